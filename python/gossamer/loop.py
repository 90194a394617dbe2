"""The training loop of `fit`: steps, evaluations and checkpoints, and what is told of them."""

from __future__ import annotations

import json
import math
import time
import zlib
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from .prune import Pruner
from .report import render
from .resume import Checkpoints, require_same
from .timing import eval_mode

_STATE = "fit.json"


@dataclass
class History:
    """What a run did; `str()` is a table with a row for each evaluation.

    Args:
        losses: the mean loss of each optimizer step, over its batches and all processes.
        evaluations: (steps taken, evaluate(model)).
        seconds: of all parts of the run, a killed one up to its last checkpoint.
        resumed: steps that were already taken when this process began.

    Example:
        >>> print(History([0.5, 0.3, 0.2], [(2, 0.8), (3, 0.9)], seconds=1.5))
        | step |  loss | score |
        |------|-------|-------|
        |    2 | 0.400 |   0.8 |
        |    3 | 0.200 |   0.9 |
        3 steps, 1.5 s
    """

    losses: list[float] = field(default_factory=list)
    evaluations: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0
    resumed: int = 0

    def to_json(self) -> dict[str, Any]:
        """The fields, as a JSON-able dict."""
        return asdict(self)

    def __str__(self) -> str:
        rows, last = [], 0
        marks: list[tuple[int, float | None]] = [*self.evaluations]
        for step, score in marks or [(len(self.losses), None)]:
            recent = self.losses[last:step]
            loss = f"{sum(recent) / len(recent):.3f}" if recent else ""
            rows.append([str(step), loss, "" if score is None else f"{score:.4g}"])
            last = step
        resumed = f", resumed at step {self.resumed}" if self.resumed else ""
        table = render([">step", ">loss", ">score"], rows)
        return f"{table}\n{len(self.losses)} steps, {self.seconds:.1f} s{resumed}"


