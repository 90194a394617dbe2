"""fuse on networks that nobody would draw: layers, sums and moves put together at random."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fused_nets import STATIC, lively, run, static
from products import same_bits
from torch import Tensor, fx, nn

import gossamer as gs
from gossamer.fuse import pieces
from gossamer.timing import threads

KINDS = {"conv": 6, "add": 6, "act": 2, "norm": 1, "pool": 1, "up": 1, "cat": 1, "gate": 1}
KINDS |= {"again": 1, "view": 1, "half": 1, "average": 1}
MODULES = {"conv", "act", "norm", "pool", "up", "gate", "average"}
# How far results may be from those of the unfused model, as a share of their norm.
BOUNDS = {"Sparse": 1e-4, "Int8": 0.1, "SparseInt8": 0.1}


class Drawn(nn.Module):
    """Values made one from another, most of them read once; the last and another are returned."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.random, self.layers = random.Random(seed), nn.ModuleDict()
        self.steps: list[tuple[str, str, int, int]] = []
        self.values, self.unread = [(3, 0)], [0]  # of each: channels, and how often it was halved
        while len(self.steps) < 16:
            self._step(self.random.choices([*KINDS], [*KINDS.values()])[0])
        self.also = self.random.randrange(len(self.values))

    def _pick(self, places: list[int]) -> int:
        fresh = [place for place in places if place in self.unread]
        return self.random.choice(fresh if fresh and self.random.random() < 0.85 else places)

    def _step(self, kind: str) -> None:
        one = self._pick([*range(len(self.values))])
        channels, halved = self.values[one]
        alike = [p for p, (c, h) in enumerate(self.values) if h == halved and c == channels]
        other = self._pick([p for p in alike if p != one] or [one])
        name, shape = f"{kind}{len(self.steps)}", (channels, halved)
        if kind == "conv":
            outputs, stride = self.random.choice((8, 8, 8, 6)), 1 + (self.random.random() < 0.1)
            size = self.random.choice((1, 3))
            groups = self.random.choice((1, 1, 2)) if channels % 2 == 0 else 1
            self.layers[name] = nn.Conv2d(channels, outputs, size, stride, size // 2, groups=groups)
            shape = (outputs, halved + stride - 1)
        elif kind == "pool":
            self.layers[name] = self.random.choice((nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1)))
            shape = (channels, halved + 1)
        elif kind == "up":
            self.layers[name], shape = nn.Upsample(scale_factor=2), (channels, halved - 1)
        elif kind == "again":
            named = [n for n, m in self.layers.items() if n.startswith("conv")]
            name = self.random.choice(named) if named else ""
            layer: Any = self.layers[name] if name else None
            if layer is None or layer.stride != (1, 1) or layer.in_channels != channels:
                return
            shape = (layer.out_channels, halved)
        elif kind in MODULES:
            acts = (nn.ReLU(), nn.ReLU(True), nn.ReLU6(), nn.SiLU(), nn.Hardswish(), nn.Tanh())
            made = {"act": self.random.choice(acts), "norm": nn.BatchNorm2d(channels)}
            made |= {"gate": nn.Conv2d(channels, channels, 1), "average": nn.AvgPool2d(3, 1, 1)}
            self.layers[name] = made[kind]
        elif kind == "cat":
            shape = (2 * channels, halved)
        elif kind == "half":
            shape = (channels // 2, halved)
        if not 0 <= shape[1] <= 2 or not 1 < shape[0] <= 32:
            if kind in MODULES:
                del self.layers[name]
            return
        self.steps.append((kind, name, one, other))
        read = {one, other} if kind in ("add", "cat") else {one}
        self.unread = [p for p in self.unread if p not in read] + [len(self.values)]
        self.values.append(shape)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        values = [x]
        for kind, name, one, other in self.steps:
            values.append(self._compute(kind, name, values[one], values[other]))
        return values[-1], values[-1].mean((2, 3)), values[self.also]

    def _compute(self, kind: str, name: str, x: Tensor, other: Tensor) -> Tensor:
        layer: Any = self.layers[name] if kind in MODULES or kind == "again" else None
        if kind == "add":
            return x + other
        if kind == "cat":
            return torch.cat([x, other], 1)
        if kind == "half":
            return x[:, : x.shape[1] // 2]
        if kind == "view":
            return x.flatten(2).view(x.size(0), -1, x.shape[2], x.shape[3])
        if kind == "gate":
            return x * torch.sigmoid(layer(F.adaptive_avg_pool2d(x, 1)))
        y: Tensor = layer(x)
        return y


def packed(seed: int, format: Any, x: Tensor) -> nn.Module:
    net = lively(Drawn(seed))
    if isinstance(format, gs.Sparse):
        gs.prune_(net, 0.5, "unstructured")
    return static(net, x, format)


def apart(got: Any, want: Any) -> float:
    """The largest distance of two results, as a share of what is expected."""
    for a, b in zip(got, want, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
    pairs = zip(got, want, strict=True)
    return max(float((a - b).norm() / (b.norm() + 1e-9)) for a, b in pairs)


@pytest.mark.parametrize("seed", range(24))
@pytest.mark.parametrize("format", [gs.Sparse(), *STATIC], ids=lambda f: f.name)
def test_any_network(format: Any, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(seed)
    x, bound = torch.randn(3, 3, 24, 20), BOUNDS[type(format).__name__]
    if seed % 3 == 0:
        x = x.contiguous(memory_format=torch.channels_last)
    model = packed(seed, format, x)
    if seed % 2:
        monkeypatch.setattr(pieces, "_BYTES", 1 << 13)  # batches in pieces
    fused, before = gs.fuse(model, x), x.clone()
    got: Any = run(fused, x)
    assert torch.equal(x, before)
    assert apart(got, run(model, x)) < bound
    # In chains and pieces, on threads and alone: floats of torch may differ in the last bits.
    with torch.no_grad():
        assert apart(got, fx.Interpreter(fused).run(x)) < 1e-5
    with threads(2):
        assert apart(run(fused, x), got) < 1e-5
    alone = [run(fused, image) for image in x.split(1)]
    assert apart(tuple(map(torch.cat, zip(*alone, strict=True))), got) < 1e-5
    other = torch.randn(2, 3, 32, 28)
    own = other.clone()  # some nets write over their input
    assert apart(run(fused, other), run(model, own)) < 2 * bound
    assert same_bits(got[0], run(fused, x)[0])
