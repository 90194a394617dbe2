"""Blocked images: every stem on every Isa against its reference, and between layers bit for bit."""

from __future__ import annotations

import dataclasses
import itertools
from functools import cache
from typing import Any

import pytest
import torch
from products import INT8_STEMS, integers, same_bits
from torch import Tensor

import gossamer as gs
from gossamer import _C, ops, reference, testing
from gossamer.packed import pack
from gossamer.testing import CASES, Case, ImageCase, assert_close
from gossamer.timing import threads

AFFINE, Y_AFFINE, R_AFFINE = (torch.tensor(a) for a in ((0.02, 100.0), (0.03, 90.0), (0.01, 7.0)))
FORMS = (torch.contiguous_format, torch.channels_last)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OUTPUTS = 37  # neither of panels nor of words


@cache
def packed_conv(stem: str, case: ImageCase, n: int = OUTPUTS) -> Any:
    """A static weight for the case's windows."""
    columns = case.kernel[0] * case.kernel[1] * -(-case.shape[1] // 4) * 4
    weight = Case(case.name, 1, columns, n, density=0.3 if stem == "spmm_int8" else 1, block=4)
    format = dataclasses.replace(testing.FORMATS[stem], activations="static")  # type: ignore[call-arg]
    return pack(weight.weight(), format, (-2.0, 3.1))


def image_of(packed: Any, case: ImageCase) -> Tensor:
    return ops.block(case.x(), packed.x_affine)


def residual_of(y: Tensor, channels: int = OUTPUTS) -> Tensor:
    g = torch.Generator().manual_seed(5)
    return ops.block(torch.randn(y.shape[0], channels, *y.shape[2:4], generator=g), R_AFFINE)


# Against the reference.


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_block(isa: str, dtype: torch.dtype, form: torch.memory_format) -> None:
    for case in CASES["block"]:
        x = case.x(dtype)
        q = ops.block(x.contiguous(memory_format=form), AFFINE)
        assert torch.equal(q, reference.block(x, AFFINE)), str(case)
        assert q.is_contiguous()


@pytest.mark.parametrize("channels", [1, 3, 5, 17, 31, 32, 33, 64, 65, 70])
def test_block_of_any_channels_and_pixels(isa: str, channels: int) -> None:
    for height, width in ((1, 1), (1, 7), (3, 5), (4, 4), (1, 17), (3, 11), (33, 40)):
        x = torch.randn(2, channels, height, width)
        for form in FORMS:
            q = ops.block(x.contiguous(memory_format=form), AFFINE)
            assert torch.equal(q, reference.block(x, AFFINE)), (height, width, form)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("ill", [torch.nan, torch.inf, -torch.inf])
def test_block_refuses_what_no_byte_can_be(isa: str, ill: float, form: torch.memory_format) -> None:
    x = torch.randn(3, 5, 40, 41)
    x[2, 4, 39, 40] = ill
    with pytest.raises(RuntimeError, match="image 2 holds a NaN or an Inf"):
        ops.block(x.contiguous(memory_format=form), AFFINE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unblock(isa: str, dtype: torch.dtype) -> None:
    for case in CASES["unblock"]:
        q, channels = ops.block(case.x(), AFFINE), case.shape[1]
        y = ops.unblock(q, AFFINE, channels, dtype)
        assert torch.equal(y, reference.unblock(q, AFFINE, channels, dtype)), str(case)
        assert y.dtype == dtype and y.is_contiguous()
        if dtype == torch.float32:
            assert torch.equal(ops.block(y, AFFINE), q)


def window_of(case: ImageCase) -> tuple[list[int], ...]:
    return list(case.kernel), list(case.stride), list(case.sides), list(case.dilation)


def test_max_pool(isa: str) -> None:
    for case in CASES["max_pool"]:
        q = ops.block(case.x(), AFFINE)
        y = ops.max_pool(q, *window_of(case))
        if case.shape[0]:
            assert torch.equal(y, reference.max_pool(q, *window_of(case))), str(case)


def test_max_pool_of_floats(isa: str) -> None:
    for case in CASES["max_pool"]:
        x = case.x()
        if x.numel() > 9:
            x.view(-1)[0], x.view(-1)[3], x.view(-1)[-1] = torch.nan, -torch.inf, -torch.nan
        for form in FORMS:
            y = ops.max_pool(x.contiguous(memory_format=form), *window_of(case))
            assert y.is_contiguous()
            if case.shape[0]:
                want = reference.max_pool(x, *window_of(case))
                assert torch.equal(y.isnan(), want.isnan()), str(case)
                assert torch.equal(y.nan_to_num(), want.nan_to_num()), str(case)
    wide = torch.randn(2, 70, 33, 34)
    want = torch.nn.functional.max_pool2d(wide, 3, 2, 1)
    for count in (1, 2):
        for form in FORMS:
            with threads(count):
                x = wide.contiguous(memory_format=form)
                assert torch.equal(ops.max_pool(x, [3, 3], [2, 2], [1] * 4, [1, 1]), want)
    for other in (wide.bfloat16(), wide.double(), wide.transpose(2, 3), wide[0]):
        with pytest.raises(RuntimeError, match="must be a blocked image"):
            ops.max_pool(other, [3, 3], [2, 2], [1] * 4, [1, 1])


@pytest.mark.parametrize("ceil", [False, True])
def test_max_pool_is_that_of_torch(isa: str, ceil: bool) -> None:
    for channels, size, kernel, stride, padding in ((64, 112, 3, 2, 1), (6, 13, 2, 2, 0)):
        q = ops.block(torch.randn(2, channels, size, size), AFFINE)
        x = ops.unblock(q, AFFINE, channels)
        want = torch.nn.functional.max_pool2d(x, kernel, stride, padding, ceil_mode=ceil)
        more = (want.shape[2] - 1) * stride + kernel - size - padding
        sides = [padding, more, padding, more]
        y = ops.max_pool(q, [kernel] * 2, [stride] * 2, sides, [1, 1])
        assert torch.equal(ops.unblock(y, AFFINE, channels), want)


def test_mean(isa: str) -> None:
    for case in CASES["mean"]:
        q, channels = ops.block(case.x(), AFFINE), case.shape[1]
        for keepdim in (False, True):
            y = ops.mean(q, AFFINE, channels, keepdim)
            assert same_bits(y, reference.mean(q, AFFINE, channels, keepdim)), str(case)
            assert y.is_contiguous() and y.shape[2:] == (1, 1) * keepdim
        if case.shape[0]:
            want = ops.unblock(q, AFFINE, channels).double().mean((2, 3))
            torch.testing.assert_close(y[:, :, 0, 0].double(), want, rtol=1e-5, atol=1e-6)


def test_mean_of_many_pixels(isa: str) -> None:
    """Summed in several parts, and shared by threads."""
    q = torch.full((1, 1, 700, 701, 4), 255, dtype=torch.uint8)
    q[0, 0, 0, 0] = torch.tensor([0, 1, 2, 3])
    assert same_bits(ops.mean(q, AFFINE, 3), reference.mean(q, AFFINE, 3))
    wide = ops.block(torch.randn(3, 1000, 30, 31), AFFINE)
    with threads(2):
        assert same_bits(ops.mean(wide, AFFINE, 998), reference.mean(wide, AFFINE, 998))


@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize("stem", INT8_STEMS)
def test_convolution(isa: str, stem: str, activation: str) -> None:
    for case in CASES["conv_int8"]:
        packed, conv = packed_conv(stem, case), case.conv()
        q, bias = image_of(packed, case), Case(case.name, 1, 1, OUTPUTS).bias()
        place = ops.activation_index(activation)
        y = packed.convolve(q, bias, place, conv, Y_AFFINE)
        residual = residual_of(y)
        for r in (None, residual):
            y = packed.convolve(q, bias, place, conv, Y_AFFINE, r, R_AFFINE)
            floats = None if r is None else ops.unblock(r, R_AFFINE, OUTPUTS)
            want = getattr(reference, stem.replace("gemm", "conv").replace("spmm", "conv_spmm"))(
                q, integers(packed), packed.scale, conv, packed.x_affine, bias, activation, floats
            )
            steps = (want / Y_AFFINE[0] + Y_AFFINE[1]).clamp(0, 255)
            got = ops.unblock(y, torch.tensor([1.0, 0.0]), OUTPUTS)
            assert_close(got, steps, torch.tensor(0.5 + 1e-3))
            assert (y[:, -1, ..., OUTPUTS % 4 :] == Y_AFFINE[1]).all()


# Between layers: the bits of fp32 in between.


@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize("stem", INT8_STEMS)
def test_bytes_are_those_of_floats_that_are_quantized(isa: str, stem: str, activation: str) -> None:
    for case in CASES["conv_int8"]:
        packed, conv = packed_conv(stem, case), case.conv()
        q, bias = image_of(packed, case), Case(case.name, 1, 1, OUTPUTS).bias()
        x = ops.unblock(q, packed.x_affine, case.shape[1])
        y = packed.convolve(q, bias, ops.activation_index(activation), conv, Y_AFFINE)
        floats = packed.matmul(x, bias, activation, conv)
        assert torch.equal(y, ops.block(floats, Y_AFFINE)), str(case)
        if activation in ("none", "relu", "relu6"):
            r = residual_of(y)
            y = packed.convolve(
                q, bias, ops.activation_index(activation), conv, Y_AFFINE, r, R_AFFINE
            )
            floats = packed.matmul(x, bias, "none", conv) + ops.unblock(r, R_AFFINE, OUTPUTS)
            floats = reference.activate(floats, activation)
            assert torch.equal(y, ops.block(floats, Y_AFFINE)), str(case)


# Steps of y, on both sides of where ReLU6 is the last byte and where a value has 2^31 of them.
STEPS = (6 / 256, 6 / 255, 6 / 254, 0.04, 1e-9, 1e-30)


@pytest.mark.parametrize("activation", ["none", "relu", "relu6"])
@pytest.mark.parametrize("stem", INT8_STEMS)
def test_bytes_from_zero(isa: str, stem: str, activation: str) -> None:
    place = ops.activation_index(activation)
    for case, step in itertools.product(CASES["conv_int8"][:6], STEPS):
        packed, conv = packed_conv(stem, case), case.conv()
        q, small = image_of(packed, case), Case(case.name, 1, 1, OUTPUTS).bias()
        large = torch.where(torch.arange(OUTPUTS) % 5 == 0, small.sign() * 1e7, small)
        x, y_affine = ops.unblock(q, packed.x_affine, case.shape[1]), torch.tensor([step, 0.0])
        for bias, zero in itertools.product((small, large, large * 1e20), (None, 0.0, 7.0)):
            y = packed.convolve(q, bias, place, conv, y_affine)
            floats = packed.matmul(x, bias, "none", conv)
            if zero is not None:
                r_affine = torch.tensor([0.5, zero])
                r = ops.block(torch.randn(floats.shape) * 30, r_affine)
                y = packed.convolve(q, bias, place, conv, y_affine, r, r_affine)
                floats = floats + ops.unblock(r, r_affine, OUTPUTS)
            want = ops.block(reference.activate(floats, activation), y_affine)
            assert torch.equal(y, want), (str(case), step, zero)


@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize("stem", INT8_STEMS)
def test_bytes_to_floats(isa: str, stem: str, activation: str) -> None:
    for case in CASES["conv_int8"]:
        packed = packed_conv(stem, case)
        q, bias = image_of(packed, case), Case(case.name, 1, 1, OUTPUTS).bias()
        x, place = ops.unblock(q, packed.x_affine, case.shape[1]), ops.activation_index(activation)
        for planar, form in ((True, torch.contiguous_format), (False, torch.channels_last)):
            y = packed.convolve(q, bias, place, case.conv(planar), None)
            assert y.is_contiguous(memory_format=form)
            assert same_bits(y, packed.matmul(x, bias, activation, case.conv(planar))), str(case)


@pytest.mark.parametrize("stem", INT8_STEMS)
def test_contiguous_and_channels_last_have_the_same_bits(isa: str, stem: str) -> None:
    for case in CASES["conv_int8"]:
        packed, x = packed_conv(stem, case), case.x()
        want = packed.matmul(x, None, "relu", case.conv(True))
        for form in FORMS:
            for planar in (True, False):
                y = packed.matmul(x.contiguous(memory_format=form), None, "relu", case.conv(planar))
                assert torch.equal(y, want), str(case)


# The same bits, whatever the Isa, the threads and the batch.


@pytest.mark.skipif(len(_C.isas()) == 1, reason="this CPU has one Isa")
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize("stem", INT8_STEMS)
def test_bits_are_those_of_every_isa(stem: str, activation: str) -> None:
    for case in CASES["conv_int8"]:
        packed, results = packed_conv(stem, case), []
        q, place = image_of(packed, case), ops.activation_index(activation)
        for name in _C.isas():
            with testing.isa(name):
                y = packed.convolve(q, None, place, case.conv(), Y_AFFINE)
                r = residual_of(y)
                results.append(packed.convolve(q, None, place, case.conv(), Y_AFFINE, r, R_AFFINE))
        assert all(torch.equal(results[0], y) for y in results), str(case)


@pytest.mark.parametrize("shape", [(1, 256, 7, 7), (5, 64, 20, 20)])
@pytest.mark.parametrize("stem", INT8_STEMS)
def test_bits_are_those_of_one_thread_and_one_image(
    isa: str, stem: str, shape: tuple[int, int, int, int]
) -> None:
    case = ImageCase(f"threads {shape}", shape, (3, 3), sides=(1, 1, 1, 1))
    packed, conv = packed_conv(stem, case, 1100), case.conv()
    x = case.x()

    def all_steps(x: Tensor) -> list[Tensor]:
        q = ops.block(x, packed.x_affine)
        y = packed.convolve(q, None, 1, conv, Y_AFFINE)
        pooled = ops.max_pool(y, [3, 3], [2, 2], [1, 1, 1, 1], [1, 1])
        return [q, y, pooled, ops.unblock(pooled, Y_AFFINE, 1100)]

    one = all_steps(x)
    with threads(2):
        two = all_steps(x)
    parts = [torch.cat(step) for step in zip(*map(all_steps, x.split(2)), strict=True)]
    for a, b, c in zip(one, two, parts, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


# What compilers are told, and refusals.


@pytest.mark.parametrize("stem", INT8_STEMS)
def test_opcheck_of_images(stem: str) -> None:
    for case in CASES["conv_int8"]:
        packed = packed_conv(stem, case)
        x, conv = case.x(), case.conv()
        q = ops.block(x, packed.x_affine)
        weight = list(packed.buffers())
        y = packed.convolve(q, None, 2, conv, Y_AFFINE)
        tail = (None, Y_AFFINE, residual_of(y), R_AFFINE, packed.k, 2, conv)
        op = ops._conv_int8 if stem == "gemm_int8" else ops._conv_spmm_int8
        torch.library.opcheck(op, (q, *weight, *tail))
        floats = (None, None, None, None, packed.k, 2)
        for planar in (True, False):
            torch.library.opcheck(op, (q, *weight, *floats, case.conv(planar)))
        over = ops._conv_int8_ if stem == "gemm_int8" else ops._conv_spmm_int8_
        torch.library.opcheck(over, (q, *weight, *tail))
        torch.library.opcheck(ops._block, (x, AFFINE))
        torch.library.opcheck(ops._unblock, (q, AFFINE, case.shape[1], 1))
        for image in (q, x, x.contiguous(memory_format=torch.channels_last)):
            torch.library.opcheck(ops._max_pool, (image, *window_of(case)))
        for keepdim in (0, 1):
            torch.library.opcheck(ops._mean, (q, AFFINE, case.shape[1], keepdim))


def test_refusals() -> None:
    case = CASES["conv_int8"][0]
    packed = packed_conv("gemm_int8", case)
    q, conv = image_of(packed, case), case.conv()
    dynamic = pack(torch.randn(4, 8), gs.Int8())
    with pytest.raises(ValueError, match="only static formats have"):
        dynamic.convolve(q, None, 0, conv, Y_AFFINE)
    with pytest.raises(NotImplementedError, match="does not multiply blocked images"):
        pack(torch.randn(4, 8), gs.Int4()).convolve(q, None, 0, conv, Y_AFFINE)
    for bad in (q[..., 0], q.float(), q.transpose(2, 3), q[0]):
        with pytest.raises(RuntimeError, match=r"q of shape .* must be a blocked image"):
            packed.convolve(bad, None, 0, conv, Y_AFFINE)
    y = packed.convolve(q, None, 0, conv, Y_AFFINE)
    for bad in (y[:1], y[..., :2], y.double()):
        with pytest.raises(RuntimeError, match="residual of shape"):
            packed.convolve(q, None, 0, conv, Y_AFFINE, bad, R_AFFINE)
    with pytest.raises(RuntimeError, match="needs its residual_affine"):
        packed.convolve(q, None, 0, conv, Y_AFFINE, y)
    with pytest.raises(RuntimeError, match="for results in bytes: it needs y_affine"):
        packed.convolve(q, None, 0, conv, None, y, R_AFFINE)
    for affine, message in (
        (torch.tensor([0.0, 1.0]), "y_affine has scale .*: not positive"),
        (torch.tensor([torch.nan, 1.0]), "y_affine has scale .*: not positive"),
        (torch.tensor([1.0, 256.0]), "y_affine has zero point 256"),
        (torch.tensor([torch.inf, 0.0]), "y has scale inf"),
        (torch.zeros(3), "y_affine of shape"),
    ):
        with pytest.raises(RuntimeError, match=message):
            packed.convolve(q, None, 0, conv, affine)
    with pytest.raises(RuntimeError, match="has 16 columns, the weight k=8"):
        packed.convolve(torch.cat([q, q], 1), None, 0, conv, Y_AFFINE)
    with pytest.raises(RuntimeError, match="does not hold 9 channels"):
        ops.unblock(q, AFFINE, 9)
    with pytest.raises(RuntimeError, match="does not hold 3 channels"):
        ops.mean(q, AFFINE, 3)
    with pytest.raises(TypeError, match="use float32, bfloat16 or float16"):
        ops.unblock(q, AFFINE, 8, torch.float64)
    with pytest.raises(RuntimeError, match="conv needs 11 integers, got 10"):
        ops.max_pool(q, [2, 2], [2, 2], [0, 0, 0], [1, 1])
    with pytest.raises(RuntimeError, match="must be at least 1"):
        ops.max_pool(q, [9, 9], [2, 2], [0, 0, 0, 0], [1, 1])
