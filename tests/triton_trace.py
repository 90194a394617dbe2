"""Traces a compressed model on a GPU that is not here: one line for each kind of trace.

    python tests/triton_trace.py

Run by tests/test_triton_trace.py in a process of its own, where Triton's interpreter is off.
"""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from triton_compile import Elsewhere, target_of

import gossamer as gs

FORMATS = {
    "0": gs.Int8(),
    "2": gs.Int8(),
    "4": gs.Int4(),
    "5": gs.Sparse(),
    "6": gs.SparseInt8(),
    "7": gs.Int8(activations="none"),
    "8": gs.Sparse(),
    "9": gs.SparseInt8(),
}


def laid_out(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if hasattr(module, "_arrange"):
            module._arrange(True)
    return model


def compressed() -> nn.Module:
    """One layer of each stem, sparse ones in blocks too, with its buffers as a GPU has them."""
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(288, 64), nn.GELU(), nn.Linear(64, 40)),
        *(nn.Linear(40, 33), nn.Linear(33, 8), nn.Linear(8, 96)),
        *(nn.Linear(96, 96), nn.Linear(96, 16)),
    )
    gs.prune_(model[8:], 0.7, "32x32", "layer")
    gs.compress_(model, FORMATS)
    return laid_out(model)


def imagine_on_cuda(model: nn.Module) -> None:
    """Every buffer becomes a fake one of the same shape and strides, on cuda."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                shape = (buffer.shape, buffer.stride())
                module._buffers[name] = torch.empty_strided(
                    *shape, dtype=buffer.dtype, device="cuda"
                )


class Images(nn.Module):
    """Every operator on blocked images; the second of two convolutions is sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.same = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Conv2d(8, 8, 1)

    def forward(self, x: Any) -> Any:
        x = F.max_pool2d(self.stem(x), 2)
        x = F.relu(F.interpolate(x, scale_factor=2))
        y = self.same(x) + x
        return self.last(y).amax((2, 3)) + y.mean((2, 3))


def fused() -> nn.Module:
    """With its buffers as a GPU has them."""
    model, x = Images(), torch.randn(2, 3, 10, 10)
    with torch.no_grad(), gs.calibrate(model):
        model(x)
    sparse = gs.SparseInt8(activations="static")
    gs.compress_(model, {"same": sparse, "*": gs.Int8(activations="static")})
    return laid_out(gs.fuse(model, x))


def called(graph: Any) -> list[str]:
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


def traced(model: nn.Module, shape: tuple[int, ...]) -> dict[str, Any]:
    lowered = []

    def lower(module: Any, inputs: Any) -> Any:
        lowered.append(module.graph)
        return module

    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        imagine_on_cuda(model)
        x = torch.empty(shape, device="cuda", dtype=torch.float16)
        y = model(x)
        exported = torch.export.export(model, (x,))
        backend = aot_autograd(fw_compiler=lower, inference_compiler=lower)
        z = torch.compile(model, fullgraph=True, backend=backend)(x)
    return {
        "results": [[str(t.device), str(t.dtype), list(t.shape)] for t in (y, z)],
        "exported": called(exported.graph),
        "lowered": [called(graph) for graph in lowered],
    }


def main() -> None:
    triton.runtime.driver.set_active(Elsewhere(target_of("cuda:90")))
    rows = traced(compressed(), (5, 3, 8, 8))
    print(json.dumps({"rows": rows, "images": traced(fused(), (5, 3, 10, 10))}))


if __name__ == "__main__":
    main()
