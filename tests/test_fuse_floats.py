"""fuse where 8-bit images meet floats: what stays in floats says so, and is right."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fused_nets import EVERY_STATIC, STATIC, ResNet, images, lively, run, static
from products import same_bits
from torch import Tensor, nn

import gossamer as gs


class Grouped(nn.Module):
    """A ShuffleNet's kind of convolution between two others."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
        self.middle, self.norm = nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(F.relu6(self.norm(self.middle(F.relu6(self.up(x))))))
        return y.mean([2, 3])


def test_a_grouped_convolution_says_why() -> None:
    x = images(2, 16)
    model = static(lively(Grouped()), x, {"middle": None, "*": gs.Int8(activations="static")})
    fused = gs.fuse(model, x)
    rows = {row.name: row for row in fused.report}
    assert rows["up"].note == "gives fp32: middle reads it so"
    assert rows["middle"].fused == "BatchNorm"
    assert rows["middle"].note == "grouped: Int8(activations='static') would keep 8 bits"
    assert rows["last"].gives == "int8" and "mean_image" in rows


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
            y = self.b(F.max_pool2d(x, 3, 1, 1))  # of a narrower range than x
            whole = y.view(x.size(0), y.shape[1], -1) * x.shape[1] + x.size(dim=-1)
            n, _, height, _ = x.shape
            return whole.reshape(n, -1, height, x.size()[3])

    x = images(size=7)
    model = static(Net(), x)
    fused = gs.fuse(model, x)
    assert not any("ToFloat" in row.runs for row in fused.report)
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
    model = static(lively(ResNet()), x)
    wide, narrow = gs.fuse(model, x), gs.fuse(model, x / 100)
    name = "layers.1.downsample.0"
    assert torch.equal(
        wide.get_submodule(name).y_affine, wide.get_submodule("layers.1.conv2").residual_affine
    )
    assert narrow.get_submodule(name).y_affine[0] < wide.get_submodule(name).y_affine[0]
    for same in ("conv1", "layers.0.conv1"):  # whose readers are static
        assert torch.equal(*(f.get_submodule(same).y_affine for f in (wide, narrow)))


@pytest.mark.parametrize("ill", [torch.nan, torch.inf])
def test_an_ill_image_is_an_error(ill: float) -> None:
    x = images(2, 32)
    fused = gs.fuse(static(lively(ResNet()), x), x)
    x[1, 2, 3, 4] = ill
    with pytest.raises(RuntimeError, match="NaN or an Inf"):
        run(fused, x)


def test_max_pools_of_floats_run_axis_by_axis() -> None:
    class Pools(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.pool = nn.Conv2d(3, 8, 3), nn.MaxPool2d(3, 2, 1, ceil_mode=True)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = F.max_pool2d(self.pool(self.conv(x)), (2, 3), stride=1)
            return y

    model, x = Pools().eval(), images()
    gs.compress_(model, gs.Sparse())
    fused = gs.fuse(model, x)
    assert [row.runs for row in fused.report][1:] == ["SeparableMaxPool2d", "SeparableMaxPool2d"]
    x[0, 0, 5, 5] = torch.nan
    got = run(fused, x)
    assert torch.equal(got.isnan(), run(model, x).isnan())
    assert same_bits(got.nan_to_num(), run(model, x).nan_to_num())
    assert got.is_contiguous()
    last = x.contiguous(memory_format=torch.channels_last)
    assert run(fused, last).is_contiguous(memory_format=torch.channels_last)
    one = run(gs.fuse(model, x[0]), x[0])  # an image without a batch
    assert same_bits(one.nan_to_num(), run(model, x[0]).nan_to_num())


@pytest.mark.parametrize("kernel", [1, 2, 3, (5, 2)])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_max_pools_of_any_geometry(kernel: Any, stride: int) -> None:
    """Bit for bit those of torch, whatever each axis's windows have of the padding."""
    pools = 0
    for padding in (0, 1):
        for dilation in (1, 2, 3):
            for ceil_mode in (False, True):
                if padding > min(nn.modules.utils._pair(kernel)) // 2:
                    continue
                pool = nn.MaxPool2d(kernel, stride, padding, dilation, ceil_mode=ceil_mode)
                for height, width in ((13, 14), (15, 16)):
                    x = torch.randn(2, 5, height, width)
                    x[0, 0, 4, 4], x[1, 2] = torch.nan, -torch.inf
                    fused = gs.fuse(nn.Sequential(pool).eval(), x)
                    for image in (x, x.contiguous(memory_format=torch.channels_last)):
                        got, want = run(fused, image), pool(image)
                        assert got.stride() == want.stride()
                        assert torch.equal(got.isnan(), want.isnan())
                        assert torch.equal(got.nan_to_num(), want.nan_to_num())
                    pools += fused.report.rows[0].runs == "SeparableMaxPool2d"
    assert pools >= 12
    small = gs.fuse(nn.Sequential(nn.MaxPool2d(3)).eval(), x)
    with pytest.raises(RuntimeError, match="too small"):
        run(small, torch.zeros(1, 5, 2, 3))


def test_sums_are_written_over_what_they_alone_read() -> None:
    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            own, read = self.one(x), self.two(x)
            wide = self.two(x[:1])
            return torch.relu(x + own), read + x, read, F.relu(wide + x)

    x = images()
    for format, left in ((gs.Int8(), ["add_", "relu_"]), (gs.Sparse(), [])):
        model = Sums().eval()
        gs.compress_(model, format)
        fused, before = gs.fuse(model, x), x.clone()
        assert all(map(same_bits, run(fused, x), run(model, x)))
        assert same_bits(x, before)
        assert [n.target for n in fused.graph.nodes if n.op == "call_method"] == left
    rows = {row.name: row.fused for row in fused.report}
    assert rows["one"] == "+ x, relu" and rows["two_1"] == ""


@pytest.mark.parametrize("format", [gs.Sparse(), *STATIC], ids=lambda f: f.name)
def test_sums_of_many_lose_none(format: Any) -> None:
    """As in HRNet, where each resolution adds up what all others give."""

    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Conv2d(3, 8, 1) for _ in range(4))
            self.last, self.one, self.two = nn.Conv2d(8, 8, 1), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x) + self.b(x) + self.c(x) + torch.relu(self.d(x))
            y = self.last(torch.relu(y)).mean((2, 3))
            return self.one(y) + self.two(y) + y

    x = images()
    dense = Sums().eval()
    model = static(dense, x, format)
    want = run(model, x)
    torch.testing.assert_close(
        run(gs.fuse(model, x), x), want, rtol=0, atol=0.03 * want.abs().max()
    )


