"""Which layers of a model can be pruned, and why the others are left alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedParameter

from .masks import Pattern
from .patterns import select
from .report import Row


@dataclass
class Surveyed:
    """One weight to prune, or a layer left alone and the reason why."""

    name: str
    module: nn.Linear | nn.Conv2d
    note: str
    skipped: bool

    @property
    def weight(self) -> Tensor:
        """Looked up at each use: load_state_dict(assign=True) and model.to() may replace it."""
        return self.module.weight

    def row(self, pattern: str, mask: Tensor | None) -> Row:
        """The layer's row in a Report; `mask` is True where a weight is kept."""
        weight, kind = self.weight, type(self.module).__name__
        shape = () if isinstance(weight, UninitializedParameter) else tuple(weight.shape)
        after = "" if self.skipped else f"{kind} {pattern}"
        notes = [self.note]
        if mask is not None and (empty := int((~mask.flatten(1).any(1)).sum())):
            notes.append(f"{empty} output{'s have' if empty > 1 else ' has'} no weights left")
        return Row(
            self.name, shape, kind, after, _zeros(weight), note="; ".join(filter(None, notes))
        )


def survey(model: nn.Module, pattern: Pattern, exclude: str | Iterable[str]) -> list[Surveyed]:
    """Every Linear and Conv2d of the model, subclasses too, and what is to be done with it.

    Raises:
        ValueError: there is nothing to prune, `exclude` matches nothing, or a weight is not there.
    """
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
        own = f"{name}.weight" if name else "weight"
        others = [other for other in holders.get(id(weight), []) if other != own]
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
            note = _note(weight, pattern, others)
        layers.append(Surveyed(name, module, note, skipped))
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


def _note(weight: Tensor, pattern: Pattern, others: list[str]) -> str:
    inputs, size, notes = weight.shape[1], pattern.of or pattern.width, []
    if pattern.height > 1 and weight.dim() == 4:
        inputs = (inputs + -inputs % 4) * weight[0, 0].numel()
    if size and inputs % size:
        notes.append(f"the last block of a row is short: {size} does not divide {inputs} inputs")
    if weight.shape[0] % pattern.height:
        notes.append(
            f"the last blocks are low: {pattern.height} does not divide {len(weight)} outputs"
        )
    if others:
        notes.append(f"shared with {', '.join(others)}")
    return "; ".join(notes)


def _zeros(weight: Tensor) -> float:
    if isinstance(weight, UninitializedParameter) or weight.is_meta or weight.numel() == 0:
        return 0.0
    return 1.0 - int(weight.count_nonzero()) / weight.numel()
