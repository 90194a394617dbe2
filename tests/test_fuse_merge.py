"""fuse merges the layers that read one tensor: encoders, bit for bit, and what must stay apart."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from nets import FORMATS
from torch import Tensor, nn

import gossamer as gs
from gossamer.fuse import Fused
from gossamer.tasks.minilm import Block

STATIC = [gs.Int8(activations="static"), gs.SparseInt8(activations="static")]


class Three(nn.Module):
    """q, k and v of x, of which k has no bias."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.q, self.v = nn.Linear(width, 20), nn.Linear(width, 7)
        self.k = nn.Linear(width, 33, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.q(x).view(x.shape[0], -1), self.k(x).transpose(0, 1), self.v(x) * 2


def packed(model: nn.Module, format: gs.Format, x: Tensor) -> nn.Module:
    model.eval()
    with gs.calibrate(model):
        model(x)
    gs.compress_(model, format, bias_correction=False)
    return model


def layers(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, gs.Linear)]


def notes(fused: Fused) -> dict[str, str]:
    return {row.name: row.note for row in fused.report.rows}


@pytest.mark.parametrize("format", [*FORMATS, *STATIC], ids=str)
def test_three_layers_become_one_with_the_same_bits(format: gs.Format) -> None:
    x = torch.randn(2, 5, 24)
    model = packed(Three(), format, x)
    before = copy.deepcopy(model.state_dict())
    fused = gs.fuse(model, example_inputs=(x,))
    assert layers(fused) == ["q_k_v"] and layers(model) == ["q", "v", "k"]
    assert fused.report.rows[0].fused == "with k, with v"
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    for other in (x, torch.randn(3, 9, 24), torch.randn(1, 1, 24)):
        for got, want in zip(fused(other), model(other), strict=True):
            if format in (gs.Sparse(), gs.Int8(activations="none"), gs.Int4()):
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
            else:
                assert torch.equal(got, want)


class Apart(nn.Module):
    """Layers that read one tensor, and must not be one layer."""

    def __init__(self, why: str) -> None:
        super().__init__()
        self.why = why
        self.a, self.b, self.c = (nn.Linear(24, 24) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x), self.b(x)
        if self.why == "activation":
            return torch.relu(a) + b * 2
        if self.why == "layer":
            return self.c(a) * b
        if self.why == "written":
            a[..., 0].add_(1)
            return a * b
        return a * b


SAID = {
    "activation": "no other like it",
    "format": "no other like it",
    "layer": "the layer behind it would copy a slice",
    "written": "its result is written to in place",
    "hook": "a has forward hooks",
}


@pytest.mark.parametrize("why", SAID)
def test_what_differs_stays_apart_and_says_why(why: str) -> None:
    x = torch.randn(2, 5, 24)
    model = Apart(why).eval()
    gs.compress_(model, {"a": gs.Int8(), "*": gs.Int4() if why == "format" else gs.Int8()})
    if why == "hook":
        model.a.register_forward_hook(lambda module, args, y: y)
    fused = gs.fuse(model, example_inputs=(x,))
    assert {"a", "b"} <= set(layers(fused))
    assert "not merged: " + SAID[why] in notes(fused)["a"]
    torch.testing.assert_close(fused(x), model(x))


def test_other_ranges_stay_apart() -> None:
    x = torch.randn(2, 5, 24)
    model: Any = packed(Three(), gs.Int8(activations="static"), x)
    model.k.packed = model.k.packed.with_range(-1.0, 1.0)
    fused = gs.fuse(model, example_inputs=(x,))
    assert layers(fused) == ["k", "q_v"] or layers(fused) == ["q_v", "k"]
    assert all(torch.equal(g, w) for g, w in zip(fused(x), model(x), strict=True))


def test_a_layer_that_runs_twice_is_not_the_reader_of_one_tensor() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(24, 24)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) * self.a(x + 1)

    model = packed(Twice(), gs.Int8(), x := torch.randn(3, 24))
    fused = gs.fuse(model, example_inputs=(x,))
    assert len(layers(fused)) == 2 and torch.equal(fused(x), model(x))


def test_a_block_of_an_encoder(tmp_path: Any) -> None:
    x, mask = torch.randn(2, 9, 24), torch.ones(2, 9, dtype=torch.bool)
    mask[1, 5:] = False
    model = packed(Wrapped(), gs.Int8(), x)
    fused = gs.fuse(model, example_inputs=(x, mask))
    names = {"block.query_key_value", "block.out", "block.up", "block.down"}
    assert set(layers(fused)) == names
    rows = {row.name: row for row in fused.report.rows}
    assert rows["block.up"].fused == "gelu"
    x, mask = torch.randn(3, 4, 24), torch.ones(3, 4, dtype=torch.bool)
    want = model(x, mask)
    # One rounding apart in GELU, a byte of what `down` quantizes may be another.
    torch.testing.assert_close(fused(x, mask), want, rtol=0, atol=0.02)
    assert torch.equal(torch.compile(fused, backend="aot_eager")(x, mask), fused(x, mask))
    again = gs.fuse(packed(Wrapped(), gs.Int8(), x), example_inputs=(x, mask))
    gs.save(fused, tmp_path / "fused.safetensors")
    gs.load_(again, tmp_path / "fused.safetensors")
    assert torch.equal(again(x, mask), fused(x, mask))


class Wrapped(nn.Module):
    """One layer of BERT."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block(24, 2, 48)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.block(x, torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask)
