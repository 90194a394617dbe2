"""The ceilings: that the loops do the work they report, and which of them bounds a product."""

from __future__ import annotations

import math

import pytest
import torch

from gossamer import _C, ceilings

MULADD, DOT, READ = range(3)


def loop(which: int, turns: int, size: int = 8192) -> tuple[float, float]:
    data = torch.ones(size // 4, dtype=torch.int32)
    return _C.ceiling(which, data.data_ptr(), size, turns)


@pytest.mark.parametrize("turns", [0, 1, 7, 200])
def test_each_loop_does_the_work_it_reports(isa: str, turns: int) -> None:
    (muladds, a), (dots, s), (size, _) = (loop(which, turns) for which in (MULADD, DOT, READ))
    assert (a, s) == (turns, turns**2)
    assert dots == 8 * muladds, "eight times as many products a lane"
    assert size == 8192 * turns


def test_the_reading_loop_reads_each_word_once(isa: str) -> None:
    data, ones = torch.arange(3072, dtype=torch.int32), torch.ones(3072, dtype=torch.int32)
    mean, count = (_C.ceiling(READ, d.data_ptr(), 12288, 1)[1] for d in (data, ones))
    assert mean / count == pytest.approx(3071 / 2)


@pytest.mark.parametrize(
    ("which", "turns", "size", "sentence"),
    [
        (3, 1, 4096, "loop 3 is unknown"),
        (READ, 1, 5000, "bytes=5000 must be a multiple of 4096"),
        (READ, 1, 0, "bytes=0 must be"),
        (DOT, -1, 4096, "turns=-1 must be"),
        (DOT, 2**22 + 1, 4096, "turns=4194305 must be"),
    ],
)
def test_what_the_loops_refuse(which: int, turns: int, size: int, sentence: str) -> None:
    data = torch.ones(1024, dtype=torch.int32)
    with pytest.raises(ValueError, match=sentence):
        _C.ceiling(which, data.data_ptr(), size, turns)


@pytest.mark.parametrize("threads", [1, 2])
def test_every_ceiling_is_a_number(isa: str, threads: int) -> None:
    measured = ceilings.measure(threads=threads, seconds=0.001)
    assert (measured.isa, measured.threads) == (isa, threads)
    figures = {k: v for k, v in measured.to_json().items() if k not in ("isa", "threads")}
    assert all(math.isfinite(value) and value > 0 for value in figures.values())
    assert measured.l2_bytes < measured.l3_bytes
    assert f"ceilings of {isa}, {threads} thread" in str(measured)


def test_the_roofline_takes_the_slower_of_arithmetic_and_memory() -> None:
    c = ceilings.Ceilings("avx2", 1, 100, 400, 100, 50, 20, l2_bytes=1000, l3_bytes=10000)
    assert c.bound(4e8, 1000, integer=True) == ceilings.Bound(1.0, "int8")
    assert c.bound(4e8, 1000, integer=False) == ceilings.Bound(4.0, "fp32")
    assert c.bound(0, 1000, integer=True) == ceilings.Bound(1e-6 * 1000 / 100, "l2")
    assert c.bound(0, 1001, integer=True) == ceilings.Bound(1e-6 * 1001 / 50, "l3")
    assert c.bound(0, 10001, integer=True) == ceilings.Bound(1e-6 * 10001 / 20, "dram")


def test_a_machine_that_does_not_describe_its_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings.Path, "glob", lambda *_: iter(()))
    assert ceilings._cache(2, 12345) == 12345
