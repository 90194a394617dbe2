"""A plan carried out: nodes that give 8-bit images, and the conversions at their borders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from .graph import absorb, add_module, seen
from .images import (
    ImageConv2d,
    ImageMean,
    ImageRelu,
    ImageUpsample,
    ToFloat,
    ToInt8,
    shape_of,
)
from .match import (
    Cat,
    MaxPool,
    Nearest,
    PixelMean,
    flattens,
    label,
    only_reader,
    shape_read,
    source,
    title,
)
from .plan import Plan, Residual, parts, static_conv
from .pools import ImageMaxPool2d
from .trace import Fused


def rewrite(fused: Fused, plan: Plan) -> None:
    """Puts the 8-bit nodes of the plan in the places of those that computed in floats."""
    _Rewriter(fused, plan).run()


class _Rewriter:
    def __init__(self, fused: Fused, plan: Plan) -> None:
        self.fused, self.graph, self.plan = fused, fused.graph, plan
        self.images: dict[fx.Node, fx.Node] = {}  # a node of the plan -> its bytes
        self.floats: dict[fx.Node, fx.Node] = {}  # a node of the plan -> its floats again
        self.quantized: dict[tuple[fx.Node, tuple[float, ...]], fx.Node] = {}  # floats -> bytes

    def run(self) -> None:
        plan = self.plan
        inside = {r.conv for r in plan.residuals.values()} | {
            r.add for r in plan.residuals.values()
        }
        for node in list(self.graph.nodes):
            with self.graph.inserting_before(node):
                if node in plan.int8:
                    self.images[node] = self._image(node)
                elif isinstance(plan.ops.get(node), PixelMean) and source(node) in self.images:
                    self._mean(node)
                elif node not in inside and not self._to_floats(node):
                    self._read_floats(node)
        for node in reversed(list(self.graph.nodes)):
            if node in plan.int8 or node in inside:
                self.graph.erase_node(node)

    def _image(self, node: fx.Node) -> fx.Node:
        """The new node that computes the same as bytes."""
        op, affine = self.plan.ops.get(node), self.plan.affines[node]
        if op is None:
            return self._conv(node, self.plan.residuals.get(node), affine)
        images = [self.images[part] for part in parts(node, op)]
        if isinstance(op, Cat):
            return self._stands_for(self.graph.call_function(torch.cat, (images, 1)), node)
        if isinstance(op, MaxPool):
            return self._call(node, ImageMaxPool2d(op), images)
        if isinstance(op, Nearest):
            sizes = [] if op.size is None else [op.size]
            return self._call(node, ImageUpsample(op.scale_factor), [*images, *sizes])
        return self._call(node, ImageRelu(affine), images)

    def _conv(self, node: fx.Node, residual: Residual | None, affine: Tensor) -> fx.Node:
        """A convolution, with the addition and the activation behind it if there is a residual."""
        conv = node if residual is None else residual.conv
        layer, before = static_conv(conv), source(conv)
        assert layer is not None and before is not None
        operands = [self._quantized(before, layer.packed.get_buffer("x_affine"))]
        own = None
        if residual is not None:
            own = self.plan.affines[residual.other]
            operands.append(self._quantized(residual.other, own))
            layer.activate_with(residual.activation)
            fused = [*conv.meta.get("fused", []), f"+ {title(residual.other)}"]
            fused += [] if residual.add is node else [label(node)]
            conv.meta["fused"] = fused
            conv.meta["seen"] = seen(node)
        self.fused.set_submodule(str(conv.target), ImageConv2d(layer, affine, own))
        image = self.graph.call_module(str(conv.target), tuple(operands))
        return self._stands_for(image, conv)

    def _to_floats(self, node: fx.Node) -> bool:
        """Makes a convolution whose readers want floats read bytes, if there are any."""
        layer, before = static_conv(node), source(node)
        if layer is None or before not in self.images:
            return False
        image = ImageConv2d(layer, None, dtype=seen(node).dtype or torch.float32)
        self.fused.set_submodule(str(node.target), image)
        node.args, node.kwargs = (self.images[before],), {}
        return True

    def _mean(self, node: fx.Node) -> None:
        """Replaces a mean of bytes by one that gives floats."""
        op = self.plan.ops[node]
        assert isinstance(op, PixelMean)
        (part,) = parts(node, op)
        shape, dtype = seen(part).shape, seen(node).dtype or torch.float32
        mean = ImageMean(self.plan.affines[part], shape[1], dtype, op.keepdim)
        call = self._call(node, mean, [self.images[part]])
        node.replace_all_uses_with(call)
        self.graph.erase_node(node)
        reader = only_reader(call)
        if op.keepdim and reader is not None and flattens(reader):
            mean.keepdim = False
            absorb(call, reader, label(reader))

    def _read_floats(self, node: fx.Node) -> None:
        """Whatever else reads bytes gets them as floats, unless it only asks for their shape."""
        asked, before = shape_read(node), source(node)
        if asked is not None and before is not None and before in self.images:
            what: Any = (self.images[before], seen(before).shape[1], *asked)
            node.replace_all_uses_with(self.graph.call_function(shape_of, what))
            self.graph.erase_node(node)
            return
        for read in node.all_input_nodes:
            if read in self.images:
                node.replace_input_with(read, self._as_floats(read))

    def _as_floats(self, node: fx.Node) -> fx.Node:
        if node not in self.floats:
            dtype = seen(node).dtype or torch.float32
            module = ToFloat(self.plan.affines[node], seen(node).shape[1], dtype)
            self.floats[node] = self._call(node, module, [self.images[node]], "_to_float")
        return self.floats[node]

    def _quantized(self, node: fx.Node, affine: Tensor) -> fx.Node:
        """The bytes of a node: its own, or those that its floats are quantized to."""
        if node in self.images:
            return self.images[node]
        key = (node, tuple(affine.tolist()))
        if key not in self.quantized:
            self.quantized[key] = self._call(node, ToInt8(affine), [node], "_to_int8")
        return self.quantized[key]

    def _call(
        self, node: fx.Node, module: nn.Module, operands: Sequence[Any], suffix: str = ""
    ) -> fx.Node:
        """A call of a new module, in the place of a node or, with a suffix, beside it."""
        name = add_module(self.fused, node.name + (suffix or "_image"), module)
        call = self.graph.call_module(name, tuple(operands))
        if not suffix:
            return self._stands_for(call, node)
        call.meta["seen"] = seen(node)
        return call

    @staticmethod
    def _stands_for(call: fx.Node, node: fx.Node) -> fx.Node:
        call.meta.update({k: node.meta[k] for k in ("seen", "fused", "note") if k in node.meta})
        return call
