"""Depthwise convolutions of static int8: the kernel, the layer, and what finds and trains it."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fused_nets import MobileNet, calibrated, images, lively, run, static
from products import integers, same_bits
from torch import Tensor, nn

import gossamer as gs
from gossamer import _C, layers, ops, reference, testing
from gossamer.calibrate import observed
from gossamer.geometry import is_depthwise, weight_matrix
from gossamer.packed import pack
from gossamer.testing import CASES, ImageCase, assert_close
from gossamer.timing import threads

STATIC = gs.Int8(activations="static")
Y_AFFINE, R_AFFINE = torch.tensor([0.03, 90.0]), torch.tensor([0.01, 7.0])
WINDOWS = [case for case in CASES["conv_int8"] if case.shape[0] and case.shape[1] > 1]
WINDOWS += [
    ImageCase("five by five", (2, 21, 14, 14), (5, 5), sides=(2, 2, 2, 2)),
    ImageCase("seven by seven", (1, 8, 30, 9), (7, 7), stride=(2, 2), sides=(3, 3, 3, 3)),
    ImageCase("rows longer than a tile", (1, 9, 4, 1000), (3, 3), sides=(1, 1, 1, 1)),
]
EVERY_WINDOW = pytest.mark.parametrize("case", WINDOWS, ids=str)


@cache
def packed_taps(case: ImageCase) -> Any:
    g = torch.Generator().manual_seed(len(case.name))
    weight = torch.randn(case.shape[1], case.kernel[0] * case.kernel[1], generator=g)
    return pack(weight, STATIC, (-2.0, 3.1))


def bias_of(case: ImageCase) -> Tensor:
    return torch.randn(case.shape[1], generator=torch.Generator().manual_seed(1))


def dense_weight(packed: Any, case: ImageCase) -> Tensor:
    """The same product as a matrix over all channels: zeros but for each output's own."""
    channels, taps = case.shape[1], packed.k
    wide = torch.zeros(channels, taps, -(-channels // 4) * 4)
    own = torch.arange(channels)
    wide[own, :, own] = integers(packed)
    return wide.flatten(1)


# The kernel.


@EVERY_WINDOW
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
def test_bytes_and_floats(isa: str, case: ImageCase, activation: str) -> None:
    packed, bias, place = packed_taps(case), bias_of(case), ops.activation_index(activation)
    q, conv, channels = ops.block(case.x(), packed.x_affine), case.conv(), case.shape[1]
    y = packed.convolve(q, bias, place, conv, Y_AFFINE)
    g = torch.Generator().manual_seed(5)
    residual = torch.randn(y.shape[0], channels, *y.shape[2:4], generator=g)
    for r in (None, ops.block(residual, R_AFFINE)):
        y = packed.convolve(q, bias, place, conv, Y_AFFINE, r, R_AFFINE)
        floats = None if r is None else ops.unblock(r, R_AFFINE, channels)
        want = reference.conv_int8(
            q, dense_weight(packed, case), packed.scale, conv, packed.x_affine, bias, activation,
            floats,
        )  # fmt: skip
        steps = (want / Y_AFFINE[0] + Y_AFFINE[1]).clamp(0, 255)
        got = ops.unblock(y, torch.tensor([1.0, 0.0]), channels)
        assert_close(got, steps, torch.tensor(0.5 + 1e-3))
        assert channels % 4 == 0 or (y[:, -1, ..., channels % 4 :] == Y_AFFINE[1]).all()
    floats = packed.matmul(case.x(), bias, activation, conv)
    for planar, form in ((True, torch.contiguous_format), (False, torch.channels_last)):
        y = packed.convolve(q, bias, place, case.conv(planar), None)
        assert same_bits(y, floats) and y.is_contiguous(memory_format=form)
    assert same_bits(ops.block(floats, Y_AFFINE), packed.convolve(q, bias, place, conv, Y_AFFINE))


@EVERY_WINDOW
def test_bits_are_those_of_every_isa_thread_image_and_layout(case: ImageCase) -> None:
    packed, bias, x = packed_taps(case), bias_of(case), case.x()
    q = ops.block(x, packed.x_affine)
    want = packed.convolve(q, bias, 1, case.conv(), Y_AFFINE)
    floats = packed.matmul(x, bias, "relu", case.conv())
    for name in _C.isas():
        with testing.isa(name):
            for count in (1, 2):
                with threads(count):
                    assert torch.equal(packed.convolve(q, bias, 1, case.conv(), Y_AFFINE), want)
            parts = [packed.convolve(one, bias, 1, case.conv(), Y_AFFINE) for one in q.split(1)]
            assert torch.equal(torch.cat(parts), want)
            for form in (torch.contiguous_format, torch.channels_last):
                for planar in (True, False):
                    image = x.contiguous(memory_format=form)
                    y = packed.matmul(image, bias, "relu", case.conv(planar))
                    assert same_bits(y, floats)


def test_refusals() -> None:
    case = next(case for case in WINDOWS if case.name == "three by three")
    packed, x = packed_taps(case), case.x()
    for bad in (x[:, :7], torch.cat([x, x], 1)):
        with pytest.raises(RuntimeError, match="columns, the weight k=9"):
            packed.matmul(bad, None, "none", case.conv())
    q = ops.block(torch.cat([x, x], 1), packed.x_affine)
    with pytest.raises(RuntimeError, match="columns, the weight k=9"):
        packed.convolve(q, None, 0, case.conv(), Y_AFFINE)
    far = [3, 3, 1, 1, 20000, 20000, 20000, 20000, 20000, 20000, 1]
    with pytest.raises(RuntimeError, match=r"depthwise windows that span .* are too large"):
        packed.matmul(x, None, "none", far)
    with pytest.raises(RuntimeError, match="columns, the weight k=9"):
        pack(torch.randn(8, 9), gs.SparseInt8()).matmul(x, None, "none", case.conv())


@EVERY_WINDOW
def test_the_operators_of_gpus_have_the_same_bits(case: ImageCase) -> None:
    from gossamer.triton import depthwise as twins
    from gossamer.triton import older
    from gossamer.triton.gemm_int8 import by_rows

    packed, bias, x = packed_taps(case), bias_of(case), case.x()
    n, conv, weight = packed.n, case.conv(), by_rows(packed.panels)[: packed.n, : packed.k]
    q = ops.block(x, packed.x_affine)
    residual = packed.convolve(q, None, 0, conv, R_AFFINE)
    head = (packed.scale, packed.x_affine, bias)
    for place in map(ops.activation_index, ("none", "relu", "relu6", "hardswish")):
        for tail in ((Y_AFFINE, None, None), (Y_AFFINE, residual, R_AFFINE)):
            want = packed.convolve(q, bias, place, conv, *tail)
            assert torch.equal(twins.conv_int8(q, weight, *head, *tail, place, conv), want)
            more = (packed.panels, packed.scale, packed.wsum, packed.x_affine, bias)
            near = older.conv_int8(q, *more, *tail, packed.k, place, conv)
            assert (near.int() - want.int()).abs().max() <= 1
        floats = packed.matmul(x, bias, ops.ACTIVATIONS[place], conv)
        own = twins.conv_int8(q, weight, *head, None, None, None, place, conv)
        assert same_bits(own, floats)
        near = older.conv_int8(q, *more, None, None, None, packed.k, place, conv)
        torch.testing.assert_close(near, floats, rtol=1e-4, atol=1e-4)
        assert same_bits(twins.gemm_int8(x, weight, *head, place, conv), floats)
    for tail, message in (
        ((None, residual, R_AFFINE), "for results in bytes: it needs y_affine"),
        ((Y_AFFINE, residual, None), "needs its residual_affine"),
    ):
        with pytest.raises(RuntimeError, match=message):
            twins.conv_int8(q, weight, *head, *tail, 0, conv)
        with pytest.raises(RuntimeError, match=message):
            older.conv_int8(q, *more, *tail, packed.k, 0, conv)
    ill = x.clone()
    ill[0, n - 1, 0, 0] = torch.nan
    y = twins.gemm_int8(ill, weight, *head, 0, conv)
    assert same_bits(y, packed.matmul(ill, bias, "none", conv)) and y[0].isnan().all()
    with pytest.raises(ValueError, match="x_affine must not be None"):
        twins.gemm_int8(x, weight, packed.scale, None, bias, 0, conv)


# The layer, and what finds it.


def depthwise(**more: Any) -> nn.Conv2d:
    return nn.Conv2d(12, 12, 3, padding=1, groups=12, **more)


def test_a_layer_like_any_other(tmp_path: Path) -> None:
    dense = nn.Sequential(depthwise(stride=2), nn.Conv2d(12, 4, 1))
    x = torch.randn(3, 12, 15, 14)
    model = calibrated(copy.deepcopy(dense), x)
    report = gs.compress_(model, STATIC)
    assert [row.after for row in report.rows] == ["Conv2d Int8(activations=static)"] * 2
    layer: Any = model[0]
    assert type(layer) is gs.Conv2d and layer.groups == 12 and layer.packed.k == 9
    y, want = run(model, x), run(dense, x)
    assert (y - want).norm() < 0.02 * want.norm()
    assert y.shape == want.shape and same_bits(run(layer, x[0]), run(layer, x)[0])
    back = layer.to_dense()
    assert type(back) is nn.Conv2d and back.groups == 12 and back.weight.shape == (12, 1, 3, 3)
    assert torch.equal(back.weight, layer.unpack())
    assert "groups=12" in repr(layer) and layer.geometry()["groups"] == 12
    gs.save(model, tmp_path / "model.safetensors")
    loaded = copy.deepcopy(dense)
    gs.load_(loaded, tmp_path / "model.safetensors")
    assert same_bits(run(loaded, x), y)
    loaded[0].load_state_dict(layer.state_dict())
    assert same_bits(run(loaded, x), y)
    exported = torch.export.export(model.eval(), (x,))
    assert same_bits(exported.module()(x), y)


def test_other_formats_leave_it_to_torch() -> None:
    for format in (gs.Int8(), gs.Int8(activations="none"), gs.Int4(), gs.Sparse(), gs.SparseInt8()):
        model = nn.Sequential(depthwise(), nn.Conv2d(12, 4, 1))
        report = gs.compress_(model, format)
        note = "groups=12: depthwise convolutions are for Int8(activations='static')"
        assert report.rows[0].note == note and type(model[0]) is nn.Conv2d
        assert type(model[1]) is gs.Conv2d
        with pytest.raises(ValueError, match="groups=12"):
            gs.Conv2d.from_dense(depthwise(), format)
    assert layers.unsupported(depthwise()) is None
    assert not is_depthwise(nn.Conv2d(12, 24, 3, groups=12))
    assert not is_depthwise(nn.Conv2d(1, 1, 3))
    packed = pack(torch.randn(12, 9), STATIC, (-1.0, 1.0))
    for groups, outputs in ((3, 12), (6, 12), (12, 24)):
        with pytest.raises(ValueError, match=f"groups={groups}: the weight must be SparseInt8"):
            gs.Conv2d(packed, None, 12, outputs, (3, 3), groups=groups)
    with pytest.raises(ValueError, match="this convolution needs 12 x 25"):
        gs.Conv2d(packed, None, 12, 12, (5, 5), groups=12)
    # A convolution of one channel is no depthwise one, and its columns are padded.
    one = calibrated(nn.Sequential(nn.Conv2d(1, 1, 3)), torch.randn(2, 1, 9, 9))
    gs.compress_(one, STATIC)
    assert one[0].packed.k == 36


def test_calibration_is_of_each_channel() -> None:
    torch.manual_seed(0)
    conv, x = depthwise(), torch.randn(4, 12, 9, 8) + torch.arange(12.0).view(-1, 1, 1)
    seen: Any = observed(calibrated(nn.Sequential(conv), x, hessian=True)[0])
    windows = F.unfold(x, 3, padding=1).view(4, 12, 9, -1)
    torch.testing.assert_close(seen.mean, windows.mean((0, 3)))
    torch.testing.assert_close(seen.square, windows.square().mean((0, 3)))
    torch.testing.assert_close(seen.absmax, windows.abs().amax((0, 3)))
    assert seen.hessian is None and seen.mean.shape == weight_matrix(conv).shape
    model = nn.Sequential(conv)
    twin = copy.deepcopy(model)
    gs.compress_(model, STATIC)
    gs.compress_(twin, STATIC, bias_correction=False)
    dense = calibrated(nn.Sequential(model[0].to_dense()), x)
    wrong = [(run(m, x) - run(nn.Sequential(conv), x)).mean((0, 2, 3)) for m in (dense, twin)]
    assert wrong[0].abs().max() < 1e-5 and wrong[1].abs().max() > 1e-3


def test_criteria_that_need_inputs() -> None:
    model = calibrated(nn.Sequential(depthwise()), torch.randn(4, 12, 9, 9), hessian=True)
    gs.prune_(copy.deepcopy(model), 0.5, "unstructured", score="wanda")
    with pytest.raises(ValueError, match="exclude grouped convolutions"):
        gs.prune_(copy.deepcopy(model), 0.5, "unstructured", score="sparsegpt", scope="layer")
    wide = nn.Sequential(depthwise(), nn.Conv2d(12, 4, 1))
    calibrated(wide, torch.randn(4, 12, 9, 9), hessian=True)
    assert gs.gptq_(wide, STATIC).rows[0].note == "left alone: grouped"


def test_training() -> None:
    torch.manual_seed(0)
    dense, x = nn.Sequential(depthwise(stride=2)), torch.randn(4, 12, 9, 9)
    model = calibrated(copy.deepcopy(dense), x)
    gs.qat_(model, STATIC)
    given = x.clone().requires_grad_()
    y = model(given)
    y.square().sum().backward()
    packed: Any = gs.layers.pack_dense(model[0], STATIC)
    own = copy.deepcopy(dense)
    with torch.no_grad():
        own[0].weight.copy_(packed.unpack().view(12, 1, 3, 3))
    mine = x.clone().requires_grad_()
    own(mine).backward(2 * y.detach())
    torch.testing.assert_close(given.grad, mine.grad, rtol=1e-4, atol=1e-4)
    grads = (model[0].weight.grad, own[0].weight.grad)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-3)
    gs.compress_(model, STATIC)
    assert same_bits(run(model, x), y.detach())


# In a fused network.


def test_a_mobile_net_stays_in_bytes(isa: str) -> None:
    for act in (nn.ReLU6, nn.Hardswish):
        x = images(3, 32)
        dense = lively(MobileNet(act))
        model = static(dense, x)
        fused = gs.fuse(model, x)
        rows = {row.name: row for row in fused.report}
        middle = rows["blocks.0.middle.0"]
        assert (
            middle.gives == "int8"
            and middle.runs == "Conv2d Int8(activations=static)"
            and not middle.note
        )
        assert middle.fused.startswith("BatchNorm, ") and rows["blocks.0.up.0"].gives == "int8"
        want = run(dense, x)
        assert (run(fused, x) - want).norm() < 0.15 * want.norm()
        one = torch.cat([run(fused, image) for image in x.split(1)])
        assert same_bits(run(fused, x), one)


def test_bits_between_layers_are_those_of_floats(isa: str) -> None:
    net = nn.Sequential(nn.Conv2d(3, 12, 1), depthwise(), nn.ReLU(), nn.Conv2d(12, 12, 1))
    net.append(depthwise(stride=2)).append(nn.Conv2d(12, 4, 1))
    x = images(2, 21)
    model = static(net, x)
    fused = gs.fuse(model, x)
    assert [row.gives for row in fused.report].count("int8") == 5
    assert same_bits(run(fused, x), run(model, x))


def test_a_dense_one_says_what_would_help() -> None:
    x = images(2, 16)
    fused = gs.fuse(static(lively(MobileNet()), x, gs.SparseInt8(activations="static")), x)
    rows = {row.name: row for row in fused.report}
    note = rows["blocks.0.middle.0"].note
    assert note == "depthwise: Int8(activations='static') would keep 8 bits"
    assert rows["blocks.0.up.0"].note == "gives fp32: blocks.0.middle.0 reads it so"
