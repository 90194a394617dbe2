"""sensitivity: how the quality falls when one layer alone is pruned, for each layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .masks import Pattern
from .prune import Pruner
from .report import render
from .survey import Surveyed, survey


@dataclass(frozen=True)
class Sensitivity:
    """Quality of the model with one layer pruned; `str()` is a table of differences.

    Args:
        dense: quality of the model as it is.
        sparsities: what was tried.
        quality: name of a layer -> quality at each of `sparsities`, in the model's order.
        weights: name of a layer -> number of its weights.

    Example:
        >>> print(Sensitivity(0.9, (0.5, 0.9), {"fc": (0.9, 0.7)}, {"fc": 128}))
        quality 0.9 dense; with one layer pruned:
        | layer | weights |    50 % |    90 % |
        |-------|---------|---------|---------|
        | fc    |     128 | +0.0000 | -0.2000 |
    """

    dense: float
    sparsities: tuple[float, ...]
    quality: dict[str, tuple[float, ...]]
    weights: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """Numbers and strings only.

        Example:
            >>> Sensitivity(0.9, (0.5,), {"fc": (0.8,)}, {"fc": 128}).to_json()["layers"]
            [{'name': 'fc', 'weights': 128, 'quality': [0.8]}]
        """
        layers = [
            {"name": name, "weights": self.weights[name], "quality": list(values)}
            for name, values in self.quality.items()
        ]
        return {"dense": self.dense, "sparsities": list(self.sparsities), "layers": layers}

    def plot(self, path: str | Path) -> None:
        """Draws quality over sparsity, a line a layer, into a PNG.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from .plots import sensitivity

        sensitivity(self.to_json(), Path(path))

    def __str__(self) -> str:
        headers = ["layer", ">weights", *(f">{100 * share:.4g} %" for share in self.sparsities)]
        rows = [
            [
                name or "(the model)",
                f"{self.weights[name]:,d}",
                *(f"{value - self.dense:+.4f}" for value in values),
            ]
            for name, values in self.quality.items()
        ]
        return f"quality {self.dense:.6g} dense; with one layer pruned:\n{render(headers, rows)}"


def sensitivity(
    model: nn.Module,
    evaluate: Callable[[nn.Module], float],
    sparsities: Sequence[float] = (0.5, 0.7, 0.8, 0.9, 0.95),
    pattern: str = "unstructured",
    score: str = "magnitude",
    exclude: str | Iterable[str] = (),
) -> Sensitivity:
    """Prunes one layer at a time, evaluates the model, and gives the layer its weights back.

    Args:
        model: its weights are the same after, even if `evaluate` raises.
        evaluate: model -> quality. It is called once for the dense model and once for each layer
            and sparsity, with the model in the mode in which it is now.
        sparsities: of the one layer, each in [0, 1). For a pattern N:M there is one only.
        pattern, score, exclude: see `Pruner`.

    Raises:
        ValueError: as `Pruner`, or no sparsity is given.

    Example:
        >>> import torch, gossamer as gs
        >>> x = torch.eye(8)
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
        >>> y = model(x)
        >>> found = gs.sensitivity(model, lambda m: -float((m(x) - y).square().mean().detach()))
        >>> list(found.quality), len(found.quality["0"]), torch.equal(model(x), y)
        (['0', '1'], 5, True)
    """
    form = Pattern.named(pattern)
    shares = (form.sparsity,) if form.sparsity is not None else tuple(map(float, sparsities))
    if not shares:
        raise ValueError("sparsities is empty: give the shares to try, such as (0.5, 0.9)")
    layers = [layer for layer in survey(model, form, exclude) if not layer.skipped]
    quality: dict[str, tuple[float, ...]] = {}
    dense = float(evaluate(model))
    for layer in layers:
        before, found = layer.weight.detach().clone(), []
        for share in shares:
            try:
                _prune(layer, share, pattern, score)
                found.append(float(evaluate(model)))
            finally:
                with torch.no_grad():
                    layer.weight.copy_(before)
        quality[layer.name] = tuple(found)
    return Sensitivity(dense, shares, quality, {x.name: x.weight.numel() for x in layers})


def _prune(layer: Surveyed, share: float, pattern: str, score: str) -> None:
    try:
        Pruner(layer.module, share, pattern, scope="layer", score=score).finish()
    except ValueError as error:
        raise ValueError(f"{layer.name!r}: {error}") from error
