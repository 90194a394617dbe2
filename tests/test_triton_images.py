"""Blocked images by the Triton kernels, against those of the CPU bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fused_nets import EVERY_STATIC, Chain, ResNet, images, lively, static
from gpu import DEVICE, kernels, on_gpu, run
from products import INT8_STEMS
from test_images import (
    AFFINE,
    FORMS,
    OUTPUTS,
    R_AFFINE,
    Y_AFFINE,
    image_of,
    packed_conv,
    residual_of,
    window_of,
)
from torch import nn

import gossamer as gs
from gossamer import ops
from gossamer.testing import CASES, Case, ImageCase

SMOOTH = ("gelu", "silu")  # their quotients may differ in the last bit


@pytest.mark.parametrize("case", CASES["block"], ids=str)
def test_what_moves_bytes(case: ImageCase) -> None:
    for dtype in (torch.float32, torch.float16):
        x = case.x(dtype)
        want = ops.block(x, AFFINE)
        for form in FORMS:
            got = run(ops.block, x.contiguous(memory_format=form), AFFINE)
            assert torch.equal(got, want) and got.is_contiguous()
        got = run(ops.unblock, want, AFFINE, case.shape[1], dtype)
        assert torch.equal(got, ops.unblock(want, AFFINE, case.shape[1], dtype))
    for keepdim in (False, True):
        got = run(ops.mean, want, AFFINE, case.shape[1], keepdim)
        torch.testing.assert_close(got, ops.mean(want, AFFINE, case.shape[1], keepdim))
    got = run(ops.max_pool, want, *window_of(case))
    assert torch.equal(got, ops.max_pool(want, *window_of(case)))


def test_bfloat16_goes_to_the_nearest() -> None:
    # Of 8 bits all are exact: Triton's interpreter cuts the others off.
    q = torch.arange(256, dtype=torch.uint8).view(1, 4, 4, 4, 4)
    affine = torch.tensor([0.5, 128.0])
    y = run(ops.unblock, q, affine, 15, torch.bfloat16)
    assert torch.equal(y, ops.unblock(q, affine, 15, torch.bfloat16))
    assert torch.equal(run(ops.block, y, affine), ops.block(y, affine))


@pytest.mark.parametrize("ill", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.skipif(DEVICE == "cuda", reason="an assertion on the device ends the process")
def test_block_refuses_what_no_byte_can_be(ill: float) -> None:
    x = torch.randn(3, 5, 9, 11)
    x[2, 4, 8, 10] = ill
    with pytest.raises(RuntimeError, match="holds a NaN or an Inf: no byte"):
        run(ops.block, x, AFFINE)


@pytest.mark.parametrize("case", CASES["conv_int8"], ids=str)
@pytest.mark.parametrize("stem", INT8_STEMS)
def test_convolution_has_the_bytes_of_the_cpu(stem: str, case: ImageCase) -> None:
    packed, conv = packed_conv(stem, case), case.conv()
    q, bias = image_of(packed, case), Case(case.name, 1, 1, OUTPUTS).bias()
    want = packed.convolve(q, bias, 1, conv, Y_AFFINE)
    moved = on_gpu(packed)
    assert torch.equal(run(moved.convolve, q, bias, 1, conv, Y_AFFINE), want)
    tail = (conv, Y_AFFINE, residual_of(want), R_AFFINE)
    want = packed.convolve(q, None, 0, *tail)
    assert torch.equal(run(moved.convolve, q, None, 0, *tail), want)
    for planar, form in ((True, torch.contiguous_format), (False, torch.channels_last)):
        want = packed.convolve(q, bias, 1, case.conv(planar), None)
        got = run(moved.convolve, q, bias, 1, case.conv(planar), None)
        assert torch.equal(got, want) and got.is_contiguous(memory_format=form)


@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize("stem", INT8_STEMS)
def test_every_epilogue(stem: str, activation: str) -> None:
    case = next(c for c in CASES["conv_int8"] if c.name == "odd channels")
    packed, place = packed_conv(stem, case), ops.activation_index(activation)
    q, moved = image_of(packed, case), on_gpu(packed)
    bias = 3 * Case(case.name, 1, 1, OUTPUTS).bias()
    residual = residual_of(packed.convolve(q, None, 0, case.conv(), Y_AFFINE))
    for affine in ((0.03, 90.0), (0.001, 0.0), (0.5, 255.0)):
        for r in (None, residual):
            head = (q, bias, place, case.conv(), torch.tensor(affine), r)
            want = packed.convolve(*head, R_AFFINE)
            got = run(moved.convolve, *head, R_AFFINE)
            apart = (got.int() - want.int()).abs()
            if activation in SMOOTH:
                assert apart.max() <= 1 and apart.count_nonzero() <= 0.001 * apart.numel() + 1
            else:
                assert not apart.any()
            assert (got[:, -1, ..., OUTPUTS % 4 :] == affine[1]).all()


def test_refusals() -> None:
    case = CASES["conv_int8"][0]
    packed = on_gpu(packed_conv("gemm_int8", case))
    q, conv = image_of(packed_conv("gemm_int8", case), case), case.conv()
    for bad in (q[..., 0], q.float(), q.transpose(2, 3), q[0]):
        with pytest.raises(RuntimeError, match=r"q of shape .* must be a blocked image"):
            run(packed.convolve, bad, None, 0, conv, Y_AFFINE)
    y = run(packed.convolve, q, None, 0, conv, Y_AFFINE)
    for bad in (y[:1], y[..., :2], y.double()):
        with pytest.raises(RuntimeError, match="residual of shape"):
            run(packed.convolve, q, None, 0, conv, Y_AFFINE, bad, R_AFFINE)
    with pytest.raises(RuntimeError, match="needs its residual_affine"):
        run(packed.convolve, q, None, 0, conv, Y_AFFINE, y)
    with pytest.raises(RuntimeError, match="for results in bytes: it needs y_affine"):
        run(packed.convolve, q, None, 0, conv, None, y, R_AFFINE)
    with pytest.raises(RuntimeError, match="has 16 columns, the weight k=8"):
        run(packed.convolve, torch.cat([q, q], 1), None, 0, conv, Y_AFFINE)
    with pytest.raises(RuntimeError, match="does not hold 9 channels"):
        run(ops.unblock, q, AFFINE, 9)
    with pytest.raises(RuntimeError, match="does not hold 3 channels"):
        run(ops.mean, q, AFFINE, 3)
    with pytest.raises(RuntimeError, match="must be at least 1"):
        run(ops.max_pool, q, [9, 9], [2, 2], [0, 0, 0, 0], [1, 1])


@pytest.mark.parametrize("net", [Chain, ResNet])
@EVERY_STATIC
def test_a_fused_model_gives_what_it_gives_on_the_cpu(net: Any, format: Any) -> None:
    torch.manual_seed(0)
    model: nn.Module = lively(net())
    x = images()
    fused = gs.fuse(static(model, x, format), x)
    moved = on_gpu(fused)
    with torch.no_grad():
        want = fused(x)
        with kernels():
            got = moved(x.to(DEVICE)).cpu()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)  # some layers are torch's
    state = moved.state_dict()
    assert all(torch.equal(state[name].cpu(), b) for name, b in fused.state_dict().items())
    fused.load_state_dict(state)
