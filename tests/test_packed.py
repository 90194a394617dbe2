"""Packing: no lane overflows, and unpack is the weight in use."""

from __future__ import annotations

from typing import Any

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from products import STEMS, integers
from torch import Tensor

import gossamer as gs
from gossamer import _C, formats
from gossamer.packed import LANE_LIMIT, pack, quantize_lanes
from gossamer.testing import CASES, FORMATS, Case, assert_close

INT8_FORMATS = [f for f in FORMATS.values() if isinstance(f, gs.Int8 | gs.SparseInt8)]


def weight_cases() -> list[Case]:
    """One of each size and filling."""
    cases = {(c.k, c.n, c.weights, c.density, c.block): c for s in STEMS for c in CASES[s]}
    return [c for c in cases.values() if c.n * c.k < 10**6]


def lanes_of(rows: Tensor) -> Tensor:
    """What a CPU sums in 16 bits: inputs 0 1 4 5 and 2 3 6 7 of every 8."""
    eight = rows.reshape(-1, 8)
    return torch.cat([eight[:, [0, 1, 4, 5]], eight[:, [2, 3, 6, 7]]])


def excess(lanes: Tensor) -> int:
    """How far the fullest lane lies above the limit."""
    wide = torch.cat([lanes.long(), torch.zeros(1, 4, dtype=torch.int64)])
    return int(max(wide.clamp(min=0).sum(1).max(), -wide.clamp(max=0).sum(1).min())) - LANE_LIMIT


# The arithmetic.


@pytest.mark.parametrize("format", INT8_FORMATS, ids=str)
def test_a_given_scale(format: gs.Format) -> None:
    weight = Case("scales", 1, 50, 30, density=0.6, block=4).weight()
    own: Any = pack(weight, format)
    # Its own scale changes nothing; half of it cuts off, and no lane overflows.
    again: Any = pack(weight, format, scale=own.scale)
    assert torch.equal(again.unpack(), own.unpack())
    tight: Any = pack(weight, format, scale=own.scale / 2)
    tight._validate()
    assert torch.equal(tight.scale, own.scale / 2)
    off = (tight.unpack() - weight).abs() / tight.scale[:, None]
    assert off.max() > 10 and off.median() < 1
    for wrong in (own.scale[1:], -own.scale, own.scale * torch.nan):
        with pytest.raises(ValueError, match="scale must be 30 finite positive numbers"):
            pack(weight, format, scale=wrong)
    for other in (gs.Int4(), gs.Sparse()):
        with pytest.raises(ValueError, match="chooses its own scales"):
            pack(weight, other, scale=own.scale)


@settings(max_examples=300)
@given(
    hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 12), st.just(4)),
        elements=st.floats(width=32, allow_nan=False, allow_infinity=False)
        | st.sampled_from([0.0, 1.0, -1.0, 126.5, 127.0, 0.5, 63.5, 31.75, -32.5, 3e38]),
    ),
    st.integers(1, 3),
)
def test_no_lane_overflows_and_no_weight_moves_far(array: np.ndarray, n: int) -> None:
    lanes, outputs = torch.from_numpy(array), torch.arange(len(array)) % n
    q, scale = quantize_lanes(lanes, outputs, n)
    assert q.dtype == torch.int8 and int(q.long().abs().max()) <= 127
    assert excess(q) <= 0
    assert torch.isfinite(scale).all() and (scale > 0).all()
    # Rounding moves a weight by 1/2; who pays for a full lane had gained 1/4, and gives back 1.
    moved = (q.double() * scale.double()[outputs, None] - lanes.double()).abs()
    each = scale.double()[outputs, None]
    tiny = (lanes.abs() < 127 * 2.0**-120) & (each == 1)
    assert (moved <= torch.where(tiny, 2.0**-113, (0.75 + 2.0**-15) * each)).all()


@pytest.mark.parametrize("format", INT8_FORMATS, ids=str)
def test_the_scale_is_the_smallest_that_fits(format: formats.Format) -> None:
    # Full lanes need room for sums; a weight alone in its lane needs room for itself.
    for weight in (Case("scale", 1, 64, 40).weight().double(), torch.eye(40, 64).double()):
        scale = pack(weight, format).get_buffer("scale").double()
        lanes = torch.stack([lanes_of(row) for row in weight])
        sums = torch.stack([lanes.clamp(min=0).sum(2), -lanes.clamp(max=0).sum(2)]).amax((0, 2))
        need = torch.maximum(weight.abs().amax(1) / 127, sums / LANE_LIMIT)
        assert_close(scale, need, need * 2.0**-21)


@pytest.mark.parametrize("case", weight_cases(), ids=str)
def test_unpack_is_close_to_the_weight(case: Case) -> None:
    weight = case.weight()
    assert torch.equal(pack(weight, gs.Sparse()).unpack(), weight)
    for format in INT8_FORMATS:
        packed: Any = pack(weight, format)
        got = packed.unpack()
        assert got.dtype == torch.float32 and got.is_contiguous()
        far = 0.75 + 2.0**-15 if weight.abs().max() > 1e-30 else 2.0**-113
        assert_close(got, weight, far * packed.scale[:, None].expand_as(weight))
        assert (got[weight == 0] == 0).all()
        if format == gs.SparseInt8():
            assert excess(lanes_of(packed.values)) <= 0
        else:
            padded = torch.nn.functional.pad(integers(packed), (0, -case.k % 8))
            assert excess(lanes_of(padded)) <= 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stem", STEMS)
