"""fuse between static layers: what moves bytes moves them exactly, the rest within its steps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fused_nets import (
    STATIC,
    Block,
    Chain,
    Dense,
    MobileNet,
    Patches,
    ResNet,
    UNet,
    lively,
    run,
    static,
)
from products import same_bits
from torch import Tensor, nn

import gossamer as gs
from gossamer import ops
from gossamer.packed import affine_of

EVERY_STATIC = pytest.mark.parametrize("format", STATIC, ids=lambda f: f.name)


def images(n: int = 2, size: int = 21) -> Tensor:
    return torch.randn(n, 3, size, size)


def gives(fused: Any) -> dict[str, str]:
    return {row.name: row.gives for row in fused.report}


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
    assert len(fused.report) == 7


def test_concatenated_values_share_the_widest_range() -> None:
    x, net = images(), Dense()
    with torch.no_grad():
        net.two.weight *= 20
    model = static(net, x)
    fused = gs.fuse(model, x)
    affines = [fused.get_submodule(n).y_affine for n in ("stem", "one", "two")]
    assert all(torch.equal(affine, affines[0]) for affine in affines)
    assert torch.equal(affines[0], fused.out.packed.x_affine)
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


# What stays in floats, and says so.


def test_a_mobile_net_says_why() -> None:
    for act, name in ((nn.ReLU6, "ReLU6"), (nn.Hardswish, "Hardswish")):
        x = images(2, 16)
        fused = gs.fuse(static(lively(MobileNet(act)), x), x)
        rows = {row.name: row for row in fused.report}
        assert rows["blocks.0.up.0"].fused == f"BatchNorm, {name}"
        assert rows["blocks.0.up.0"].note == "gives fp32: blocks.0.middle.0 reads it so"
        depthwise = rows["blocks.0.middle.0"]
        assert depthwise.fused == "BatchNorm"
        assert depthwise.note == "groups=32: grouped convolutions stay with torch"
        assert rows["last"].fused == "hardswish" and rows["last"].gives == "int8"
        assert "mean_image" in rows


def test_padding_that_is_not_zeros_is_for_floats() -> None:
    x = images()
    convs = [nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")]
    model = static(nn.Sequential(*convs, nn.Conv2d(4, 4, 1)), x)
    fused = gs.fuse(model, x)
    assert same_bits(run(fused, x), run(model, x))
    assert "padding_mode='reflect' pads floats" in str(fused.report)


def test_a_layer_that_runs_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.one, self.two = nn.Conv2d(8, 8, 1), *map(nn.BatchNorm2d, (8, 8))
            self.stem, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.one(self.conv(self.stem(x))))
            y: Tensor = self.head(F.silu(self.two(self.conv(x))))
            return y

    dense, x = lively(Twice()), images()
    model = static(dense, x, reach=3.0)
    fused = gs.fuse(model, x)
    assert [row.fused for row in fused.report][2:4] == ["BatchNorm, relu", "BatchNorm, silu"]
    wrong = [(run(m, x) - run(dense, x)).norm() for m in (fused, model)]
    assert wrong[0] < 1.1 * wrong[1]
    panels = [fused.get_submodule(n).layer.packed for n in ("conv", "conv_1")]
    assert not torch.equal(panels[0].scale, panels[1].scale)
    assert model.conv.activation == "none"


def test_who_reads_floats_shares_them() -> None:
    """A value that a static convolution and something else read: written over in place, too."""

    class Net(nn.Module):
        def __init__(self, view: bool) -> None:
            super().__init__()
            self.a, self.b, self.view = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), view

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            (x.flatten(2) if self.view else x).mul_(0.5)
            y: Tensor = self.b(x) + x.sin()
            return y

    x = images()
    for view in (True, False):
        model = static(Net(view), x)
        assert same_bits(run(gs.fuse(model, x), x), run(model, x))


class Odd(nn.Module):
    """Floats between 8-bit images: a dense stem, a gate, a sum over an image, an early output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.two, self.three = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.four, self.five = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = F.max_pool2d(torch.sin(self.stem(x)), 2)
        x = torch.relu(self.one(x) + x)
        y = self.two(x)
        y = self.three(y * torch.sigmoid(y.mean((2, 3), keepdim=True)))
        y = y + y.mean(1, keepdim=True)
        early = self.four(y)
        z = self.five(F.relu6(early))
        return {"early": early, "flat": z.view(z.size(0), -1), "x": x}


@EVERY_STATIC
def test_floats_between_images(format: Any) -> None:
    x = images(size=10)
    model = Odd()
    with torch.no_grad(), gs.calibrate(model, observer="minmax"):
        model(x)
    gs.compress_(model, {"stem": None, "*": format})
    fused = gs.fuse(model, x)
    rows = {row.name: row for row in fused.report}
    # The floats of a dense layer are quantized to be a residual, by the scale of who reads them.
    assert rows["one"].fused == "+ max_pool2d, relu" and rows["max_pool2d_to_int8"].gives == "int8"
    assert torch.equal(fused.one.residual_affine, fused.one.layer.packed.x_affine)
    assert rows["two"].note == "gives fp32: mean, mul read it so"
    assert rows["three"].gives == rows["add_1"].gives == rows["four"].gives == "fp32"
    with torch.no_grad():
        got, want = fused(x), model(x)
    step = fused.one.y_affine[0] + fused.one.residual_affine[0]
    assert (got["x"] - want["x"]).abs().max() <= step / 2 * 1.001
    assert {k: v.shape for k, v in got.items()} == {k: v.shape for k, v in want.items()}


def test_asking_for_a_shape_needs_no_floats() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            y = self.b(x)
            whole = y.view(x.size(0), y.shape[1], -1) * x.shape[1] + x.size(dim=-1)
            n, _, height, _ = x.shape
            return whole.reshape(n, -1, height, x.size()[3])

    x = images(size=7)
    model = static(Net(), x)
    fused = gs.fuse(model, x)
    assert [row.runs for row in fused.report if "ToFloat" in row.runs] == ["ToFloat"]
    other = images(3, 9)
    assert same_bits(run(fused, other), run(model, other))


def test_bfloat16(tmp_path: Any) -> None:
    x = images(4, 32)
    model = static(lively(ResNet()), x)
    half = copy.deepcopy(model).bfloat16()
    fused = gs.fuse(half, x.bfloat16())
    y = run(fused, x.bfloat16())
    assert y.dtype == torch.bfloat16
    want = run(model, x)
    assert (y.float() - want).norm() < 0.05 * want.norm()
    # The scales stay float32 when a fused model is converted.
    later = gs.fuse(model, x).bfloat16()
    assert later.conv1.y_affine.dtype == torch.float32
    assert run(later, x.bfloat16()).isfinite().all()


def test_the_range_of_the_example_is_what_no_reader_knows() -> None:
    x = images(8, 32)
    fused = gs.fuse(static(lively(ResNet()), x), x)
    down = fused.get_submodule("layers.1.downsample.0")
    last = fused.get_submodule("layers.1.conv2")
    assert torch.equal(down.y_affine, last.residual_affine)
    narrow = gs.fuse(static(lively(ResNet()), x), x / 100)
    assert narrow.get_submodule("layers.1.downsample.0").y_affine[0] < down.y_affine[0]
    assert torch.equal(affine_of(0.0, 0.0), affine_of(-0.0, 0.0))
