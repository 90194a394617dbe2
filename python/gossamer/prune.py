"""Pruning: choose the weights that matter least, and keep them at zero in training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .masks import SCOPES, Pattern, choose, pack_bits, unpack_bits
from .patterns import matches, select
from .report import Report
from .schedules import OneShot, Schedule
from .scores import energy, gradient_energy, parse, reconstruct_
from .survey import survey

Sparsity = float | Mapping[str, float] | None

_AT_ONCE = OneShot()
# Molchanov et al. 2019 average over minibatches with a momentum of 0.9.
_MOMENTUM = 0.9
# Integers of a float's size: times False they are 0 whatever they were, where NaN * 0 is NaN and
# -1 * 0 a negative zero; 1.2 ms for 2.4 million weights, masked_fill_ 3.6 ms.
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def prune_(
    model: nn.Module,
    sparsity: Sparsity = None,
    pattern: str = "unstructured",
    scope: str = "global",
    exclude: str | Iterable[str] = (),
    score: str = "magnitude",
    cap: float | None = None,
) -> Report:
    """Set the least weights of every nn.Linear and nn.Conv2d to zero, in place, once.

    The arguments, the choice of weights and the errors are those of `Pruner`. For
    `score="taylor"` the gradients must be there: call backward() on some batches first.

    Returns:
        One row a layer, in the model's order: its share of zeros, and why it was left alone.

    Example:
        >>> import torch, gossamer as gs
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
        >>> report = gs.prune_(model, sparsity=0.75, pattern="1x4", exclude="1")
        >>> int((model[0].weight == 0).sum()), int((model[1].weight == 0).sum())
        (48, 0)
    """
    return Pruner(model, sparsity, pattern, _AT_ONCE, scope, exclude, score, cap).finish()


class Pruner:
    """Zeros for `sparsity * schedule(t)` of the weights, held against any optimizer.

    Blocks are ranked by the sum of their weights' scores, see `gossamer.masks.choose`. Among
    equals the choice is spread evenly, and everything is deterministic: equal weights, as on all
    DDP ranks, give equal masks (scores that depend on data are averaged over the ranks). A pruned
    weight stays pruned, and the sparsity never falls. Each layer keeps its best block, and what
    `cap` demands; only where that is the limit does the sparsity stay below the target.

    Only the weights change (zeros in the dense modules; biases stay): no hooks, no buffers, no new
    names in the model's state_dict. A weight shared by several layers is pruned once, under its
    first name; it is left alone if one of these layers is excluded.

    Args:
        model: its nn.Linear and nn.Conv2d layers are pruned. Subclasses are left alone.
        sparsity: share of blocks to remove, in [0, 1); exact up to rounding to whole blocks. With
            `scope="layer"` also a dict of name patterns to shares: the first that matches decides,
            and a layer that none matches stays dense. Not needed for N:M, which implies it.
        pattern: what goes together. `"unstructured"`: single weights. `"1x4"`: 1 output x 4
            inputs; in a convolution 4 input channels of one group at one tap. `"16x16"`, `"32x32"`:
            16 outputs x 16 inputs, of which GPUs skip what is empty; in a convolution 16 columns
            of its matrix (tap, channel up to 4). `"2:4"` (or any N:M): at most 2 of 4 consecutive
            inputs live. `"channel"`: all weights of an output. Where the size of a block does not
            divide the weight's the last ones are short, and the report says so.
        schedule: share of `sparsity` due after a number of steps, such as `Cubic(steps=2000)`.
        scope: `"global"` (one ranking of all layers, each score in units of its layer's mean) or
            `"layer"` (the same sparsity in each layer).
        exclude: names of layers to leave alone, see `gossamer.patterns`.
        score: of a weight. `"magnitude"`: w^2. `"wanda"`: w^2 E[x^2] (Sun et al. 2023, arXiv
            2306.11695), from `gs.calibrate` before; with `scope="layer"` weights compete within
            their output, as in the paper. `"taylor"`: (w * gradient)^2 (Molchanov et al. 2019),
            averaged over steps, see `accumulate`. `"sparsegpt"`: drops weights and lets the others
            make up for them (Frantar & Alistarh 2023, arXiv 2301.00774), layer by layer, from
            `gs.calibrate(model, hessian=True)`. `"random"` or `"random:3"`, with a seed: a
            control. Scores are squares, so that a block's is what the loss or output loses by it.
        cap: the largest share of one layer that may go, such as 0.98; the others lose more for it.

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
        sparsity: Sparsity = None,
        pattern: str = "unstructured",
        schedule: Schedule = _AT_ONCE,
        scope: str = "global",
        exclude: str | Iterable[str] = (),
        score: str = "magnitude",
        cap: float | None = None,
    ) -> None:
        form, (self._kind, _) = Pattern.named(pattern), parse(score)
        if scope not in SCOPES:
            raise ValueError(f"scope={scope!r} is unknown: choose one of {list(SCOPES)}")
        if cap is not None and not 0 < cap <= 1:
            raise ValueError(f"cap={cap} is not in (0, 1]: give the largest share of a layer to go")
        if self._kind == "sparsegpt" and scope == "global":
            raise ValueError("score='sparsegpt' goes layer by layer: it needs scope='layer'")
        self._survey = survey(model, form, exclude)
        self._layers = [layer for layer in self._survey if not layer.skipped]
        names = [layer.name for layer in self._layers]
        self._targets = _targets(names, sparsity, form, scope, 1.0 if cap is None else cap)
        self._schedule, self._pattern, self._scope = schedule, pattern, scope
        self._score, self._cap = score, cap
        self._step = 0
        self._share = 0.0  # of the targets, for which the masks were last chosen
        self._average: dict[str, Tensor] = {}  # of gradient energies, name -> in the weight's shape
        self._accumulated = False
        self._bits = {
            layer.name: pack_bits(torch.ones_like(layer.weight, dtype=torch.bool))
            for layer in self._layers
        }

    @property
    def masks(self) -> dict[str, Tensor]:
        """Name of a layer -> bool tensor in the weight's shape, True where a weight is kept.

        Made anew at each call: a Pruner holds one bit a weight.
        """
        return {
            layer.name: unpack_bits(self._bits[layer.name], layer.weight.shape)
            for layer in self._layers
        }

    @property
    def sparsity(self) -> float:
        """Share of pruned weights now, over all layers that are being pruned."""
        masks = self.masks.values()
        return 1.0 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)

    def accumulate(self) -> None:
        """Adds the gradients as they are now to the moving average that `score="taylor"` ranks by.

        `step` does so by itself, with the weights after the optimizer's step. Call this before
        the optimizer's step where that matters (large steps, clipped gradients, zero_grad() before
        `pruner.step()`); the next `step` then does not.

        Raises:
            ValueError: a layer has no gradient, or the score is another one.
        """
        if self._kind != "taylor":
            raise ValueError(f"score={self._score!r} uses no gradients: accumulate is for 'taylor'")
        for layer in self._layers:
            found = gradient_energy(layer.name, layer.module)
            average = self._average.setdefault(layer.name, found)
            average.lerp_(found, 1 - _MOMENTUM)
        self._accumulated = True

    def step(self) -> None:
        """Advance the schedule by one and set every pruned weight to zero; after optimizer.step().

        Raises:
            ValueError: new masks are due and a layer's weights are not finite or its scores cannot
                be computed, or the schedule gives a share outside [0, 1].
        """
        share = self._schedule(self._step + 1)
        if not 0 <= share <= 1:
            raise ValueError(
                f"the schedule gives {share} at step {self._step + 1}: "
                "it must return a share of the final sparsity, in [0, 1]"
            )
        if self._kind == "taylor" and self._share < 1 and not self._accumulated:
            self.accumulate()
        self._accumulated = False
        self._step += 1
        self._advance(share)

    def finish(self) -> Report:
        """Go to the final sparsity, wherever the schedule is, and report on every layer."""
        if self._kind == "taylor" and not self._average:
            self.accumulate()
        self._advance(1.0)
        masks = self.masks
        count = sum(mask.numel() for mask in masks.values())
        asked = sum(self._targets[name] * mask.numel() for name, mask in masks.items()) / count
        title = (
            f"{self.sparsity:.2%} of the weights pruned, {asked:.2%} asked for "
            f"(pattern {self._pattern}, scope {self._scope}, score {self._score})"
        )
        rows = [
            layer.row(self._pattern, None if layer.skipped else masks[layer.name])
            for layer in self._survey
        ]
        return Report(rows, title)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, in tensors, numbers and strings: torch.save stores it.

        `{"configuration": {...}, "step": int, "share": float, "masks": {name: {"bits": uint8
        tensor, one bit a weight, "shape": list}}, "average": {name: tensor, "taylor" only}}`.
        """
        masks = {
            layer.name: {"bits": self._bits[layer.name], "shape": list(layer.weight.shape)}
            for layer in self._layers
        }
        return {
            "configuration": self._configuration(),
            "step": self._step,
            "share": self._share,
            "masks": masks,
            "average": dict(self._average),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state` and set the weights that it prunes to zero.

        Raises:
            ValueError: the state is of another configuration, which is named, or its masks are not
                those of this model's layers.
        """
        own, masks = self.state_dict(), state.get("masks")
        if state.keys() != own.keys() or not isinstance(masks, Mapping):
            raise ValueError("this is no state of a Pruner: give what state_dict() returned")
        if masks.keys() != self._bits.keys():
            raise ValueError(
                f"the state has masks for {sorted(masks)}, this pruner for {sorted(self._bits)}: "
                "give the same model and the same exclude"
            )
        for name, value in own["configuration"].items():
            if (other := state["configuration"].get(name)) != value:
                raise ValueError(
                    f"the state is of a run with {name}={other!r}, this pruner has "
                    f"{name}={value!r}: resume with the same configuration"
                )
        for name, mask in masks.items():
            bits, shape = self._bits[name], own["masks"][name]["shape"]
            if mask["shape"] != shape or mask["bits"].shape != bits.shape:
                raise ValueError(
                    f"the mask of layer {name!r} is {mask['shape']}, the weight {shape}: "
                    "the state is of another model"
                )
        self._step, self._share = int(state["step"]), float(state["share"])
        self._bits = {name: mask["bits"].to(torch.uint8) for name, mask in masks.items()}
        # Cloned: accumulate writes into them.
        self._average = {name: tensor.clone() for name, tensor in state["average"].items()}
        self._apply()

    def _configuration(self) -> dict[str, Any]:
        schedule = self._schedule
        # The repr of a function holds its address, which is another one in each run.
        name = repr(schedule) if is_dataclass(schedule) else type(schedule).__name__
        return {
            "sparsity": dict(self._targets),
            "pattern": self._pattern,
            "schedule": name,
            "scope": self._scope,
            "score": self._score,
            "cap": self._cap,
        }

    @torch.no_grad()
    def _advance(self, share: float) -> None:
        # The old masks first: what an optimizer wrote into pruned weights is not to be ranked.
        self._apply()
        if share > self._share:
            masks = self._choose(share)
            self._bits = {name: pack_bits(mask) for name, mask in masks.items()}
            self._share = share
            self._apply()

    def _choose(self, share: float) -> dict[str, Tensor]:
        due = {name: share * goal for name, goal in self._targets.items()}
        masks = self.masks
        if self._kind == "sparsegpt":
            return {
                layer.name: reconstruct_(
                    layer.name, layer.module, masks[layer.name], due[layer.name], self._pattern
                )
                for layer in self._layers
            }
        energies = {
            layer.name: energy(layer.name, layer.module, self._score, self._average.get(layer.name))
            for layer in self._layers
        }
        cap = 1.0 if self._cap is None else self._cap
        if self._scope == "global":
            (goal,) = set(due.values())
            return choose(energies, masks, goal, self._pattern, "global", cap)
        scope = "output" if self._kind == "wanda" else "layer"
        return choose(energies, masks, due, self._pattern, scope, cap)

    @torch.no_grad()
    def _apply(self) -> None:
        for layer in self._layers:
            weight = layer.weight
            bits = self._bits[layer.name] = self._bits[layer.name].to(weight.device)
            mask = unpack_bits(bits, weight.shape)
            weight.view(_INTEGERS[weight.element_size()]).mul_(mask)


