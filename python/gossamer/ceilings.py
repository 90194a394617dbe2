"""What no kernel can exceed: arithmetic and read bandwidth, measured with loops of nothing else."""

from __future__ import annotations

import functools
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from . import _C, testing

# Kernels that multiply integers; the others multiply floats.
INTEGER = frozenset({"gemm_int8", "gemm_int4", "spmm_int8"})

_MULADD, _DOT, _READ = range(3)  # gossamer_loop
_MAX_TURNS = 1 << 22
_PAGE = 4096


@dataclass(frozen=True)
class Bound:
    """The least time that a product can take, and what sets it.

    Args:
        ms: milliseconds.
        by: "fp32", "int8", "l2", "l3" or "dram".
    """

    ms: float
    by: str


@dataclass(frozen=True)
class Ceilings:
    """The fastest this CPU does each thing, on `threads` threads together.

    Args:
        isa: of the loops.
        threads: how many ran at once.
        fp32: multiply-adds, GFLOP/s (a multiply-add counts 2).
        int8: the dot of the Isa (vpdpbusd, or vpmaddubsw and what it needs), GOP/s.
        l2, l3, dram: reads from a working set that just this one holds, GB/s.
        l2_bytes, l3_bytes: sizes of these caches, of all threads together.
    """

    isa: str
    threads: int
    fp32: float
    int8: float
    l2: float
    l3: float
    dram: float
    l2_bytes: int
    l3_bytes: int

    def memory(self, size: int) -> str:
        """Which of "l2", "l3", "dram" holds `size` bytes."""
        return "l2" if size <= self.l2_bytes else "l3" if size <= self.l3_bytes else "dram"

    def bound(self, ops: float, size: int, integer: bool) -> Bound:
        """The roofline: max(ops / peak, bytes / bandwidth).

        Calls are repeated, so the operands stay in the smallest memory that holds them all: its
        bandwidth is the one that counts.

        Args:
            ops: operations, 2 a multiply-add, of weights that are stored.
            size: bytes of weight, input and output, each moved once.
            integer: multiplied as integers or as floats.

        Example:
            >>> c = Ceilings("avx2", 1, 100, 200, 100, 50, 20, 2**20, 2**25)
            >>> c.bound(2e8, 1000, integer=True), c.bound(1e6, 2**24, integer=False)
            (Bound(ms=1.0, by='int8'), Bound(ms=0.33554432, by='l3'))
        """
        peak, memory = ("int8" if integer else "fp32"), self.memory(size)
        arithmetic = Bound(1e-6 * ops / getattr(self, peak), peak)
        moving = Bound(1e-6 * size / getattr(self, memory), memory)
        return max(arithmetic, moving, key=lambda bound: bound.ms)

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"ceilings of {self.isa}, {self.threads} thread{'s' * (self.threads > 1)}: "
            f"fp32 {self.fp32:.0f} GFLOP/s, int8 {self.int8:.0f} GOP/s, "
            f"reads L2 {self.l2:.0f}, L3 {self.l3:.0f}, DRAM {self.dram:.0f} GB/s"
        )


def measure(isa: str | None = None, threads: int = 1, seconds: float = 0.1) -> Ceilings:
    """Runs each loop for about `seconds`; the fastest of five rounds is the ceiling.

    Example:
        >>> measure(seconds=0.001).fp32 > 0
        True
    """
    with testing.isa(isa or _C.isa()):
        l2, l3 = _cache(2, 2**20), _cache(3, 2**24)
        # Half an L2 leaves room for what else is there. L3 is shared by all threads, and with
        # neighbours of a virtual machine: a quarter. Four L3s leave nothing of the round before.
        sizes = {
            "l2": l2 // 2,
            "l3": max(l3 // 4 // threads, 2 * l2),
            "dram": min(4 * l3, 2**28) // threads,
        }
        return Ceilings(
            isa=_C.isa(),
            threads=threads,
            fp32=_rate(_MULADD, _PAGE, threads, seconds),
            int8=_rate(_DOT, _PAGE, threads, seconds),
            l2_bytes=l2 * threads,
            l3_bytes=l3,
            **{name: _rate(_READ, size, threads, seconds) for name, size in sizes.items()},
        )


@functools.cache
def of(isa: str, threads: int) -> Ceilings:
    """`measure`, once in a process for each Isa and number of threads."""
    return measure(isa, threads)


def _cache(level: int, otherwise: int) -> int:
    """Bytes of a cache, as the kernel describes the first CPU's; `otherwise` if it does not."""
    for folder in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        if (folder / "level").read_text().strip() == str(level):
            return 1024 * int((folder / "size").read_text().strip().removesuffix("K"))
    return otherwise


def _rate(loop: int, size: int, threads: int, seconds: float) -> float:
    """1e9 operations or bytes a second of all threads together, each on `size` bytes of its own."""
    size = max(_PAGE, size // _PAGE * _PAGE)
    data = [torch.ones(size // 4, dtype=torch.int32) for _ in range(threads)]
    together = threading.Barrier(threads)

    def run(own: torch.Tensor, turns: int) -> tuple[float, float, float]:
        together.wait()
        start = time.perf_counter()
        work, _ = _C.ceiling(loop, own.data_ptr(), size, turns)
        return work, start, time.perf_counter()

    with ThreadPoolExecutor(threads) as pool:

        def once(turns: int) -> tuple[float, float]:
            works, starts, ends = zip(*pool.map(run, data, [turns] * threads), strict=True)
            return sum(works), max(ends) - min(starts)

        turns = 1
        while once(turns)[1] < seconds / 10 and turns < _MAX_TURNS:
            turns *= 2
        return 1e-9 * max(w / t for w, t in (once(turns) for _ in range(5)))
