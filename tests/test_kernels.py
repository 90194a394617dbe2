"""Every stem on every Isa against its reference: integers exactly, floats in a computed bound."""

from __future__ import annotations

import operator
from functools import cache
from typing import Any

import pytest
import torch
from products import (
    INT8_STEMS,
    INTEGER_STEMS,
    STEMS,
    expected,
    integers,
    packed_case,
    same_bits,
    static_case,
)
from torch import Tensor

from gossamer import _C, ops, reference, testing
from gossamer.packed import pack
from gossamer.testing import CASES, Case, ImageCase, assert_close
from gossamer.timing import threads

HALVES = [torch.bfloat16, torch.float16]
PRODUCTS = [pytest.param(stem, c, id=f"{stem}-{c}") for stem in STEMS for c in CASES[stem]]


# Against the reference.


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("case", CASES["quantize_rows"], ids=str)
def test_quantize_rows(isa: str, case: Case, dtype: torch.dtype) -> None:
    x = case.x(dtype)
    q, scale, zero = ops.quantize_rows(x)
    want_q, want_scale, want_zero = reference.quantize_rows(x)
    assert torch.equal(q, want_q) and torch.equal(zero, want_zero) and same_bits(scale, want_scale)


# In the middle, at the ends, beyond what an int32 holds of x / scale, beyond 1 / scale.
AFFINES = [(0.02, 100.0), (0.1, 0.0), (1e-3, 255.0), (2.0**-126, 7.0), (3e38, 3.0)]


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("affine", AFFINES, ids=str)
def test_quantize_rows_by_a_given_range(
    isa: str, affine: tuple[float, float], dtype: torch.dtype
) -> None:
    x_affine = torch.tensor(affine)
    for case in CASES["quantize_rows"]:
        x = case.x(dtype)
        got, want = ops.quantize_rows(x, x_affine), reference.quantize_rows(x, x_affine)
        assert torch.equal(got[0], want[0]) and torch.equal(got[2], want[2]), str(case)
        assert same_bits(got[1], want[1]), str(case)
    huge = torch.tensor([[3e38, -3e38, 0.0]])
    q = ops.quantize_rows(huge, torch.tensor([1e-3, 9.0]))[0]
    assert q.tolist() == [[255, 0, 9]]


STATIC = [pytest.param(s, c, id=f"{s}-{c}") for s in INT8_STEMS for c in CASES[s]]


@pytest.mark.parametrize("stem, case", STATIC)
def test_static_product(isa: str, stem: str, case: Case) -> None:
    packed, x, bias = static_case(stem, case), case.x(), case.bias()
    assert_close(packed.matmul(x, bias), *expected(packed, x, bias))


@pytest.mark.parametrize("stem, case", PRODUCTS)
def test_product(isa: str, stem: str, case: Case) -> None:
    packed, x, bias = packed_case(stem, case), case.x(), case.bias()
    assert_close(packed.matmul(x, bias), *expected(packed, x, bias))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("stem", STEMS)
def test_product_of_16_bit_rows(isa: str, stem: str, dtype: torch.dtype) -> None:
    for case in (Case("halves", m, k, n) for m, k, n in ((1, 7, 5), (3, 40, 33), (66, 100, 17))):
        packed, x, bias = packed_case(stem, case), case.x(dtype), case.bias()
        y = packed.matmul(x, bias, "relu")
        assert y.dtype == dtype
        assert_close(y, *expected(packed, x, bias, "relu"))


@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize("stem", STEMS)
def test_activation_of_any_float(isa: str, stem: str, activation: str) -> None:
    # x = 0 leaves the bias as the activation's argument, exactly.
    special = [0.0, 1e-40, 1e-30, 87.0, 88.0, 89.0, 104.0, 1e4, 1e19, 1e30, 3e38, torch.inf]
    bias = torch.cat([torch.linspace(-30, 30, 6001), torch.tensor(special), -torch.tensor(special)])
    if activation in ("gelu", "silu", "hardswish"):
        bias = bias[bias > -torch.inf]  # 0 * Inf
    packed = pack(torch.zeros(len(bias), 4), testing.FORMATS[stem])
    y = packed.matmul(torch.zeros(2, 4), bias, activation)
    want = reference.activate(bias.double(), activation).expand(2, -1)
    size, tiny = bias.double().abs(), 2.0**-149
    bound = {
        "none": 0 * size,
        "relu": 0 * size,
        "gelu": 2 * reference.EPS32 * size + tiny,  # 1 + erf cancels; erf is right to 1.5e-7
        "relu6": 0 * size,
        "hardswish": 4 * reference.EPS32 * (want.abs() + size / 2) + tiny,  # y + 3 cancels
        "silu": 4 * reference.EPS32 * want.abs()
        + size * 2.0**-126
        + tiny,  # exp is never above e^88
    }
    assert_close(y, want, torch.where(bias.isinf(), 0.0, bound[activation]))
    nan = packed.matmul(torch.zeros(1, 4), bias * torch.nan, activation)
    assert nan.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("case", CASES["im2col"], ids=str)
