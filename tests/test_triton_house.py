"""The taste of the GPU kernels, executable: where they are, and who imports them when."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from builds import output
from house import read, under

PACKAGE = Path("python/gossamer")
STEMS = (
    *("gemm_int4", "gemm_int8", "gemm_w8", "im2col", "quantize_rows", "sddmm", "spmm"),
    *("spmm_int8", "block", "unblock", "max_pool", "conv_int8", "conv_spmm_int8"),
)


@pytest.mark.parametrize("stem", STEMS)
def test_a_stem_is_in_its_place_for_gpus(stem: str) -> None:
    code = read(PACKAGE / f"triton/{stem}.py")
    assert Path(f"csrc/kernels/{stem}.cpp").name in {p.name for p in under("csrc", ".cpp")}
    assert code.startswith(f'"""{stem}: ')
    assert f'@triton_op("gossamer_triton::{stem}"' in code
    assert re.search(rf"_gpu\([xq]\.device\)\.{stem}\b", read(PACKAGE / "ops.py"))


def test_only_ops_imports_the_kernels() -> None:
    pattern = r"^\s*(from gossamer(\.triton\b| import .*\btriton\b)|import gossamer\.triton)"
    found = [
        str(path)
        for path in under("python", ".py")
        if re.search(pattern, read(path), re.MULTILINE) and path != PACKAGE / "ops.py"
    ]
    assert not found, f"only ops.py chooses by device, not {found}"


def test_triton_is_imported_when_a_cuda_tensor_arrives_and_not_before() -> None:
    output(
        sys.executable,
        "-c",
        "import sys, torch, gossamer as gs\n"
        "gs.Linear.from_dense(torch.nn.Linear(8, 8), gs.Int8())(torch.randn(2, 8))\n"
        "assert 'gossamer.triton' not in sys.modules and 'triton' not in sys.modules",
    )
