"""Where the time of a traced net goes: milliseconds and GOP/s of each kind of layer."""

from __future__ import annotations

import statistics
import time
from typing import Any

from torch import Tensor, fx, nn

ROUNDS = 15


class _Clock(fx.Interpreter):
    """Runs a graph node by node, and keeps the seconds and the result's shape of each."""

    def __init__(self, model: fx.GraphModule) -> None:
        super().__init__(model)
        self.seconds: dict[fx.Node, list[float]] = {}
        self.shape: dict[fx.Node, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        start = time.perf_counter()
        y = super().run_node(n)
        self.seconds.setdefault(n, []).append(time.perf_counter() - start)
        self.shape[n] = tuple(y.shape) if isinstance(y, Tensor) else ()
        return y


def layer_times(model: fx.GraphModule, x: Tensor) -> list[dict[str, Any]]:
    """Rows of name, calls, ms (of all calls) and gops (of weights that are not zero); most first.

    Layers of equal geometry share a row. A median of rounds, each node on its own clock.
    """
    clock = _Clock(model)
    for _ in range(ROUNDS + 1):
        clock.run(x)
    rows: dict[str, dict[str, Any]] = {}
    for node, seconds in clock.seconds.items():
        if node.op in ("placeholder", "output", "get_attr"):
            continue
        name, ops = _describe(node, clock.shape[node])
        row = rows.setdefault(name, {"name": name, "calls": 0, "ms": 0.0, "ops": 0.0})
        row["calls"] += 1
        row["ms"] += 1e3 * statistics.median(seconds[1:])
        row["ops"] += ops
    for row in rows.values():
        row["gops"] = 1e-6 * row.pop("ops") / row["ms"]
    return sorted(rows.values(), key=lambda row: -row["ms"])


def _describe(node: fx.Node, shape: tuple[int, ...]) -> tuple[str, float]:
    """What a node is, and its operations: two for each weight that is not zero and each pixel."""
    if node.op != "call_module":
        return str(getattr(node.target, "__name__", node.target)), 0.0
    module = node.graph.owning_module.get_submodule(str(node.target))
    layer = getattr(module, "layer", module)
    if not hasattr(layer, "out_channels"):
        return type(module).__name__, 0.0
    pixels = shape[0] * shape[2] * shape[3]
    weight = layer.weight if isinstance(layer, nn.Conv2d) else layer.unpack()
    kernel, stride = layer.kernel_size[0], layer.stride[0]
    residual = " + residual" if len(node.args) > 1 else ""
    depthwise = "depthwise " * (layer.groups > 1)
    name = f"{depthwise}{kernel}x{kernel}" + f" / {stride}" * (stride > 1)
    name += f", {layer.in_channels} -> {layer.out_channels}, {shape[2]} x {shape[3]}{residual}"
    return name, 2.0 * pixels * float(weight.count_nonzero())
