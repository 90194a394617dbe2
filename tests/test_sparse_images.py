"""The stem spmm under a convolution: images of either layout, multiplied as they lie."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from products import expected, same_bits
from torch import Tensor

from gossamer import reference
from gossamer.formats import Sparse
from gossamer.packed import pack
from gossamer.testing import CASES, Case, ImageCase, assert_close
from gossamer.timing import threads

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def image_product(case: ImageCase, x: Tensor) -> tuple[Any, Tensor]:
    rows = reference.im2col(x, case.conv())
    return pack(Case("image", 1, rows.shape[1], 9, density=0.4).weight(), Sparse()), rows


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", CASES["im2col"], ids=str)
def test_spmm_of_images_as_they_lie(isa: str, case: ImageCase, dtype: torch.dtype) -> None:
    x, bias = case.x(dtype), torch.randn(9)
    packed, rows = image_product(case, x)
    last = x.contiguous(memory_format=torch.channels_last)
    first, *others = (
        packed.matmul(image, bias, "silu", case.conv(planar)).contiguous()
        for image in (x, last)
        for planar in (True, False)
    )
    assert all(same_bits(first, y) for y in others)
    y = first.movedim(1, -1).reshape(-1, 9)
    assert_close(y, *expected(packed, rows, bias, "silu"))


@pytest.mark.parametrize("ill", [torch.nan, torch.inf, -torch.inf])
def test_an_ill_pixel_is_ill_in_every_window_that_has_it(isa: str, ill: float) -> None:
    for case in (c for c in CASES["im2col"] if c.shape[0]):
        x = case.x()
        sick = x.clone()
        sick[-1, -1, x.shape[2] // 2, x.shape[3] // 2] = ill
        packed, rows = image_product(case, sick)
        hit = ~rows.isfinite().all(1)
        for form in (torch.contiguous_format, torch.channels_last):
            healthy, y = (
                packed.matmul(t.contiguous(memory_format=form), None, "relu", case.conv())
                .movedim(1, -1)
                .reshape(-1, 9)
                for t in (x, sick)
            )
            assert y[hit].isnan().all() and same_bits(y[~hit], healthy[~hit])


def test_bits_are_those_of_one_thread(isa: str) -> None:
    # One tile of pixels, which two threads share by outputs; then many.
    for size in (7, 40):
        case = ImageCase("threads", (2, 64, size, size), (3, 3), sides=(1, 1, 1, 1))
        packed, _ = image_product(case, case.x())
        results = []
        for count in (1, 2, 3):
            with threads(count):
                results.append(packed.matmul(case.x(), None, "gelu", case.conv()))
        assert same_bits(results[0], results[1]) and same_bits(results[0], results[2])
