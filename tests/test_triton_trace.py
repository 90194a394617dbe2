"""torch.export and torch.compile(fullgraph=True) of a compressed model on an imagined GPU."""

from __future__ import annotations

import json
import os
import sys
from functools import cache
from typing import Any

import pytest
from builds import ROOT, output

pytest.importorskip("triton")
ROWS = ("gemm_int8", "gemm_int8", "gemm_int4", "spmm", "spmm_int8", "gemm_w8")
IMAGES = ("block", "conv_int8", "max_pool", "conv_spmm_int8", "conv_int8", "unblock")


@cache
def traces() -> dict[str, dict[str, Any]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    text = output(sys.executable, str(ROOT / "tests/triton_trace.py"), env=environment)
    found: dict[str, dict[str, Any]] = json.loads(text.splitlines()[-1])
    return found


@pytest.mark.parametrize(
    "model, dtype, shape, stems, before",
    [
        # Five quantize their inputs, and one searches for what is ill; the last two are in blocks.
        ("rows", "torch.float16", [5, 16], [*ROWS, "spmm", "spmm_int8"], 6),
        # Three turn theirs around.
        ("images", "torch.float32", [5, 8], [*IMAGES], 3),
    ],
)
def test_a_model_on_cuda_is_exported_and_compiled_whole(
    model: str, dtype: str, shape: list[int], stems: list[str], before: int
) -> None:
    found = traces()[model]
    assert found["results"] == [["cuda:0", dtype, shape]] * 2
    ours = [name for name in found["exported"] if name.startswith("gossamer_triton")]
    assert ours == [f"gossamer_triton.{stem}.default" for stem in stems]
    # What a compiler sees, AOTInductor too, are the kernels themselves; it copies no weight.
    (lowered,) = found["lowered"]
    assert lowered.count("triton_kernel_wrapper_functional") == len(stems) + before
    assert not [name for name in lowered if "gossamer" in name or "clone" in name]
