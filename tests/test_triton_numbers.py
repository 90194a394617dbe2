"""The Triton kernels against the reference and the CPU's, in Triton's interpreter if need be."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from gpu import DEVICE, kernels, on_gpu, run
from products import INT8_STEMS, STEMS, expected, packed_case, same_bits, static_case
from torch import Tensor, nn

import gossamer as gs
from gossamer import ops, reference, testing
from gossamer.packed import pack
from gossamer.testing import CASES, Case, ImageCase, assert_close

HALVES = [torch.bfloat16, torch.float16]

# The interpreter takes a millisecond a step: of shapes alike one is enough, and of large ones none.
SLOW = ("deep", "gemv", "few rows", "long", "bert", "minilm", "shallow", "narrow")


def small(stem: str) -> list[Case]:
    """One case of each intent, the tiny ones without their repetitions."""
    seen: set[str] = set()
    found = []
    for case in CASES[stem]:
        fresh = case.name not in seen or (case.name == "tiny" and case.n == 33 and case.m == 11)
        if DEVICE == "cuda" or (fresh and not case.name.startswith(SLOW)):
            found.append(case)
        seen.add(case.name)
    return found


PRODUCTS = [pytest.param(stem, c, id=f"{stem}-{c}") for stem in STEMS for c in small(stem)]


def interpreted_wrongly(x: Tensor, dot: bool = False) -> bool:
    """Triton 3.9's interpreter misreads denormal bfloat16, and any in a dot, as its bits."""
    tiny = (x != 0) & (x.abs() < torch.finfo(x.dtype).smallest_normal)
    return DEVICE == "cpu" and x.dtype == torch.bfloat16 and (dot or bool(tiny.any()))


@pytest.mark.parametrize("case", small("quantize_rows"), ids=str)
def test_quantize_rows(case: Case) -> None:
    for dtype in (torch.float32, *HALVES):
        x = case.x(dtype)
        if interpreted_wrongly(x):
            continue
        for affine in (None, torch.tensor([0.02, 100.0])):
            want = reference.quantize_rows(x, affine)
            q, scale, zero = run(ops.quantize_rows, x, affine)
            assert torch.equal(q, want[0]) and torch.equal(zero, want[2]), dtype
            assert same_bits(scale, want[1]), dtype


@pytest.mark.parametrize("affine", [(2.0**-126, 7.0), (3e38, 3.0), (1e-3, 255.0)], ids=str)
def test_quantize_rows_beyond_an_int32(affine: tuple[float, float]) -> None:
    x = torch.tensor([[3e38, -3e38, 0.0, 1.5]])
    got = run(ops.quantize_rows, x, torch.tensor(affine))
    assert torch.equal(got[0], reference.quantize_rows(x, torch.tensor(affine))[0])


@pytest.mark.parametrize("stem, case", PRODUCTS)
def test_product(stem: str, case: Case) -> None:
    packed, x, bias = packed_case(stem, case), case.x(), case.bias()
    y = run(on_gpu(packed).matmul, x, bias)
    assert_close(y, *expected(packed, x, bias))
    if stem in INT8_STEMS:  # the same integers, and the same operations after them
        assert same_bits(y, packed.matmul(x, bias))


@pytest.mark.parametrize("stem", INT8_STEMS)
def test_static_product_has_the_bits_of_the_cpu(stem: str) -> None:
    for case in (Case("static", 3, 40, 33), Case("static", 9, 72, 35, inputs="nan")):
        packed, x, bias = static_case(stem, case), case.x(), case.bias()
        y = run(on_gpu(packed).matmul, x, bias)
        assert same_bits(y, packed.matmul(x, bias))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("stem", STEMS)
def test_16_bit_rows_and_strides(stem: str, dtype: torch.dtype) -> None:
    case = Case("halves", 18, 100, 17)
    packed, bias = packed_case(stem, case), case.bias()
    x = nn.functional.pad(case.x(dtype), (3, 5))[:, 3:103].unflatten(0, (2, 9))[:, 1:]
    if interpreted_wrongly(x, dot=stem == "gemm_w8"):
        pytest.skip("Triton's interpreter multiplies the bits of bfloat16 as integers")
    y = run(on_gpu(packed).matmul, x, bias, "relu")
    assert y.dtype == dtype and y.shape == (2, 8, 17)
    assert_close(y, *expected(packed, x, bias, "relu"))


