"""save, load_: a compressed model as one safetensors file, without pickle, checked before use."""

from __future__ import annotations

import copy
import json
import os
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .compress import Layer, swap
from .content import Content, StrPath, read, shown, write
from .formats import format_from_json
from .layers import LAYERS
from .packed import Packed, packed_from_buffers
from .resize import Sizes, mark, plan, resized, resizes, shapes

_M = TypeVar("_M", bound=nn.Module)


@dataclass(frozen=True)
class _Slot:
    """A place in the model that holds a tensor: module._parameters[key] or module._buffers[key]."""

    registry: dict[str, Any]
    key: str

    @property
    def tensor(self) -> Tensor:
        tensor: Tensor = self.registry[self.key]
        return tensor


def save(model: nn.Module, path: StrPath) -> None:
    """Writes the model's parameters, persistent buffers and packed layers to a safetensors file.

    Tensors that share memory under several names are stored once. The file appears at `path`
    complete or not at all: it is written beside it, synced to disk and then renamed, so that an
    older file survives a failure.

    Args:
        model: compressed or not, on any device.
        path: of the file, by custom with the suffix .safetensors.

    Raises:
        ValueError: the model holds what safetensors cannot store (the name is given), or is
            itself one packed layer.
        OSError: the file cannot be written.

    Example:
        >>> import tempfile, torch, gossamer as gs
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64))
        >>> report = gs.compress_(model, gs.Int8())
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     gs.save(model, f"{folder}/model.safetensors")
        ...     copy = gs.load_(torch.nn.Sequential(torch.nn.Linear(64, 64)),
        ...                     f"{folder}/model.safetensors")
        >>> x = torch.randn(2, 64)
        >>> torch.equal(model(x), copy(x))
        True
    """
    _refuse_single_layer(model)
    state = {name: slot.tensor for name, slot in _slots(model).items()}
    foreign = sorted(model.state_dict().keys() - state.keys())
    if foreign:
        raise ValueError(
            f"{shown(foreign)}: neither a parameter nor a buffer, only pickle could store it"
        )
    first: dict[int, str] = {}
    owner = {name: first.setdefault(id(tensor), name) for name, tensor in state.items()}
    tensors = _storable({name: state[name] for name in first.values()})
    layers = {name: _entry(module) for name, module in _named(model, Layer)}
    aliases = {name: stored for name, stored in owner.items() if name != stored}
    write(path, Content(tensors, layers, aliases, resizes(model)))


def load_(model: _M, path: StrPath) -> _M:
    """Fills `model`, freshly constructed and dense, from a file of `save`; returns it.

    Layers that the file holds packed take the place of the dense ones; layers that `slim_` made
    smaller become so here too, if the model has the sizes from before; all other parameters and
    buffers are copied into the model's own, in the model's dtype and device, as
    nn.Module.load_state_dict does. Tensors that shared memory when they were saved share it again.
    Buffers that are not persistent, and train or eval mode, are not in the file and stay.
    Everything is built and checked before the model changes: an error leaves it as it was.

    Args:
        model: of the class that was saved, before or after `compress_`; it may be on the meta
            device, where its parameters take the file's tensors and dtypes.
        path: a file that `save` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, truncated, not written by `save`, of another version, or
            does not fit the model (the sentence says which names, shapes or settings differ).

    Example:
        See `save`.
    """
    _refuse_single_layer(model)
    content = read(path)
    try:
        sizes = plan(model, content.slim)
        layers = _build_layers(model, content, sizes)
        slots = _match(model, content, sizes)
    except ValueError as error:
        raise ValueError(
            f"{os.fspath(path)} does not fit {type(model).__name__}: {error}"
        ) from error
    for module, (before, after) in sizes.items():
        for key, value in after.items():
            setattr(module, key, value)
        mark(module, before)
    _copy(slots, content)
    swap(model, layers)
    return model


def _refuse_single_layer(model: nn.Module) -> None:
    if isinstance(model, Layer):
        raise ValueError("the model itself is one packed layer: wrap it in nn.Sequential")


def _named(model: nn.Module, kind: Any) -> list[tuple[str, Any]]:
    """Modules of a type, under all their names."""
    modules = model.named_modules(remove_duplicate=False)
    return [(name, module) for name, module in modules if isinstance(module, kind)]


