"""fuse takes a large batch in pieces, where that cannot change what comes out."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from fused_nets import Chain, Dense, MobileNet, ResNet, UNet, images, run, static
from products import same_bits
from torch import Tensor, nn

import gossamer as gs
from gossamer.fuse import pieces


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache for two images of 8 channels, 21 x 21, as bytes."""
    monkeypatch.setattr(pieces, "_BYTES", 2 * 8 * 21 * 21)
    torch.set_num_threads(1)


def batches(fused: Any, x: Tensor) -> list[int]:
    """How many images each call of the first convolution got."""
    seen: list[int] = []
    first = next(m for m in fused.modules() if isinstance(m, gs.Conv2d))
    for module in fused.modules():
        if module is first or getattr(module, "layer", None) is first:
            module.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[0]))
    run(fused, x)
    return seen


@pytest.mark.parametrize("net", [Chain, UNet, Dense, ResNet, MobileNet], ids=lambda n: n.__name__)
def test_pieces_are_the_batch(net: Any) -> None:
    x = images(1, 20 if net is UNet else 21)
    model = static(net(), x, gs.Int8(activations="static"))
    fused, whole = gs.fuse(model, x), gs.fuse(model, x)
    assert fused.meta["images"] >= 1
    whole.meta["images"] = None
    many = images(7, x.shape[2])
    assert same_bits(run(fused, many), run(whole, many))
    at_once = fused.meta["images"]
    assert max(batches(fused, many)) <= at_once < 7
    assert sum(batches(copy.deepcopy(fused), many)) == 7
    assert batches(fused, many[:at_once]) == [at_once]


class Reads(nn.Module):
    """A convolution, then something else."""

    def __init__(self, what: Any) -> None:
        super().__init__()
        self.conv, self.other, self.what = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3), what

    def forward(self, x: Tensor) -> Any:
        return self.what(self.conv(x).relu(), x)


APART = {
    "view": lambda y, x: y.view(x.size(0), -1),
    "reshape": lambda y, x: y.reshape(-1, 8),
    "shape": lambda y, x: y.reshape(y.shape[0], 8, -1),
    "gate": lambda y, x: y * torch.sigmoid(y.mean((2, 3), keepdim=True)),
    "several": lambda y, x: {"a": y, "b": [torch.flatten(y, 1), x]},
}
MIXED = {
    "batch norm by hand": lambda y, x: y - y.mean(0, keepdim=True),
    "mean": lambda y, x: y.mean(),
    "flat": lambda y, x: torch.flatten(y),
    "rows": lambda y, x: y.view(y.size(1), -1),
    "running": lambda y, x: y.cumsum(0),
    "sorted": lambda y, x: y.sort(0)[0],
    "divided": lambda y, x: y.flatten(1) / x.size(0),
    "size": lambda y, x: (y, x.size(0)),
}


def fuse_of(what: Any) -> tuple[Any, Any]:
    model = Reads(what).eval()
    gs.compress_(model, gs.Int8())
    return model, gs.fuse(model, images(1))


@pytest.mark.parametrize("name", APART)
def test_each_image_alone(name: str) -> None:
    model, fused = fuse_of(APART[name])
    x = images(5)
    assert max(batches(fused, x)) < 5
    got, want = run(fused, x), run(model, x)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)  # torch's sums may be cut otherwise


@pytest.mark.parametrize("name", MIXED)
def test_what_may_mix_images_is_not_cut(name: str) -> None:
    model, fused = fuse_of(MIXED[name])
    assert fused.meta["images"] is None
    x = images(5)
    assert batches(fused, x) == [5]
    torch.testing.assert_close(run(fused, x), run(model, x))


def test_large_linear_layers_are_read_once_a_batch() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 19 * 19, 64)).eval()
    gs.compress_(model, gs.Int8())
    assert gs.fuse(model, images(1)).meta["images"] is None


def test_a_model_without_packed_convolutions_stays_whole() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 19 * 19, 4)).eval()
    gs.compress_(model, {"2": gs.Int8(), "*": None})
    assert gs.fuse(model, images(1)).meta["images"] is None


def test_each_thread_has_an_image() -> None:
    _, fused = fuse_of(APART["view"])
    fused.meta["images"] = 1
    torch.set_num_threads(2)
    try:
        assert batches(fused, images(5)) == [2, 2, 1]
    finally:
        torch.set_num_threads(1)


def test_traced_it_is_one_piece() -> None:
    _, fused = fuse_of(APART["view"])
    x = images(5)
    exported = torch.export.export(fused, (x,))
    calls = [n for n in exported.graph.nodes if "gemm_int8" in str(n.target)]
    assert len(calls) == 1
    assert same_bits(exported.module()(x), run(fused, x))


def test_inputs_by_name() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            y: Tensor = self.conv(left).relu() + self.conv(right)
            return y

    model, left, right = Two().eval(), images(5), images(5)
    gs.compress_(model, gs.Int8())
    fused = gs.fuse(model, {"left": left[:1], "right": right[:1]})
    assert fused.meta["images"]
    with torch.no_grad():
        want = fused(left, right)
        assert same_bits(fused(right=right, left=left), want)
        assert same_bits(fused(left, right=right), want)
        assert same_bits(want, model(left, right))
