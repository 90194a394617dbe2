"""Buffers out of a file or a state_dict: none is trusted; what is taken means what unpack says."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from products import STEMS, expected
from torch import Tensor

import gossamer as gs
from gossamer.packed import Packed, pack, packed_from_buffers
from gossamer.testing import FORMATS, Case, assert_close

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
    sizes: list[Any] = [(2**31, K), (2**70, K), ("40", K), (40.0, K), (N, None)]
    for n, k in sizes:
        with pytest.raises(ValueError, match="a weight has 1"):
            load(stem, buffers_of(stem), n, k)


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
    "gemm_int4": [
        *SCALE_ATTACKS,
        poke("panels", (2, 0, 15, 0), 0x89),  # behind the last output
        poke("panels", (0, 6, 0, 2), 0x87),  # behind the last input
        poke("panels", (0, 6, 0, 0), 0x38),
        poke("group_scale", (1, 2, 3), -128),
        poke("wsum", (5,), 10**6),
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


def grown(stem: str, entries: int, rows: list[list[int]]) -> dict[str, Tensor]:
    """An index of one row (output 32, inputs 0 to 7), and rows of zeros added behind it."""
    weight = torch.zeros(N, K)
    weight[32, :8] = 1
    b = {name: buffer.clone() for name, buffer in pack(weight, FORMATS[stem]).named_buffers()}
    b["values"] = torch.cat([b["values"], b["values"].new_zeros(entries, *b["values"].shape[1:])])
    b["columns"] = torch.cat([b["columns"], b["columns"].new_zeros(entries)])
    b["rows"] = torch.tensor([*b["rows"].tolist(), *rows], dtype=torch.uint16)
    b["cells"][-1] += torch.tensor([len(rows), entries], dtype=torch.int32)
    return b


@pytest.mark.parametrize("stem", ["spmm", "spmm_int8"])
def test_an_index_that_only_a_kernel_would_find_wrong(stem: str) -> None:
    # All offsets fit each other and lie inside; but kernels rely on more than that.
    pair, first = (2, 2) if stem == "spmm_int8" else (1, 8)
    x = Case("grown", 3, K, N).x()
    packed = load(stem, grown(stem, pair, [[7, pair]]))
    assert_close(packed.matmul(x), *expected(packed, x))
    bad = {
        "no first entry to begin a sum with": (0, [[7, 0]]),
        "longer than the row before": (first + pair, [[7, first + pair]]),
        "an output twice": (pair, [[32, pair]]),
        "more rows than outputs": (8 * pair, [[7, pair]] * 8),
        "an odd number, but pairs are read": (1, [[7, 1]]) if pair == 2 else (0, [[7, 0]]),
    }
    for what, (entries, rows) in bad.items():
        with pytest.raises(ValueError, match=r"of the index|ends at row"):
            load(stem, grown(stem, entries, rows))
            pytest.fail(what)


def test_a_row_longer_than_its_block_is_refused() -> None:
    b = {name: v.clone() for name, v in pack(torch.zeros(N, K), FORMATS["spmm"]).named_buffers()}
    b |= {"values": torch.zeros(K + 1), "columns": torch.zeros(K + 1, dtype=torch.uint8)}
    b["rows"] = torch.tensor([[0, K + 1]], dtype=torch.uint16)
    b["cells"][1:] = torch.tensor([1, K + 1], dtype=torch.int32)
    with pytest.raises(ValueError, match="of the index"):
        load("spmm", b)


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
    part = {"columns": torch.zeros_like(packed.get_buffer("columns"))}
    with pytest.raises(RuntimeError, match=r"Missing key.*values.*rows"):
        packed.load_state_dict(part)
    missing = packed.load_state_dict(part, strict=False).missing_keys
    assert set(missing) == set(packed.BUFFERS) - {"columns"}
    with pytest.raises(RuntimeError, match=r"Unexpected key.*more"):
        packed.load_state_dict({**packed.state_dict(), "more": torch.zeros(1)})
    assert torch.equal(packed.unpack(), before)
