"""Modules made smaller: which attributes hold their sizes, what these were, and new ones set."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from .layers import LAYERS

Sizes = dict[str, Any]
"""Attribute -> int, or a tuple of ints."""

_MARK = "_gossamer_dense_sizes"  # on a module that was made smaller: its sizes before


def _linear(module: Any, sizes: Sizes) -> dict[str, tuple[int, ...]]:
    outputs = sizes["out_features"]
    return {"weight": (outputs, sizes["in_features"]), "bias": (outputs,)}


def _conv(module: Any, sizes: Sizes) -> dict[str, tuple[int, ...]]:
    outputs, inputs = sizes["out_channels"], sizes["in_channels"] // sizes["groups"]
    return {"weight": (outputs, inputs, *module.kernel_size), "bias": (outputs,)}


def _embedding(module: Any, sizes: Sizes) -> dict[str, tuple[int, ...]]:
    return {"weight": (module.num_embeddings, sizes["embedding_dim"])}


def _channels(module: Any, sizes: Sizes) -> dict[str, tuple[int, ...]]:
    (size,) = sizes.values()
    shape = size if isinstance(size, tuple) else (size,)
    return dict.fromkeys(("weight", "bias", "running_mean", "running_var"), shape)


_Shapes = Callable[[Any, Sizes], dict[str, tuple[int, ...]]]
# Type -> the attributes that hold its sizes, and the shapes of its tensors that follow from them.
RESIZABLE: dict[type[nn.Module], tuple[tuple[str, ...], _Shapes]] = {
    nn.Linear: (("in_features", "out_features"), _linear),
    nn.Embedding: (("embedding_dim",), _embedding),
    nn.LayerNorm: (("normalized_shape",), _channels),
    nn.GroupNorm: (("num_channels",), _channels),
    nn.PReLU: (("num_parameters",), _channels),
    **dict.fromkeys(
        (nn.Conv1d, nn.Conv2d, nn.Conv3d),
        (("in_channels", "out_channels", "groups"), _conv),
    ),
    **dict.fromkeys(
        (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), (("num_features",), _channels)
    ),
}
_DENSE: dict[type[nn.Module], type[nn.Module]] = {packed: dense for dense, packed in LAYERS.items()}


def sizes_of(module: nn.Module) -> Sizes:
    """The sizes of a module whose type is in RESIZABLE, or of a packed layer of such a type."""
    attributes, _ = RESIZABLE[_DENSE.get(type(module), type(module))]
    return {name: getattr(module, name) for name in attributes}


def mark(module: nn.Module, before: Sizes) -> None:
    """Keeps the sizes that the module's class would give it; those of the first time stay."""
    if not hasattr(module, _MARK) and before != sizes_of(module):
        setattr(module, _MARK, before)


def carry(module: nn.Module, heir: nn.Module) -> None:
    """Copies the mark, if there is one, to the module that takes the place of another one."""
    if hasattr(module, _MARK):
        setattr(heir, _MARK, getattr(module, _MARK))


def resizes(model: nn.Module) -> dict[str, dict[str, list[Any]]]:
    """Name of each module that was made smaller -> attribute -> [before, now], as a file has it."""
    found = {}
    for name, module in model.named_modules(remove_duplicate=False):
        before: Sizes = getattr(module, _MARK, {})
        if before:
            now = sizes_of(module)
            found[name] = {key: [before[key], now[key]] for key in before}
    return found


def plan(
    model: nn.Module, table: Mapping[str, Mapping[str, Any]]
) -> dict[nn.Module, tuple[Sizes, Sizes]]:
    """Module -> its sizes before and after, from what `resizes` gave for the saved model.

    Raises:
        ValueError: the model has not these modules or sizes, or a size would not shrink.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    planned: dict[nn.Module, tuple[Sizes, Sizes]] = {}
    for name, entry in table.items():
        if name not in modules:
            raise ValueError(f"the file has a slimmed layer {name!r} that the model has not")
        module = modules[name]
        kind = _DENSE.get(type(module), type(module))
        if kind not in RESIZABLE or set(entry) != set(RESIZABLE[kind][0]):
            raise ValueError(
                f"layer {name!r} is a {kind.__name__}, the file has {sorted(entry)} of it"
            )
        here = sizes_of(module)
        pair = tuple({key: _size(name, key, entry[key], end) for key in entry} for end in (0, 1))
        before, after = pair[0], pair[1]
        for key, value in here.items():
            if value not in (before[key], after[key]):
                raise ValueError(
                    f"layer {name!r} had {key}={before[key]} before it was slimmed, "
                    f"the model has {value}"
                )
        if planned.setdefault(module, (before, after)) != (before, after):
            raise ValueError(f"layer {name!r} has two names and two sizes in the file")
    return planned


def _size(name: str, key: str, value: object, end: int) -> Any:
    """One end of [before, after], once both are sizes and it shrinks."""
    pair = [x if isinstance(x, list) else [x] for x in value] if isinstance(value, list) else []
    fits = len(pair) == 2 and len(pair[0]) == len(pair[1])
    if not fits or not all(
        type(a) is int and type(b) is int and 0 < b <= a for a, b in zip(*pair, strict=True)
    ):
        raise ValueError(f"damaged: {key} of layer {name!r} goes to {str(value)[:60]}")
    return tuple(pair[end]) if isinstance(value[end], list) else value[end]  # type: ignore[index]


def shapes(module: nn.Module, sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Shapes of the module's own tensors when its sizes are these."""
    return RESIZABLE[type(module)][1](module, sizes)


def resized(module: nn.Module, sizes: Sizes) -> nn.Module:
    """A shallow copy that says it has these sizes; its tensors are still those of the module."""
    shell = copy.copy(module)
    for key, value in sizes.items():
        setattr(shell, key, value)
    return shell
