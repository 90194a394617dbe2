"""The Report of a fused model: one row a node, what runs there, what was fused, and why not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from gossamer.compress import format_name
from gossamer.geometry import is_depthwise
from gossamer.layers import Conv2d, Linear, unsupported
from gossamer.report import Report

from .graph import own_layer, seen
from .images import (
    ImageConv2d,
    ImageRelu,
    ImageUpsample,
    ToFloat,
    ToInt8,
    gives_floats,
)
from .match import label, module_of, title, titles
from .pools import ImageMaxPool2d

_BYTES = (ImageConv2d, ImageMaxPool2d, ImageRelu, ImageUpsample, ToInt8)


@dataclass
class FusedRow:
    """One node of the fused graph.

    Args:
        name: of the module that runs there, or of the node.
        runs: the kind of module, function or method, and the format of a packed layer.
        fused: what the layer computes besides, in order: "BatchNorm", "ReLU", "+ name".
        gives: "int8", or the dtype of the result in the example.
        shape: of the result in the example.
        note: why something was not fused, or gives floats.
    """

    name: str
    runs: str
    fused: str
    gives: str
    shape: tuple[int, ...]
    note: str = ""


@dataclass
class FuseReport(Report):
    """The rows of a fused model.

    >>> print(FuseReport([FusedRow("conv1", "Conv2d Int8", "BatchNorm", "fp32", (1, 8, 5, 5))]))
    | node  | runs        | fused     | gives | shape         |
    |-------|-------------|-----------|-------|---------------|
    | conv1 | Conv2d Int8 | BatchNorm | fp32  | 1 x 8 x 5 x 5 |
    1 nodes run, 1 more are fused into them, 0 give int8
    """

    rows: list[Any]

    def _columns(self) -> tuple[list[str], list[list[str]]]:
        headers = ["node", "runs", "fused", "gives", "shape", "note"]
        cells = [
            [r.name, r.runs, r.fused, r.gives, " x ".join(map(str, r.shape)), r.note]
            for r in self.rows
        ]
        kept = [i for i in range(len(headers)) if any(line[i] for line in cells)]
        return [headers[i] for i in kept], [[line[i] for i in kept] for line in cells]

    def _totals(self) -> str:
        inside = sum(len(row.fused.split(", ")) for row in self.rows if row.fused)
        int8 = sum(row.gives == "int8" for row in self.rows)
        return f"{len(self.rows)} nodes run, {inside} more are fused into them, {int8} give int8"


def report_of(graph: fx.Graph) -> FuseReport:
    """A row for each node that computes a tensor."""
    nodes = [node for node in graph.nodes if node.op.startswith("call_")]
    int8 = in_bytes(graph)
    tensors = [node for node in nodes if seen(node).dtype is not None or node.meta.get("note")]
    return FuseReport([_row(node, node in int8) for node in tensors])


def in_bytes(graph: fx.Graph) -> set[fx.Node]:
    """The nodes of a fused graph that give 8 bits."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        moved = node.target is torch.cat and found.issuperset(node.all_input_nodes)
        module = module_of(node)
        if moved or (isinstance(module, _BYTES) and not gives_floats(module)):
            found.add(node)
    return found


def _row(node: fx.Node, is_bytes: bool) -> FusedRow:
    module, shown = module_of(node), seen(node)
    dtype = str(shown.dtype or "").removeprefix("torch.")
    notes = [node.meta.get("note", ""), _why_not(node, module)]
    return FusedRow(
        name=title(node),
        runs=_runs(node, module),
        fused=", ".join(node.meta.get("fused", [])),
        gives="int8" if is_bytes else dtype.replace("float32", "fp32"),
        shape=shown.shape,
        note="; ".join(filter(None, notes)),
    )


def _runs(node: fx.Node, module: nn.Module | None) -> str:
    if isinstance(module, ImageConv2d):
        module = module.layer
    if isinstance(module, Conv2d | Linear):
        return f"{type(module).__name__} {format_name(module.packed.format)}"
    return label(node)


def _why_not(node: fx.Node, module: nn.Module | None) -> str:
    """What a reader of the table would ask of a node that runs in floats."""
    if isinstance(module, nn.Conv2d) and module.groups > 1:
        kind = "depthwise" if is_depthwise(module) else "grouped"
        own = f"{kind}: Int8(activations='static') would keep 8 bits"
        return unsupported(module) or own
    static = module if isinstance(module, Conv2d) and module.packed.static else None
    if static is not None and not static.takes_images:
        return f"padding_mode={static.padding_mode!r} pads floats"
    if gives_floats(module) or (static is not None and not own_layer(node)):
        readers = titles(node.users)
        return f"gives fp32: {readers} {'reads' if len(node.users) == 1 else 'read'} it so"
    if isinstance(module, ToFloat):
        return "for " + titles(node.users)
    return ""
