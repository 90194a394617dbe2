"""What a student and its teachers are compared by, and the losses of their outputs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Run:
    """What one forward pass left behind, as a loss sees it.

    Attributes:
        who: `"student"` or `"teacher"`, for error messages.
        output: what the model returned; from a cache, a dict of the tensors that the losses read.
        features: name of a layer -> its output; None for a layer that did not run.
        mask: (batch, tokens) bool, False where a token is padding; None if none is.
        share: what this teacher counts among several; the shares of all sum to 1.
    """

    who: str
    output: Any
    features: dict[str, Tensor | None] = field(default_factory=dict)
    mask: Tensor | None = None
    share: float = 1.0

    @property
    def logits(self) -> Tensor:
        """The output, or its `.logits` or `["logits"]`: (..., classes).

        Raises:
            TypeError: the output has no logits.
        """
        return self.tensor("logits")

    def tensor(self, key: str) -> Tensor:
        """The output if it is a tensor, else its attribute or entry `key`.

        Raises:
            TypeError: the output is neither.
        """
        output = self.output
        if isinstance(output, Mapping):
            output = output.get(key)
        elif not isinstance(output, Tensor):
            output = getattr(output, key, None)
        if not isinstance(output, Tensor):
            raise TypeError(
                f"the {self.who} returned a {type(self.output).__name__} without {key}: "
                f"it must return a tensor, an object with .{key} or a dict with {key!r}"
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

    def rows(self, x: Tensor) -> Tensor:
        """x (..., width) as (rows, width) in fp32 or wider, without the rows that are padding.

        Squares and logarithms of bf16 are too coarse for a loss.

        Raises:
            ValueError: x is empty, or the mask does not say which of its rows are padding.
        """
        if self.mask is not None:
            lead = tuple(x.shape[:-1])
            if lead == tuple(self.mask.shape):
                x = x[self.mask]
            elif lead != tuple(self.mask.shape[:1]):
                raise ValueError(
                    f"a tensor {tuple(x.shape)} of the {self.who} starts neither with (batch, "
                    f"tokens) nor is (batch, width), as the mask {tuple(self.mask.shape)} needs: "
                    "compare another layer, or give a mask of ones if there is no padding"
                )
        if not x.numel():
            raise ValueError(
                f"a tensor {tuple(x.shape)} of the {self.who} is empty: there is no mean over no "
                "rows, so leave the batch out"
            )
        return x.to(torch.promote_types(x.dtype, torch.float32)).reshape(-1, x.shape[-1])


def require_factor(name: str, value: float) -> None:
    """A weight of the loss is finite and not negative.

    Raises:
        ValueError: it is not.
    """
    if not 0 <= value < math.inf:
        raise ValueError(f"{name}={value} must be finite and not negative")


def require_same(what: str, ours: Tensor, theirs: Tensor, remedy: str) -> None:
    """Both tensors have one shape.

    Raises:
        ValueError: they have not.
    """
    if ours.shape != theirs.shape:
        raise ValueError(
            f"the student's {what} are {tuple(ours.shape)}, the teacher's "
            f"{tuple(theirs.shape)}: {remedy}"
        )


@dataclass(frozen=True)
class Loss:
    """A term of the distillation loss; a subclass says what it compares in `__call__`.

    Args:
        weight: factor in the sum of the losses, >= 0.

    Attributes:
        key: the entry of a model's output that the loss reads, if the output is not a tensor.

    Raises:
        ValueError: the weight is negative or not finite.

    Example: match the logits themselves (Ba & Caruana 2014).
        >>> import torch, gossamer as gs
        >>> from gossamer.losses import Loss, Run
        >>> class Logits(Loss):
        ...     def __call__(self, student: Run, teacher: Run) -> torch.Tensor:
        ...         return (student.logits - teacher.logits).square().mean()
        >>> teacher, student = torch.nn.Linear(4, 2), torch.nn.Linear(4, 2)
        >>> loss = gs.Distiller(student, teacher, losses=[Logits(weight=0.5)])(torch.ones(1, 4))
        >>> loss.requires_grad
        True
    """

    weight: float = field(default=1.0, kw_only=True)
    key: str = field(default="logits", kw_only=True)

    def __post_init__(self) -> None:
        require_factor("weight", self.weight)

    @property
    def learned(self) -> nn.Module | None:
        """What the loss itself learns, such as a projection; None for most."""
        return None

    def layers(self, names: Sequence[str]) -> dict[str, str]:
        """The layers whose features the loss compares, student's name -> teacher's name.

        Args:
            names: the student's layers, in its order.
        """
        return {}

    def __call__(self, student: Run, teacher: Run) -> Tensor:
        """The loss, a scalar, before `weight`."""
        raise NotImplementedError

    def ensemble(self, student: Run, teachers: Sequence[Run]) -> Tensor:
        """The loss to several teachers: the mean of the losses, weighted with their shares."""
        return torch.stack([teacher.share * self(student, teacher) for teacher in teachers]).sum()


@dataclass(frozen=True)
class _Softened(Loss):
    """Compares softmax(logits / T); of several teachers, the mean of their probabilities."""

    temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature} must be positive and finite, as 2.0")

    def __call__(self, student: Run, teacher: Run) -> Tensor:
        return self.ensemble(student, [teacher])

    def ensemble(self, student: Run, teachers: Sequence[Run]) -> Tensor:
        ours = student.tensor(self.key)
        shares = []
        for teacher in teachers:
            theirs = teacher.tensor(self.key)
            remedy = "both need the same classes in the same order"
            require_same("logits", ours, theirs, remedy)
            shares.append(teacher.share * F.softmax(teacher.rows(theirs) / self.temperature, -1))
        logits = student.rows(ours) / self.temperature
        return self.temperature**2 * self._compare(logits, torch.stack(shares).sum(0))

    def _compare(self, logits: Tensor, target: Tensor) -> Tensor:
        """The student's logits / T and the teachers' probabilities, both (rows, classes)."""
        raise NotImplementedError


@dataclass(frozen=True)
class KD(_Softened):
    """T^2 * KL(softmax(teacher / T) || softmax(student / T)), the mean over rows.

    T^2 keeps the gradient's size independent of the temperature. Every leading dimension of the
    logits counts as rows, without padding; the classes are the last. Several teachers give the
    mean of their probabilities.

    Source: Hinton, Vinyals & Dean 2015, arXiv 1503.02531.

    Args:
        temperature: T > 0; more than 1 shows the student how the teacher ranks the wrong classes.

    Raises:
        ValueError: T is not positive and finite; in a call, the shapes of the logits differ.

    Example:
        >>> import torch, gossamer as gs
        >>> from gossamer.losses import Run
        >>> student = Run("student", torch.tensor([[0.0, 0.0]]))
        >>> teacher = Run("teacher", torch.tensor([[2.0, 0.0]]))
        >>> round(gs.KD(temperature=2.0)(student, teacher).item(), 4)
        0.4438
    """

    temperature: float = 2.0

    def _compare(self, logits: Tensor, target: Tensor) -> Tensor:
        return F.kl_div(F.log_softmax(logits, -1), target, reduction="batchmean")


@dataclass(frozen=True)
class DIST(_Softened):
    """T^2 * (inter * (1 - r of each row) + intra * (1 - r of each class)), r Pearson's correlation.

    Between softmax(student / T) and softmax(teacher / T): the mean over rows of r over the classes,
    and over classes of r over the rows of the batch. It asks for the teacher's preferences and not
    for its confidence, which suits a teacher much stronger than the student. Rows and several
    teachers are as for KD; the second part needs batches of more than one row, and on several
    processes it sees each one's own.

    Source: Huang et al. 2022, arXiv 2205.10536, equations 6 to 10.

    Args:
        temperature: T > 0.
        inter: weight of the relation between classes, >= 0.
        intra: weight of the relation within a class, >= 0.

    Raises:
        ValueError: an argument is out of its range; in a call, the shapes of the logits differ.

    Example: scores on another scale, and in the same order.
        >>> import torch, gossamer as gs
        >>> from gossamer.losses import Run
        >>> logits = torch.tensor([[0.0, 1.0], [2.0, 0.0]])
        >>> loss = gs.DIST(intra=0.0)(Run("student", logits), Run("teacher", 3 * logits))
        >>> round(loss.item(), 4)
        0.0
    """

    inter: float = 1.0
    intra: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_factor("inter", self.inter)
        require_factor("intra", self.intra)

    def _compare(self, logits: Tensor, target: Tensor) -> Tensor:
        ours = F.softmax(logits, -1)
        between, within = _pearson(ours, target, 1), _pearson(ours, target, 0)
        return self.inter * (1 - between.mean()) + self.intra * (1 - within.mean())


def _pearson(x: Tensor, y: Tensor, dim: int) -> Tensor:
    x, y = (z - z.mean(dim, keepdim=True) for z in (x, y))
    return F.cosine_similarity(x, y, dim=dim)


@dataclass(frozen=True)
class Cosine(Loss):
    """1 - cos(student, teacher) of the outputs, the mean over rows: for models that embed.

    A row is a sentence's embedding or, in outputs (batch, tokens, width), a real token's. For
    vectors of length 1 it is their squared distance / 2.

    Source: Reimers & Gurevych 2020, arXiv 2004.09813, with the cosine for the squared distance.

    Args:
        key: the entry that is compared where the output is not a tensor, such as
            `"last_hidden_state"` or `"sentence_embedding"`.

    Raises:
        ValueError: in a call, the shapes of the outputs differ.

    Example:
        >>> import torch, gossamer as gs
        >>> from gossamer.losses import Run
        >>> student = Run("student", torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
        >>> teacher = Run("teacher", torch.tensor([[3.0, 0.0], [1.0, 0.0]]))
        >>> gs.Cosine()(student, teacher).item()
        0.5
    """

    key: str = field(default="last_hidden_state", kw_only=True)

    def __call__(self, student: Run, teacher: Run) -> Tensor:
        ours, theirs = student.tensor(self.key), teacher.tensor(self.key)
        require_same("embeddings", ours, theirs, "distil features with Hint where widths differ")
        return 1 - F.cosine_similarity(student.rows(ours), teacher.rows(theirs), dim=-1).mean()
