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


def batches(fused: Any, x: Tensor, which: int = 0) -> list[int]:
    """How many images each call of the first packed layer, or another one, got."""
    seen: list[int] = []
    layer = [m for m in fused.modules() if isinstance(m, gs.Conv2d | gs.Linear)][which]
    for module in fused.modules():
        if module is layer or getattr(module, "layer", None) is layer:
            module.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[0]))
    run(fused, x)
    return seen


def first_stage(fused: Any) -> int:
    """How many images it takes at once."""
    images: dict[str, int] = fused.meta["images"]
    return next(iter(images.values()))


@pytest.mark.parametrize("net", [Chain, UNet, Dense, ResNet, MobileNet], ids=lambda n: n.__name__)
def test_pieces_are_the_batch(net: Any) -> None:
    x = images(1, 20 if net is UNet else 21)
    model = static(net(), x, gs.Int8(activations="static"))
    fused, whole = gs.fuse(model, x), gs.fuse(model, x)
    whole.meta["images"] = {}
    many = images(7, x.shape[2])
    assert same_bits(run(fused, many), run(whole, many))
    at_once = first_stage(fused)
    assert max(batches(fused, many)) < 7 > at_once
    assert sum(batches(copy.deepcopy(fused), many)) == 7
    assert batches(fused, many[:at_once]) == [at_once]


class Narrow(nn.Module):
    """Values become small at once, and a residual lives on where they do."""

    def __init__(self, last: bool = True) -> None:
        super().__init__()
        self.stem, self.pool = nn.Conv2d(3, 8, 3, padding=1), nn.MaxPool2d(4)
        self.one, self.two = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.mean, self.fc, self.last = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 4), last

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.stem(x).relu())
        x = (x + self.two(self.one(x).relu())).relu()
        y: Tensor = self.fc(torch.flatten(self.mean(x), 1))
        return y if self.last else x


@pytest.mark.parametrize("format", [gs.Int8(activations="static"), gs.Sparse()])
def test_pieces_join_where_values_become_small(format: Any) -> None:
    x = images(1)
    model = static(Narrow(), x, format)
    fused, whole = gs.fuse(model, x), gs.fuse(model, x)
    stages = fused.meta["images"]
    assert len(stages) > 1
    assert list(stages.values()) == sorted(stages.values())
    whole.meta["images"] = {}
    for count in (2, 7, 70):
        many = images(count)
        torch.testing.assert_close(run(fused, many), run(whole, many), atol=1e-6, rtol=1e-6)
    few, more = batches(copy.deepcopy(fused), many), batches(copy.deepcopy(fused), many, -1)
    assert sum(few) == sum(more) == 70
    assert max(few) <= first_stage(fused) < min(more)


def test_a_joined_piece_is_not_written_to_twice() -> None:
    # Two readers of what the first stage left, of which the last one may write over it.
    x = images(1)
    fused = gs.fuse(static(Narrow(last=False), x), x)
    many = images(9)
    before, want = many.clone(), torch.cat([run(fused, one) for one in many.split(1)])
    for _ in range(2):
        assert same_bits(run(fused, many), want)
    assert same_bits(many, before)


def test_stages_survive_copies_and_edits() -> None:
    x = images(1)
    fused = gs.fuse(static(Narrow(), x), x)
    many = images(9)
    want = run(fused, many)
    twin = copy.deepcopy(fused)
    assert twin.meta["images"] == fused.meta["images"]
    for layer in (fused, twin):
        layer.fc.register_forward_hook(lambda *_: _[-1] + 1)
        assert same_bits(run(layer, many), want + 1)
    twin.meta["images"] = {"nothing of this name": 2}
    assert same_bits(run(twin, many), want + 1)


def test_an_edited_graph_gets_the_batch_as_it_comes() -> None:
    x = images(1)
    fused = gs.fuse(static(Narrow(), x), x)
    many = images(9)
    want = run(fused, many)
    (output,) = fused.graph.find_nodes(op="output")
    with fused.graph.inserting_before(output):
        centred = fused.graph.call_function(_centred, (output.args[0],))
    output.args = (centred,)
    fused.recompile()
    assert same_bits(run(fused, many), _centred(want))
    assert batches(fused, many) == [9]


def _centred(y: Tensor) -> Tensor:
    return y - y.mean(0)


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
    assert fused.meta["images"] == {}
    x = images(5)
    assert batches(fused, x) == [5]
    torch.testing.assert_close(run(fused, x), run(model, x))


def test_large_linear_layers_are_read_for_many_images() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 19 * 19, 64)).eval()
    gs.compress_(model, gs.Int8())
    weights = sum(buffer.nbytes for buffer in model[2].buffers())
    (at_once,) = gs.fuse(model, images(1)).meta["images"].values()
    left = 4 * (3 * 21 * 21 + 2 * 8 * 19 * 19 + 64)  # bytes an image: input, result and its view
    assert (at_once - 1) * left < 4 * weights <= at_once * left


def test_a_model_without_packed_convolutions_stays_whole() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 19 * 19, 4)).eval()
    gs.compress_(model, {"2": gs.Int8(), "*": None})
    assert gs.fuse(model, images(1)).meta["images"] == {}


def test_each_thread_has_an_image() -> None:
    _, fused = fuse_of(APART["view"])
    fused.meta["images"] = dict.fromkeys(fused.meta["images"], 1)
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
