"""Magnitude pruning: choose the weights that matter least, and keep them at zero in training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedParameter

from .masks import PATTERNS, SCOPES, choose
from .patterns import select
from .report import Report, Row

Schedule = Callable[[int], float]
"""Maps the number of steps taken to the share of the final sparsity, in [0, 1], due by then."""


@dataclass(frozen=True)
class OneShot:
    """s(t) = 1: the whole sparsity at the first step.

    Example:
        >>> import gossamer as gs
        >>> gs.OneShot()(1)
        1.0
    """

    def __call__(self, step: int) -> float:
        return 1.0


@dataclass(frozen=True)
class Cubic:
    """s(t) = 1 - (1 - (t - begin) / steps)^3: fast while weights are redundant, slow at the end.

    Source: Zhu & Gupta 2017, "To prune, or not to prune", arXiv 1710.01878, equation 1.

    Args:
        steps: from the first weight pruned to the final sparsity, in calls of `Pruner.step`.
        begin: steps that leave the model dense.
        every: steps between two choices of masks; by default a hundredth of `steps`, as each
            choice ranks all weights.

    Raises:
        ValueError: `steps` or `every` below 1, `begin` below 0.

    Example:
        >>> import gossamer as gs
        >>> [gs.Cubic(steps=4)(step) for step in range(5)]
        [0.0, 0.578125, 0.875, 0.984375, 1.0]
    """

    steps: int
    begin: int = 0
    every: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("begin", 0), ("every", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}={value} is too small: Cubic needs at least {least}")

    def __call__(self, step: int) -> float:
        elapsed = min(step - self.begin, self.steps)
        if elapsed <= 0:
            return 0.0
        if elapsed < self.steps:
            elapsed -= elapsed % (self.every or math.ceil(self.steps / 100))
        return 1.0 - (1.0 - elapsed / self.steps) ** 3


@dataclass
class _Layer:
    """One weight to prune, or a layer left alone and the reason why."""

    name: str
    module: nn.Linear | nn.Conv2d
    note: str
    skipped: bool

    @property
    def weight(self) -> Tensor:
        # Looked up at each use: load_state_dict(assign=True) and model.to() may replace it.
        return self.module.weight

    def row(self, pattern: str) -> Row:
        weight, kind = self.weight, type(self.module).__name__
        shape = () if isinstance(weight, UninitializedParameter) else tuple(weight.shape)
        after = "" if self.skipped else f"{kind} {pattern}"
        return Row(self.name, shape, kind, after, _zeros(weight), note=self.note)


def prune_(
    model: nn.Module,
    sparsity: float,
    pattern: str = "unstructured",
    scope: str = "global",
    exclude: str | Iterable[str] = (),
) -> Report:
    """Set the least weights of every nn.Linear and nn.Conv2d to zero, in place, once.

    The arguments, the choice of weights and the errors are those of `Pruner`.

    Returns:
        One row a layer, in the model's order: its share of zeros, and why it was left alone.

    Example:
        >>> import torch, gossamer as gs
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
        >>> report = gs.prune_(model, sparsity=0.75, pattern="1x4", exclude="1")
        >>> int((model[0].weight == 0).sum()), int((model[1].weight == 0).sum())
        (48, 0)
    """
    return Pruner(model, sparsity, pattern, OneShot(), scope, exclude).finish()


class Pruner:
    """Zeros for `sparsity * schedule(t)` of the weights, held against any optimizer.

    Blocks are ranked by their squared norm, see `gossamer.masks.choose`. Among equals the choice
    is spread evenly, and everything is deterministic: equal weights, as on all DDP ranks, give
    equal masks. A pruned weight stays pruned, and the sparsity never falls. Each layer keeps its
    best block; only where that is the limit does the sparsity stay below the target.

    Only the weights change (zeros in the dense modules): no hooks, no buffers, no new names in the
    model's state_dict. A weight shared by several layers is pruned once, under its first name; it
    is left alone if one of these layers is excluded.

    Args:
        model: its nn.Linear and nn.Conv2d layers are pruned. Subclasses are left alone.
        sparsity: share of blocks to remove, in [0, 1); exact up to rounding to whole blocks.
        pattern: `"unstructured"` (single weights) or `"1x4"` (1 output x 4 inputs; in a
            convolution 4 input channels of one group at one tap). Where 4 does not divide the
            inputs the last block of a row is short, and the report says so.
        schedule: share of `sparsity` due after a number of steps, such as `Cubic(steps=2000)`.
        scope: `"global"` (one ranking of all layers, each score in units of its layer's mean) or
            `"layer"` (the same sparsity in each layer).
        exclude: names of layers to leave alone, see `gossamer.patterns`.

    Attributes:
        masks: name of a layer -> bool tensor in the weight's shape, True where a weight is kept.

    Raises:
        ValueError: an argument out of its range, a pattern in `exclude` that matches nothing, no
            layer to prune, or a layer whose weights are not there (lazy, meta device, computed by a
            parametrization) or not finite.

    Example:
        >>> import torch, gossamer as gs
        >>> model = torch.nn.Linear(8, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> pruner = gs.Pruner(model, sparsity=0.5, schedule=gs.Cubic(steps=3))
        >>> for _ in range(4):
        ...     model(torch.randn(3, 8)).square().sum().backward()
        ...     optimizer.step(); pruner.step(); optimizer.zero_grad()
        >>> pruner.sparsity, int((model.weight == 0).sum())
        (0.5, 8)
    """

    def __init__(
        self,
        model: nn.Module,
        sparsity: float,
        pattern: str = "unstructured",
        schedule: Schedule = OneShot(),
        scope: str = "global",
        exclude: str | Iterable[str] = (),
    ) -> None:
        if not 0 <= sparsity < 1:
            raise ValueError(
                f"sparsity={sparsity} is not in [0, 1): give the share of weights to remove, "
                "0.9 for nine in ten"
            )
        if pattern not in PATTERNS:
            raise ValueError(f"pattern={pattern!r} is unknown: choose one of {list(PATTERNS)}")
        if scope not in SCOPES:
            raise ValueError(f"scope={scope!r} is unknown: choose one of {list(SCOPES)}")
        self._target, self._pattern, self._scope = float(sparsity), pattern, scope
        self._schedule = schedule
        self._survey = _survey(model, PATTERNS[pattern], exclude)
        self._layers = [layer for layer in self._survey if not layer.skipped]
        self._step = 0
        self._due = 0.0  # the sparsity for which the masks were last chosen
        self.masks = {
            layer.name: torch.ones_like(layer.weight, dtype=torch.bool) for layer in self._layers
        }

    @property
    def sparsity(self) -> float:
        """Share of pruned weights now, over all layers that are being pruned."""
        kept = sum(int(mask.sum()) for mask in self.masks.values())
        return 1.0 - kept / sum(mask.numel() for mask in self.masks.values())

    def step(self) -> None:
        """Advance the schedule by one and set every pruned weight to zero; after optimizer.step().

        Raises:
            ValueError: new masks are due and a layer's weights are not finite, or the schedule
                gives a share outside [0, 1].
        """
        share = self._schedule(self._step + 1)
        if not 0 <= share <= 1:
            raise ValueError(
                f"the schedule gives {share} at step {self._step + 1}: "
                "it must return a share of the final sparsity, in [0, 1]"
            )
        self._step += 1
        self._advance(self._target * share)

    def finish(self) -> Report:
        """Go to the final sparsity, wherever the schedule is, and report on every layer."""
        self._advance(self._target)
        title = (
            f"{self.sparsity:.2%} of the weights pruned, {self._target:.2%} asked for "
            f"(pattern {self._pattern}, scope {self._scope})"
        )
        return Report([layer.row(self._pattern) for layer in self._survey], title)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: `{"step": int, "due": float, "masks": {name: bool tensor}}`."""
        return {"step": self._step, "due": self._due, "masks": dict(self.masks)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state` and set the weights that it prunes to zero.

        Raises:
            ValueError: the masks are not those of this model's layers.
        """
        masks = state["masks"]
        if masks.keys() != self.masks.keys():
            raise ValueError(
                f"the state has masks for {sorted(masks)}, this pruner for {sorted(self.masks)}: "
                "give the same model and the same exclude"
            )
        for name, mask in masks.items():
            expected = tuple(self.masks[name].shape)
            if mask.dtype != torch.bool or tuple(mask.shape) != expected:
                raise ValueError(
                    f"the mask of layer {name!r} is {mask.dtype} {tuple(mask.shape)}, "
                    f"not torch.bool {expected}: the state is of another model"
                )
        self._step, self._due, self.masks = int(state["step"]), float(state["due"]), dict(masks)
        self._apply()

    @torch.no_grad()
    def _advance(self, due: float) -> None:
        # The old masks first: what an optimizer wrote into pruned weights is not to be ranked.
        self._apply()
        if due > self._due:
            weights = {layer.name: layer.weight for layer in self._layers}
            self.masks = choose(weights, self.masks, due, self._pattern, self._scope)
            self._due = due
            self._apply()

    @torch.no_grad()
    def _apply(self) -> None:
        for layer in self._layers:
            mask = self.masks[layer.name] = self.masks[layer.name].to(layer.weight.device)
            # Not a product with the mask: NaN * 0 is NaN, and -1 * 0 is a negative zero.
            layer.weight.masked_fill_(~mask, 0)


def _survey(model: nn.Module, width: int, exclude: str | Iterable[str]) -> list[_Layer]:
    """Every Linear and Conv2d of the model, subclasses too, and what is to be done with it."""
    found = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, (nn.Linear, nn.Conv2d))
    }
    exact = [name for name, module in found.items() if _exact(module)]
    if not exact:
        raise ValueError(
            "the model has no nn.Linear or nn.Conv2d to prune "
            "(layers that compress_ has packed are no longer dense: prune first)"
        )
    excluded = select(exact, exclude)
    frozen = {id(found[name].weight) for name in excluded}
    holders: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        holders.setdefault(id(parameter), []).append(name)

    layers, first = [], dict[int, str]()  # first: the name under which a shared weight is pruned
    for name, module in found.items():
        weight, skipped = module.weight, True
        others = [other for other in holders.get(id(weight), []) if other != f"{name}.weight"]
        if name in excluded:
            note = "excluded"
        elif name not in exact:
            note = f"left alone: {type(module).__name__} is a subclass"
        elif id(weight) in frozen:
            note = f"left alone: shared with {', '.join(others)}, which is excluded"
        elif id(weight) in first:
            note = f"pruned as {first[id(weight)]}, whose weight it shares"
        else:
            _require_weight(name, weight)
            first[id(weight)], skipped = name, False
            note = _note(weight, width, others)
        layers.append(_Layer(name, module, note, skipped))
    if not first:
        raise ValueError(f"exclude={exclude!r} names every layer: nothing is left to prune")
    return layers


def _exact(module: nn.Module) -> bool:
    # A lazy layer turns into its exact class with the first batch.
    return type(module) in (nn.Linear, nn.Conv2d) or isinstance(module, LazyModuleMixin)


def _require_weight(name: str, weight: Tensor) -> None:
    if isinstance(weight, UninitializedParameter):
        raise ValueError(
            f"layer {name!r} has no weights yet: run one batch through the model first"
        )
    if not isinstance(weight, nn.Parameter):
        raise ValueError(
            f"layer {name!r} computes its weight anew in each forward pass (weight_norm, "
            "torch.nn.utils.prune), which would undo the pruning: make the weight a parameter first"
        )
    if weight.is_meta:
        raise ValueError(f"layer {name!r} is on the meta device: load its weights first")
    if weight.numel() == 0:
        raise ValueError(f"layer {name!r} has an empty weight {tuple(weight.shape)}: exclude it")


def _note(weight: Tensor, width: int, others: list[str]) -> str:
    inputs, notes = weight.shape[1], []
    if inputs % width:
        notes.append(f"the last block of a row is short: {width} does not divide {inputs} inputs")
    if others:
        notes.append(f"shared with {', '.join(others)}")
    return "; ".join(notes)


def _zeros(weight: Tensor) -> float:
    if isinstance(weight, UninitializedParameter) or weight.is_meta or weight.numel() == 0:
        return 0.0
    return 1.0 - int(weight.count_nonzero()) / weight.numel()
