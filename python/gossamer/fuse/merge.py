"""Packed Linear layers that read the same tensor become one: the q, k and v of attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from gossamer.layers import Conv2d, Linear
from gossamer.packed import Packed

from .graph import Seen, add_module, is_view, note, own_layer, seen
from .match import module_of, source, title
from .trace import Fused

_ANY_STRIDES = {"view": "reshape", "view_as": "reshape_as"}


def merge_linears(fused: Fused) -> None:
    """One product for all layers of one format that read one tensor: it is quantized once.

    Each result becomes a slice of the whole one, with the bits that it had where weights are int8.
    """
    readers: dict[fx.Node, list[fx.Node]] = {}
    for node in fused.graph.nodes:
        read = source(node)
        if read is not None and isinstance(module_of(node), Linear):
            readers.setdefault(read, []).append(node)
    for nodes in readers.values():
        if len(nodes) > 1:
            _merge_readers(fused, nodes)


def _merge_readers(fused: Fused, nodes: list[fx.Node]) -> None:
    groups: dict[Any, list[fx.Node]] = {}
    for node in nodes:
        if reason := _why_not(node):
            note(node, f"not merged: {reason}")
        else:
            groups.setdefault(_kind(node), []).append(node)
    for group in groups.values():
        if len(group) > 1:
            _merge(fused, group)
        else:
            note(group[0], "not merged: no other like it, in format, range and activation")


def _why_not(node: fx.Node) -> str:
    """Why its result cannot be a slice of a wider one, or ""."""
    if node.meta.get("pinned"):
        return "its result is written to in place"
    if any(isinstance(module_of(user), Linear | Conv2d) for user in node.users):
        return "the layer behind it would copy a slice first"
    return own_layer(node)


def _kind(node: fx.Node) -> tuple[Any, ...]:
    """What layers must have in common to be one."""
    layer: Any = module_of(node)
    affine = tuple(layer.packed.x_affine.tolist()) if layer.packed.static else ()
    return layer.packed.format, layer.activation, affine


def _merge(fused: Fused, nodes: list[fx.Node]) -> None:
    graph, layers = fused.graph, [module_of(node) for node in nodes]
    whole = _call(fused, nodes, _stack(layers))
    start = 0
    for node, layer in zip(nodes, layers, strict=True):
        width: Any = layer.out_features  # type: ignore[union-attr]
        _allow_strides(node)
        with graph.inserting_before(node):
            part = graph.call_method("narrow", (whole, -1, start, width))
        part.meta["seen"] = seen(node)
        node.replace_all_uses_with(part)
        graph.erase_node(node)
        start += width


def _stack(layers: list[Any]) -> Linear:
    """The layer whose outputs are those of all, one behind the other."""
    bias = None
    if any(layer.bias is not None for layer in layers):
        zeros = [torch.zeros(layer.out_features) for layer in layers]
        bias = torch.cat(
            [z if own.bias is None else own.bias for own, z in zip(layers, zeros, strict=True)]
        )
    merged = Linear(Packed.concat([layer.packed for layer in layers]), bias, layers[0].activation)
    return merged.train(layers[0].training)


def _call(fused: Fused, nodes: list[fx.Node], layer: Linear) -> fx.Node:
    """A node that calls `layer` where the first of the nodes is."""
    first, names = nodes[0], [title(node) for node in nodes]
    name = "_".join([names[0], *(name.rpartition(".")[2] for name in names[1:])])
    with fused.graph.inserting_before(first):
        whole = fused.graph.call_module(add_module(fused, name, layer), (source(first),))
    shown = [seen(node) for node in nodes]
    low, high = min(s.low for s in shown), max(s.high for s in shown)
    shape = (*shown[0].shape[:-1], layer.out_features)
    whole.meta["seen"] = Seen(shape, shown[0].dtype, low, high)
    inside = [
        what for node in nodes for what in (f"with {title(node)}", *node.meta.get("fused", ()))
    ]
    whole.meta["fused"] = inside[1:]
    return whole


def _allow_strides(node: fx.Node) -> None:
    """Views of a slice need not exist: where `view` would refuse, `reshape` copies."""
    for user in node.users:
        if source(user) is not node or not is_view(user):
            continue
        bits = any(isinstance(value, torch.dtype) for value in user.args)
        if user.op == "call_method" and not bits:
            user.target = _ANY_STRIDES.get(str(user.target), user.target)
        _allow_strides(user)
