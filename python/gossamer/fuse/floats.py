"""What stays in floats, with fewer passes over memory.

The dense convolution of an image's three channels and sums are torch's operators still, called so
that they cost less. ResNet-50, batch 1: torch's max-pool takes 6.1 ms of planes and 0.3 of channels
that lie innermost; `ops.max_pool`, which makes planes of both, 0.3 and 0.2. oneDNN's convolution
writes either in the same 2.5 ms.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from gossamer import ops, reference
from gossamer.layers import Conv2d, Linear

from .graph import absorb, add_module, can_wait, own_layer, seen
from .images import gives_floats
from .match import (
    MaxPool,
    activation,
    addends,
    image_op,
    label,
    module_of,
    only_reader,
    source,
    title,
)
from .pools import SeparableMaxPool2d
from .trace import Fused


class PooledConv2d(nn.Module):
    """act(max_pool2d(conv2d(x))), channels innermost in between; the result is laid out as x.

    Of an activation that never falls, which pooling may as well come before: it then sees fewer
    pixels. Exact.
    """

    def __init__(self, conv: nn.Conv2d, pool: SeparableMaxPool2d, act: str) -> None:
        super().__init__()
        self.conv, self.pool, self.act = conv, pool, act

    def forward(self, x: Tensor) -> Tensor:
        """(images, channels, height, width), or one image without the first dimension."""
        if x.dim() != 4 or x.device.type != "cpu":
            return reference.activate(self.pool(self.conv(x)), self.act)
        y = self.conv(x.contiguous(memory_format=torch.channels_last))
        y = self.pool.planes(y) if x.is_contiguous() else self.pool(y)
        if self.act == "relu" and not y.requires_grad:
            return y.relu_()
        return reference.activate(y, self.act)


def settle_floats(fused: Fused) -> None:
    """Max-pools with channels innermost, and additions inside of layers or over their results."""
    for node in list(fused.graph.nodes):
        op = image_op(node)
        if isinstance(op, MaxPool):
            pool = SeparableMaxPool2d(op)
            if not _pool_inside(fused, node, pool):
                _call(fused, node, pool)
        elif addends(node):
            _add(node)


def _call(fused: Fused, node: fx.Node, pool: nn.Module) -> None:
    """In the place of a module, or beside the graph's others where a function was called."""
    if node.op == "call_module":
        fused.set_submodule(str(node.target), pool)
        return
    image, name = source(node), add_module(fused, node.name, pool)
    node.op, node.target = "call_module", name
    node.args, node.kwargs = (image,), {}


# An image's colours, of which torch's convolution reads either layout at the same speed.
_FEW_CHANNELS = 4


def _pool_inside(fused: Fused, node: fx.Node, pool: SeparableMaxPool2d) -> bool:
    """Joins a dense convolution of few channels, and a ReLU, with the pool behind them."""
    before, act = source(node), None
    if before is not None and activation(before) in ("relu", "relu6"):
        before, act = source(before), before
    conv: Any = None if before is None else module_of(before)
    if before is None or type(conv) is not nn.Conv2d or own_layer(before):
        return False
    alone = only_reader(before) is (act or node) and (act is None or only_reader(act) is node)
    if not alone or conv.in_channels > _FEW_CHANNELS:
        return False
    name = "none" if act is None else str(activation(act))
    fused.set_submodule(str(before.target), PooledConv2d(conv, pool, name))
    if act is not None:
        absorb(before, act, label(act))
    absorb(before, node, label(node))
    return True


def _add(node: fx.Node) -> None:
    """Into the layer that computes one of the addends, or over its result."""
    a, b = addends(node) or (node, node)
    ends = [(own, other) for own, other in ((a, b), (b, a)) if _may_hold(own, other, node)]
    for own, other in ends:
        layer: Any = module_of(own)
        if _adds(layer, own) and can_wait(own, node):
            _add_inside(layer, own, other, node)
            return
    if ends:
        _write_over(node, *ends[0])


def _adds(layer: Any, own: fx.Node) -> bool:
    """Whether a layer can add to its result before anything else is done to it."""
    free = not gives_floats(layer) and len(own.args) == 1  # it has no other addend yet
    return free and layer.packed.adds and layer.activation == "none"


def _may_hold(own: fx.Node, other: fx.Node, add: fx.Node) -> bool:
    """Whether a packed layer's result becomes the sum, and is nothing else's."""
    module = module_of(own)
    packed = isinstance(module, Conv2d | Linear) and not own_layer(own)
    alike = seen(own).shape == seen(other).shape and seen(own).dtype == seen(other).dtype
    return (packed or gives_floats(module)) and alike and only_reader(own) is add


def _add_inside(layer: Conv2d | Linear, own: fx.Node, other: fx.Node, add: fx.Node) -> None:
    """The layer takes the addend, and the activation behind the sum."""
    last, reader = add, only_reader(add)
    if reader is not None and source(reader) is add and activation(reader) in ops.ACTIVATIONS:
        last = reader
        layer.activate_with(str(activation(reader)))
    with add.graph.inserting_before(add):
        call = add.graph.call_module(str(own.target), (source(own), other))
    call.meta.update(own.meta)
    absorb(call, last, f"+ {title(other)}" + f", {label(last)}" * (last is not add))
    if last is not add:
        call.graph.erase_node(add)
    call.graph.erase_node(own)


def _write_over(add: fx.Node, own: fx.Node, other: fx.Node) -> None:
    """The sum, and a ReLU that alone reads it, in the memory of one addend."""
    reader = only_reader(add)
    _replace(add, "add_", (own, other))
    if reader is not None and activation(reader) == "relu" and source(reader) is add:
        _replace(reader, "relu_", (add,))


def _replace(node: fx.Node, method: str, operands: tuple[fx.Node | None, ...]) -> None:
    node.op, node.target = "call_method", method
    node.args, node.kwargs = operands, {}
