"""fuse between static layers: what moves bytes moves them exactly, the rest within its steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fused_nets import (
    EVERY_STATIC,
    STATIC,
    Block,
    Chain,
    Dense,
    MobileNet,
    Patches,
    ResNet,
    UNet,
    gives,
    images,
    lively,
    run,
    static,
)
from products import same_bits
from torch import Tensor, nn

import gossamer as gs
from gossamer import ops
from gossamer.packed import range_of

# Exactly.


@pytest.mark.parametrize("net", [Chain, UNet, Dense], ids=lambda net: net.__name__)
@EVERY_STATIC
def test_what_only_moves_bytes_is_exact(isa: str, format: Any, net: Any) -> None:
    size = 20 if net is UNet else 21
    x = images(size=size)
    model = static(net(), x, format, reach=6.0)
    fused = gs.fuse(model, x)
    assert same_bits(run(fused, x), run(model, x))
    others = images(3, size=size + 8)
    assert same_bits(run(fused, others), run(model, others))
    # All but the last layer, whose reader wants floats.
    convs = [row for row in fused.report if row.runs.startswith("Conv2d")]
    assert [row.gives for row in convs] == ["int8"] * (len(convs) - 1) + ["fp32"]


@EVERY_STATIC
def test_the_reader_decides_the_scale(format: Any) -> None:
    """Each value has the range that its reader was calibrated with: exact without any help."""
    x = images()
    net = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, padding=1)),
        *(nn.SiLU(), nn.Conv2d(8, 9, 1), nn.GELU(), nn.Dropout(), nn.Conv2d(9, 4, 1)),
    )
    model = static(net, x, format)
    fused = gs.fuse(model, x)
    assert same_bits(run(fused, x), run(model, x))
    assert [row.fused for row in fused.report][1:6:2] == ["ReLU", "SiLU", ""]
    assert len(fused.report) == 6


def test_concatenated_values_share_the_widest_range() -> None:
    x, net = images(), Dense()
    with torch.no_grad():
        net.two.weight *= 20
    model = static(net, x)
    fused = gs.fuse(model, x)
    affines = [fused.get_submodule(n).y_affine for n in ("stem", "one", "two")]
    assert all(torch.equal(affine, affines[0]) for affine in affines)
    assert torch.equal(affines[0], fused.out.layer.packed.x_affine)
    assert any("takes the range" in row.note for row in fused.report)
    plain = model.get_submodule("one").packed.x_affine
    assert not torch.equal(plain, affines[0])  # and the model keeps its own
    error = (run(fused, x) - run(model, x)).abs().max()
    assert error < 10 * affines[0][0]


@pytest.mark.parametrize("channels", [6, 8])
def test_a_part_of_odd_channels_goes_through_floats(channels: int) -> None:
    x = images()
    model = static(Dense(growth=channels), x, reach=6.0)
    fused = gs.fuse(model, x)
    assert same_bits(run(fused, x), run(model, x))
    notes = [row.note for row in fused.report if row.runs == "cat" and row.note]
    assert len(notes) == (1 if channels == 6 else 0)
    assert all("one has 6 channels, no multiple of 4" in note for note in notes)


@pytest.mark.parametrize("size", [7, 8, 9, 12])
@pytest.mark.parametrize(
    "pool",
    [
        nn.MaxPool2d(2),
        nn.MaxPool2d(3, 2, 1),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        nn.MaxPool2d((2, 3), (3, 2), (1, 0), ceil_mode=True),
        nn.MaxPool2d(3, 1, 1, dilation=2),
        nn.MaxPool2d(2, 3, 1, ceil_mode=True),
    ],
    ids=str,
)
def test_max_pooling(pool: nn.Module, size: int) -> None:
    x = images(size=size)
    model = static(nn.Sequential(nn.Conv2d(3, 6, 1), pool, nn.Conv2d(6, 4, 1)), x)
    fused = gs.fuse(model, x)
    assert gives(fused)["1_image" if "1_image" in gives(fused) else "_1_image"] == "int8"
    assert same_bits(run(fused, x), run(model, x))


@pytest.mark.parametrize("act", [nn.ReLU, nn.ReLU6, lambda: nn.ReLU(inplace=True)])
@pytest.mark.parametrize("format", [*STATIC, gs.Int8(), gs.Sparse()], ids=str)
def test_an_activation_behind_a_pool_goes_into_the_layer_before_it(act: Any, format: Any) -> None:
    x = images(size=12)
    net = nn.Sequential(nn.Conv2d(3, 6, 1), nn.MaxPool2d(3, 2, 1), act(), nn.Conv2d(6, 4, 1))
    model = static(net, x, format)
    fused = gs.fuse(model, x)
    rows = [row for row in fused.report if row.runs.startswith("Conv2d")]
    assert [row.fused for row in rows] == [type(act()).__name__, ""]
    assert len(fused.report.rows) <= 5 and not any("elu" in row.runs for row in fused.report)
    assert same_bits(run(fused, x), run(model, x))
    x[0, 0, 0, 0] = torch.nan
    if format in (gs.Sparse(), gs.Int8()):
        assert same_bits(run(fused, x), run(model, x))


def test_what_others_read_keeps_its_activation_behind_the_pool() -> None:
    class Net(nn.Module):
        def __init__(self, of: Any) -> None:
            super().__init__()
            self.a, self.b, self.of = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1), of

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.b(self.of(self.a(x)))
            return y

    x = images(size=12)
    for of in (
        lambda y: F.relu(F.max_pool2d(y, 2)) + F.avg_pool2d(y, 2),
        lambda y: F.relu(z := F.max_pool2d(y, 2)) - z,
        lambda y: F.hardswish(F.max_pool2d(y, 2)),
        lambda y: F.relu(F.max_pool2d(F.silu(y), 2)),
    ):
        model = static(Net(of), x)
        fused = gs.fuse(model, x)
        assert next(row for row in fused.report if row.name == "a").fused in ("", "silu")
        torch.testing.assert_close(run(fused, x), run(model, x), atol=0.1, rtol=0.1)


@pytest.mark.parametrize(
    "options",
    [
        {"scale_factor": 2},
        {"scale_factor": (1.5, 2.7)},
        {"size": (17, 30)},
        {"size": 5},
        {"scale_factor": 0.6},
    ],
    ids=str,
)
def test_nearest_upsampling(options: dict[str, Any]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.b(F.interpolate(self.a(x), **options))
            return y

    x = images(size=11)
    model = static(Net(), x)
    fused = gs.fuse(model, x)
    assert gives(fused)["interpolate_image"] == "int8"
    assert same_bits(run(fused, x), run(model, x))


# Within steps.


@pytest.mark.parametrize("order", ["iadd", "swapped", "function", "add_"])
@pytest.mark.parametrize("stride", [1, 2])
@EVERY_STATIC
def test_a_residual_is_rounded_once(format: Any, stride: int, order: str) -> None:
    block = lively(Block(8, 8, stride, order))
    x = images()
    model: Any = static(nn.Sequential(nn.Conv2d(3, 8, 1), block, nn.Conv2d(8, 4, 1)), x, format)
    fused = gs.fuse(model, x)
    conv, other = "1.conv2", "0" if stride == 1 else "1.downsample.0"
    if stride == 2 and order == "swapped":  # the left one computes, the right one is added
        conv, other = other, conv
    rows = {row.name: row for row in fused.report}
    assert rows[conv].fused == f"BatchNorm, + {other}, ReLU"
    assert not any(row.runs.startswith(("add", "ReLU", "BatchNorm")) for row in fused.report)

    last, got = fused.get_submodule(conv), []
    last.register_forward_hook(lambda conv, args, y: got.append(ops.unblock(y, conv.y_affine, 8)))
    run(fused, x)
    want = run(model[1], run(model[0], x))
    # Half a step of the residual and of the result; and where folding BatchNorm moved a sum over
    # the edge between two bytes, one step of the input times the weights that read it.
    bn, packed = model[1].bn2, model[1].conv2.packed
    factor = (bn.weight / (bn.running_var + bn.eps).sqrt()).abs().max().detach()
    flips = packed.x_affine[0] * packed.unpack().abs().sum(1).max() * factor
    steps = (last.y_affine[0] + last.residual_affine[0]) / 2
    assert (got[0] - want).abs().max() <= steps + flips


def test_additions_that_are_no_residual() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Conv2d(3, 3, 1) for _ in range(4))
            self.e, self.f, self.g, self.h = (nn.Conv2d(3, 3, 1) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            z = self.c(y + self.b(x))  # a is read by others too, so b computes
            z = F.relu(z) + F.silu(self.d(y))  # neither is a sum any more
            z = torch.add(self.e(z), self.f(z), alpha=2)
            z = self.g(z)
            y = self.h(z + z)
            return y + y.mean((0, 1))  # of another shape

    x = images()
    model = static(Net(), x)
    fused = gs.fuse(model, x)
    fusions = {row.name: row.fused for row in fused.report if row.fused}
    assert fusions == {"b": "+ a", "c": "relu", "d": "silu"}
    error = run(fused, x) - run(model, x)
    assert error.norm() < 0.05 * run(model, x).norm()


@pytest.mark.parametrize("act", [F.silu, F.hardswish, F.gelu, F.relu6], ids=lambda f: f.__name__)
def test_the_activation_behind_a_residual(act: Any) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (
                nn.Conv2d(3, 8, 1),
                nn.Conv2d(8, 8, 3, 1, 1),
                nn.Conv2d(8, 4, 1),
            )

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            y: Tensor = self.c(act(x + self.b(x)))
            return y

    x = images() * 4
    model: Any = static(Net(), x)
    fused = gs.fuse(model, x)
    assert fused.report.rows[2].fused == f"+ a, {act.__name__}"
    got: list[Tensor] = []
    fused.b.register_forward_hook(lambda m, args, y: got.append(ops.unblock(y, m.y_affine, 8)))
    run(fused, x)
    affines = fused.b.residual_affine, fused.b.y_affine
    other = run(model.a, x).clamp(*range_of(affines[0]))
    want = act(other + run(model.b, run(model.a, x))).clamp(*range_of(affines[1]))
    # Half a step each; no slope of these is above 1.5.
    assert (got[0] - want).abs().max() <= affines[0][0] * 0.751 + affines[1][0] * 0.501


def test_the_mean_of_bytes() -> None:
    class Net(nn.Module):
        def __init__(self, how: str) -> None:
            super().__init__()
            self.conv, self.how = nn.Conv2d(3, 6, 3), how

        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(self.conv(x))
            if self.how == "mean":
                return y.mean((2, 3))
            if self.how == "keepdim":
                return torch.mean(y, dim=[-1, -2], keepdim=True)
            return F.adaptive_avg_pool2d(y, 1)

    x = images()
    for how, shape in (("mean", (2, 6)), ("keepdim", (2, 6, 1, 1)), ("pool", (2, 6, 1, 1))):
        model = static(Net(how), x)
        fused = gs.fuse(model, x)
        got, want = run(fused, x), run(model, x)
        step = fused.conv.y_affine[0]
        bytes_of = {row.name: row.gives for row in fused.report}
        assert got.shape == want.shape == shape and "fp32" in bytes_of.values()
        assert (got - want).abs().max() <= step * 0.501


@pytest.mark.parametrize("net", [ResNet, MobileNet, Patches], ids=lambda net: net.__name__)
@EVERY_STATIC
def test_whole_networks_lose_no_more_than_quantization_does(format: Any, net: Any) -> None:
    torch.manual_seed(1)
    dense, x = lively(net()), images(8, 32)
    model = static(dense, x, format)
    fused = gs.fuse(model, x)
    wrong = [(run(m, x) - run(dense, x)).norm() for m in (fused, model)]
    assert wrong[0] < 2 * wrong[1] < run(dense, x).norm()


def test_nothing_depends_on_the_batch() -> None:
    model, x = lively(ResNet()), images(5, 32)
    fused = gs.fuse(static(model, x), x)
    y = run(fused, x)
    for sizes in ([1] * 5, [2, 3], [4, 1]):
        assert same_bits(torch.cat([run(fused, part) for part in x.split(sizes)]), y)
    assert run(fused, torch.randn(3, 3, 47, 40)).shape == (3, 10)
    assert run(fused, torch.randn(0, 3, 32, 32)).shape == (0, 10)
    with pytest.raises(ValueError, match=r"x has shape \(3, 32, 32\): this model was fused for"):
        run(fused, x[0])