def test_im2col(isa: str, case: ImageCase, dtype: torch.dtype) -> None:
    x = case.x(dtype)
    assert same_bits(ops.im2col(x, case.conv()), reference.im2col(x, case.conv()))


# Exactness: the int32 sums, on the grid where a float shows them.

EXACT_K = 4096


def lanes(*pattern: int) -> Tensor:
    """20 outputs of a pattern repeated over k, every other one negated."""
    sign = 1 - 2 * (torch.arange(20) % 2)[:, None]
    return torch.tensor(pattern).repeat(EXACT_K // len(pattern)) * sign


def adversarial_weights() -> dict[str, Tensor]:
    """Integers that packing keeps: a 16-bit lane (inputs 0 1 4 5 or 2 3 6 7) sums 128 at most."""
    g = torch.Generator().manual_seed(0)
    random = torch.randint(-32, 33, (20, EXACT_K), generator=g)
    random[:, :8] = 32
    rare = torch.zeros(20, EXACT_K, dtype=torch.int64)
    rare[torch.arange(20), torch.randint(EXACT_K, (20,), generator=g)] = 127
    return {
        "full": lanes(32),
        "negative": lanes(-32),
        "alternating": lanes(64, -64),
        "alternating pairs": lanes(64, 64, -64, -64, -64, -64, 64, 64),
        "spikes": lanes(127, -127, 127, -127, 1, -1, 1, -1),
        "late spikes": lanes(0, 0, 1, -127, 0, 0, 127, -1),
        "random": random,
        "one a row": rare,
    }


WEIGHTS = adversarial_weights()


def adversarial_rows(weight: Tensor) -> Tensor:
    """u8 rows, each with a 255: all, alternating, what makes lanes largest and smallest, random."""
    g = torch.Generator().manual_seed(1)
    rows = torch.stack(
        [
            torch.full((EXACT_K,), 255),
            255 * (torch.arange(EXACT_K) % 2),
            255 * (weight[0] > 0).long(),
            255 * (weight[0] < 0).long(),
            torch.randint(0, 256, (EXACT_K,), generator=g),
        ]
    )
    rows[:, -1] = 255
    return rows


@cache
def python_sums(name: str) -> list[list[int]]:
    weight = WEIGHTS[name].tolist()
    rows = adversarial_rows(WEIGHTS[name]).tolist()
    return [[sum(map(operator.mul, row, w)) for w in weight] for row in rows]


def packed_integers(name: str, stem: str, factor: Tensor | float = 1.0) -> Any:
    packed = pack(WEIGHTS[name] * factor, testing.FORMATS[stem])
    assert torch.equal(integers(packed), WEIGHTS[name].float())
    return packed


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("stem", INT8_STEMS)
def test_sums_equal_python_integers(isa: str, stem: str, name: str) -> None:
    packed, sums = packed_integers(name, stem), python_sums(name)
    assert (packed.scale == 1).all()
    rows = adversarial_rows(WEIGHTS[name])
    # x = q with a 255: scale 1, zero 0, and y is the sum rounded to float, exact below 2^24.
    y = packed.matmul(rows.float())
    assert y.tolist() == torch.tensor(sums).float().tolist()
    # x = q - 255 with a -255: scale 1, zero 255. The kernel's sum is as large, 255 * 32 * 4096, but
    # 255 * wsum is taken off before it becomes a float: what is left shows every bit of it.
    few = rows.clone()
    few[:, 64:] = 255
    few[:, 0] = 0
    y = packed.matmul((few - 255).float())
    wsum = [sum(w) for w in WEIGHTS[name].tolist()]
    for row, got in zip(few.tolist(), y.tolist(), strict=True):
        want = [sum(map(operator.mul, row, w)) for w in WEIGHTS[name].tolist()]
        assert max(abs(g) for g in got) < 2**24
        assert [int(g) + 255 * s for g, s in zip(got, wsum, strict=True)] == want


@pytest.mark.parametrize("stem", INT8_STEMS)
def test_sums_with_channels_at_x1000(isa: str, stem: str) -> None:
    # An output at x1000 has a scale of 1000 and the same integers; an input at x1000 has its own.
    factor = torch.ones(20, 1)
    factor[7] = 1000
    packed = packed_integers("random", stem, factor)
    want = torch.tensor(python_sums("random")).float() * packed.scale
    assert packed.scale[7] == 1000
    assert same_bits(packed.matmul(adversarial_rows(WEIGHTS["random"]).float()), want)

    x = torch.randn(4, EXACT_K, generator=torch.Generator().manual_seed(2))
    x[:, 100] *= 1000
    q, scale, zero = (t.tolist() for t in reference.quantize_rows(x))
    sums = [
        [
            sum((v - z) * w for v, w in zip(row, line, strict=True))
            for line in WEIGHTS["random"].tolist()
        ]
        for row, z in zip(q, zero, strict=True)
    ]
    want = torch.tensor(sums).float() * (torch.tensor(scale)[:, None] * packed.scale)
    assert same_bits(packed.matmul(x), want)


@pytest.mark.parametrize("stem", INT8_STEMS)
def test_the_largest_sum_of_all(isa: str, stem: str) -> None:
    packed = pack(torch.tensor([[32.0], [-32.0]]).expand(2, 65536), testing.FORMATS[stem])
    y = packed.matmul(torch.full((1, 65536), 255.0))
    assert y.tolist() == [[255.0 * 32 * 65536, -255.0 * 32 * 65536]]


# The same bits, whatever the Isa, the threads and the batch.


@pytest.mark.skipif(len(_C.isas()) == 1, reason="this CPU has one Isa")
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize("stem", INTEGER_STEMS)
def test_integer_bits_are_those_of_every_isa(stem: str, activation: str) -> None:
    cases = [(packed_case(stem, case), case) for case in CASES[stem]]
    cases += [(static_case(stem, case), case) for case in CASES[stem] if stem in INT8_STEMS]
    for packed, case in cases:
        bias = case.bias()
        for dtype in (torch.float32, *HALVES) if case.m * case.n < 5000 else (torch.float32,):
            results = {}
            for name in _C.isas():
                with testing.isa(name):
                    results[name] = packed.matmul(case.x(dtype), bias, activation)
            first, *others = results.values()
            assert all(same_bits(first, y) for y in others), (str(case), dtype)


@pytest.mark.parametrize("m, k, n", [(130, 256, 300), (1, 2048, 2100), (33, 520, 1100)])
@pytest.mark.parametrize("stem", STEMS)
def test_bits_are_those_of_one_thread(isa: str, stem: str, m: int, k: int, n: int) -> None:
    case = Case("threads", m, k, n, density=0.5, block=4)
    packed, x, bias = packed_case(stem, case), case.x(), case.bias()
    one = packed.matmul(x, bias, "gelu")
    with threads(2):
        two = packed.matmul(x, bias, "gelu")
    assert same_bits(one, two)


@pytest.mark.parametrize("stem", STEMS)
def test_bits_of_a_row_are_those_of_the_row_alone(isa: str, stem: str) -> None:
    for case in (Case("batch", 70, 200, 50, density=0.5, block=4), Case("batch", 130, 33, 17)):
        packed, x, bias = packed_case(stem, case), case.x(), case.bias()
        whole = packed.matmul(x, bias, "silu")
        for size in (1, 2, 3, 5, 16, 64):
            for part, rows in zip(x.split(size), whole.split(size), strict=True):
                # One row of fp32 sparse keeps four sums an output, which round otherwise.
                if stem != "spmm" or len(part) > 1:
                    assert same_bits(packed.matmul(part, bias, "silu"), rows), size


@pytest.mark.parametrize("stem", ["spmm", "spmm_int8"])
def test_threads_share_a_tile_by_its_non_zeros(isa: str, stem: str) -> None:
    # All non-zeros in one chunk: some threads get none, and still have outputs to write.
    for chunk in range(6):
        weight = Case("skew", 1, 512, 3000).weight()
        weight[: chunk * 512] = 0
        weight[(chunk + 1) * 512 :] = 0
        packed = pack(weight, testing.FORMATS[stem])
        x, bias = torch.randn(40, 512), torch.rand(3000)
        one = packed.matmul(x, bias)
        assert_close(one, *expected(packed, x, bias))
        with threads(2):
            assert same_bits(packed.matmul(x, bias), one)


# Rows that are ill, 16-bit floats, memory.


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("ill", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("stem", STEMS)
def test_an_ill_row_is_ill_alone(isa: str, stem: str, ill: float, dtype: torch.dtype) -> None:
    # Most weights are zero, not stored by the sparse stems, and some results go through ReLU.
    case = Case("ill", 67, 50, 20, density=0.1)
    packed, x = packed_case(stem, case), case.x(dtype)
    healthy = packed.matmul(x, activation="relu")
    others = [r for r in range(67) if r not in (5, 66)]
    for column in (0, 31, 49):
        sick = x.clone()
        sick[5, column] = sick[66, column] = ill
        y = packed.matmul(sick, activation="relu")
        assert y[[5, 66]].isnan().all()
        assert same_bits(y[others], healthy[others])


def widen_by_quantizing(halves: Tensor, copies: int) -> Tensor:
    """|value| / 255 as the kernel reads it: the scale of a row that repeats one value."""
    return ops.quantize_rows(halves[:, None].expand(-1, copies))[1]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_16_bit_float_is_read_as_torch_reads_it(isa: str, dtype: torch.dtype) -> None:
    halves = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    want = (halves.float().abs() / 255).clamp(min=2.0**-126)
    want = torch.where(halves.isfinite(), want, torch.nan)
    for copies in (1, 33):  # the masked and the whole load
        assert same_bits(widen_by_quantizing(halves, copies), want)
    # The sign: y = 1 * x, where a zero may lose it.
    y = pack(torch.ones(1, 1), testing.FORMATS["spmm"]).matmul(halves[:, None])[:, 0]
    assert same_bits(y + 0.0, torch.where(halves.isfinite(), halves + 0.0, torch.nan))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_float_is_rounded_to_16_bits_as_torch_rounds_it(isa: str, dtype: torch.dtype) -> None:
    halves = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    wide = halves[halves.isfinite()].double().sort().values.unique()
    middles = ((wide[1:] + wide[:-1]) / 2).float()
    up, down = (torch.nextafter(middles, torch.tensor(end)) for end in (torch.inf, -torch.inf))
    edges = torch.tensor([65519.0, 65519.996, 65520.0, 65536.0, 1e38, 3.4e38, torch.inf, torch.nan])
    payloads = torch.tensor([0x7FFFFFFF, 0x7F800001, -1]).int().view(torch.float32)  # NaN, all
    floats = torch.cat([wide.float(), middles, up, down, edges, -edges, payloads])
    n = len(floats)
    packed = pack(torch.zeros(n, 1), testing.FORMATS["spmm"])
    y = packed.matmul(torch.zeros(1, 1, dtype=dtype), floats)[0]
    assert same_bits(y, (0.0 + floats).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stem", STEMS)
def test_any_strides_and_leading_dimensions(isa: str, stem: str, dtype: torch.dtype) -> None:
    case = Case("strides", 12, 24, 18)
    packed, x = packed_case(stem, case), case.x(dtype)
    want = packed.matmul(x)
    wide = torch.full((12, 40), torch.nan, dtype=dtype)
    wide[:, 7:31] = x
    views = {
        "slice of wider rows": wide[:, 7:31],
        "every other row": torch.stack([x, x * torch.nan], 1)[:, 0],
        "transposed": x.t().contiguous().t(),
        "every other column": torch.stack([x, x * torch.nan], 2)[..., 0],
        "backwards": x.flip(0).contiguous().flip(0),
    }
    for name, view in views.items():
        assert torch.equal(view, x)
        assert same_bits(packed.matmul(view), want), name
    assert same_bits(packed.matmul(x[:1].expand(5, -1)), want[:1].expand(5, -1))
    assert same_bits(packed.matmul(x[:, :1].expand(-1, 24)), packed.matmul(x[:, :1].repeat(1, 24)))
    assert same_bits(packed.matmul(x[3]), packed.matmul(x[3:4])[0])
    for shape in ((12,), (3, 4), (2, 3, 2), (1, 12, 1)):
        assert same_bits(packed.matmul(x.view(*shape, 24)), want.view(*shape, 18))
    shuffled = x.view(3, 4, 24).transpose(0, 1)
    assert same_bits(packed.matmul(shuffled), want.view(3, 4, 18).transpose(0, 1).contiguous())
    for shape in ((0,), (0, 3), (3, 0)):
        assert packed.matmul(x.new_empty(*shape, 24)).shape == (*shape, 18)
