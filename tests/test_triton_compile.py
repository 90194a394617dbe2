"""Every configuration of the Triton kernels, compiled for GPUs that are not here, and its gates."""

from __future__ import annotations

import json
import os
import sys
from functools import cache
from typing import Any

import pytest
from builds import ROOT, output

pytest.importorskip("triton")
from triton_compile import IMAGE_STEMS, STEMS

from gossamer.triton import tiles

TARGETS = ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942")
SPARSE = ("spmm", "spmm_int8")
# By stem, and whether the weight is in blocks and its steps are listed.
TABLES = {(stem, False): vars(sys.modules[f"gossamer.triton.{stem}"])["TILES"] for stem in STEMS}
TABLES |= {
    (stem, True): vars(sys.modules[f"gossamer.triton.{stem}"])["BLOCK_TILES"] for stem in SPARSE
}
INTEGER_STEMS = ("gemm_int8", "gemm_int4", "spmm_int8", *IMAGE_STEMS)
REGISTERS = 65536  # of a multiprocessor; AMD has 512 vector registers a lane of a SIMD


def compiled(*arguments: str) -> list[dict[str, Any]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = str(ROOT / "tests/triton_compile.py")
    return json.loads(output(sys.executable, script, *arguments, env=environment).splitlines()[-1])


@cache
def kernels(target: str) -> list[dict[str, Any]]:
    return compiled(target)


def products(target: str) -> list[dict[str, Any]]:
    return [k for k in kernels(target) if k["name"] in {f"_{stem}" for stem in STEMS}]


def spilling(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The kernels that keep a value in memory for want of a register, or need a stack."""
    return [kernel for kernel in found if kernel["spills"] or kernel["stack"]]


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_spills(target: str) -> None:
    assert len(kernels(target)) > 20
    assert not spilling(kernels(target))


def test_a_kernel_that_spills_is_found() -> None:
    planted = compiled("--spill", "cuda:90")
    assert spilling(planted) == planted != []


@pytest.mark.parametrize("target", TARGETS)
def test_shared_memory_and_registers_leave_room(target: str) -> None:
    backend, arch = target.split(":")
    on = tiles.chip_of(backend, int(arch) if backend == "cuda" else 0)
    for kernel in kernels(target):
        assert kernel["shared"] <= on.shared, kernel
        if backend == "cuda":
            # Two programs of 4 warps, one of 8; of few rows, which wait for memory, 3 or more.
            threads = 32 * kernel["warps"]
            few = kernel["tile"][:1] == [16] and kernel["dtype"] == "torch.float16"
            together = 3 if few else 8 // kernel["warps"]
            assert kernel["registers"] * threads * max(together, 1) <= REGISTERS, kernel
        else:
            assert kernel["registers"] <= 512, kernel


@pytest.mark.parametrize("target", TARGETS)
def test_every_tile_is_compiled_and_there_are_few(target: str) -> None:
    for kind, table in TABLES.items():
        assert len(table) <= 8
        own = [kernel for kernel in products(target) if (kernel["stem"], kernel["blocks"]) == kind]
        found = {tuple(kernel["tile"]) for kernel in own}
        assert found == {(t.rows, t.outputs, t.inputs) for t in table}, kind


def test_a_first_call_does_not_wait_long() -> None:
    # Seconds of a processor: at most 1.8 on Zen 4, the median 0.7; of a cached kernel none.
    assert max(kernel["seconds"] for kernel in products("cuda:90")) < 3


@pytest.mark.parametrize("target", ["cuda:80", "cuda:90"])
def test_steps_in_a_list_are_fetched_ahead(target: str) -> None:
    # A loop that Triton does not pipeline has no asynchronous copies.
    listed = [kernel for kernel in products(target) if kernel["blocks"]]
    assert len(listed) > 4
    assert all(kernel["copies"] >= kernel["stages"] for kernel in listed)


MATRIX = {
    "cuda:80": ("mma.sync", ".s32.s8.s8"),
    "cuda:90": ("mma", ".s32.s8.s8"),  # wgmma.mma_async for 64 rows or more
    "cuda:100": ("mma", "s8.s8|kind::i8"),
    "hip:gfx942": ("v_mfma", "_i8"),
}


@pytest.mark.parametrize("target", TARGETS)
def test_products_run_on_matrix_units(target: str) -> None:
    unit, of_bytes = MATRIX[target]
    for kernel in products(target):
        assert kernel["matrix"] and all(unit in name for name in kernel["matrix"]), kernel
        if kernel["stem"] in INTEGER_STEMS:
            wanted = of_bytes.split("|")
            assert all(any(w in n for w in wanted) for n in kernel["matrix"]), kernel


def test_many_rows_run_on_the_units_of_their_generation() -> None:
    for target, unit in (("cuda:90", "wgmma.mma_async"), ("cuda:100", "tcgen05.mma")):
        largest = [k for k in products(target) if k["tile"][0] == 128 and k["stem"] == "gemm_int8"]
        assert largest and all(unit in name for k in largest for name in k["matrix"])
