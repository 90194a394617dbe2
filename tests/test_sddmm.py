"""The stem sddmm: a sparse weight's gradient at its entries, against the whole dense one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from products import packed_case, same_bits
from torch import Tensor

import gossamer as gs
from gossamer import ops, reference
from gossamer.packed import pack
from gossamer.packed.index import Index, entry_places
from gossamer.testing import CASES, Case, ImageCase, assert_close
from gossamer.timing import threads

IMAGES = [case for case in CASES["im2col"] if case.shape[0] and case.shape[2] > 1]


def arguments(packed: Any) -> tuple[Tensor, Tensor, Tensor, int, int]:
    return packed.columns, packed.rows, packed.cells, packed.n, packed.k


def check(packed: Any, got: Tensor, x: Tensor, dy: Tensor) -> None:
    """x and dy as rows."""
    places = entry_places(packed.n, 1, Index(packed.columns, packed.rows, packed.cells))
    want = reference.sddmm(x, dy)
    bound = reference.bound(want, dy.T.float(), x.T.float())
    assert got.shape == places[0].shape and got.dtype == torch.float32
    assert_close(got, want[places], bound[places])


@pytest.mark.parametrize("case", CASES["sddmm"], ids=str)
def test_sddmm(isa: str, case: Case) -> None:
    packed, x, dy = packed_case("spmm", case), case.x(), case.dy()
    check(packed, ops.sddmm(x, dy, *arguments(packed)), x, dy)


@pytest.mark.parametrize("case", IMAGES, ids=str)
def test_under_a_convolution(isa: str, case: ImageCase) -> None:
    x = case.x()
    rows = reference.im2col(x, case.conv())
    images, out = len(x), len(rows) // len(x)
    weight = Case("image", 1, rows.shape[1], 7, density=0.4).weight()
    height = (x.shape[2] + sum(case.sides[:2]) - case.dilation[0] * (case.kernel[0] - 1) - 1) // (
        case.stride[0]
    ) + 1
    packed = pack(weight, gs.Sparse())
    dy = torch.randn(images, 7, height, out // height)
    for image, gradient in ((x, dy), (x.contiguous(memory_format=torch.channels_last), dy.mT.mT)):
        got = ops.sddmm(image, gradient, *arguments(packed), case.conv())
        check(packed, got, rows, dy.movedim(1, -1).reshape(-1, 7))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_rows(isa: str, dtype: torch.dtype) -> None:
    for m, k, n in ((1, 7, 5), (3, 40, 33), (66, 100, 17)):
        case = Case("halves", m, k, n)
        packed, x, dy = packed_case("spmm", case), case.x(dtype), case.dy(dtype)
        check(packed, ops.sddmm(x, dy, *arguments(packed)), x, dy)


def test_any_number_of_threads_gives_the_same_bits(isa: str) -> None:
    case = Case("threads", 200, 300, 1100, density=0.2)
    packed, x, dy = packed_case("spmm", case), case.x(), case.dy()
    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append(ops.sddmm(x, dy, *arguments(packed)))
    assert same_bits(results[0], results[1]) and same_bits(results[0], results[2])


def test_strided_and_expanded_gradients() -> None:
    case = Case("strides", 20, 30, 18, density=0.5)
    packed, x = packed_case("spmm", case), case.x()
    wide = torch.randn(20, 40)
    check(packed, ops.sddmm(x, wide[:, 5:23], *arguments(packed)), x, wide[:, 5:23])
    ones = torch.ones(1, 1).expand(20, 18)
    check(packed, ops.sddmm(x, ones, *arguments(packed)), x, ones)
    check(packed, ops.sddmm(x.T.contiguous().T, ones, *arguments(packed)), x, ones)


def test_what_does_not_fit_is_a_sentence() -> None:
    packed = packed_case("spmm", Case("fit", 4, 24, 20))
    index, n, k = arguments(packed)[:3], 20, 24
    x, dy = torch.zeros(4, 24), torch.zeros(4, 20)
    for bad_x, bad_dy, message in (
        (x[:, 1:], dy, "must end with k=24"),
        (x, dy[:, 1:].contiguous(), "must end with k=20|invalid for input"),
        (x[1:], dy, "dy has 4 rows with stride 20, x has 3 rows and the weight n=20"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.sddmm(bad_x, bad_dy, *index, n, k)
    with pytest.raises(RuntimeError, match=r"cells of shape .* do not belong to n=20, k=1000"):
        ops.sddmm(torch.zeros(4, 1000), dy, *index, n, 1000)
    with pytest.raises(TypeError, match="use float32, bfloat16 or float16"):
        ops.sddmm(x.double(), dy, *index, n, k)


def test_opcheck() -> None:
    case = Case("opcheck", 5, 40, 24, density=0.3)
    packed = packed_case("spmm", case)
    torch.library.opcheck(
        torch.ops.gossamer.sddmm.default, (case.x(), case.dy(), *arguments(packed), None)
    )
    conv = gs.Conv2d.from_dense(torch.nn.Conv2d(3, 5, 3), gs.Sparse())
    x = torch.randn(2, 3, 6, 6).contiguous(memory_format=torch.channels_last)
    dy = torch.randn(2 * 4 * 4, 5)
    geometry = [3, 3, 1, 1, 1, 1, 0, 0, 0, 0, 1]
    torch.library.opcheck(
        torch.ops.gossamer.sddmm.default, (x, dy, *arguments(conv.packed), geometry)
    )
