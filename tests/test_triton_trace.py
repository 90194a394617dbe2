"""torch.export and torch.compile(fullgraph=True) of a compressed model on an imagined GPU."""

from __future__ import annotations

import json
import os
import sys

import pytest
from builds import ROOT, output

pytest.importorskip("triton")


def test_a_model_on_cuda_is_exported_and_compiled_whole() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    found = json.loads(
        output(sys.executable, str(ROOT / "tests/triton_trace.py"), env=environment).splitlines()[
            -1
        ]
    )
    assert found["results"] == [["cuda:0", "torch.float16", [5, 16]]] * 2
    stems = ["gemm_int8", "gemm_int8", "gemm_int4", "spmm", "spmm_int8", "gemm_w8"]
    stems += ["spmm", "spmm_int8"]  # in blocks
    ours = [name for name in found["exported"] if name.startswith("gossamer_triton")]
    assert ours == [f"gossamer_triton.{stem}.default" for stem in stems]
    # What a compiler sees, AOTInductor too, are the kernels themselves; it copies no weight.
    (lowered,) = found["lowered"]
    products, quantized, searched = len(stems), 5, 1  # the last for what is ill
    assert lowered.count("triton_kernel_wrapper_functional") == products + quantized + searched
    assert not [name for name in lowered if "gossamer" in name or "clone" in name]