def test_a_sum_behind_bytes_is_written_over_the_floats_of_the_convolution() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.two(self.one(x)) + x)

    x = images()
    model = static(Sum(), x)
    fused = gs.fuse(model, x)
    assert same_bits(run(fused, x), run(model, x))
    assert [n.target for n in fused.graph.nodes if n.op == "call_method"] == ["add_", "relu_"]
    assert [row.gives for row in fused.report] == ["int8", "int8", "fp32", "fp32", "fp32"]


@pytest.mark.parametrize("activation", [nn.Identity, nn.ReLU, nn.GELU, nn.Hardswish])
def test_sparse_layers_add_inside(activation: Any) -> None:
    """Residuals of convolutions and linear layers, of which one comes later than the layer."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1, bias=False)
            self.side, self.norm, self.act = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), activation()
            self.head, self.tail = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.b(self.a(x)))
            y = self.act(y + torch.sin(self.side(x))).mean((2, 3))
            y = self.act(self.head(y) + y)
            return self.tail(y) + y

    dense = lively(Block())
    gs.prune_(dense, 0.5, "unstructured")
    model, x = copy.deepcopy(dense), images()
    gs.compress_(model, gs.Sparse())
    fused = gs.fuse(model, x)
    assert not {"add", "add_"} & {str(n.target) for n in fused.graph.nodes}
    for form in (torch.contiguous_format, torch.channels_last):
        for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
            image = x.to(dtype, memory_format=form)
            got, want = run(fused, image), run(dense, image.float())
            assert got.dtype == dtype and (got - want).abs().max() <= bound * want.abs().max()
    with pytest.raises(RuntimeError, match="must have the shape"):
        model.tail(torch.ones(2, 8), torch.ones(3, 8))
    gs.compress_(dense, gs.Int8())
    with pytest.raises(ValueError, match="adds no residual"):
        dense.tail(torch.ones(2, 8), torch.ones(2, 8))
    x = torch.ones(2, 8, requires_grad=True)
    with pytest.raises(RuntimeError, match="inference only"):
        model.tail(x.detach(), x).sum().backward()


@pytest.mark.parametrize("act", [nn.Identity, nn.ReLU, nn.ReLU6, nn.SiLU])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_a_stem_pools_before_its_activation(act: Any, channels: int) -> None:
    pool, last = nn.MaxPool2d(3, 2, 1), nn.Conv2d(8, 4, 1)
    model = nn.Sequential(nn.Conv2d(channels, 8, 3), nn.BatchNorm2d(8), act(), pool, last)
    x = torch.randn(2, channels, 12, 11)
    gs.compress_(lively(model), {"4": gs.Sparse(), "*": None})
    fused = gs.fuse(model, x)
    joined = channels <= 4 and act is not nn.SiLU
    assert (fused.report.rows[0].runs == "PooledConv2d") == joined
    assert not joined or fused.report.rows[0].fused.endswith("MaxPool2d")
    x[0, 0, 5, 5] = torch.nan
    for image in (x, x.contiguous(memory_format=torch.channels_last)):
        got, want = run(fused, image), run(model, image)
        assert torch.equal(got.isnan(), want.isnan()) and got.stride() == want.stride()
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert torch.allclose(run(fused, x[1]), want[1], rtol=1e-4, atol=1e-5)
    if joined:  # and where gradients are asked for, by torch
        stem, image = fused.get_submodule("0"), torch.randn(2, channels, 12, 11, requires_grad=True)
        y = stem(image)
        assert y.is_contiguous() and torch.allclose(y, run(stem, image.detach()), atol=1e-5)
        (slope,) = torch.autograd.grad(y.sum(), image)
        (wanted,) = torch.autograd.grad(model[:4](image).sum(), image)
        assert torch.allclose(slope, wanted, rtol=1e-4, atol=1e-5)
