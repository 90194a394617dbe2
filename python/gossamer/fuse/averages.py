"""Average pools of 8-bit images: depthwise convolutions with one weight."""

from __future__ import annotations

import math

import torch
from torch import fx

from gossamer import Int8
from gossamer.layers import Conv2d
from gossamer.packed import pack

from .graph import add_module, note, seen
from .match import AveragePool, source, title
from .trace import Fused


def average(node: fx.Node, pool: AveragePool, low: float, high: float) -> None:
    """The node calls a static convolution from now on, of an input from low to high.

    The sum of a window is exact; what is left to round is what the pool's result, as floats,
    would be rounded to.
    """
    before, root = source(node), node.graph.owning_module
    assert before is not None and isinstance(root, Fused)
    channels, size = seen(before).shape[1], math.prod(pool.kernel)
    weight = torch.full((channels, size), 1 / size)
    packed = pack(weight, Int8(activations="static"), (low, high))
    shape = (pool.kernel, pool.stride, pool.padding)
    layer = Conv2d(packed, None, channels, channels, *shape, groups=channels).eval()
    name = add_module(root, title(node), layer)
    node.op, node.target, node.args, node.kwargs = "call_module", name, (before,), {}
    note(node, "an average pool")
