"""Distilling and pruning inside Hugging Face's Trainer and Lightning, which are not required."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .distill import Distiller

_STATE = "gossamer.pt"  # in each of the Trainer's checkpoint folders


class Stepped(Protocol):
    """What is called after each step of the optimizer, such as a `gossamer.Pruner`."""

    def step(self) -> None:
        """After optimizer.step()."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state_dict."""


def _imported(module: str, packages: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(f"{module} is missing: pip install {packages}") from error


def _state(distiller: Distiller, pruner: Stepped | None) -> dict[str, Any]:
    return {
        "distiller": distiller.state_dict(),
        "pruner": pruner.state_dict() if pruner is not None else None,
    }


def _load(distiller: Distiller, pruner: Stepped | None, state: Mapping[str, Any]) -> None:
    if (pruner is None) != (state["pruner"] is None):
        there, here = ("no pruner", "one") if pruner is not None else ("a pruner", "none")
        raise ValueError(f"the checkpoint is of a run with {there}, this has {here}")
    distiller.load_state_dict(state["distiller"])
    if pruner is not None:
        pruner.load_state_dict(state["pruner"])


def trainer(distiller: Distiller, pruner: Stepped | None = None, **options: Any) -> Any:
    """A transformers.Trainer of the distiller's student, whose loss is the distiller's.

    The optimizer gets `distiller.parameters()` too, `pruner.step()` follows each of its steps, and
    the state of both is in every checkpoint, from which `train(resume_from_checkpoint=...)` goes
    on. What is saved as the model is the student alone. `labels` go to `hard` and to neither model;
    those of tokens are compared in place, so shift them in the collator for a causal model.

    Args:
        distiller: its teachers are moved to the Trainer's device.
        pruner: of the same student.
        options: for transformers.Trainer, such as args, train_dataset and data_collator.

    Raises:
        ImportError: transformers or accelerate is not installed.
        ValueError: the checkpoint to resume from is of a run without this state.

    Example: (`batches` holds dicts, as the models take them)
        trainer = gs.integrations.trainer(distiller, pruner, args=arguments, train_dataset=batches)
        trainer.train()
        trainer.save_model("student")
    """
    transformers = _imported("transformers", "transformers accelerate")
    _imported("accelerate", "transformers accelerate")

    class Callback(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        def on_optimizer_step(self, *args: Any, **more: Any) -> None:
            if pruner is not None:
                pruner.step()
            # The Trainer zeroes the model's gradients only.
            for parameter in distiller.parameters():
                parameter.grad = None

        def on_save(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            if state.is_world_process_zero:
                folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
                torch.save(_state(distiller, pruner), folder / _STATE)

    class DistillingTrainer(transformers.Trainer):  # type: ignore[misc, name-defined]
        def create_optimizer(self, *args: Any, **more: Any) -> Any:
            ours, learned = self.optimizer is None, list(distiller.parameters())
            optimizer = super().create_optimizer(*args, **more)
            if ours and learned:
                optimizer.add_param_group({"params": learned})
            return optimizer

        def compute_loss(
            self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **_: Any
        ) -> Any:
            distiller.student = model  # perhaps wrapped by now
            fed = {name: value for name, value in inputs.items() if name != "labels"}
            loss, outputs = distiller.run(fed, inputs.get("labels"))
            return (loss, outputs) if return_outputs else loss

        def train(self, resume_from_checkpoint: Any = None, *args: Any, **more: Any) -> Any:
            folder = resume_from_checkpoint
            if folder is True:
                folder = transformers.trainer_utils.get_last_checkpoint(self.args.output_dir)
            if folder:
                _load(distiller, pruner, _read(folder))
            return super().train(resume_from_checkpoint, *args, **more)

    built = DistillingTrainer(model=distiller.student, callbacks=[Callback()], **options)
    # Our loss is a mean over the batch: the Trainer is to divide it by the batches of a step.
    built.model_accepts_loss_kwargs = False
    distiller.to(built.args.device)
    return built


def _read(folder: str | os.PathLike[str]) -> dict[str, Any]:
    path = Path(folder, _STATE)
    if not path.is_file():
        raise ValueError(f"{path} is missing: the checkpoint is not of gossamer's trainer")
    state: dict[str, Any] = torch.load(path, weights_only=True)
    return state


def module(
    distiller: Distiller,
    optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer],
    pruner: Stepped | None = None,
) -> Any:
    """A LightningModule of the distiller's student, whose loss is the distiller's.

    Its parameters and checkpoints are the student's, under `student.`, with the state of distiller
    and pruner beside them; teachers are not stored. A batch is `(inputs, labels)`, or a dict whose
    `labels`, if there are any, go to `hard` and to neither model. The loss is logged as `loss`, its
    parts under their names; in validation as `val_loss`.

    Args:
        distiller: its teachers are moved to the module's device.
        optimizer: makes the optimizer of the parameters it is given: the student's and
            `distiller.parameters()`.
        pruner: of the same student; its step follows each of the optimizer's.

    Raises:
        ImportError: lightning is not installed.

    Example:
        module = gs.integrations.module(distiller, lambda p: torch.optim.AdamW(p, lr=1e-4), pruner)
        lightning.Trainer(max_epochs=3).fit(module, loader)
    """
    lightning = _imported("lightning", "lightning")

    class DistillingModule(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.student = distiller.student

        def forward(self, *args: Any, **more: Any) -> Any:
            return self.student(*args, **more)

        def on_fit_start(self) -> None:
            distiller.to(self.device)

        def training_step(self, batch: Any, index: int) -> Tensor:
            loss = distiller(*_split(batch))
            self.log_dict({"loss": loss.detach(), **distiller.parts}, prog_bar=True)
            return loss

        def validation_step(self, batch: Any, index: int) -> None:
            self.log("val_loss", distiller(*_split(batch)), prog_bar=True)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return optimizer([*self.student.parameters(), *distiller.parameters()])

        def optimizer_step(self, *args: Any, **more: Any) -> None:
            super().optimizer_step(*args, **more)
            if pruner is not None:
                pruner.step()

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["gossamer"] = _state(distiller, pruner)

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            _load(distiller, pruner, checkpoint["gossamer"])

    return DistillingModule()


def _split(batch: Any) -> tuple[Any, Any]:
    """The inputs and the labels of a batch."""
    if isinstance(batch, Mapping):
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        return inputs, batch.get("labels")
    inputs, labels = batch
    return inputs, labels
