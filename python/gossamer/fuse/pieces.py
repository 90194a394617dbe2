"""A batch in pieces: as many images at once as leave values that stay in cache, through all layers.

Layer by layer, all images of a batch would go through memory at each. ResNet-50, batch 16, one
thread: 849 -> 514 ms with fp32 weights at 90 % zeros, 143 -> 131 with 1x4 int8, 404 -> 394 dense.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from gossamer.layers import Conv2d, Linear

from .graph import seen
from .match import activation, addends, image_op, module_of, shape_read, source
from .plan import Plan

# The largest value of a piece; a core's L2 has 0.5 to 2 MB, what cores share more.
_BYTES = 4 << 20

_LAYERS: set[Any] = {
    Conv2d,
    Linear,
    nn.Conv2d,
    nn.Linear,
    nn.BatchNorm2d,
    nn.MaxPool2d,
    nn.AvgPool2d,
}
_LAYERS |= {nn.AdaptiveAvgPool2d, nn.Upsample, nn.Sigmoid, nn.Hardsigmoid, nn.LeakyReLU}
_CALLS: set[Any] = {
    F.max_pool2d,
    torch.max_pool2d,
    F.avg_pool2d,
    F.adaptive_avg_pool2d,
    F.interpolate,
}
_CALLS |= {torch.sigmoid, F.sigmoid, F.hardsigmoid, "sigmoid"}
_PRODUCTS = {operator.mul, torch.mul, "mul", "mul_", operator.imul}
_FLATTENS = {torch.flatten, "flatten"}
_VIEWS = {"view", "reshape"}


def images_at_once(graph: fx.Graph, plan: Plan) -> int | None:
    """How many images a thread takes through the whole graph; None: the batch as it comes.

    None where a node may mix images, where no packed convolution is, and where the weights of
    linear layers, which each piece reads anew, weigh more than a quarter of what a piece leaves.
    """
    if not _each_alone(graph):
        return None
    modules = [module_of(node) for node in graph.nodes]
    if not any(isinstance(module, Conv2d) for module in modules):
        return None
    inside = {r.conv for r in plan.residuals.values()} | {r.add for r in plan.residuals.values()}
    inside -= plan.int8
    values = [_bytes_an_image(node, plan) for node in graph.nodes if node not in inside]
    images = max(1, _BYTES // max(values))
    linear = [m for m in modules if isinstance(m, Linear | nn.Linear)]
    weights = sum(t.nbytes for m in linear for t in (*m.parameters(), *m.buffers()))
    return images if 4 * weights <= images * sum(values) else None


def _bytes_an_image(node: fx.Node, plan: Plan) -> int:
    shown = seen(node)
    if not shown.shape or shown.dtype is None or not shown.shape[0]:
        return 0
    size = 1 if node in plan.int8 else shown.dtype.itemsize
    return math.prod(shown.shape[1:]) * size


def _each_alone(graph: fx.Graph) -> bool:
    """Whether all inputs are images, and all nodes are known to compute each image by itself."""
    images: set[fx.Node] = set()
    sizes: set[fx.Node] = set()  # numbers, of a batch or of an image
    for node in graph.nodes:
        if node.op == "placeholder":
            if len(seen(node).shape) != 4:
                return False
        elif not set(node.all_input_nodes) <= images | sizes:
            return False
        elif node.op == "output":
            return set(node.all_input_nodes) <= images
        elif _is_size(node, sizes):
            sizes.add(node)
            continue
        elif not _alone(node):
            return False
        images.add(node)
    return False


def _is_size(node: fx.Node, sizes: set[fx.Node]) -> bool:
    return shape_read(node) is not None or (
        node.target is operator.getitem and source(node) in sizes
    )


def _alone(node: fx.Node) -> bool:
    """Whether the node computes each image of its operands by itself."""
    module = module_of(node)
    if module is not None:
        flat = type(module) is nn.Flatten and module.start_dim == 1
        return flat or type(module) in _LAYERS or activation(node) is not None
    if node.op not in ("call_function", "call_method"):
        return False
    if node.target in _PRODUCTS or addends(node):
        dims = {len(seen(operand).shape) for operand in node.all_input_nodes}
        return len(dims) == 1 and not node.kwargs
    if node.target in _FLATTENS:
        return (*node.args[1:2], *node.kwargs.values()) == (1,)
    if node.target in _VIEWS:
        return len(node.args) > 2 and _counts_images(node.args[1])
    return node.target in _CALLS or activation(node) is not None or image_op(node) is not None


def _counts_images(size: Any) -> bool:
    """Whether a size is -1 or that of the first dimension, as a node."""
    if not isinstance(size, fx.Node):
        return bool(size == -1)
    first = size.target is operator.getitem and size.args[1:] == (0,)
    return first or shape_read(size) == (0,)
