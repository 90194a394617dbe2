"""Distillation: a student learns from a teacher's logits and features, and neither is changed."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .patterns import select

if TYPE_CHECKING:
    from .formats import Format
    from .report import Report


@dataclass
class Run:
    """What one forward pass left behind, as a loss sees it.

    Attributes:
        who: `"student"` or `"teacher"`, for error messages.
        output: what the model returned.
        features: name of a layer -> its output; None for a layer that did not run.
    """

    who: str
    output: Any
    features: dict[str, Tensor | None]

    @property
    def logits(self) -> Tensor:
        """The output, or its `.logits` or `["logits"]`: (..., classes).

        Raises:
            TypeError: the output has no logits.
        """
        output = self.output
        if isinstance(output, Mapping):
            output = output.get("logits")
        elif not isinstance(output, Tensor):
            output = getattr(output, "logits", None)
        if not isinstance(output, Tensor):
            raise TypeError(
                f"the {self.who} returned a {type(self.output).__name__} without logits: "
                "it must return a tensor, an object with .logits or a dict with 'logits'"
            )
        return output

    def feature(self, name: str) -> Tensor:
        """The output of layer `name`; of its last run, if it ran several times.

        Raises:
            ValueError: the layer did not run.
        """
        feature = self.features[name]
        if feature is None:
            raise ValueError(
                f"layer {name!r} of the {self.who} did not run in this forward pass: "
                "match the layer that calls it instead"
            )
        return feature


def _require_factor(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise ValueError(f"{name}={value} must be finite and not negative")


@dataclass(frozen=True)
class Loss:
    """A term of the distillation loss; a subclass says what it compares in `__call__`.

    Args:
        weight: factor in the sum of the losses, >= 0.

    Raises:
        ValueError: the weight is negative or not finite.

    Example: match the logits themselves (Ba & Caruana 2014).
        >>> import torch, gossamer as gs
        >>> from gossamer.distill import Loss, Run
        >>> class Logits(Loss):
        ...     def __call__(self, student: Run, teacher: Run) -> torch.Tensor:
        ...         return (student.logits - teacher.logits).square().mean()
        >>> teacher, student = torch.nn.Linear(4, 2), torch.nn.Linear(4, 2)
        >>> loss = gs.Distiller(student, teacher, losses=[Logits(weight=0.5)])(torch.ones(1, 4))
        >>> loss.requires_grad
        True
    """

    weight: float = field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        _require_factor("weight", self.weight)

    def layers(self, names: Sequence[str]) -> dict[str, str]:
        """The layers whose features the loss compares, student's name -> teacher's name.

        Args:
            names: the student's layers, in its order.
        """
        return {}

    def __call__(self, student: Run, teacher: Run) -> Tensor:
        """The loss, a scalar, before `weight`."""
        raise NotImplementedError


@dataclass(frozen=True)
class KD(Loss):
    """T^2 * KL(softmax(teacher / T) || softmax(student / T)), the mean over rows.

    T^2 keeps the gradient's size independent of the temperature. Every leading dimension of the
    logits counts as rows; the classes are the last.

    Source: Hinton, Vinyals & Dean 2015, arXiv 1503.02531.

    Args:
        temperature: T > 0; more than 1 shows the student how the teacher ranks the wrong classes.

    Raises:
        ValueError: T is not positive and finite; in a call, the shapes of the logits differ.

    Example:
        >>> import torch, gossamer as gs
        >>> from gossamer.distill import Run
        >>> student = Run("student", torch.tensor([[0.0, 0.0]]), {})
        >>> teacher = Run("teacher", torch.tensor([[2.0, 0.0]]), {})
        >>> round(gs.KD(temperature=2.0)(student, teacher).item(), 4)
        0.4438
    """

    temperature: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature} must be positive and finite, as 2.0")

    def __call__(self, student: Run, teacher: Run) -> Tensor:
        ours, theirs = student.logits, teacher.logits
        if ours.shape != theirs.shape:
            raise ValueError(
                f"the student's logits are {tuple(ours.shape)}, the teacher's "
                f"{tuple(theirs.shape)}: both need the same classes in the same order"
            )
        log_student = F.log_softmax(_rows(ours) / self.temperature, dim=-1)
        teacher_share = F.softmax(_rows(theirs) / self.temperature, dim=-1)
        divergence = F.kl_div(log_student, teacher_share, reduction="batchmean")
        return self.temperature**2 * divergence


@dataclass(frozen=True)
class SquareHead(Loss):
    """MSE(student, teacher) / (MSE(0, teacher) + eps) of each matched layer, the mean over layers.

    The division makes layers of any scale count alike. Matching features keeps training stable at
    high sparsity, where the logits alone say too little.

    Source: Kurtic et al. 2023, arXiv 2310.06927.

    Args:
        match: a pattern of names (`gossamer.patterns`) that stand for the same layers in both
            models, where of nested matches only the outermost counts, so that `"layers.*"` is each
            layer and not its parts; or a dict, student's name -> teacher's name. A layer returns a
            tensor, or a tuple that starts with one.
        eps: keeps a layer finite whose teacher is all zeros.

    Raises:
        ValueError: the pattern matches nothing or a name is missing, when the Distiller is made; in
            a call, a layer did not run or its features differ in shape.

    Example:
        >>> import copy, torch, gossamer as gs
        >>> teacher = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
        >>> distiller = gs.Distiller(copy.deepcopy(teacher), teacher, losses=[gs.SquareHead("0")])
        >>> distiller(torch.ones(3, 4)).item()
        0.0
    """

    match: str | Mapping[str, str]
    eps: float = 1e-8

    def layers(self, names: Sequence[str]) -> dict[str, str]:
        if isinstance(self.match, Mapping):
            if missing := [name for name in self.match if name not in names]:
                raise ValueError(f"the student has no layer {missing[0]!r}")
            return dict(self.match)
        found = select(names, self.match)
        return {name: name for name in found if not any(name.startswith(f"{x}.") for x in found)}

    def __call__(self, student: Run, teacher: Run) -> Tensor:
        ratios = []
        for ours, theirs in self.layers(list(student.features)).items():
            mine, target = _wide(student.feature(ours)), _wide(teacher.feature(theirs))
            if mine.shape != target.shape:
                raise ValueError(
                    f"layer {ours!r}: the student's features are {tuple(mine.shape)}, the "
                    f"teacher's ({theirs!r}) {tuple(target.shape)}: match layers of equal shape"
                )
            ratios.append(F.mse_loss(mine, target) / (target.square().mean() + self.eps))
        return torch.stack(ratios).mean()


class Distiller:
    """sum_i weight_i * loss_i(student, teacher) + hard * cross_entropy(student, labels).

    A plain object: the student's class, state_dict, mode and optimizer are left alone, and the
    hooks that read features live inside a call only. The teacher runs first, in eval mode and
    without gradients.

    Args:
        student: the model in training; may be wrapped in DistributedDataParallel.
        teacher: another model with the same inputs. Switched to eval mode, otherwise unchanged.
        losses: at least one of KD, SquareHead or your own `gossamer.distill.Loss`.
        hard: weight of the cross-entropy to the labels, >= 0; used when a call has labels.
        teacher_format: run a copy of the teacher packed by `gossamer.compress_` in this format (or
            these formats by pattern); the given teacher stays as it is.

    Attributes:
        parts: the terms of the last loss, after weighting and detached: class name (and `"hard"`)
            -> scalar tensor. They sum to the loss.
        teacher_report: what compress_ did to the copy of the teacher; None without a format.

    Raises:
        ValueError: no losses, a negative weight, a pattern that matches no layer, a layer that the
            teacher does not have, or a student that is its own teacher.

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
        teacher: nn.Module,
        losses: Sequence[Loss] = (KD(),),
        hard: float = 0.0,
        teacher_format: Format | Mapping[str, Format | None] | None = None,
    ) -> None:
        if not losses:
            raise ValueError("losses is empty: give at least one, such as KD()")
        if student is teacher:
            raise ValueError("the student is its own teacher: give copy.deepcopy(teacher) as one")
        _require_factor("hard", hard)
        self.teacher_report: Report | None = None
        if teacher_format is not None:
            from .compress import compress_

            teacher = copy.deepcopy(teacher)
            self.teacher_report = compress_(teacher, teacher_format)
        self.student, self.teacher = student, teacher.eval()
        self.losses, self.hard = tuple(losses), hard
        self.parts: dict[str, Tensor] = {}
        student_layers, teacher_layers = _layers(student), _layers(teacher)
        self._student_read: dict[str, nn.Module] = {}
        self._teacher_read: dict[str, nn.Module] = {}
        for loss in self.losses:
            for ours, theirs in loss.layers(list(student_layers)).items():
                if theirs not in teacher_layers:
                    raise ValueError(
                        f"the teacher has no layer {theirs!r} for the student's {ours!r}: "
                        "name the pairs in a dict, student's name -> teacher's name"
                    )
                self._student_read[ours] = student_layers[ours]
                self._teacher_read[theirs] = teacher_layers[theirs]

    def __call__(self, inputs: Any, labels: Tensor | None = None) -> Tensor:
        """The loss of one batch: a scalar with gradients to the student only.

        Args:
            inputs: for both models: a tensor, a tuple or list (`model(*inputs)`) or a dict
                (`model(**inputs)`).
            labels: class indices, shaped as the logits without the classes (-100 is ignored), or
                class probabilities, shaped as the logits.

        Raises:
            TypeError: a model's output has no logits and a loss needs them.
            ValueError: logits or features of the two models differ in shape.
        """
        self.teacher.eval()
        with torch.no_grad():
            teacher = _run("teacher", self.teacher, self._teacher_read, inputs)
        student = _run("student", self.student, self._student_read, inputs)

        terms: dict[str, Tensor] = {}
        seen: Counter[str] = Counter()
        for loss in self.losses:
            name = type(loss).__name__
            seen[name] += 1
            key = name if seen[name] == 1 else f"{name} {seen[name]}"
            terms[key] = loss.weight * loss(student, teacher)
        if self.hard and labels is not None:
            terms["hard"] = self.hard * _cross_entropy(student.logits, labels)
        self.parts = {name: term.detach() for name, term in terms.items()}
        return torch.stack(list(terms.values())).sum()


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
        # A copy: an in-place ReLU or residual sum that follows would change what was read.
        features[name] = feature.clone()

    return read


def _wide(x: Tensor) -> Tensor:
    """x in fp32 or wider: squares and logarithms of bf16 are too coarse for a loss."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _rows(logits: Tensor) -> Tensor:
    return _wide(logits).reshape(-1, logits.shape[-1])


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    if labels.shape == logits.shape:
        return F.cross_entropy(_rows(logits), _rows(labels))
    if labels.shape == logits.shape[:-1]:
        return F.cross_entropy(_rows(logits), labels.reshape(-1))
    raise ValueError(
        f"labels are {tuple(labels.shape)}, the logits {tuple(logits.shape)}: "
        f"give class indices {tuple(logits.shape[:-1])} or probabilities {tuple(logits.shape)}"
    )