def _targets(
    names: list[str], sparsity: Sparsity, pattern: Pattern, scope: str, cap: float
) -> dict[str, float]:
    """Name of a layer -> its final sparsity; 0 where no pattern matches its name."""
    if isinstance(sparsity, Mapping):
        if scope == "global":
            raise ValueError("a sparsity for each layer needs scope='layer'")
        shares = {key: _share(value, pattern, cap) for key, value in sparsity.items()}
        select(names, shares)
        found = {n: next((s for p, s in shares.items() if matches(n, p)), 0.0) for n in names}
        return found
    return dict.fromkeys(names, _share(sparsity, pattern, cap))


def _share(sparsity: float | None, pattern: Pattern, cap: float) -> float:
    """The sparsity as a number, checked."""
    implied = pattern.sparsity
    if sparsity is None:
        if implied is None:
            raise ValueError(f"pattern={pattern.name!r} needs a sparsity, such as 0.9")
        sparsity = implied
    if not 0 <= sparsity < 1:
        raise ValueError(
            f"sparsity={sparsity} is not in [0, 1): give the share of weights to remove, "
            "0.9 for nine in ten"
        )
    if implied is not None and abs(sparsity - implied) > 1e-6:
        raise ValueError(
            f"sparsity={sparsity} is not that of pattern={pattern.name!r}, which is {implied}: "
            "leave it out"
        )
    if sparsity > cap:
        raise ValueError(f"sparsity={sparsity} is above cap={cap}: no layer may lose as much")
    return float(sparsity)
