"""Packing: no lane overflows, unpack is the weight in use, and no buffer is trusted."""

from __future__ import annotations

import copy
from collections.abc import Callable

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from products import STEMS, expected, integers
from torch import Tensor

import gossamer as gs
from gossamer import _C, formats
from gossamer.packed import LANE_LIMIT, Packed, pack, packed_from_buffers, quantize_lanes
from gossamer.testing import CASES, FORMATS, Case, assert_close

INT8_FORMATS = [f for f in FORMATS.values() if f != gs.Sparse()]


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


@settings(max_examples=300)
@given(
    hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 12), st.just(4)),
        elements=st.floats(width=32, allow_nan=False, allow_infinity=False)
        | st.sampled_from([0.0, 1.0, -1.0, 126.5, 127.0, 0.5, 63.5, 31.75, -32.5]),
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
    weight = Case("scale", 1, 64, 40).weight().double()
    scale = pack(weight, format).scale.double()
    lanes = torch.stack([lanes_of(row) for row in weight])
    sums = torch.stack([lanes.clamp(min=0).sum(2), -lanes.clamp(max=0).sum(2)]).amax((0, 2))
    need = torch.maximum(weight.abs().amax(1) / 127, sums / LANE_LIMIT)
    assert_close(scale, need, need * 2.0**-21)


@pytest.mark.parametrize("case", weight_cases(), ids=str)
def test_unpack_is_close_to_the_weight(case: Case) -> None:
    weight = case.weight()
    assert torch.equal(pack(weight, gs.Sparse()).unpack(), weight)
    for format in INT8_FORMATS:
        packed = pack(weight, format)
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
    with pytest.raises(ValueError, match=r"use gs.Int8\(\), gs.Sparse\(\) or gs.SparseInt8\(\)"):
        pack(torch.zeros(2, 2), formats.Format())
    with pytest.raises(
        ValueError, match="activations='static' is unknown: use one of dynamic, none"
    ):
        gs.Int8(activations="static")
    with pytest.raises(ValueError, match=r"use one of dynamic$"):
        gs.SparseInt8(activations="none")
    for data in ({"format": "Int3"}, {}, {"format": "Int8", "bits": 4}, "Int8", None):
        with pytest.raises(ValueError):
            formats.format_from_json(data)  # type: ignore[arg-type]
    for format in FORMATS.values():
        assert formats.format_from_json(format.to_json()) == format


# Buffers from outside.

N, K = 40, 50


def buffers_of(stem: str) -> dict[str, Tensor]:
    """Of a weight whose index has two chunks; its last input is alone in a block of four."""
    weight = Case("buffers", 1, K, N, density=0.6, block=4).weight()
    return {name: b.clone() for name, b in pack(weight, FORMATS[stem]).named_buffers()}


def load(stem: str, buffers: dict[str, Tensor], n: int = N, k: int = K) -> Packed:
    return packed_from_buffers(n, k, FORMATS[stem], buffers)


@pytest.mark.parametrize("stem", STEMS)
def test_own_buffers_are_taken(stem: str) -> None:
    buffers, x = buffers_of(stem), Case("buffers", 3, K, N).x()
    packed = load(stem, buffers)
    want = pack(packed.unpack(), FORMATS[stem])
    assert torch.equal(
        packed.unpack(), load(stem, {k: v.clone() for k, v in buffers.items()}).unpack()
    )
    assert want.unpack().shape == (N, K)
    assert_close(packed.matmul(x), *expected(packed, x))
    # Not contiguous is no damage.
    strided = {k: torch.stack([v, v], -1)[..., 0] for k, v in buffers.items()}
    assert torch.equal(load(stem, strided).unpack(), packed.unpack())


