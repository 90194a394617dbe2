"""Which values stay 8 bits between layers, and by which scale and zero point.

A value can be an 8-bit image where a static convolution computes it, alone or with an addition, or
where bytes are only moved or compared: max-pooling, concatenation, nearest upsampling, ReLU. An
average pool that a static convolution reads becomes one itself. A value is an image where somebody
reads it as such: a static convolution, an addition that became a residual, a mean over pixels, or
an operation that moves bytes and is itself such an image.

Each value has one scale and zero point, an *affine*; operations that move bytes share one with what
they read. It is the `x_affine` of the static convolutions that read the value; where these differ
(a concatenation has a wider range than its parts), all take the range that holds theirs. What no
static convolution reads has the range that the example showed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from gossamer import ops
from gossamer.layers import Conv2d
from gossamer.packed import affine_of, range_of

from .averages import average
from .graph import can_wait, note, own_layer, seen
from .match import (
    Cat,
    ImageOp,
    PixelMean,
    activation,
    addends,
    average_pool,
    image_op,
    module_of,
    only_reader,
    shape_read,
    source,
    title,
    titles,
)


@dataclass
class Residual:
    """activation(conv + other), which one kernel computes."""

    conv: fx.Node
    other: fx.Node
    add: fx.Node
    activation: str


@dataclass
class Plan:
    """Which nodes give 8-bit images.

    Attributes:
        ops: of nodes that work on images as bytes; `PixelMean` alone gives floats.
        residuals: by the last node of each, the activation if there is one.
        int8: the nodes that give 8-bit images.
        affines: of these nodes, and of floats that are quantized to be a residual.
    """

    ops: dict[fx.Node, ImageOp] = field(default_factory=dict)
    residuals: dict[fx.Node, Residual] = field(default_factory=dict)
    int8: set[fx.Node] = field(default_factory=set)
    affines: dict[fx.Node, Tensor] = field(default_factory=dict)


def make_plan(graph: fx.Graph) -> Plan:
    """Decides for each node of the graph."""
    plan = Plan()
    able = _able(graph, plan)
    for node in reversed(graph.nodes):
        if node in able and any(_wants(reader, node, plan) for reader in node.users):
            plan.int8.add(node)
    plan.residuals = {tail: r for tail, r in plan.residuals.items() if tail in plan.int8}
    plan.int8 -= {residual.conv for residual in plan.residuals.values()}
    for group in _groups(plan):
        _share_affine(group, plan)
    for residual in plan.residuals.values():
        if residual.other not in plan.int8:
            convs = _static_readers(residual.other)
            own = [conv.packed.get_buffer("x_affine") for _, conv in convs]
            plan.affines[residual.other] = own[0] if own else affine_of(*_range(residual.other))
    return plan


def static_conv(node: fx.Node) -> Conv2d | None:
    """The convolution that a node calls, if 8-bit images can go in and out of it."""
    layer, before = module_of(node), source(node)
    if not isinstance(layer, Conv2d) or before is None or len(seen(before).shape) != 4:
        return None
    return layer if layer.takes_images and not own_layer(node) else None


def parts(node: fx.Node, op: ImageOp) -> tuple[fx.Node, ...]:
    """The images that an operation reads."""
    before = source(node)
    if isinstance(op, Cat):
        return op.parts
    return () if before is None else (before,)


def _able(graph: fx.Graph, plan: Plan) -> set[fx.Node]:
    """The nodes that can give 8-bit images.

    Finds operations and residuals on the way, and makes convolutions of average pools.
    """
    able: set[fx.Node] = set()
    for node in graph.nodes:
        if node.meta.get("pinned"):
            continue
        residual = _residual(node)
        if residual is not None:
            plan.residuals.pop(residual.add, None)
            able.discard(residual.add)
            plan.residuals[node] = residual
            able.add(node)
        elif static_conv(node) is not None or _average(node, able):
            able.add(node)
        else:
            op = image_op(node)
            if op is None:
                continue
            images = parts(node, op)
            reason = _why_floats(images, able)
            if not reason:
                plan.ops[node] = op
                if not isinstance(op, PixelMean):
                    able.add(node)
            elif any(image in able for image in images):
                note(node, reason)
    return able


def _residual(node: fx.Node) -> Residual | None:
    """The residual that ends at this node, as far as it is seen now: an activation may follow."""
    add, name = source(node), activation(node)
    if add is None or name not in ops.ACTIVATIONS or only_reader(add) is not node:
        add, name = node, "none"
    both = addends(add) or ()
    for conv, other in (both, reversed(both)) if both else ():
        layer = static_conv(conv)
        alike = seen(conv).shape == seen(other).shape and seen(conv).dtype == seen(other).dtype
        free = layer is not None and layer.activation == "none" and only_reader(conv) is add
        if free and alike and can_wait(conv, add):
            return Residual(conv, other, add, name)
    return None


def _average(node: fx.Node, able: set[fx.Node]) -> bool:
    """Makes a convolution of an average pool between 8-bit images, if it is one."""
    pool, before = average_pool(node), source(node)
    if pool is None or before not in able or not _static_readers(node):
        return False
    others = [conv.packed.get_buffer("x_affine") for _, conv in _static_readers(before)]
    average(node, pool, *(range_of(others[0]) if others else _range(before)))
    return True


def _why_floats(images: tuple[fx.Node, ...], able: set[fx.Node]) -> str:
    """Why an operation on images cannot work on bytes, or ""."""
    floats = titles(image for image in images if image not in able)
    if floats or not images:
        return f"fp32: {floats} cannot be 8 bits"
    for image in images[:-1]:
        channels = seen(image).shape[1]
        if channels % 4:
            return f"fp32: {title(image)} has {channels} channels, no multiple of 4"
    return ""


def _wants(reader: fx.Node, node: fx.Node, plan: Plan) -> bool:
    """Whether a reader, of which all later nodes are decided, reads 8-bit images."""
    if any(r.add is reader and tail in plan.int8 for tail, r in plan.residuals.items()):
        return True
    if static_conv(reader) is not None:
        return source(reader) is node
    if isinstance(plan.ops.get(reader), PixelMean):
        return len(node.users) == 1  # else it is no reason: floats are there anyway
    return reader in plan.int8 and reader in plan.ops


def _groups(plan: Plan) -> list[set[fx.Node]]:
    """The 8-bit nodes, those together that share an affine."""
    group = {node: {node} for node in plan.int8}
    for node in plan.int8 & plan.ops.keys():
        for part in parts(node, plan.ops[node]):
            both = group[node] | group[part]
            group.update(dict.fromkeys(both, both))
    return list({id(nodes): nodes for nodes in group.values()}.values())


def _static_readers(node: fx.Node) -> list[tuple[fx.Node, Conv2d]]:
    found = [(r, static_conv(r)) for r in node.users if source(r) is node]
    return [(reader, conv) for reader, conv in found if conv is not None]


def _range(node: fx.Node) -> tuple[float, float]:
    return min(seen(node).low, 0.0), max(seen(node).high, 0.0)


def _share_affine(group: set[fx.Node], plan: Plan) -> None:
    """Gives the group its affine, and its readers too where theirs differ."""
    readers, ranges = [], []
    for node in group:
        convs = _static_readers(node)
        readers += convs
        moved = {r for r in node.users if r in plan.int8 and r in plan.ops}
        moved |= {r for r in node.users if shape_read(r) is not None}
        if not convs and set(node.users) - moved:
            ranges.append(_range(node))
    wanted = [conv.packed.get_buffer("x_affine") for _, conv in readers]
    ranges += [range_of(affine) for affine in wanted]
    low, high = min(low for low, _ in ranges), max(high for _, high in ranges)
    # The widest one is taken as it is: another of its range might differ in the last bit.
    widest = [affine for affine in wanted if range_of(affine) == (low, high)]
    affine = widest[0] if widest else affine_of(low, high)
    plan.affines.update(dict.fromkeys(group, affine))
    for reader, conv in readers:
        if not torch.equal(conv.packed.get_buffer("x_affine"), affine):
            conv.packed = conv.packed.with_affine(affine)
            note(reader, "takes the range of a value that others read or share too")
