"""Compiles every configuration of the Triton kernels for GPUs that are not here: JSON on stdout.

    python tests/triton_compile.py cuda:80 cuda:90 hip:gfx942

It calls the operators on tensors that nobody fills, with a driver that names another chip and with
kernels that stop after compiling: so what is compiled is what would be launched.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from gossamer import triton as kernels
from gossamer.triton import tiles

IMAGE_STEMS = ("conv_int8", "conv_spmm_int8")
STEMS = ("gemm_int8", "gemm_w8", "gemm_int4", "spmm", "spmm_int8", "sddmm", *IMAGE_STEMS)
N, K = 4096, 4096
# Rows, of sddmm inputs and outputs, by which `choose` comes to each tile of each table.
SIZES = (16, 32, 64, 128, 256, 512, 768)
CONV = [3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 0]


class Elsewhere:
    """A driver of a GPU that only compiles."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def target_of(name: str) -> GPUTarget:
    backend, arch = name.split(":")
    return GPUTarget(backend, int(arch), 32) if backend == "cuda" else GPUTarget("hip", arch, 64)


seconds: dict[str, float] = {}  # of the processor, to compile a kernel, by its hash


@contextlib.contextmanager
def elsewhere(target: GPUTarget) -> Iterator[list[Any]]:
    """Kernels compile for the target and are listed, with their tiles, instead of run."""
    compiled: list[Any] = []
    chip = tiles.chip_of(target.backend, target.arch if target.backend == "cuda" else 0)
    run = JITFunction.run

    def only_compile(self: Any, *args: Any, grid: Any, warmup: bool, **meta: Any) -> Any:
        before = sum(os.times()[:4])  # of the compiler's processes too, whatever else runs here
        kernel = run(self, *args, grid=grid, warmup=True, **meta)
        seconds[kernel.hash] = max(seconds.get(kernel.hash, 0.0), sum(os.times()[:4]) - before)
        tile = [meta[name] for name in ("ROWS", "OUTPUTS", "INPUTS") if name in meta]
        compiled.append((tile, kernel))
        return kernel

    triton.runtime.driver.set_active(Elsewhere(target))
    modules = [vars(sys.modules[f"gossamer.triton.{stem}"]) for stem in STEMS]
    JITFunction.run = only_compile
    for module in modules:
        module["chip"] = lambda device: chip
    try:
        yield compiled
    finally:
        JITFunction.run = run


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


