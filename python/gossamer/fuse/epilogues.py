"""Activations into the kernels of the layers whose results they alone read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import fx

from gossamer import ops
from gossamer.layers import Conv2d, Linear

from .graph import absorb, note, own_layer, seen
from .match import MaxPool, activation, image_op, label, module_of, only_reader, source, title

# The least and the most that activations give which never fall: the largest of what they gave is
# what they give of the largest.
_BOUNDS = {"relu": (0.0, float("inf")), "relu6": (0.0, 6.0)}


def fuse_activations(graph: fx.Graph) -> None:
    """Makes ReLU, ReLU6, SiLU, Hardswish and exact GELU the activation of the packed layer before.

    The others get a note that says why not, where a packed layer is before them.
    """
    for node in list(graph.nodes):
        _before_the_pool(node)
        before, name = source(node), activation(node)
        layer: Any = None if before is None else module_of(before)
        if before is None or name is None or not isinstance(layer, Conv2d | Linear):
            continue
        reason = own_layer(before)
        if only_reader(before) is not node:
            reason = f"{title(before)} is read by others too"
        elif layer.activation != "none":
            reason = f"{title(before)} has {layer.activation} already"
        elif name not in ops.ACTIVATIONS:
            reason = f"the kernels have no {name}"
        if reason:
            note(node, f"not fused: {reason}")
            continue
        layer.activate_with(name)
        absorb(before, node, label(node))


def _before_the_pool(node: fx.Node) -> None:
    """Moves an activation from behind a max-pool to the packed convolution before it; exact."""
    pool, name = source(node), str(activation(node))
    conv = None if pool is None else source(pool)
    if pool is None or conv is None or name not in _BOUNDS:
        return
    layer = module_of(conv)
    if not isinstance(layer, Conv2d) or layer.activation != "none" or own_layer(conv):
        return
    alone = only_reader(pool) is node and only_reader(conv) is pool
    if not alone or not isinstance(image_op(pool), MaxPool):
        return
    least, most = _BOUNDS[name]
    shown = seen(conv)
    pool.meta["seen"] = seen(node)
    node.meta["seen"] = replace(
        shown, low=min(max(shown.low, least), most), high=min(max(shown.high, least), most)
    )
    node.replace_all_uses_with(pool)
    pool.replace_input_with(conv, node)
    node.replace_input_with(pool, conv)
    pool.prepend(node)