@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize("stem", STEMS)
def test_activations(stem: str, activation: str) -> None:
    special = [0.0, 1e-40, 87.0, 88.0, 89.0, 104.0, 1e4, 1e19, 3e38]
    bias = torch.cat([torch.linspace(-30, 30, 601), torch.tensor(special), -torch.tensor(special)])
    packed = pack(torch.zeros(len(bias), 4), testing.FORMATS[stem])
    x = torch.zeros(2, 4)
    y = run(on_gpu(packed).matmul, x, bias, activation)
    # One rounding of the quotient apart, and what the rest makes of that.
    want = packed.matmul(x, bias, activation)
    assert_close(y, want.double(), 4 * reference.EPS32 * bias.double().abs() + 2.0**-126)
    assert run(on_gpu(packed).matmul, x, bias * torch.nan, activation).isnan().all()


@pytest.mark.parametrize("planar", [True, False], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("case", CASES["im2col"], ids=str)
def test_convolution(case: ImageCase, planar: bool) -> None:
    channels = -(-case.shape[1] // 4) * 4
    k = case.kernel[0] * case.kernel[1] * channels
    matrix = Case("convolution", 1, k, 19).weight().view(19, -1, channels)
    matrix[..., case.shape[1] :] = 0
    x, conv = case.x(), case.conv(planar)
    for stem in STEMS if planar else INT8_STEMS:
        packed = pack(matrix.flatten(1), testing.FORMATS[stem])
        want = packed.matmul(x, None, "relu", conv)
        y = run(on_gpu(packed).matmul, x, None, "relu", conv)
        assert y.stride() == want.stride()
        if stem in INT8_STEMS:
            assert same_bits(y, want), stem
        else:
            torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
    assert same_bits(run(ops.im2col, x, conv), reference.im2col(x, conv))


def test_an_image_with_a_nan_is_nan_and_the_others_are_not() -> None:
    x = torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    x[1, 2, 3, 4] = torch.nan
    packed = pack(Case("image", 1, 36, 6).weight(), gs.Int8())
    conv = [3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1]
    y = run(on_gpu(packed).matmul, x, None, "none", conv)
    assert same_bits(y, packed.matmul(x, None, "none", conv))
    assert y[1].isnan().all() and y[::2].isfinite().all()


@pytest.mark.parametrize("case", small("sddmm"), ids=str)
def test_sddmm(case: Case) -> None:
    packed: Any = pack(case.weight(), gs.Sparse())
    x, dy = case.x(), case.dy()
    if not x.isfinite().all():
        return  # a gradient of NaN is not asked for
    index = (packed.columns, packed.rows, packed.cells, case.n, case.k)
    want = ops.sddmm(x, dy, *index)
    moved = on_gpu(packed)
    got = run(ops.sddmm, x, dy, *index, None, moved.bitmap, moved.steps)
    size = ops.sddmm(x.abs(), dy.abs(), *index)
    assert_close(got, want.double(), 2 * (case.m + 8) * reference.EPS32 * size + 2.0**-126)


@pytest.mark.parametrize(
    "dense", [nn.Linear(40, 33), nn.Conv2d(5, 6, 3, 2, 1)], ids=["linear", "conv"]
)
def test_training_has_the_gradients_of_the_cpu(dense: Any) -> None:
    torch.manual_seed(0)
    dense = copy.deepcopy(dense)
    with torch.no_grad():
        dense.weight *= torch.rand_like(dense.weight) < 0.3
    layer: Any = (gs.Linear if isinstance(dense, nn.Linear) else gs.Conv2d).from_dense(
        dense, gs.Sparse(trainable=True)
    )
    x = torch.randn((3, 40) if isinstance(dense, nn.Linear) else (2, 5, 7, 8), requires_grad=True)
    y = dense(x)
    dy = torch.randn_like(y)
    want_x, want_w, want_b = torch.autograd.grad(y, (x, dense.weight, dense.bias), dy)
    layer = on_gpu(layer)
    x = x.detach().to(DEVICE).requires_grad_()
    with kernels():
        inputs = (x, layer.packed.values, layer.bias)
        got = torch.autograd.grad(layer(x), inputs, dy.to(DEVICE))
    torch.testing.assert_close(got[0].cpu(), want_x)
    torch.testing.assert_close(got[2].cpu(), want_b)
    layer.packed.values.data = got[1]
    layer.cpu()
    torch.testing.assert_close(layer.unpack(), want_w * (dense.weight != 0))


@pytest.mark.parametrize("group", [16, 32])
def test_both_groups_of_int4(group: int) -> None:
    case = Case("groups", 5, 100, 33)
    packed = pack(case.weight(), dataclasses.replace(gs.Int4(), group=group))
    x = case.x()
    assert_close(run(on_gpu(packed).matmul, x), *expected(packed, x))
