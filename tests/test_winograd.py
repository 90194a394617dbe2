"""3x3 kernels with stride 1, where conv_int8 is Winograd's algorithm: the same integers."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from products import integers, same_bits
from torch import Tensor

import gossamer as gs
from gossamer import _C, ops, reference, testing
from gossamer.packed import pack
from gossamer.testing import ImageCase
from gossamer.timing import threads

STATIC = gs.Int8(activations="static")
Y_AFFINE, R_AFFINE = torch.tensor([0.6, 90.0]), torch.tensor([0.2, 7.0])


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer that pays on every Isa of ours."""

    name: str
    shape: tuple[int, int, int, int]
    n: int = 64
    sides: tuple[int, int, int, int] = (1, 1, 1, 1)

    def __str__(self) -> str:
        return self.name.replace(" ", "-")

    def conv(self, planar: bool = True) -> list[int]:
        return ImageCase(self.name, self.shape, (3, 3), sides=self.sides).conv(planar)

    def q(self, low: int = 0, high: int = 256) -> Tensor:
        """A blocked image; channels that fill up a word are noise, which 0 multiplies."""
        images, channels, height, width = self.shape
        g = torch.Generator().manual_seed(len(self.name))
        size = (images, -(-channels // 4), height, width, 4)
        return torch.randint(low, high, size, dtype=torch.uint8, generator=g)

    def packed(self, kind: str = "normal", high: float = 2.3) -> Any:
        """A weight of random numbers; or with as many 32s in a row as the format allows: all."""
        channels = self.shape[1]
        weight = torch.randn(self.n, channels, 9, generator=torch.Generator().manual_seed(1))
        if kind != "normal":
            sign = -1 if kind == "negative" else 1
            weight = torch.full_like(weight, 0.1 * sign)
        taps = F.pad(weight, (0, 0, 0, -channels % 4)).transpose(1, 2)
        return pack(taps.flatten(1), STATIC, (-1.7, high))


LAYERS = [
    Layer("whole tiles", (1, 64, 28, 28)),
    Layer("parts of tiles", (1, 68, 26, 30), 72),
    Layer("odd words and panels", (1, 61, 31, 31), 83),
    Layer("no padding", (1, 64, 30, 31), sides=(0, 0, 0, 0)),
    Layer("padding of two", (1, 64, 26, 25), sides=(2, 2, 2, 2)),
    Layer("padding below and left", (1, 64, 28, 28), sides=(0, 2, 1, 0)),
    Layer("units of some rows", (2, 64, 57, 58)),
    Layer("one row of tiles", (1, 64, 4, 250)),
    Layer("a row that needs more scratch", (1, 256, 6, 520), 80),
    Layer("images together", (9, 64, 12, 12)),
    Layer("the last images fewer", (13, 128, 14, 14), 96),
    Layer("two exact parts", (16, 512, 7, 7), 96),
    Layer("an exact part and a word", (6, 388, 16, 16), 48),
]
EVERY_LAYER = pytest.mark.parametrize("layer", LAYERS, ids=str)


def sums_of(layer: Layer, q: Tensor, packed: Any) -> Tensor:
    """(images, n, height, width), of numbers less their zero point, exactly."""
    images, words, height, width, _ = q.shape
    zero = packed.x_affine[1].double()
    x = q.permute(0, 1, 4, 2, 3).reshape(images, 4 * words, height, width).double() - zero
    top, bottom, left, right = layer.sides
    w = integers(packed).double().view(layer.n, 3, 3, 4 * words).permute(0, 3, 1, 2)
    return F.conv2d(F.pad(x, (left, right, top, bottom)), w)


def floats_of(layer: Layer, q: Tensor, packed: Any, bias: Tensor | None = None) -> Tensor:
    scale = (packed.x_affine[0] * packed.scale)[:, None, None]
    y = sums_of(layer, q, packed).float() * scale
    return y if bias is None else y + bias[:, None, None]


@EVERY_LAYER
def test_floats(isa: str, layer: Layer) -> None:
    packed, bias = layer.packed(), torch.randn(layer.n)
    for q in (layer.q(), layer.q(255), layer.q(0, 1)):
        want = reference.activate(floats_of(layer, q, packed, bias), "relu")
        for planar, form in ((True, torch.contiguous_format), (False, torch.channels_last)):
            y = packed.convolve(q, bias, 1, layer.conv(planar), None)
            assert same_bits(y, want) and y.is_contiguous(memory_format=form)


@pytest.mark.parametrize("kind", ["positive", "negative"])
@EVERY_LAYER
def test_the_largest_sums(isa: str, layer: Layer, kind: str) -> None:
    """All weights 32 in size, all pixels 255, or as unlike their neighbours as can be."""
    packed = layer.packed(kind, high=1e9)  # zero point 0
    assert packed.x_affine[1] == 0 and integers(packed).abs().max() == 32
    edges = (layer.q(0, 2) * 255).to(torch.uint8)
    for q in (layer.q(255), edges):
        y = packed.convolve(q, None, 0, layer.conv(), None)
        assert same_bits(y, floats_of(layer, q, packed))


@EVERY_LAYER
@pytest.mark.parametrize("activation", ["none", "relu", "relu6", "silu"])
def test_bytes(isa: str, layer: Layer, activation: str) -> None:
    packed, bias, place = layer.packed(), torch.randn(layer.n), ops.activation_index(activation)
    q = layer.q()
    floats = floats_of(layer, q, packed, bias)
    residual = ops.block(torch.randn(floats.shape) * 9, R_AFFINE)
    for r in (None, residual):
        y = packed.convolve(q, bias, place, layer.conv(), Y_AFFINE, r, R_AFFINE)
        if r is not None:
            floats = floats + ops.unblock(r, R_AFFINE, layer.n)
        want = reference.activate(floats, activation)
        steps = (want / Y_AFFINE[0] + Y_AFFINE[1]).clamp(0, 255)
        got = ops.unblock(y, torch.tensor([1.0, 0.0]), layer.n)
        assert (got - steps).abs().max() <= 0.5 + 1e-3
        if activation != "silu":
            assert torch.equal(y, ops.block(want, Y_AFFINE))


@EVERY_LAYER
def test_images_of_floats_are_blocked_first(isa: str, layer: Layer) -> None:
    packed, bias = layer.packed(), torch.randn(layer.n)
    x = torch.randn(layer.shape, generator=torch.Generator().manual_seed(2))
    want = packed.convolve(ops.block(x, packed.x_affine), bias, 1, layer.conv(), None)
    for form in (torch.contiguous_format, torch.channels_last):
        y = packed.matmul(x.contiguous(memory_format=form), bias, "relu", layer.conv())
        assert same_bits(y, want)


@EVERY_LAYER
def test_bits_are_those_of_every_isa_thread_and_image(layer: Layer) -> None:
    packed, q = layer.packed(), layer.q()
    want = packed.convolve(q, None, 1, layer.conv(), Y_AFFINE)
    for name in _C.isas():
        with testing.isa(name):
            for count in (1, 2, 3):
                with threads(count):
                    assert torch.equal(packed.convolve(q, None, 1, layer.conv(), Y_AFFINE), want)
            parts = [packed.convolve(one, None, 1, layer.conv(), Y_AFFINE) for one in q.split(2)]
            assert torch.equal(torch.cat(parts), want)
