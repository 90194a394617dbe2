"""Weights in blocks on a GPU: what is listed, that no other step is taken, and the numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu import DEVICE, kernels, on_gpu, run
from products import STEMS, expected, same_bits
from torch import Tensor, nn

import gossamer as gs
from gossamer import ops, reference, testing
from gossamer.packed import pack
from gossamer.testing import assert_close

pytest.importorskip("triton")
SPARSE = ("spmm", "spmm_int8")
# Blocks (row, column) that live, of 32 x 32.
CASES = {
    "one": (100, 170, [(1, 3)]),
    "none": (40, 70, []),
    "rows without any": (130, 200, [(1, 0), (1, 6), (4, 2)]),
    "the last ones": (70, 300, [(2, 9), (0, 4)]),
    "whole": (64, 256, [(0, 1), (1, 1), (1, 7)]),
}


def weight_of(n: int, k: int, blocks: list[tuple[int, int]]) -> Tensor:
    """(n, k) of zeros but for these blocks, in which some weights are zeros too."""
    dense = torch.randn(n, k, generator=torch.Generator().manual_seed(n + k)) * k**-0.5
    mask = torch.zeros(n, k, dtype=torch.bool)
    for i, j in blocks:
        mask[32 * i : 32 * i + 32, 32 * j : 32 * j + 32] = True
    mask[:, 5::16] = False
    return dense * mask


def moved(stem: str, name: str) -> tuple[Any, Any]:
    """A packed weight, and the same as a GPU has it."""
    packed = pack(weight_of(*CASES[name]), testing.FORMATS[stem])
    return packed, on_gpu(packed)


def rows_of(k: int, m: int = 7) -> Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(k))


def listed(steps: Tensor, groups: int) -> list[tuple[int, int]]:
    """(row, column) of each block in the list."""
    numbers = steps.tolist()
    return [(g, s) for g in range(groups) for s in numbers[numbers[g] : numbers[g + 1]]]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("stem", SPARSE)
def test_the_list_has_the_blocks_that_hold_something_and_no_other(stem: str, name: str) -> None:
    n, _, blocks = CASES[name]
    steps = moved(stem, name)[1].steps
    assert listed(steps, -(-n // 32)) == sorted(blocks)
    assert len(steps) == -(-n // 32) + 1 + len(blocks)


@pytest.mark.parametrize("stem", SPARSE)
def test_weights_that_fill_their_blocks_have_no_list(stem: str) -> None:
    scattered = torch.zeros(64, 256)
    scattered[::7, ::9] = 1  # 98 % zeros, and something in each block
    half = weight_of(64, 64, [(0, 0), (1, 1)])
    for weight in (scattered, half, torch.ones(1, 1)):
        assert on_gpu(pack(weight, testing.FORMATS[stem])).steps is None


@pytest.mark.parametrize("pattern, most", [("32x32", 0.1), ("16x16", 0.35)])
def test_a_pruned_layer_takes_a_share_of_the_steps(pattern: str, most: float) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(640, 640)
    gs.prune_(layer, 0.9, pattern)
    for stem in SPARSE:
        steps = on_gpu(pack(layer.weight.detach(), testing.FORMATS[stem])).steps
        assert len(steps) - 21 <= most * 20 * 20 + 1


@pytest.mark.parametrize("stem", SPARSE)
def test_a_product_takes_the_steps_in_the_list_and_no_other(stem: str) -> None:
    packed, gpu = moved(stem, "rows without any")
    x = rows_of(packed.k)
    want = run(gpu.matmul, x)
    # The list without its second block of group 1: what that block adds is gone, all else stays.
    numbers = gpu.steps.tolist()
    begins = [b - (g > 1) for g, b in enumerate(numbers[:6])]
    gpu.steps = torch.tensor([*begins, numbers[6], numbers[8]], dtype=torch.int32, device=DEVICE)
    got = run(gpu.matmul, x)
    assert torch.equal(got[:, :32], want[:, :32]) and torch.equal(got[:, 64:], want[:, 64:])
    less: Any = packed.unpack()
    less[:, 192:] = 0
    assert not torch.equal(got[:, 32:64], want[:, 32:64])
    if stem == "spmm":
        torch.testing.assert_close(got, x @ less.T)


@pytest.mark.parametrize("m", [1, 7, 130])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("stem", SPARSE)
def test_product(stem: str, name: str, m: int) -> None:
    packed, gpu = moved(stem, name)
    x, bias = rows_of(packed.k, m), torch.randn(packed.n)
    y = run(gpu.matmul, x, bias, "relu")
    assert_close(y, *expected(packed, x, bias, "relu"))
    if stem == "spmm_int8":
        assert same_bits(y, packed.matmul(x, bias, "relu"))


@pytest.mark.parametrize("ill", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("stem", SPARSE)
def test_a_row_that_is_ill_where_nothing_is_read_is_nan(stem: str, ill: float) -> None:
    _, gpu = moved(stem, "one")
    x = rows_of(170)
    x[2, 165] = ill
    y = run(gpu.matmul, x)
    assert y[2].isnan().all() and y[[0, 1, 3, 4, 5, 6]].isfinite().all()
    image = torch.ones(1, 4, 5, 5)
    image[0, 3, 4, 4] = ill
    matrix = torch.zeros(40, 36)
    matrix[:32, :2] = 1  # reads the first tap only; a pixel is ill if any tap of its is
    y = run(on_gpu(pack(matrix, testing.FORMATS[stem])).matmul, image, None, "none", _CONV)
    if stem == "spmm":
        assert y.isnan().all(1).flatten().tolist() == [False] * 8 + [True]


_CONV = [3, 3, 1, 1, 1, 1, 0, 0, 0, 0, 1]


@pytest.mark.parametrize("name", CASES)
def test_sddmm(name: str) -> None:
    packed, gpu = moved("spmm", name)
    x = rows_of(packed.k)
    dy = torch.randn(7, packed.n)
    index = (packed.columns, packed.rows, packed.cells, packed.n, packed.k)
    want = ops.sddmm(x, dy, *index)
    got = run(ops.sddmm, x, dy, *index, None, gpu.bitmap, gpu.steps)
    size = ops.sddmm(x.abs(), dy.abs(), *index)
    assert_close(got, want.double(), 2 * (7 + 8) * reference.EPS32 * size + 2.0**-126)


@pytest.mark.parametrize("pattern", ["16x16", "32x32"])
@pytest.mark.parametrize(
    "dense, shape",
    [(nn.Linear(170, 100), (5, 170)), (nn.Conv2d(32, 64, 3, 2, 1), (2, 32, 6, 7))],
    ids=["linear", "conv"],
)
def test_training_has_the_gradients_of_the_dense_layer(
    dense: Any, shape: tuple[int, ...], pattern: str
) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        dense.reset_parameters()
    gs.prune_(dense, 0.9, pattern)
    layer: Any = gs.Linear if isinstance(dense, nn.Linear) else gs.Conv2d
    layer = on_gpu(layer.from_dense(dense, gs.Sparse(trainable=True)))
    assert layer.packed.steps is not None and layer.packed.transposed_steps is not None
    x = torch.randn(shape, requires_grad=True)
    y = dense(x)
    dy = torch.randn_like(y)
    want_x, want_w, want_b = torch.autograd.grad(y, (x, dense.weight, dense.bias), dy)
    on = x.detach().to(DEVICE).requires_grad_()
    with kernels():
        out = layer(on)
        got = torch.autograd.grad(out, (on, layer.packed.values, layer.bias), dy.to(DEVICE))
    torch.testing.assert_close(out.detach().cpu(), y.detach())
    torch.testing.assert_close(got[0].cpu(), want_x)
    torch.testing.assert_close(got[2].cpu(), want_b)
    layer.packed.values.data = got[1]
    layer.cpu()
    assert layer.packed.steps is None and layer.packed.transposed_steps is None
    torch.testing.assert_close(layer.unpack(), want_w * (dense.weight != 0))


# Rows that lie 2^30 elements apart: the third begins where an int32 ends.

APART = 2**30


def far(x: Tensor) -> Tensor:
    """The same rows, that far apart in memory that nobody else touches."""
    rows = torch.empty((len(x) - 1) * APART + x.shape[1], dtype=x.dtype, device=DEVICE)
    rows = rows.as_strided(x.shape, (APART, 1))
    return rows.copy_(x)


@pytest.mark.parametrize("stem", STEMS)
def test_strides_that_overflow_int32(stem: str) -> None:
    x = rows_of(40, 3).half()
    packed = pack(torch.randn(17, 40), testing.FORMATS[stem])
    y = run(on_gpu(packed).matmul, far(x))
    assert same_bits(y, run(on_gpu(packed).matmul, x))


def test_gradients_of_strides_that_overflow_int32() -> None:
    x, dy = rows_of(40, 3).half(), rows_of(17, 3).half()
    packed = pack(torch.randn(17, 40), gs.Sparse())
    gpu = on_gpu(packed)
    index = (packed.columns, packed.rows, packed.cells, 17, 40, None, gpu.bitmap, gpu.steps)
    assert same_bits(run(ops.sddmm, far(x), far(dy), *index), run(ops.sddmm, x, dy, *index))