@pytest.mark.parametrize("stem", STEMS)
def test_buffers_of_the_wrong_kind(stem: str) -> None:
    for name in buffers_of(stem):
        for change in (
            lambda b: b.double(),
            lambda b: b.bool(),
            lambda b: b[:-1],
            lambda b: torch.cat([b, b[-1:]]),
            lambda b: b[:0],
            lambda b: b.reshape(-1)[0],
            lambda b: b[None],
            lambda b: b.to("meta"),
            lambda b: b.tolist(),
        ):
            bad = buffers_of(stem)
            bad[name] = change(bad[name])
            with pytest.raises(ValueError):
                load(stem, bad)
        lacking = buffers_of(stem)
        del lacking[name]
        with pytest.raises(ValueError, match="has the buffers"):
            load(stem, lacking)
    with pytest.raises(ValueError, match="has the buffers"):
        load(stem, {**buffers_of(stem), "more": torch.zeros(1)})
    # An index may belong to a slightly larger weight as well: only its cells tell.
    for n, k in ((40 * N, K), (N, K + 768), (N, 1), (1, K), (0, K), (N, 0), (-N, -K), (N, 65537)):
        with pytest.raises(ValueError):
            load(stem, buffers_of(stem), n, k)
    for n, k in ((2**31, K), (2**70, K), ("40", K), (40.0, K), (N, None)):
        with pytest.raises(ValueError, match="a weight has 1"):
            load(stem, buffers_of(stem), n, k)  # type: ignore[arg-type]


def poke(name: str, place: tuple[int, ...], value: float) -> Callable[[dict[str, Tensor]], None]:
    """Sets one element of one buffer; a string-like name keeps test ids short."""

    def change(buffers: dict[str, Tensor]) -> None:
        buffers[name][place] = value

    change.__name__ = f"{name}{list(place)}={value}"
    return change


INDEX_ATTACKS = [
    poke("columns", (0,), 255),
    poke("columns", (-1,), 50),
    poke("rows", (0, 0), 32),
    poke("rows", (0, 0), 65535),
    poke("rows", (-1, 0), 8),  # the second chunk has 8 outputs
    poke("rows", (0, 1), 0),
    poke("rows", (0, 1), 65535),
    poke("rows", (-1, 1), 60),
    poke("rows", (1, 1), 51),
    poke("cells", (0, 0), 1),
    poke("cells", (0, 0), -1),
    poke("cells", (0, 1), 2),
    poke("cells", (1, 0), -5),
    poke("cells", (1, 0), 2**31 - 1),
    poke("cells", (1, 1), -(2**31)),
    poke("cells", (1, 1), 7),
    poke("cells", (-1, 0), 1),
    poke("cells", (-1, 0), 10**6),
    poke("cells", (-1, 1), 2**31 - 1),
]
SCALE_ATTACKS = [
    poke("scale", (3,), value) for value in (0.0, -1.0, torch.nan, torch.inf, -torch.inf)
]
ATTACKS = {
    "gemm_int8": [
        *SCALE_ATTACKS,
        poke("panels", (0, 0, 3, 1), -128),
        poke("panels", (2, 0, 15, 0), 1),  # behind the last output
        poke("panels", (0, 12, 0, 2), 1),  # behind the last input
        poke("panels", (0, 13, 0, 0), 1),
        poke("wsum", (5,), 10**6),
        poke("wsum", (-1,), -(2**31)),
    ],
    "gemm_w8": [
        *SCALE_ATTACKS,
        poke("panels", (1, 5, 3, 1), -128),
        poke("panels", (2, 0, 15, 0), 1),
        poke("panels", (0, 12, 0, 2), 1),
    ],
    "spmm": [
        *INDEX_ATTACKS,
        poke("values", (4,), torch.nan),
        poke("values", (-1,), torch.inf),
    ],
    "spmm_int8": [
        *INDEX_ATTACKS,
        *SCALE_ATTACKS,
        poke("rows", (0, 1), 3),  # odd
        poke("values", (0, 1), -128),
        poke("wsum", (0,), 12345),
    ],
}


@pytest.mark.parametrize(
    "stem, attack",
    [pytest.param(s, a, id=f"{s}-{a.__name__}") for s, attacks in ATTACKS.items() for a in attacks],
)
def test_a_damaged_buffer_is_refused(stem: str, attack: Callable) -> None:
    buffers = buffers_of(stem)
    attack(buffers)
    with pytest.raises(ValueError):
        load(stem, buffers)