def weight_of(stem: str, n: int, k: int, blocks: bool) -> tuple[Any, ...]:
    """What follows x in the operator's arguments, up to the bias."""
    steps = empty(100, dtype=torch.int32) if blocks else None
    scale, wsum = empty(n), empty(n, dtype=torch.int32)
    panels = empty(-(-n // 16) * 16, k, dtype=torch.int8).view(-1, 16, k // 4, 4).transpose(1, 2)
    if stem == "gemm_int8":
        return panels, scale, wsum, None
    if stem == "gemm_w8":
        return panels, scale
    if stem == "gemm_int4":
        codes = empty(-(-n // 16) * 16, k // 2, dtype=torch.uint8)
        codes = codes.view(-1, 16, k // 8, 4).transpose(1, 2)
        return codes, empty(codes.shape[0], k // 16, 16, dtype=torch.int8), scale, wsum
    if stem == "spmm":
        return empty(100), empty(n, -(-k // 32), 2, dtype=torch.int32), steps, n
    bitmap = empty(n, -(-k // 128), 2, dtype=torch.int32)
    return empty(100, 4, dtype=torch.int8), bitmap, steps, scale, wsum, None


def call(stem: str, m: int, dtype: torch.dtype, conv: bool = False, blocks: bool = False) -> None:
    """One call with m rows, or of a convolution of m x m pixels; of a weight in blocks."""
    n, k = N, 9 * 64 if conv else K
    if stem == "sddmm" and not conv:
        n, k, m = -(-m // 32) * 32, -(-m // 32) * 32, 1024
    operator = getattr(kernels, stem)
    x = empty(1, 64, m, m, dtype=dtype) if conv else empty(m, k, dtype=dtype)
    geometry = CONV if conv else None
    if stem == "sddmm":
        rows = m * m if conv else m
        bitmap = empty(n, k // 32, 2, dtype=torch.int32)
        operator(x, empty(rows, n, dtype=dtype), bitmap, None, 100, n, k, geometry)
    else:
        operator(x, *weight_of(stem, n, k, blocks), empty(n), k, 2, geometry)


def call_images(stem: str, pixels: int, conv: bool = False) -> None:
    """One convolution, 1x1 with a residual or 3x3 without, and once what surrounds them."""
    n, k = N, 9 * 64 if conv else K
    q = empty(1, 16 if conv else K // 4, pixels if conv else 1, pixels, 4, dtype=torch.uint8)
    affine, geometry = empty(2), CONV if conv else [1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0]
    residual = None if conv else empty(1, N // 4, 1, pixels, 4, dtype=torch.uint8)
    own = "gemm_int8" if stem == "conv_int8" else "spmm_int8"
    weight = [part for part in weight_of(own, n, k, blocks=False) if part is not None]
    images = (affine, empty(n), affine, residual, None if conv else affine)
    getattr(kernels, stem)(q, *weight, *images, k, 2, geometry)
    if conv:
        kernels.max_pool(q, [3, 3], [2, 2], [1, 1, 1, 1], [1, 1])
        for to, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16)):
            kernels.unblock(q, affine, 63, to)
            with mock.patch.object(torch, "_assert_async"):  # of what no kernel has written
                kernels.block(empty(1, 63, pixels, pixels, dtype=dtype), affine)


def report(kernel: Any, target: GPUTarget) -> dict[str, Any]:
    """What a compiled kernel needs of the chip, and which matrix instructions it has."""
    found = {"name": kernel.metadata.name, "target": f"{target.backend}:{target.arch}"}
    found |= {"shared": kernel.metadata.shared, "warps": kernel.metadata.num_warps}
    found["stages"] = kernel.metadata.num_stages
    if target.backend == "cuda":
        ptx = kernel.asm["ptx"]
        found |= usage(kernel.asm["cubin"])
        found["copies"] = len(re.findall(r"cp\.async\.c[ag]", ptx))
        pattern = r"(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)[\w.:]*"
    else:
        ptx = kernel.asm["amdgcn"]
        numbers = {
            key: max(map(int, re.findall(rf"\.{key}:\s*(\d+)", ptx)), default=0)
            for key in ("vgpr_count", "vgpr_spill_count")
        }
        stack = max(map(int, re.findall(r"\.private_segment_fixed_size:\s*(\d+)", ptx)))
        # Scalar registers spill into lanes of a vector register, not into memory: no traffic.
        spills = numbers["vgpr_spill_count"]
        found |= {"registers": numbers["vgpr_count"], "spills": spills, "stack": stack}
        pattern = r"v_mfma\w+"
    found["matrix"] = sorted(set(re.findall(pattern, ptx)))
    found["lines"] = len(re.findall(r"^\s+[^./\s].*", ptx, re.MULTILINE))
    return found


def usage(cubin: bytes) -> dict[str, int]:
    """Registers, spills and stack of the machine code, by NVIDIA's tool in triton's wheel."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (
        max(map(int, re.findall(rf"{key}:(\d+)", text))) for key in ("REG", "STACK", "LOCAL")
    )
    return {"registers": registers, "stack": stack, "spills": local}


def compile_for(name: str) -> list[dict[str, Any]]:
    target = target_of(name)
    rows: list[dict[str, Any]] = []
    done: set[str] = set()
    kinds = [*((stem, False) for stem in STEMS), ("spmm", True), ("spmm_int8", True)]
    for (stem, blocks), dtype in itertools.product(kinds, (torch.float16, torch.float32)):
        whole = stem in ("gemm_int8", "gemm_int4", "spmm_int8", *IMAGE_STEMS)
        if whole and dtype == torch.float32:
            continue  # of x, only quantize_rows sees the dtype
        with elsewhere(target) as compiled:
            for m in SIZES:
                if stem in IMAGE_STEMS:
                    call_images(stem, m)
                else:
                    call(stem, m, dtype, blocks=blocks)
            if stem in IMAGE_STEMS:
                call_images(stem, 56, conv=True)
            else:
                call(stem, 56, dtype, conv=True, blocks=blocks)
        for tile, kernel in compiled:
            if kernel.hash not in done:
                done.add(kernel.hash)
                about = {"stem": stem, "blocks": blocks, "dtype": str(dtype), "tile": tile}
                about["seconds"] = seconds[kernel.hash]
                rows.append(about | report(kernel, target))
    return rows


def planted(name: str) -> list[dict[str, Any]]:
    """A tile that no chip has the registers for: the gates must see it."""
    target = target_of(name)
    huge = (tiles.Tile(256, 256, 64, 4, 2),)
    with elsewhere(target) as compiled:
        vars(sys.modules["gossamer.triton.gemm_int8"])["TILES"] = huge
        call("gemm_int8", 4096, torch.float16)
    return [{"tile": tile} | report(kernel, target) for tile, kernel in compiled if tile]


def main() -> None:
    spill, names = sys.argv[1:2] == ["--spill"], [a for a in sys.argv[1:] if a != "--spill"]
    rows = [row for name in names for row in (planted if spill else compile_for)(name)]
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