def _slots(model: nn.Module) -> dict[str, _Slot]:
    """Where each parameter and persistent buffer lives, under all its names."""
    slots = {}
    for prefix, module in _named(model, nn.Module):
        for registry in (module._parameters, module._buffers):
            for key, tensor in registry.items():
                if tensor is not None and key not in module._non_persistent_buffers_set:
                    slots[f"{prefix}.{key}" if prefix else key] = _Slot(registry, key)
    return slots


def _entry(layer: Layer) -> dict[str, Any]:
    packed = layer.packed
    return {
        "geometry": layer.geometry(),
        "format": packed.format.to_json(),
        "n": packed.n,
        "k": packed.k,
    }


def _storable(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors, no two in one storage, which safetensors would refuse."""
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in state.items():
        if tensor.is_meta or tensor.layout != torch.strided or tensor.is_quantized:
            kind = "meta" if tensor.is_meta else f"{tensor.dtype}, {tensor.layout}"
            raise ValueError(f"{name} is a tensor that safetensors cannot store ({kind})")
        plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        if plain.untyped_storage().data_ptr() in storages:
            plain = plain.clone()
        storages.add(plain.untyped_storage().data_ptr())
        tensors[name] = plain
    return tensors


_Plan = dict[nn.Module, tuple[Sizes, Sizes]]


def _build_layers(model: nn.Module, content: Content, sizes: _Plan) -> dict[nn.Module, nn.Module]:
    """The packed layers, each with the module of the model whose place it takes."""
    modules = dict(_named(model, nn.Module))
    absent = sorted(name for name in content.layers if not name or name not in modules)
    if absent:
        raise ValueError(f"the file has layers that the model has not: {shown(absent)}")
    owned: dict[str, dict[str, str]] = {name: {} for name in content.layers}
    for name in content.names():
        owner = content.layer_of(name)
        if owner is not None:
            owned[owner][name[len(owner) + 1 :]] = content.stored(name)
    built: dict[nn.Module, tuple[str, nn.Module]] = {}
    cache: dict[object, Packed] = {}
    for name, own in owned.items():
        module, entry = modules[name], content.layers[name]
        if module in built:
            first, _ = built[module]
            if owned[first] != own or content.layers[first] != entry:
                raise ValueError(f"{first} and {name} are one layer in the model, two in the file")
            continue
        try:
            dense = module.to_dense() if isinstance(module, Layer) else module
            if module in sizes:
                dense = resized(dense, sizes[module][1])
            layer = _build_layer(dense, entry, own, content.tensors, cache)
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from error
        built[module] = (name, layer)
    dense = [name for name, module in modules.items() if module in built and name not in owned]
    if dense:
        raise ValueError(f"one layer under several names, not packed in the file: {shown(dense)}")
    return {module: layer for module, (_, layer) in built.items()}


def _build_layer(
    dense: Any,
    entry: dict[str, Any],
    own: dict[str, str],
    tensors: dict[str, Tensor],
    cache: dict[object, Packed],
) -> nn.Module:
    """One packed layer; `own` maps its tensors to stored names, `cache` keeps shared weights so."""
    if type(dense) not in LAYERS:
        raise ValueError(f"packed in the file, but a {type(dense).__name__} in the model")
    outputs = dense.out_features if isinstance(dense, nn.Linear) else dense.out_channels
    if entry["n"] != outputs:
        raise ValueError(f"{entry['n']} outputs in the file, {outputs} in the model")
    format = format_from_json(entry["format"])
    weight = {
        name.removeprefix("packed."): stored
        for name, stored in own.items()
        if name.startswith("packed.")
    }
    key = (format, entry["n"], entry["k"], tuple(sorted(weight.items())))
    if key not in cache:
        buffers = {name: tensors[stored] for name, stored in weight.items()}
        cache[key] = packed_from_buffers(entry["n"], entry["k"], format, buffers)
    bias = tensors.get(own.get("bias", ""))
    if bias is not None and bias.dtype != torch.float32:
        raise ValueError(f"bias is {bias.dtype}, a packed layer has float32")
    shell = copy.copy(dense)
    shell._parameters = {**dense._parameters, "bias": bias}
    geometry = entry["geometry"]
    layer = LAYERS[type(dense)].from_dense(shell, format, cache[key], geometry.get("activation"))
    _compare(geometry, layer.geometry(), dense)
    return layer


def _compare(file: dict[str, Any], built: dict[str, Any], dense: nn.Module) -> None:
    """The file's geometry must be that of the layer it builds and of the dense one it replaces."""
    model = {key: getattr(dense, key, value) for key, value in built.items()}
    # Bias correction gives a layer a bias that had none.
    model["bias"] = dense.bias is not None or built["bias"]
    if file.keys() != built.keys():
        raise ValueError(f"its geometry must have {sorted(built)}, got {sorted(file)}"[:400])
    # As JSON: a tuple of the model is a list in the file, and 1 is not true.
    for key in built:
        there, *here = (json.dumps(table[key]) for table in (file, built, model))
        if here != [there, there]:
            raise ValueError(f"{key} is {there[:80]} in the file, {here[1]} in the model")


def _match(model: nn.Module, content: Content, sizes: _Plan) -> dict[str, _Slot]:
    """Where the tensors that belong to no packed layer go; their names and shapes are all right."""
    smaller = {
        f"{prefix}.{key}" if prefix else key: shape
        for prefix, module in _named(model, nn.Module)
        if module in sizes and not isinstance(module, Layer)
        for key, shape in shapes(module, sizes[module][1]).items()
    }
    slots = {n: slot for n, slot in _slots(model).items() if content.layer_of(n) is None}
    names = {name for name in content.names() if content.layer_of(name) is None}
    problems = {
        "missing in the file": sorted(slots.keys() - names),
        "not in the model": sorted(names - slots.keys()),
        "of another shape": [
            f"{name} ({_described(content[name])} in the file, {_described(slot.tensor)} here)"
            for name, slot in slots.items()
            if name in names and not _fits(content[name], slot.tensor, smaller.get(name))
        ],
    }
    if any(problems.values()):
        raise ValueError(
            "; ".join(f"{what}: {shown(found)}" for what, found in problems.items() if found)
        )
    first: dict[int, str] = {}
    for name, slot in slots.items():
        other = first.setdefault(id(slot.tensor), name)
        tied = content.stored(other) == content.stored(name)
        if not tied and not torch.equal(content[other], content[name]):
            raise ValueError(f"{other} and {name} are tied in the model, but not in the file")
    return slots


def _fits(source: Tensor, target: Tensor, shape: tuple[int, ...] | None) -> bool:
    """The right shape (by default the target's), and a float stays a float, of any precision."""
    return (
        not is_lazy(target)
        and source.shape == (target.shape if shape is None else shape)
        and source.is_floating_point() == target.is_floating_point()
        and source.is_complex() == target.is_complex()
    )


def _copy(slots: dict[str, _Slot], content: Content) -> None:
    """Copies the tensors into the model, and ties what was tied when it was saved."""
    leaders: dict[str, tuple[_Slot, object]] = {}
    with torch.no_grad():
        for name, slot in slots.items():
            target = slot.tensor
            kind = (type(target), target.dtype, target.device)
            leader, like = leaders.setdefault(content.stored(name), (slot, kind))
            if leader is not slot and like == kind:
                slot.registry[slot.key] = leader.tensor
            elif _writable(target) and target.shape == content[name].shape:
                target.copy_(content[name])
            else:
                device = "cpu" if target.is_meta else target.device
                fresh = content[name].to(device, target.dtype, copy=True)
                slot.registry[slot.key] = (
                    nn.Parameter(fresh, target.requires_grad)
                    if isinstance(target, nn.Parameter)
                    else fresh
                )


def _writable(target: Tensor) -> bool:
    """False where copy_ would fail or do nothing: then a new tensor takes the old one's place."""
    overlaps = any(s == 0 and n > 1 for s, n in zip(target.stride(), target.shape, strict=True))
    return not (target.is_meta or target.is_inference() or overlaps)


def _described(tensor: Tensor | None) -> str:
    if tensor is None:
        return "none"
    if is_lazy(tensor):
        return "not initialized"
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