def test_a_weight_behind_the_last_input_is_refused() -> None:
    buffers = buffers_of("spmm_int8")
    last = (buffers["columns"] == 12).nonzero()[0, 0]  # inputs 48 .. 51 of 50
    assert (buffers["values"][last, 2:] == 0).all()
    buffers["values"][last, 3] += 1
    with pytest.raises(ValueError, match="behind the last input"):
        load("spmm_int8", buffers)


@settings(max_examples=150)
@given(st.data())
def test_any_changed_element_is_refused_or_means_what_unpack_says(data: st.DataObject) -> None:
    stem = data.draw(st.sampled_from(STEMS))
    buffers = buffers_of(stem)
    for _ in range(data.draw(st.integers(1, 2))):
        flat = buffers[data.draw(st.sampled_from(sorted(buffers)))].view(-1)
        place = data.draw(st.integers(0, len(flat) - 1))
        if flat.dtype == torch.float32:
            flat[place] = data.draw(st.floats(-1e6, 1e6, width=32) | st.just(torch.nan))
        else:
            old, info = int(flat[place]), torch.iinfo(flat.dtype)
            near = st.integers(max(old - 3, info.min), min(old + 3, info.max))
            flat[place] = data.draw(near | st.integers(info.min, info.max))
    try:
        packed = load(stem, buffers)
    except ValueError:
        return
    x = Case("buffers", 5, K, N).x()
    assert_close(packed.matmul(x), *expected(packed, x))


# state_dict: the same distrust.


@pytest.mark.parametrize("stem", STEMS)
def test_state_dict_of_another_weight(stem: str) -> None:
    first = pack(Case("first", 1, K, N, density=0.6, block=4).weight(), FORMATS[stem])
    other = pack(Case("other", 1, K, N, density=0.3, block=4).weight(), FORMATS[stem])
    state = other.state_dict()
    first.load_state_dict(state)
    assert torch.equal(first.unpack(), other.unpack())
    for tensor in state.values():  # a copy, as torch makes it
        tensor.zero_()
    assert first.unpack().any()


@pytest.mark.parametrize("stem", ["spmm", "spmm_int8"])
@pytest.mark.parametrize("attack", INDEX_ATTACKS, ids=lambda a: a.__name__)
def test_a_damaged_state_dict_is_refused(stem: str, attack: Callable) -> None:
    layer = gs.Linear(load(stem, buffers_of(stem)))
    before = copy.deepcopy(layer)
    bad = {f"packed.{name}": b for name, b in buffers_of(stem).items()}
    attack({name.removeprefix("packed."): b for name, b in bad.items()})
    for strict in (True, False):
        with pytest.raises(RuntimeError, match="packed: "):
            layer.load_state_dict(bad, strict=strict)
    assert torch.equal(layer.unpack(), before.unpack())


def test_a_state_dict_without_all_buffers_changes_none() -> None:
    packed = load("spmm_int8", buffers_of("spmm_int8"))
    before = packed.unpack()
    part = {"columns": torch.zeros_like(packed.columns)}
    with pytest.raises(RuntimeError, match=r"Missing key.*values.*rows"):
        packed.load_state_dict(part)
    missing = packed.load_state_dict(part, strict=False).missing_keys
    assert set(missing) == set(packed.BUFFERS) - {"columns"}
    with pytest.raises(RuntimeError, match=r"Unexpected key.*more"):
        packed.load_state_dict({**packed.state_dict(), "more": torch.zeros(1)})
    assert torch.equal(packed.unpack(), before)


def test_layouts_do_not_depend_on_the_isa() -> None:
    assert (_C.block_columns(1), _C.block_columns(4)) == (96, 192)
    assert [_C.chunk_rows(n) for n in (1, 16, 17, 33, 1024, 1025)] == [16, 16, 16, 32, 512, 272]
