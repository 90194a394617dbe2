"""Losses of features: the layers of a student are drawn to those of its teachers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .losses import Loss, Run, require_same
from .patterns import select


@dataclass(frozen=True)
class _Layerwise(Loss):
    """Compares features of matched layers, one pair after the other: the mean over the pairs.

    A pattern stands for the same layers in both models; of nested matches only the outermost
    counts, so that `"layers.*"` is each layer and not its parts.
    """

    match: str | Mapping[str, str]

    def layers(self, names: Sequence[str]) -> dict[str, str]:
        if isinstance(self.match, Mapping):
            if missing := [name for name in self.match if name not in names]:
                raise ValueError(f"the student has no layer {missing[0]!r}")
            return dict(self.match)
        found = select(names, self.match)
        return {name: name for name in found if not any(name.startswith(f"{x}.") for x in found)}

    def __call__(self, student: Run, teacher: Run) -> Tensor:
        losses = []
        for ours, theirs in self.layers(list(student.features)).items():
            features = student.feature(ours), teacher.feature(theirs)
            losses.append(self._compare(f"layer {ours!r}", student, teacher, *features))
        return torch.stack(losses).mean()

    def _compare(
        self, what: str, student: Run, teacher: Run, ours: Tensor, theirs: Tensor
    ) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class SquareHead(_Layerwise):
    """MSE(student, teacher) / (MSE(0, teacher) + eps) of each matched layer, the mean over layers.

    The division makes layers of any scale count alike. Matching features keeps training stable at
    high sparsity, where the logits alone say too little. Padding counts in neither mean.

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

    eps: float = 1e-8

    def _compare(
        self, what: str, student: Run, teacher: Run, ours: Tensor, theirs: Tensor
    ) -> Tensor:
        require_same(f"features of {what}", ours, theirs, "Hint projects where widths differ")
        mine, target = student.rows(ours), teacher.rows(theirs)
        return F.mse_loss(mine, target) / (target.square().mean() + self.eps)


@dataclass(frozen=True)
class Hint(SquareHead):
    """SquareHead after a learned projection W of the student's features: MSE(W x, y) / MSE(0, y).

    For a student whose layers are narrower than the teacher's. W is one for all matched layers (for
    one each, list a Hint for each) and belongs to the loss, not to the student: give the optimizer
    `[*student.parameters(), *distiller.parameters()]`, and save `distiller.state_dict()` to resume.
    W starts from the same values in every process.

    Source: Romero et al. 2015, arXiv 1412.6550 (the projection); Jiao et al. 2020, arXiv
    1909.10351 (one for all layers).

    Args:
        match: as for SquareHead.
        widths: of the student's and the teacher's features: their last dimension, or in
            convolutional features (batch, channels, height, width) the channels.
        eps: as for SquareHead.

    Raises:
        ValueError: as for SquareHead, or features whose width is not that in `widths`.

    Example:
        >>> import torch, gossamer as gs
        >>> teacher, student = (
        ...     torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.Linear(width, 2))
        ...     for width in (8, 3)
        ... )
        >>> distiller = gs.Distiller(student, teacher, losses=[gs.Hint("0", widths=(3, 8))])
        >>> [tuple(parameter.shape) for parameter in distiller.parameters()]
        [(8, 3)]
        >>> loss = distiller(torch.ones(5, 4))
    """

    widths: tuple[int, int] = field(kw_only=True)
    _projection: nn.Linear = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        ours, theirs = self.widths
        if min(ours, theirs) < 1:
            raise ValueError(f"widths={self.widths} must be positive: the student's, the teacher's")
        projection = nn.Linear(ours, theirs, bias=False)
        # Its own generator: equal in all processes, and the global one is left where it was.
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            projection.weight.normal_(0, 1 / math.sqrt(ours), generator=generator)
        object.__setattr__(self, "_projection", projection)

    @property
    def learned(self) -> nn.Module:
        return self._projection

    def _compare(
        self, what: str, student: Run, teacher: Run, ours: Tensor, theirs: Tensor
    ) -> Tensor:
        if ours.ndim == theirs.ndim == 4:
            ours, theirs = ours.movedim(1, -1), theirs.movedim(1, -1)
        widths = ours.shape[-1], theirs.shape[-1]
        if widths != tuple(self.widths):
            raise ValueError(f"{what}: the features are {widths} wide, but widths={self.widths}")
        projected = self._projection(ours.to(self._projection.weight.dtype))
        return super()._compare(what, student, teacher, projected, theirs)


@dataclass(frozen=True)
class Relation(_Layerwise):
    """KL(R(teacher) || R(student)) of R = softmax(X_h X_h^T / sqrt(width / heads)): MiniLMv2.

    X is the output (batch, tokens, width) of a matched layer, cut into `heads` parts along its
    width: which token goes with which. The widths of the models may differ, and so may their own
    heads. Matched are the query, key and value projections of one layer, best the last or, of a
    large teacher, one of the upper middle. The mean is over real tokens, heads and matched layers;
    no token relates to padding.

    Source: Wang et al. 2021, arXiv 2012.15828, section 3.

    Args:
        match: as for SquareHead, such as `"layers.5.[qkv]*"` for query, key and value.
        heads: number of relations a layer, which divides both widths; more are finer.

    Raises:
        ValueError: `heads` is below 1; as for SquareHead; in a call, features that are not (batch,
            tokens, width), differ in batch or tokens, or a width that `heads` does not divide.

    Example:
        >>> import torch, gossamer as gs
        >>> teacher, student = torch.nn.ModuleDict(), torch.nn.ModuleDict()
        >>> for model, width in ((teacher, 8), (student, 4)):
        ...     model["query"] = torch.nn.Linear(6, width)
        ...     model.forward = model["query"].__call__
        >>> distiller = gs.Distiller(student, teacher, losses=[gs.Relation("query", heads=2)])
        >>> distiller(torch.randn(2, 5, 6)).item() > 0
        True
    """

    heads: int = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads < 1:
            raise ValueError(f"heads={self.heads} must be at least 1")

    def _compare(
        self, what: str, student: Run, teacher: Run, ours: Tensor, theirs: Tensor
    ) -> Tensor:
        for run, x in ((student, ours), (teacher, theirs)):
            if x.ndim != 3 or x.shape[-1] % self.heads:
                raise ValueError(
                    f"{what}: the {run.who}'s features are {tuple(x.shape)}, Relation needs "
                    f"(batch, tokens, width) with a width that heads={self.heads} divides"
                )
        remedy = "both models must see the same tokens"
        require_same(f"batch and tokens in {what}", ours[..., 0], theirs[..., 0], remedy)
        p, q = (self._log_relations(run, x) for run, x in ((teacher, theirs), (student, ours)))
        divergence = F.kl_div(q, p, reduction="none", log_target=True).sum(-1)
        return student.rows(divergence.transpose(1, 2)).mean()

    def _log_relations(self, run: Run, x: Tensor) -> Tensor:
        """(batch, heads, tokens, tokens): log-shares of what each token relates to."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if run.mask is not None:
            # Whatever is in padding, its rows are finite: 0 times their gradient is then 0.
            x = x.masked_fill(~run.mask[..., None], 0)
        x = x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        scores = x @ x.transpose(-1, -2) / math.sqrt(x.shape[-1])
        if run.mask is not None:
            # Not -inf: a share of 0 times a difference of infinities would be NaN.
            least = torch.finfo(scores.dtype).min
            scores = scores.masked_fill(~run.mask[:, None, None], least)
        return F.log_softmax(scores, -1)
