"""Distillation: a student learns from its teachers' outputs and features, and none is changed."""

from __future__ import annotations

import copy
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .hints import SquareHead as SquareHead
from .losses import KD as KD
from .losses import Loss as Loss
from .losses import Run as Run
from .losses import require_factor
from .teacher_cache import TeacherCache

if TYPE_CHECKING:
    from .formats import Format
    from .report import Report


class Distiller:
    """sum_i weight_i * loss_i(student, teachers) + hard * cross_entropy(student, labels).

    A plain object: the student's class, state_dict, mode and optimizer are left alone, and the
    hooks that read features live inside a call only. The teachers run first, in eval mode and
    without gradients.

    On several processes (the student in DistributedDataParallel) each computes the loss of its own
    part of the batch, and gradients are averaged, those of `parameters()` too: the step is that of
    one process which accumulates the parts, and so is the loss. KD, Cosine and cross-entropy are
    means over rows, for which that equals the loss of the whole batch if the parts have equally
    many rows.

    Args:
        student: the model in training; may be wrapped in DistributedDataParallel.
        teacher: another model with the same inputs, or several in a list. Switched to eval mode,
            otherwise unchanged.
        losses: at least one of KD, DIST, Cosine, SquareHead, Hint, Relation or your own
            `gossamer.losses.Loss`.
        hard: weight of the cross-entropy to the labels, >= 0; used when a call has labels.
        teacher_format: run a copy of each teacher packed by `gossamer.compress_` in this format (or
            these formats by pattern); the given teachers stay as they are.
        teacher_weights: what each of several teachers counts, >= 0; only the proportions matter.
            Default: all the same. KD and DIST average probabilities, other losses the losses.
        cache: a folder, made if it is missing, that keeps the teachers' outputs on disk, so that
            from the second epoch over fixed data on they need not run: see `TeacherCache`. Its
            losses may read outputs only, not features.

    Attributes:
        student: what a call runs; a wrapper of the same student may take its place.
        teachers: what a call runs, packed if there is a format.
        teacher_reports: what compress_ did to each copy; empty without a format.
        parts: the terms of the last loss, after weighting and detached: class name (and `"hard"`)
            -> scalar tensor. They sum to the loss.
        cache: the `TeacherCache`, which counts its hits and misses; None without one.

    Raises:
        ValueError: no losses or teachers, a weight out of its range, a pattern that matches no
            layer, a layer that a teacher does not have, a student that is its own teacher, or a
            cache with losses that read features.

    Example:
        >>> import torch, gossamer as gs
        >>> teacher, student = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
        >>> distiller = gs.Distiller(student, teacher, losses=[gs.KD(2.0)], hard=0.5)
        >>> loss = distiller(torch.randn(8, 4), torch.randint(3, (8,)))
        >>> loss.backward(); list(distiller.parts)
        ['KD', 'hard']
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | Sequence[nn.Module],
        losses: Sequence[Loss] = (KD(),),
        hard: float = 0.0,
        teacher_format: Format | Mapping[str, Format | None] | None = None,
        *,
        teacher_weights: Sequence[float] | None = None,
        cache: str | os.PathLike[str] | None = None,
    ) -> None:
        teachers = [teacher] if isinstance(teacher, nn.Module) else list(teacher)
        if not losses:
            raise ValueError("losses is empty: give at least one, such as KD()")
        if any(student is other for other in teachers):
            raise ValueError("the student is its own teacher: give copy.deepcopy(teacher) as one")
        require_factor("hard", hard)
        self._shares = _shares(teacher_weights, len(teachers))
        self.teacher_reports: tuple[Report, ...] = ()
        if teacher_format is not None:
            from .compress import compress_

            teachers = [copy.deepcopy(other) for other in teachers]
            self.teacher_reports = tuple(compress_(other, teacher_format) for other in teachers)
        self.student, self.teachers = student, tuple(other.eval() for other in teachers)
        self.losses, self.hard = tuple(losses), hard
        self.parts: dict[str, Tensor] = {}
        self._student_read: dict[str, nn.Module] = {}
        self._teachers_read: list[dict[str, nn.Module]] = [{} for _ in teachers]
        self._match_layers()
        self.cache = None if cache is None else self._open(cache)
        learned = {str(i): loss.learned for i, loss in enumerate(self.losses)}
        self._learned = nn.ModuleDict({i: m for i, m in learned.items() if m is not None})
        for parameter in self.parameters():
            parameter.register_post_accumulate_grad_hook(_average_gradient)

    def _match_layers(self) -> None:
        student, teachers = _layers(self.student), [_layers(model) for model in self.teachers]
        for loss in self.losses:
            for ours, theirs in loss.layers(list(student)).items():
                self._student_read[ours] = student[ours]
                for layers, read in zip(teachers, self._teachers_read, strict=True):
                    if theirs not in layers:
                        raise ValueError(
                            f"the teacher has no layer {theirs!r} for the student's {ours!r}: "
                            "name the pairs in a dict, student's name -> teacher's name"
                        )
                    read[theirs] = layers[theirs]

    def _open(self, folder: str | os.PathLike[str]) -> TeacherCache:
        if self._student_read:
            raise ValueError(
                f"the cache holds outputs only, but the losses read the features of "
                f"{', '.join(self._student_read)}: leave out cache= or these losses"
            )
        return TeacherCache(folder, {loss.key for loss in self.losses})

    def parameters(self) -> Iterator[nn.Parameter]:
        """What the losses themselves learn, for the optimizer: the projections of Hint."""
        return self._learned.parameters()

    def state_dict(self) -> dict[str, Any]:
        """The values of `parameters()`, by the place of their loss in `losses`."""
        return self._learned.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`.

        Raises:
            RuntimeError: the state is of other losses.
        """
        self._learned.load_state_dict(state)

    def to(self, device: torch.device | str) -> Distiller:
        """Moves the teachers and `parameters()`, in place; the student is the caller's."""
        for module in (*self.teachers, self._learned):
            module.to(device)
        return self

    def __call__(
        self, inputs: Any, labels: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """The loss of one batch: a scalar with gradients to the student (and `parameters()`) only.

        Args:
            inputs: for all models: a tensor, a tuple or list (`model(*inputs)`) or a dict
                (`model(**inputs)`).
            labels: class indices, shaped as the logits without the classes (-100 is ignored), or
                class probabilities, shaped as the logits.
            mask: (batch, tokens), 1 or True for a token, 0 or False for padding, which then counts
                in no loss. Default: `inputs["attention_mask"]`, if there is one.

        Raises:
            TypeError: a model's output has not what a loss needs.
            ValueError: outputs or features of the models differ in shape, or the mask is none.
            OSError: the cache cannot be written, such as on a full disk.
        """
        return self.run(inputs, labels, mask)[0]

    def run(
        self, inputs: Any, labels: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        """The loss, as a call gives it, and what the student returned.

        Example:
            >>> import torch, gossamer as gs
            >>> distiller = gs.Distiller(torch.nn.Linear(4, 3), torch.nn.Linear(4, 3))
            >>> loss, logits = distiller.run(torch.randn(8, 4))
            >>> logits.shape
            torch.Size([8, 3])
        """
        if mask is None and isinstance(inputs, Mapping):
            mask = inputs.get("attention_mask")
        mask = _checked_mask(mask)
        teachers = [self._teach(index, inputs, mask) for index in range(len(self.teachers))]
        student = _run("student", self.student, self._student_read, inputs)
        # Where no token is padding, losses need not pick rows.
        for run in (student, *teachers):
            run.mask = None if mask is None or mask.all() else mask

        terms: dict[str, Tensor] = {}
        seen: Counter[str] = Counter()
        for loss in self.losses:
            name = type(loss).__name__
            seen[name] += 1
            key = name if seen[name] == 1 else f"{name} {seen[name]}"
            terms[key] = loss.weight * loss.ensemble(student, teachers)
        if self.hard and labels is not None:
            terms["hard"] = self.hard * _cross_entropy(student, labels)
        self.parts = {name: term.detach() for name, term in terms.items()}
        return torch.stack(list(terms.values())).sum(), student.output

    def _teach(self, index: int, inputs: Any, mask: Tensor | None) -> Run:
        teacher, layers = self.teachers[index].eval(), self._teachers_read[index]

        def forward() -> Run:
            with torch.no_grad():
                return _run("teacher", teacher, layers, inputs)

        run = forward() if self.cache is None else self.cache.recall(teacher, inputs, mask, forward)
        run.share = self._shares[index]
        return run


def _shares(weights: Sequence[float] | None, teachers: int) -> list[float]:
    """The weights of the teachers, with the sum 1."""
    if not teachers:
        raise ValueError("teacher is empty: give a model, or several in a list")
    weights = [1.0] * teachers if weights is None else list(weights)
    for weight in weights:
        require_factor("teacher_weights", weight)
    if len(weights) != teachers or not sum(weights):
        raise ValueError(
            f"teacher_weights={weights} for {teachers} teachers: give one each, not all zero"
        )
    return [weight / sum(weights) for weight in weights]


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every module that can run, by name; containers such as ModuleList have no forward."""
    bare = model.module if isinstance(model, DistributedDataParallel) else model
    return {
        name: module
        for name, module in bare.named_modules()
        if name and type(module).forward is not nn.Module.forward
    }


def _run(who: str, model: nn.Module, layers: dict[str, nn.Module], inputs: Any) -> Run:
    features: dict[str, Tensor | None] = dict.fromkeys(layers)
    with ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.enter_context(layer.register_forward_hook(_reader(who, name, features)))
        if isinstance(inputs, Mapping):
            output = model(**inputs)
        elif isinstance(inputs, (tuple, list)):
            output = model(*inputs)
        else:
            output = model(inputs)
    return Run(who, output, features)


def _reader(who: str, name: str, features: dict[str, Tensor | None]) -> Any:
    def read(module: nn.Module, args: Any, output: Any) -> None:
        feature = output[0] if isinstance(output, (tuple, list)) and output else output
        if not isinstance(feature, Tensor):
            raise TypeError(
                f"layer {name!r} of the {who} returned a {type(output).__name__}: "
                "features are read from a tensor or from a tuple that starts with one"
            )
        # A copy: an in-place ReLU or residual sum that follows would change what was read. It takes
        # 0.15 ms for 6 MB: less than 1 % of a step that reads all layers of a MiniLM.
        features[name] = feature.clone()

    return read


def _average_gradient(parameter: Tensor) -> None:
    """The mean over processes, which DistributedDataParallel takes of the student's gradients only.

    Of a sum over micro-batches too: what was averaged before is equal everywhere, and stays.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        assert parameter.grad is not None
        torch.distributed.all_reduce(parameter.grad)
        parameter.grad /= torch.distributed.get_world_size()


def _checked_mask(mask: Tensor | None) -> Tensor | None:
    """As bool."""
    if mask is None:
        return None
    # An additive mask, 0 for tokens and -inf for padding, would say the opposite.
    if mask.ndim != 2 or not ((mask == 0) | (mask == 1)).all() or not mask.any():
        raise ValueError(
            f"the mask {tuple(mask.shape)} must be (batch, tokens) with 1 for a token and 0 for "
            "padding, not all 0: give one in mask="
        )
    return mask.bool()


def _cross_entropy(student: Run, labels: Tensor) -> Tensor:
    logits = student.logits
    if labels.shape == logits.shape:
        return F.cross_entropy(student.rows(logits), student.rows(labels))
    if labels.shape == logits.shape[:-1]:
        return F.cross_entropy(student.rows(logits), _labels(student, labels))
    raise ValueError(
        f"labels are {tuple(labels.shape)}, the logits {tuple(logits.shape)}: "
        f"give class indices {tuple(logits.shape[:-1])} or probabilities {tuple(logits.shape)}"
    )


def _labels(student: Run, labels: Tensor) -> Tensor:
    tokens = student.mask is not None and student.mask.shape == labels.shape
    return labels[student.mask] if tokens else labels.reshape(-1)
