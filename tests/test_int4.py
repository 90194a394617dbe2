"""Int4: the search for a group's scale, and the exactness that makes its bits portable."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from products import expected, same_bits
from torch import Tensor
from torch.nn.functional import pad

import gossamer as gs
from gossamer import _C, testing
from gossamer.packed import pack, packed_from_buffers
from gossamer.packed.int4 import PEAKS, SCALE_LIMIT, VALUES, quantize_groups
from gossamer.testing import CASES, Case, assert_close

GROUPS = (16, 32)
SMALL = [c for c in CASES["gemm_int4"] if c.n * c.k < 10**5]


def nearest_errors(v: Tensor, scale: Tensor) -> Tensor:
    """(groups) smallest squared errors with these scales (groups, 1), over all 16 values."""
    values = scale[..., None].double() * VALUES
    return (v.double()[..., None] - values).square().amin(-1).sum(1)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_unpack_is_close_to_the_weight(case: Case, group: int) -> None:
    weight = case.weight()
    packed: Any = pack(weight, gs.Int4(group=group))
    got = packed.unpack()
    assert got.dtype == torch.float32 and got.is_contiguous()
    assert (got[weight == 0] == 0).all()
    # At worst the largest weight is cut off, from 38 to 32, or lies between 27 and 32, and the
    # scale is rounded by half of a unit, the output's scale.
    groups = pad(weight, (0, -case.k % group)).view(case.n, -1, group)
    each = groups.abs().amax(-1, keepdim=True) * 0.2 + 16 * packed.scale[:, None, None]
    bound = each.expand_as(groups).reshape(case.n, -1)[:, : case.k]
    assert_close(got, weight, bound if weight.abs().max() > 1e-30 else torch.tensor(2.0**-107))


@pytest.mark.parametrize("group", GROUPS)
def test_codes_are_the_nearest_and_the_scale_beats_every_peak(group: int) -> None:
    limit = SCALE_LIMIT // group - 1
    v = torch.randn(2000, group, generator=torch.Generator().manual_seed(0)) * 300
    codes, scale = quantize_groups(v, limit)
    assert codes.max() <= 15 and scale.int().abs().max() <= limit and (scale != 0).all()
    error = (VALUES[codes.int()] * scale.double() - v).square().sum(1)
    assert_close(error, nearest_errors(v, scale), error * 1e-6)
    extreme = v.gather(1, v.abs().argmax(1, keepdim=True))
    for peak in PEAKS:
        assert error.sum() < 0.97 * nearest_errors(v, extreme / peak).sum()


def test_the_error_of_normal_weights() -> None:
    # Equal steps -8 .. 7 in groups of 32, the largest weight at -8, have 21.4 dB.
    weight = torch.randn(64, 4096, generator=torch.Generator().manual_seed(1))
    for group, decibels, bits in ((16, 23.6, 4.52), (32, 22.4, 4.27)):
        packed = pack(weight, gs.Int4(group=group))
        ratio = weight.square().sum() / (packed.unpack() - weight).square().sum()
        assert 10 * torch.log10(ratio) > decibels
        assert packed.nbytes * 8 / weight.numel() < bits


@pytest.mark.parametrize("group", GROUPS)
def test_scales_and_zeros(group: int) -> None:
    # One output's scale does not touch another's; a group of small weights has a scale of its own.
    weight = Case("scales", 1, 64, 6).weight()
    weight[2] *= 1e30
    weight[3] *= 1e-30
    weight[4] = 0
    weight[5, :32] *= 0.1
    packed = pack(weight, gs.Int4(group=group))
    for row in (0, 2, 3, 5):
        alone = pack(weight[row : row + 1], gs.Int4(group=group))
        assert torch.equal(packed.unpack()[row], alone.unpack()[0])
        for half in (slice(0, 32), slice(32, 64)):
            error = (packed.unpack()[row] - weight[row])[half].double().norm()
            assert error < 0.15 * weight[row, half].double().norm()
    assert (packed.unpack()[4] == 0).all() and packed.zeros >= 1 / 6


def extreme_products(group: int) -> tuple[Any, Tensor]:
    """All weights -32 at the largest scale there may be, all activations 255."""
    format, limit = gs.Int4(group=group), min(127, SCALE_LIMIT // group)
    packed = pack(torch.ones(20, 4096), format)
    buffers = {name: b.clone() for name, b in packed.named_buffers()}
    buffers["panels"].zero_()
    buffers["panels"][1, :, 4:] = 0x88
    buffers["group_scale"].fill_(limit)
    buffers["wsum"].fill_(-32 * limit * 4096)
    buffers["scale"].fill_(1)
    return packed_from_buffers(20, 4096, format, buffers), torch.full((7, 4096), 255.0)


@pytest.mark.parametrize("group", GROUPS)
def test_the_largest_products_are_exact(isa: str, group: int) -> None:
    packed, x = extreme_products(group)
    # A group adds 255 * 32 * group * limit < 2^24, exactly; only these additions round.
    limit = min(127, SCALE_LIMIT // group)
    want = torch.zeros(())
    for _ in range(4096 // group):
        want = want - 255.0 * 32 * group * limit
    assert (packed.matmul(x) == want).all()
    # x = -255 everywhere: q = 0 and zero = 255, so that the sum comes from wsum alone.
    assert (packed.matmul(-x) == 255.0 * 32 * limit * 4096).all()


@pytest.mark.parametrize("group", GROUPS)
def test_every_code_in_every_place(isa: str, group: int) -> None:
    # 16 outputs x 32 inputs in which each code stands at each place of a line once a row.
    places = (torch.arange(16)[:, None] + torch.arange(32)) % 16
    weight = VALUES[places].float()
    packed: Any = pack(weight, gs.Int4(group=group))
    assert_close(packed.unpack(), weight, torch.tensor(0.5))  # codes are those of `places`
    x = torch.eye(32) * 255
    assert_close(packed.matmul(x), *expected(packed, x))


@pytest.mark.skipif(len(_C.isas()) == 1, reason="this CPU has one Isa")
def test_groups_of_32_have_the_same_bits_too() -> None:
    for case in SMALL:
        packed, bias, x = pack(case.weight(), gs.Int4(group=32)), case.bias(), case.x()
        results = {}
        for name in _C.isas():
            with testing.isa(name):
                results[name] = packed.matmul(x, bias, "gelu")
        first, *others = results.values()
        assert all(same_bits(first, y) for y in others), str(case)
        y, bound = expected(packed, x, bias, "none")
        assert_close(packed.matmul(x, bias), y, bound)


@pytest.mark.parametrize("group", GROUPS)
def test_a_layer_of_each_group_is_saved_and_loaded(tmp_path: Any, group: int) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(40, 24), torch.nn.ReLU(), torch.nn.Linear(24, 3))
    other, x = copy.deepcopy(model), torch.randn(5, 40)
    report = gs.compress_(model, gs.Int4(group=group))
    assert [row.kernel for row in report] == ["gemm_int4"] * 2
    gs.save(model, tmp_path / "model.safetensors")
    gs.load_(other, tmp_path / "model.safetensors")
    assert other[0].packed.format == gs.Int4(group=group)
    assert same_bits(other(x), model(x))


def test_the_buffers_of_another_group_are_refused() -> None:
    buffers = dict(pack(Case("group", 1, 64, 20).weight(), gs.Int4(group=32)).named_buffers())
    with pytest.raises(ValueError, match="group=16 need"):
        packed_from_buffers(20, 64, gs.Int4(group=16), buffers)
