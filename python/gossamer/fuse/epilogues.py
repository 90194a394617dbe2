"""Activations into the kernels of the layers whose results they alone read."""

from __future__ import annotations

from typing import Any

from torch import fx

from gossamer import ops
from gossamer.layers import Conv2d, Linear

from .graph import absorb, note, own_layer
from .match import activation, label, module_of, only_reader, source, title


def fuse_activations(graph: fx.Graph) -> None:
    """Makes ReLU, ReLU6, SiLU, Hardswish and exact GELU the activation of the packed layer before.

    The others get a note that says why not, where a packed layer is before them.
    """
    for node in list(graph.nodes):
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
