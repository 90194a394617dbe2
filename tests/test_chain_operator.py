"""The operator that calls others (csrc/torch/chain.cpp), and what is asked before each call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from gossamer import _C, ops

POOL = [2, 1, 1, 2, 1, 1, 4, 0, 0, 0, 0, 2, 1, 1]  # 1 x 1 pixels


def test_refusals_of_the_operator() -> None:
    x: Any = torch.randn(1, 4, 5, 5)
    weight: Any = torch.zeros(4)
    for call, message in (
        ([99], "no operator 99"),
        ([-1], "no operator -1"),
        ([12], "end before their arguments"),
        ([12, 0, 2, 1], "end before their arguments"),
        ([12, 4, 0, 0, 0, 0], "no value for argument 4"),
        ([12, -5, 0, 0, 0, 0], "no value for argument -5"),
        ([12, -1, 0, 0, 0, 0], "no value for argument -1"),
        ([0, 1, 1], "a weight that is 1"),
        ([0, 1, -1], "a weight that is -1"),
        ([0, 0, -2, -2], "more weights than there are"),
        ([12, 0, *[2, 1, 1] * 4], "conv needs 11 integers, got 9"),
        ([12, 0, *POOL], "a result that leaves it and is not said to"),
    ):
        with pytest.raises(RuntimeError, match=message):
            called(x, weight, call)
        assert x._use_count() == weight._use_count() == 1, call
    assert called(x, weight, []) == []
    (y,) = called(x, weight, [12, 0, *POOL, 13, 3, *POOL])
    assert torch.equal(x, y) and x.data_ptr() != y.data_ptr()


def test_what_is_read_later_is_not_written_over() -> None:
    weight = torch.zeros(1)
    for operator, count in ((6, 4), (10, 7)):  # conv_int8_, conv_spmm_int8_
        call = [operator, 0, *[-2] * count, -1, -1, 2, -1, 4, 0, 0]
        with pytest.raises(RuntimeError, match="writes over a value that is read later"):
            ops.chain_keep([weight] * count, call)


def called(x: Tensor, weight: Tensor, calls: list[int]) -> list[Tensor]:
    number = ops.chain_keep([weight], calls)
    try:
        return ops.chain([x], number)
    finally:
        for _ in range(2):
            ops.chain_drop(number)
            with pytest.raises(RuntimeError, match=f"no chain is kept as {number}"):
                ops.chain([x], number)


def test_a_tracer_does_not_see_what_is_collected() -> None:
    number = ops.chain_keep([], [])

    def work(x: Tensor) -> Tensor:
        ops.chain_drop(number)
        return x + 1

    traced = make_fx(work)(torch.zeros(2))
    assert [node.op for node in traced.graph.nodes] == ["placeholder", "call_function", "output"]


def test_facts_hold() -> None:
    weight = object()
    mapping = {"a": weight, "none": None}
    assert _C.holds([(mapping, "a", weight, "none", None, "b", None)], [{}])
    assert _C.holds([], [])
    for fact in (("a", object()), ("a", None), ("b", weight), ("none", weight)):
        assert not _C.holds([(mapping, *fact)], [])
    assert not _C.holds([], [{}, mapping])
    wrong: list[Any] = [([()], []), ([({1, 2}, "a", 1)], []), ([[mapping, "a", 1]], []), ([], [()])]
    for facts, empty in wrong:
        with pytest.raises(TypeError, match=r"a fact is a tuple|facts are about dicts"):
            _C.holds(facts, empty)
    with pytest.raises(TypeError, match="unhashable"):
        _C.holds([(mapping, [], 1)], [])