@dataclass
class Run:
    """The loop: its parts as accelerate prepared them, and where it stands."""

    accelerator: Any
    model: nn.Module
    wrapped: nn.Module
    loader: Any
    optimizer: Any
    scheduler: Any
    pruner: Pruner | None
    loss: Callable[[Any, Any], Tensor]
    evaluate: Callable[[nn.Module], float] | None
    clip: float | None
    seed: int
    total: int
    every: int
    checkpoints: Checkpoints | None
    configuration: dict[str, Any]
    history: History = field(default_factory=History)
    epoch: int = 0
    batch: int = 0  # batches of this epoch that are done

    def go(self, resume: bool, progress: bool) -> History:
        """Trains from the last checkpoint, or from the beginning, to the end."""
        for part in (self.scheduler, self.pruner, self.loss):
            if hasattr(part, "state_dict"):  # a distiller may learn too
                self.accelerator.register_for_checkpointing(part)
        if self.checkpoints and resume:
            self._load(self.checkpoints)
        elif self.checkpoints and self.accelerator.is_main_process:
            self.checkpoints.clear()
        losses, before = self.history.losses, self.history.seconds
        start = time.perf_counter()
        self.history.resumed = len(losses)
        with _bar(progress and self.accelerator.is_main_process, self.total) as show:
            while len(losses) < self.total:
                self.wrapped.train()
                with closing(self._batches()) as batches:
                    for _ in self._steps(batches):
                        self.history.seconds = before + time.perf_counter() - start
                        show(len(losses), losses[-1])
                        self._keep()
                        if len(losses) == self.total:
                            break
        self.model.eval()
        return self.history

    def _batches(self) -> Generator[Any, None, None]:
        """What is left of this epoch, each batch with random numbers of its own."""
        from accelerate import skip_first_batches
        from accelerate.utils import set_seed

        self.loader.set_epoch(self.epoch)
        # Accelerate loads one batch ahead: the next one is made with this one's random numbers.
        # Two batches are loaded again, so that the third is made with the numbers that it had.
        first = max(0, self.batch - 2)
        loader = skip_first_batches(self.loader, first) if first else self.loader
        rank, index = self.accelerator.process_index, first
        batches = iter(loader)
        try:
            while True:
                # The first sets the order of the epoch: the same, wherever in it this begins.
                number = 0 if index == first else index
                set_seed(zlib.crc32(f"{self.seed} {self.epoch} {number} {rank}".encode()))
                try:
                    batch = next(batches)
                except StopIteration:
                    break
                index += 1
                if index > self.batch:
                    self.batch = index
                    yield batch
        finally:
            loader.end()  # accelerate's own mark, which a loop that is left early does not remove
        self.epoch, self.batch = self.epoch + 1, 0

    def _steps(self, batches: Iterator[Any]) -> Iterator[None]:
        """Trains on the batches; yields after each step, its loss being in the history."""
        window: list[Tensor] = []
        for batch in batches:
            inputs, labels = _pair(batch)
            with self.accelerator.accumulate(self.wrapped):
                loss = self.loss(inputs, labels)
                self.accelerator.backward(loss)
                window.append(loss.detach())
                if not self.accelerator.sync_gradients:
                    continue
                mean = self.accelerator.reduce(torch.stack(window).mean(), "mean").item()
                window.clear()
                if not math.isfinite(mean):
                    self._stop(f"the loss is {mean}")
                if self.clip is not None:
                    self.accelerator.clip_grad_norm_(self.wrapped.parameters(), self.clip)
                self.optimizer.step()
            if self.scheduler is not None and not self.accelerator.optimizer_step_was_skipped:
                self.scheduler.step()
            if self.pruner is not None:
                self.pruner.step()  # it may rank by the gradients
            self.optimizer.zero_grad()
            self.history.losses.append(mean)
            yield

    def _keep(self) -> None:
        """Evaluates, and writes a checkpoint, where one is due."""
        step = len(self.history.losses)
        if step % self.every and step != self.total:
            return
        if self.evaluate is not None:
            with eval_mode(self.model):
                self.history.evaluations.append((step, float(self.evaluate(self.model))))
        if self.checkpoints is None:
            return
        for name, parameter in self.model.named_parameters():
            if not parameter.isfinite().all():
                self._stop(f"{name} is not finite after the step")
        self._save(self.checkpoints, step)

    def _save(self, checkpoints: Checkpoints, step: int) -> None:
        main = self.accelerator.is_main_process
        state = {
            "configuration": self.configuration,
            "epoch": self.epoch,
            "batch": self.batch,
            "history": self.history.to_json(),
        }
        try:
            path = checkpoints.prepare(step) if main else checkpoints.temporary(step)
            self.accelerator.wait_for_everyone()
            self.accelerator.save_state(str(path))
            self.accelerator.wait_for_everyone()
            if main:
                (path / _STATE).write_text(json.dumps(state), encoding="utf-8")
                checkpoints.publish(step)
        # A full disk is an OSError here, a RuntimeError in torch and an error of safetensors' own.
        except Exception as error:
            checkpoints.discard(step)
            raise OSError(
                f"the checkpoint of step {step} could not be written to {checkpoints.folder} "
                f"({error}): {_kept(checkpoints)}; make room and run again"
            ) from error

    def _load(self, checkpoints: Checkpoints) -> None:
        path = checkpoints.newest()
        if path is None:
            return
        state = json.loads((path / _STATE).read_text(encoding="utf-8"))
        require_same(state["configuration"], self.configuration, f"checkpoint {path}")
        self.accelerator.load_state(str(path))
        self.epoch, self.batch = state["epoch"], state["batch"]
        history = state["history"]
        self.history.losses, self.history.seconds = history["losses"], history["seconds"]
        self.history.evaluations = [(step, score) for step, score in history["evaluations"]]

    def _stop(self, what: str) -> NoReturn:
        kept = _kept(self.checkpoints) if self.checkpoints else "no checkpoint was kept"
        raise FloatingPointError(
            f"{what} at step {len(self.history.losses) + 1}, epoch {self.epoch + 1}, "
            f"batch {self.batch}: {kept}; try a lower learning rate or a smaller clip"
        )


def _kept(checkpoints: Checkpoints) -> str:
    path = checkpoints.newest()
    return f"{path} is the last good one" if path else "there is no earlier one"


def _pair(batch: Any) -> tuple[Any, Any]:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        what = f"{len(batch)} parts" if isinstance(batch, (tuple, list)) else type(batch).__name__
        raise ValueError(
            f"a batch of the loader is {what}: it must be a pair (inputs, labels), labels may be "
            "None, inputs a tensor, a tuple of the model's arguments or a dict of its keywords"
        )
    return batch[0], batch[1]


@contextmanager
def _bar(shown: bool, total: int) -> Iterator[Callable[[int, float], None]]:
    """A bar on stderr; yields what to call with (steps done, loss)."""
    if not shown:
        yield lambda step, loss: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as progress:
        bar = progress.add_task("", total=total)
        yield lambda step, loss: progress.update(
            bar, completed=step, description=f"loss {loss:.4g}"
        )
