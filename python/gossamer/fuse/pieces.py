"""How many images go through a graph at once, so that the values that they leave stay in cache.

Layer by layer, all images of a batch would go through memory at each. ResNet-50, batch 16, one
thread: 849 -> 514 ms with fp32 weights at 90 % zeros, 143 -> 131 with 1x4 int8, 404 -> 394 dense.
Where values have become small, pieces join: layers of few pixels have large weights (382 -> 363 ms
with sparse fp32, 389 -> 379 dense int8).
"""

from __future__ import annotations

import itertools
import math
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from gossamer.layers import Conv2d, Linear

from .floats import PooledConv2d
from .graph import seen
from .match import activation, addends, alive, flattens, image_op, module_of, shape_read, source
from .rows import in_bytes

# The largest value of a piece; a core's L2 has 0.5 to 2 MB, what cores share more.
_BYTES = 2 << 20
# Pieces join where that many fit into one: what they left is copied there.
_JOIN = 4

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
_VIEWS = {"view", "reshape"}


def images_at_once(graph: fx.Graph) -> dict[str, int]:
    """How many images a thread takes through each stage of a fused graph, by the first node's name.

    A stage's values stay in cache; yet a piece leaves four times as many bytes as the weights of
    linear layers have, which it reads anew.
    """
    nodes, int8 = list(graph.nodes)[:-1], in_bytes(graph)
    inputs = [node for node in nodes if node.op == "placeholder"]
    sizes = {node: max(1, _bytes_an_image(node, int8)) for node in nodes}
    starts, largest = [0], max(sizes.values())
    for begin in range(len(inputs), len(nodes)):
        left = alive(nodes[:begin])
        later = max(sizes[node] for node in [*left, *nodes[begin:]])
        batches = {seen(node).shape[:1] for node in left}
        if _JOIN * later <= min(largest, _BYTES) and batches == {seen(inputs[0]).shape[:1]}:
            starts.append(begin)
            largest = later
    images = {}
    for begin, end in itertools.pairwise([*starts, len(nodes)]):
        own = [sizes[node] for node in [*alive(nodes[:begin]), *nodes[begin:end]]]
        weights = sum(map(_linear_bytes, nodes[begin:end]))
        images[nodes[begin].name] = max(1, _BYTES // max(own), math.ceil(4 * weights / sum(own)))
    return images


def _linear_bytes(node: fx.Node) -> int:
    module = module_of(node)
    if not isinstance(module, Linear | nn.Linear):
        return 0
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def _bytes_an_image(node: fx.Node, int8: set[fx.Node]) -> int:
    shown, module = seen(node), module_of(node)
    if not shown.shape or shown.dtype is None:
        return 0
    pooled = module.pool.pool.stride if isinstance(module, PooledConv2d) else ()
    size = 1 if node in int8 else shown.dtype.itemsize
    return math.prod((*shown.shape[1:], *pooled)) * size


def may_cut(graph: fx.Graph) -> bool:
    """Whether a batch may go through a graph in pieces, and its packed convolutions gain by that.

    All inputs are images then, and all nodes are known to compute each image by itself.
    """
    if not any(isinstance(module_of(node), Conv2d) for node in graph.nodes):
        return False
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
        return type(module) in _LAYERS or activation(node) is not None or flattens(node)
    if node.op not in ("call_function", "call_method"):
        return False
    if node.target in _PRODUCTS or addends(node):
        dims = {len(seen(operand).shape) for operand in node.all_input_nodes}
        return len(dims) == 1 and not node.kwargs
    if flattens(node):
        return True
    if node.target in _VIEWS:
        return len(node.args) > 2 and _counts_images(node.args[1])
    return node.target in _CALLS or activation(node) is not None or image_op(node) is not None


def _counts_images(size: Any) -> bool:
    """Whether a size is -1 or that of the first dimension, as a node."""
    if not isinstance(size, fx.Node):
        return bool(size == -1)
    first = size.target is operator.getitem and size.args[1:] == (0,)
    return first or shape_read(size) == (0,)
