"""One thread a test, hypothesis without a clock, Triton without a GPU."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import torch
from builds import ROOT
from products import same_bits
from torch import Tensor

from gossamer import _C, ops, testing

# Before anything imports triton: without a GPU its kernels run in its interpreter, on the CPU.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.set_num_threads(1)
hypothesis.settings.register_profile("gossamer", deadline=None)
hypothesis.settings.load_profile("gossamer")


@pytest.fixture(params=_C.isas())
def isa(request):
    """Each instruction set of this CPU, in use while the test runs."""
    with testing.isa(request.param):
        yield request.param


@pytest.fixture
def bench(monkeypatch):
    """Imports a script of bench/."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return importlib.import_module


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many values each call of the operator returned; one that it refused is not there.

    None may write to what it was given.
    """
    seen: list[int] = []
    own = ops.chain

    def counted(values: list[Tensor], *more: Any) -> list[Tensor]:
        before = [value.clone() for value in values]
        results = own(values, *more)
        assert all(map(same_bits, values, before))
        seen.append(len(results))
        return results

    monkeypatch.setattr(ops, "chain", counted)
    yield seen