def test_weights_of_any_float_dtype_and_strides(stem: str, dtype: torch.dtype) -> None:
    weight = Case("dtypes", 1, 24, 10).weight().to(dtype)
    want = pack(weight.float(), FORMATS[stem]).unpack()
    assert torch.equal(pack(weight, FORMATS[stem]).unpack(), want)
    assert torch.equal(pack(weight.t().contiguous().t(), FORMATS[stem]).unpack(), want)


@pytest.mark.parametrize("stem", STEMS)
def test_what_it_says_of_itself(stem: str) -> None:
    weight = Case("itself", 1, 40, 20, density=0.3, block=4).weight()
    packed = pack(weight, FORMATS[stem])
    assert (
        packed.kernel == stem
        and packed.format == FORMATS[stem]
        and (packed.n, packed.k) == (20, 40)
    )
    assert packed.nbytes == sum(b.numel() * b.element_size() for b in packed.buffers())
    assert packed.zeros == pytest.approx(float((packed.unpack() == 0).double().mean()))
    assert not list(packed.parameters())
    if stem == "spmm":  # 5 bytes a weight that is there, 4 a non-empty row, 8 a cell
        assert packed.nbytes <= 5 * int(weight.count_nonzero()) + 4 * 20 + 8 * 3


# Refusals when packing.


@pytest.mark.parametrize("format", FORMATS.values(), ids=str)
def test_what_cannot_be_packed(format: formats.Format) -> None:
    for bad, message in (
        (torch.zeros(3), r"must be \(n, k\), got shape \(3,\)"),
        (torch.zeros(2, 3, 4), r"got shape \(2, 3, 4\)"),
        (torch.zeros(0, 4), "n=0, k=4"),
        (torch.zeros(4, 0), "n=4, k=0"),
        (torch.zeros(1, 65537), "k=65537 overflows int32 .limit 65536.: split the layer"),
        (torch.tensor([[1.0, torch.nan]]), "NaN or an Inf"),
        (torch.tensor([[1.0, -torch.inf]]), "NaN or an Inf"),
        (torch.zeros(2, 4, device="meta"), "weight is on meta"),
    ):
        with pytest.raises(ValueError, match=message):
            pack(bad, format)
    for dtype in (torch.int8, torch.complex64, torch.bool):
        with pytest.raises(TypeError, match="use a float dtype"):
            pack(torch.zeros(2, 4, dtype=dtype), format)
    assert pack(torch.zeros(1, 65536), format).k == 65536


def test_unknown_formats() -> None:
    with pytest.raises(ValueError, match=r"use gs.Int8\(\), gs.Int4\(\), gs.Sparse\(\) or "):
        pack(torch.zeros(2, 2), formats.Format())
    with pytest.raises(
        ValueError, match="activations='half' is unknown: use one of dynamic, static, none"
    ):
        gs.Int8(activations="half")
    with pytest.raises(ValueError, match=r"use one of dynamic, static$"):
        gs.SparseInt8(activations="none")
    for group in (0, 8, 64, 16.0, True, None):
        with pytest.raises(ValueError, match=f"group={group} has no kernel: use 16 or 32"):
            gs.Int4(group=group)  # type: ignore[arg-type]
    for data in ({"format": "Int3"}, {}, {"format": "Int8", "bits": 4}, "Int8", None):
        with pytest.raises(ValueError):
            formats.format_from_json(data)  # type: ignore[arg-type]
    for format in FORMATS.values():
        assert formats.format_from_json(format.to_json()) == format


def test_layouts_do_not_depend_on_the_isa() -> None:
    assert (_C.block_columns(1), _C.block_columns(4)) == (96, 192)
    assert [_C.chunk_rows(n) for n in (1, 16, 17, 33, 1024, 1025)] == [16, 16, 16, 32, 512, 272]


# Weights below each other.


def part(format: gs.Format, n: int, k: int = 300) -> Any:
    """Rows of odd lengths, blocks whose integers are all 0, outputs of nothing."""
    weight = Case("part", 1, k, n, density=0.4, block=4).weight()
    weight[:, :8] *= 1e-5
    weight[n // 2] = 0
    static = getattr(format, "activations", "") == "static"
    return pack(weight, format, (-1.5, 2.0) if static else None)


@pytest.mark.parametrize("sizes", [(64, 64, 64), (1, 20, 7, 600)], ids=str)
@pytest.mark.parametrize("format", [*FORMATS.values(), gs.Int8(activations="static")], ids=str)
def test_concat_has_the_bits_of_its_parts(format: gs.Format, sizes: tuple[int, ...]) -> None:
    parts = [part(format, n) for n in sizes]
    whole = parts[0].concat(parts)
    whole.from_buffers(whole.n, whole.k, format, dict(whole.named_buffers()))  # valid
    assert torch.equal(whole.unpack(), torch.cat([p.unpack() for p in parts]))
    assert whole.nbytes <= sum(p.nbytes for p in parts)
    for m in (1, 5, 70):
        x = Case("x", m, 300, 1).x()
        want = torch.cat([p.matmul(x) for p in parts], -1)
        if isinstance(format, gs.Int8 | gs.SparseInt8) and format.activations != "none":
            assert torch.equal(whole.matmul(x), want)
        else:
            torch.testing.assert_close(whole.matmul(x), want, rtol=1e-5, atol=1e-5)


def test_concat_refuses_what_differs() -> None:
    one = part(gs.Int8(), 5)
    for other in (part(gs.Int4(), 5), part(gs.Int8(), 5, k=301), part(gs.Int8("none"), 5)):
        with pytest.raises(ValueError, match="only weights of one format and width can be one"):
            one.concat([one, other])
    static = part(gs.Int8(activations="static"), 5)
    with pytest.raises(ValueError, match="inputs are quantized by other ranges"):
        one.concat([static, static.with_range(-1.0, 1.0)])
