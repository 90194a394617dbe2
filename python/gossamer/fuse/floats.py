"""What stays in floats, with fewer passes over memory.

Both are torch's operators still, called so that they cost less: of ResNet-50's 31 ms with fp32
weights at 90 % zeros, batch 1, max-pooling takes 1.2 instead of 6.1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from gossamer.layers import Conv2d, Linear

from .graph import add_module, own_layer, seen
from .match import MaxPool, activation, addends, image_op, module_of, only_reader, source
from .trace import Fused


class LastMaxPool2d(nn.MaxPool2d):
    """max_pool2d of floats with channels innermost, where torch's kernel fills its vectors."""

    def forward(self, x: Tensor) -> Tensor:
        """Exact; the result has the memory format of x."""
        planar = x.device.type == "cpu" and x.dim() == 4 and x.is_contiguous()
        if not planar:
            return self._pool(x)
        return self._pool(x.contiguous(memory_format=torch.channels_last)).contiguous()

    def _pool(self, x: Tensor) -> Tensor:
        return F.max_pool2d(
            x, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode
        )


def settle_floats(fused: Fused) -> None:
    """Max-pools with channels innermost, and writes sums over the results that alone they read."""
    for node in list(fused.graph.nodes):
        op = image_op(node)
        if isinstance(op, MaxPool):
            pool = LastMaxPool2d(op.kernel, op.stride, op.padding, op.dilation, False, op.ceil_mode)
            _call(fused, node, pool)
        elif addends(node):
            _add_in_place(node)
        elif activation(node) == "relu" and _is_own_sum(source(node), node):
            _replace(node, "relu_", (source(node),))


def _call(fused: Fused, node: fx.Node, pool: nn.Module) -> None:
    """In the place of a module, or beside the graph's others where a function was called."""
    if node.op == "call_module":
        fused.set_submodule(str(node.target), pool)
        return
    image, name = source(node), add_module(fused, node.name, pool)
    node.op, node.target = "call_module", name
    node.args, node.kwargs = (image,), {}


def _add_in_place(node: fx.Node) -> None:
    both = addends(node) or ()
    for own, other in (both, reversed(both)) if both else ():
        layer = module_of(own)
        packed = isinstance(layer, Conv2d | Linear) and not own_layer(own)
        alike = seen(own).shape == seen(other).shape and seen(own).dtype == seen(other).dtype
        if packed and alike and only_reader(own) is node:
            _replace(node, "add_", (own, other))
            return


def _is_own_sum(node: fx.Node | None, reader: fx.Node) -> bool:
    """Whether this is a sum that `_add_in_place` wrote over a result, and nobody else reads it."""
    if node is None or node.op != "call_method" or node.target != "add_":
        return False
    own = module_of(node.args[0]) if isinstance(node.args[0], fx.Node) else None
    return isinstance(own, Conv2d | Linear) and only_reader(node) is reader


def _replace(node: fx.Node, method: str, operands: tuple[fx.Node | None, ...]) -> None:
    node.op, node.target = "call_method", method
    node.args, node.kwargs = operands, {}
