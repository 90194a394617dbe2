"""fit: a ready training loop on Hugging Face Accelerate, which a kill in the middle does not harm.

    accelerate launch script.py        torchrun --nproc-per-node 2 script.py

run it on several devices; nothing here is distributed by itself.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .distill import Distiller
from .loop import History, Run
from .prune import Pruner
from .resume import Checkpoints
from .timing import forward

# What changes while a scheduler, a pruner or a distiller is in use: no part of a configuration.
_MOVING = {
    *("last_epoch", "_step_count", "_last_lr", "_is_initial"),
    *("_step", "_due", "_share", "_accumulated", "parts"),
}


def fit(
    model: nn.Module,
    loader: DataLoader[Any],
    *,
    optimizer: torch.optim.Optimizer,
    epochs: int | None = None,
    steps: int | None = None,
    scheduler: Any = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
    distiller: Distiller | None = None,
    pruner: Pruner | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    accumulate: int = 1,
    clip: float | None = None,
    mixed_precision: str = "no",
    checkpoint: str | os.PathLike[str] | None = None,
    every: int | None = None,
    resume: bool = True,
    seed: int = 0,
    progress: bool = True,
) -> History:
    """Trains the model in place, and leaves it in eval mode, on accelerate's device.

    A step is one of the optimizer, on `accumulate` batches; then the scheduler and the pruner take
    one too. Python's, numpy's and torch's random numbers are seeded before each batch by `seed`
    and the batch's position, so that a run that was killed and started again ends with the bits
    of one that was not; what a loader's worker processes draw is the exception.

    Args:
        model: dense or trainable.
        loader: batches (inputs, labels), labels may be None; inputs are a tensor, a tuple of the
            model's arguments or a dict of its keywords.
        optimizer: of the model's parameters.
        epochs, steps: how long; give one of the two.
        scheduler: of the learning rate, stepped after each step.
        loss: (output, labels) -> scalar; default the cross-entropy.
        distiller: takes the place of `loss`; its student is `model`.
        pruner: of this model.
        evaluate: model -> score, in eval mode, after every `every` steps and at the end.
        accumulate: batches in a step.
        clip: largest norm of the gradient.
        mixed_precision: "no", "bf16" or "fp16", as accelerate knows it.
        checkpoint: folder that keeps the newest checkpoint; None keeps none.
        every: steps between checkpoints; default an epoch.
        resume: go on from the checkpoint, if there is one; False removes it and starts over.
        seed: of everything random but the weights that the model came with.
        progress: show a bar on stderr.

    Raises:
        ImportError: accelerate is not installed.
        TypeError: the loader is no DataLoader.
        ValueError: an argument out of its range, an empty loader, or a checkpoint of another
            configuration (the difference is named).
        FloatingPointError: the loss or a weight is NaN or infinite; the last checkpoint stays.
        OSError: a checkpoint cannot be written; the one before it stays.

    Example:
        >>> import torch, gossamer as gs
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
        >>> model = torch.nn.Linear(4, 2)
        >>> loader = DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=16)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        >>> history = gs.fit(model, loader, epochs=5, optimizer=optimizer, progress=False)
        >>> len(history.losses), history.losses[-1] < history.losses[0]
        (20, True)
    """
    counts = {"epochs": epochs, "steps": steps, "accumulate": accumulate, "every": every}
    _check(model, loader, counts, clip, loss, distiller)
    loss = loss or F.cross_entropy
    with _accelerator(accumulate, mixed_precision, seed) as accelerator:
        _check_pruner(accelerator, pruner)
        # Described first: to prepare them changes what they say of themselves.
        configuration = _configuration(model, optimizer, scheduler, distiller or loss, pruner)
        wrapped, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        per_epoch = math.ceil(len(loader) / accumulate)
        total = steps or per_epoch * (epochs or 0)
        configuration |= {
            **{"steps": total, "per_epoch": per_epoch, "accumulate": accumulate, "clip": clip},
            **{"mixed_precision": mixed_precision, "seed": seed},
            "processes": accelerator.num_processes,
        }
        with _student(distiller, wrapped, accelerator.device):
            run = Run(
                accelerator,
                model,
                wrapped,
                loader,
                optimizer,
                scheduler,
                pruner,
                distiller or _supervised(wrapped, loss),
                evaluate,
                clip=clip,
                seed=seed,
                total=total,
                every=every or per_epoch,
                checkpoints=None if checkpoint is None else Checkpoints(checkpoint),
                configuration=configuration,
            )
            history = run.go(resume, progress)
        # Mixed precision has wrapped the model's forward, as an attribute of the instance.
        for name in ("forward", "_original_forward"):
            vars(model).pop(name, None)
        return history


def _supervised(
    model: nn.Module, loss: Callable[[Any, Any], Tensor]
) -> Callable[[Any, Any], Tensor]:
    return lambda inputs, labels: loss(forward(model, inputs), labels)


@contextmanager
def _student(distiller: Distiller | None, wrapped: nn.Module, device: Any) -> Iterator[None]:
    """Within: the distiller trains what accelerate made of its student."""
    if distiller is None:
        yield
        return
    bare = distiller.student
    distiller.student = wrapped
    distiller.to(device)
    try:
        yield
    finally:
        distiller.student = bare


@contextmanager
def _accelerator(accumulate: int, mixed_precision: str, seed: int) -> Iterator[Any]:
    """An Accelerator, whose state, which is one a process, is gone afterwards."""
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState, GradientState
        from accelerate.utils import DataLoaderConfiguration
    except ImportError as error:
        raise ImportError(
            "gs.fit trains on Hugging Face Accelerate, which is missing: "
            'pip install "gossamer[train]", or pip install accelerate'
        ) from error
    if AcceleratorState._shared_state:
        raise ValueError(
            "there is an Accelerator in this process: fit makes its own, call it first"
        )
    order = DataLoaderConfiguration(use_seedable_sampler=True, data_seed=seed)
    try:
        yield Accelerator(
            gradient_accumulation_steps=accumulate,
            mixed_precision=mixed_precision,
            dataloader_config=order,
        )
    finally:
        AcceleratorState._reset_state()
        GradientState._reset_state()


def _name(x: Any) -> str:
    return getattr(x, "__qualname__", type(x).__qualname__)


def _configuration(
    model: nn.Module, optimizer: Any, scheduler: Any, loss: Any, pruner: Any
) -> dict[str, Any]:
    parts = {"scheduler": scheduler, "loss": loss, "pruner": pruner}
    return {
        "model": f"{type(model).__name__} of {sum(p.numel() for p in model.parameters())}",
        "optimizer": _described(optimizer, optimizer.defaults),
        **{name: part and _described(part, vars(part)) for name, part in parts.items()},
    }


def _described(x: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """The class and the plain settings of an object, by which a configuration is told apart."""
    told = {key: _plain(value) for key, value in settings.items() if key not in _MOVING}
    return {"class": _name(x), **{k: v for k, v in told.items() if v is not _UNTOLD}}


_UNTOLD = object()


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if is_dataclass(value) and not isinstance(value, type):
        return repr(value)
    if isinstance(value, (tuple, list)):
        told = [_plain(item) for item in value]
        return _UNTOLD if _UNTOLD in told else told
    if isinstance(value, dict) and value:
        items = {str(key): _plain(item) for key, item in value.items()}
        return _UNTOLD if _UNTOLD in items.values() else items
    return _UNTOLD


def _check_pruner(accelerator: Any, pruner: Pruner | None) -> None:
    from accelerate.utils import DistributedType

    if pruner is not None and accelerator.distributed_type == DistributedType.FSDP:
        raise ValueError(
            "FSDP keeps a part of each weight on each device, and a pruner ranks whole weights: "
            "use DDP, or prune first"
        )


def _check(
    model: nn.Module,
    loader: Any,
    counts: dict[str, int | None],
    clip: float | None,
    loss: object,
    distiller: Distiller | None,
) -> None:
    if not isinstance(loader, DataLoader):
        raise TypeError(
            f"the loader is a {type(loader).__name__}: give a torch.utils.data.DataLoader, "
            "which accelerate can divide among processes and go on with in the middle"
        )
    if not len(loader):
        raise ValueError("the loader is empty: it has no batch to train on")
    if (counts["epochs"] is None) == (counts["steps"] is None):
        raise ValueError(f"epochs={counts['epochs']} and steps={counts['steps']}: give one of them")
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{name}={count} must be at least 1")
    if clip is not None and not 0 < clip < math.inf:
        raise ValueError(f"clip={clip} must be positive and finite: it is the norm of a gradient")
    if distiller is not None and loss is not None:
        raise ValueError("give a loss or a distiller: the distiller has a hard loss of its own")
    if distiller is not None and distiller.student is not model:
        raise ValueError("the distiller's student is another model than the one to train")
