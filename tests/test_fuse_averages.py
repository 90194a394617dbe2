"""Average pools between 8-bit images, and torchvision's stochastic depth."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fused_nets import EVERY_STATIC, gives, images, run, static
from products import same_bits
from torch import Tensor, fx, nn

import gossamer as gs
from gossamer import ops
from gossamer.fuse.images import ImageConv2d
from gossamer.packed import range_of


class Pooled(nn.Module):
    """A pool between two convolutions, of which the second one shows what it reads."""

    def __init__(self, pool: Any, channels: int = 6) -> None:
        super().__init__()
        self.first, self.pool = nn.Conv2d(3, channels, 3, padding=1), pool
        self.second = nn.Conv2d(channels, channels, 1)
        nn.init.dirac_(self.second.weight)
        nn.init.zeros_(self.second.bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.pool(self.first(x).relu()))
        return y


def step_of(fused: nn.Module) -> float:
    """What rounding twice may cost: half a step of what is pooled, and of the result."""
    first, second = fused.get_submodule("first"), fused.get_submodule("second")
    return float(0.51 * (first.y_affine[0] + second.layer.packed.x_affine[0]))


def convolutions(fused: nn.Module) -> int:
    return sum(isinstance(module, ImageConv2d) for module in fused.modules())


EXACT = [
    nn.AvgPool2d(2),
    nn.AvgPool2d(3, 1, 1),
    nn.AvgPool2d(3, 2, padding=1),
    nn.AvgPool2d((2, 3), (3, 2), (1, 0)),
    nn.AvgPool2d(5, 1, count_include_pad=False),
]


@pytest.mark.parametrize("channels", [5, 8, 24])
@pytest.mark.parametrize("pool", EXACT, ids=str)
@EVERY_STATIC
def test_average_pools_sum_bytes(isa: str, format: Any, pool: nn.Module, channels: int) -> None:
    x = images(size=13)
    model = static(Pooled(pool, channels), x, format)
    fused = gs.fuse(model, x)
    assert convolutions(fused) == 3 and "AvgPool2d" not in str(fused.report)
    got, want = run(fused, x), run(model, x)
    assert (got - want).abs().max() <= step_of(fused)
    assert same_bits(run(fused, x[1:]), got[1:])


def test_a_sum_of_bytes_is_rounded_once() -> None:
    x = images(size=12)
    fused = gs.fuse(static(Pooled(nn.AvgPool2d(3, 1, 1)), x), x)
    read: list[Tensor] = []
    for name in ("first", "second"):
        hook = lambda m, args: read.append(args[0])  # noqa: E731
        fused.get_submodule(name).register_forward_pre_hook(hook)
    pool: Any = fused.get_submodule("pool_1")
    pool.register_forward_pre_hook(lambda m, args: read.append(args[0]))
    run(fused, x)
    floats = ops.unblock(read[1], pool.layer.packed.x_affine, 6)
    want = ops.block(F.avg_pool2d(floats, 3, 1, 1), pool.y_affine)
    # Where a mean lies between two bytes, floats may round to either.
    assert (read[2].int() - want.int()).abs().max() <= 1
    assert (read[2] == want).float().mean() > 0.99


def test_the_function_is_such_a_pool_too() -> None:
    x = images(size=12)
    model = static(Pooled(lambda y: F.avg_pool2d(y, 3, stride=1, padding=1)), x)
    fused = gs.fuse(model, x)
    (row,) = [row for row in fused.report if "average pool" in row.note]
    assert row.runs.startswith("Conv2d Int8") and convolutions(fused) == 3
    wide = images(size=17)
    got, low, high = run(fused, wide), *range_of(fused.get_submodule("first").y_affine)
    want = F.avg_pool2d(run(model.get_submodule("first"), wide).relu().clamp(low, high), 3, 1, 1)
    assert (got - run(model.get_submodule("second"), want)).abs().max() <= step_of(fused)


@pytest.mark.parametrize(
    "pool",
    [
        nn.AvgPool2d(3, 2, 1, count_include_pad=False),
        nn.AvgPool2d(2, ceil_mode=True),
        nn.AvgPool2d(2, divisor_override=3),
    ],
    ids=str,
)
def test_windows_of_other_weights_stay_floats(pool: nn.Module) -> None:
    x = images(size=13)
    model = static(Pooled(pool), x)
    fused = gs.fuse(model, x)
    assert convolutions(fused) == 0 and "AvgPool2d" in str(fused.report)
    assert torch.equal(run(fused, x), run(model, x))


def test_a_pool_that_floats_are_read_of_stays_one() -> None:
    x = images(size=12)
    model = static(nn.Sequential(nn.Conv2d(3, 6, 3), nn.AvgPool2d(2), nn.Sigmoid()), x)
    fused = gs.fuse(model, x)
    assert "AvgPool2d" in str(fused.report)
    assert torch.equal(run(fused, x), run(model, x))


def test_what_others_read_keeps_its_range() -> None:
    class Both(Pooled):
        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x).relu()
            y: Tensor = self.second(self.pool(x)) + self.second(x)
            return y

    x = images(size=12)
    model = static(Both(nn.AvgPool2d(3, 1, 1)), x)
    fused = gs.fuse(model, 3 * x)
    affines = {
        tuple(m.layer.packed.x_affine.tolist()) for m in fused.modules() if hasattr(m, "layer")
    }
    assert tuple(model.get_submodule("second").packed.x_affine.tolist()) in affines
    assert gives(fused)["first"] == "int8"


def stochastic_depth(input: Tensor, p: float, mode: str, training: bool = True) -> Tensor:
    """As torchvision has it, in a few words."""
    return input * float(torch.rand(()) > p) if training else input


fx.wrap("stochastic_depth")


@pytest.mark.parametrize("off", [True, False])
def test_stochastic_depth_that_is_off_is_passed_by(off: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
            self.last = nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.one(x).relu()
            y: Tensor = self.last(x + stochastic_depth(self.two(x), 0.0, "row", training=not off))
            return y

    x = images(size=12)
    fused = gs.fuse(static(Net(), x), x)
    assert (gives(fused)["two"] == "int8") == off
    assert ("stochastic_depth" in str(fused.report)) != off
