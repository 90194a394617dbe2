"""Small networks of the kinds that `fuse` meets, and how the tests make them static."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from products import same_bits
from torch import Tensor, fx, nn

import gossamer as gs
from gossamer.calibrate import observed

STATIC = [gs.Int8(activations="static"), gs.SparseInt8(activations="static")]
EVERY_STATIC = pytest.mark.parametrize("format", STATIC, ids=lambda f: f.name)


def images(n: int = 2, size: int = 21) -> Tensor:
    return torch.randn(n, 3, size, size)


class Chain(nn.Module):
    """Everything that only moves or compares bytes: pooling, concatenation, upsampling, ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True)
        self.left, self.right = nn.Conv2d(8, 12, 1), nn.Conv2d(8, 6, (3, 1), padding=(1, 0))
        self.mix = nn.Conv2d(18, 8, 3, padding="same", dilation=2)
        self.up = nn.Upsample(scale_factor=2)
        self.skip = nn.Conv2d(16, 5, 3, padding=1)
        self.head = nn.Conv2d(5, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        low = self.pool(x)
        low = torch.cat([self.left(low), F.relu(self.right(low), inplace=True)], dim=1)
        low = self.mix(F.relu(low))
        wide = torch.cat((F.interpolate(self.up(low), x.shape[2:]), x), 1)
        y: Tensor = self.head(torch.relu(self.skip(wide)))
        return y


class UNet(nn.Module):
    """Down, up by interpolate to a size, and a concatenation with what was there before."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.down = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)
        self.last, self.out = nn.Conv2d(24, 8, 3, padding=1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        low = F.relu(self.down(F.max_pool2d(x, 2)))
        up = F.interpolate(low, scale_factor=2.0, mode="nearest")
        y: Tensor = self.out(F.relu(self.last(torch.cat([x, up], 1))))
        return y


class Dense(nn.Module):
    """Each convolution reads all that came before it; one part has 6 channels, no multiple of 4."""

    def __init__(self, growth: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.one = nn.Conv2d(8, growth, 3, padding=1)
        self.two = nn.Conv2d(8 + growth, 8, 3, padding=1)
        self.out = nn.Conv2d(16 + growth, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        features = [torch.relu(self.stem(x))]
        features.append(torch.relu(self.one(torch.cat(features, 1))))
        features.append(torch.relu(self.two(torch.cat(features, 1))))
        y: Tensor = self.out(torch.cat(features, dim=-3))
        return y


class Block(nn.Module):
    """The basic block of a ResNet; `order` is how the addition is written."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, order: str = "iadd") -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(outputs))
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        other = x if self.downsample is None else self.downsample(x)
        if self.order == "iadd":
            y += other
        elif self.order == "swapped":
            y = other + y
        elif self.order == "function":
            y = torch.add(y, other)
        else:
            y = y.add_(other)
        result: Tensor = self.relu(y)
        return result


class ResNet(nn.Module):
    def __init__(self, order: str = "iadd") -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        self.layers = nn.Sequential(Block(8, 8, 1, order), Block(8, 16, 2, order))
        self.avgpool, self.dropout = nn.AdaptiveAvgPool2d((1, 1)), nn.Dropout(0.2)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(self.maxpool(self.relu(self.bn1(self.conv1(x)))))
        y: Tensor = self.fc(self.dropout(torch.flatten(self.avgpool(x), 1)))
        return y


class Inverted(nn.Module):
    """An inverted residual of a MobileNet: 1x1 up, depthwise, 1x1 down."""

    def __init__(self, channels: int, act: type[nn.Module]) -> None:
        super().__init__()
        wide = 4 * channels
        self.up = nn.Sequential(nn.Conv2d(channels, wide, 1), nn.BatchNorm2d(wide), act())
        depthwise = nn.Conv2d(wide, wide, 3, padding=1, groups=wide)
        self.middle = nn.Sequential(depthwise, nn.BatchNorm2d(wide), act())
        self.down = nn.Sequential(nn.Conv2d(wide, channels, 1), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(self.middle(self.up(x)))
        return y


class MobileNet(nn.Module):
    def __init__(self, act: type[nn.Module] = nn.ReLU6) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), act())
        self.blocks = nn.Sequential(Inverted(8, act), Inverted(8, act))
        self.last, self.classifier = nn.Conv2d(8, 16, 1), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.last(self.blocks(self.stem(x))))
        y: Tensor = self.classifier(x.mean([2, 3]))
        return y


class Patches(nn.Module):
    """The patch embedding of a vision transformer, and a layer behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, 24, 16, 16)
        self.norm, self.fc, self.act = nn.LayerNorm(24), nn.Linear(24, 8), nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.proj(x).flatten(2).transpose(1, 2)
        y: Tensor = self.act(self.fc(self.norm(tokens)))
        return y


def lively(model: nn.Module) -> nn.Module:
    """In eval mode, with BatchNorms that do something: some negative, one zero factor each."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias, std=0.3)
            with torch.no_grad():
                if module.affine:
                    module.weight[0] = 0
                assert module.running_mean is not None and module.running_var is not None
                module.running_mean.normal_(std=0.3)
                module.running_var.uniform_(0.3, 2.0)
    return model.eval()


def static(
    model: nn.Module, x: Tensor, format: Any = STATIC[0], reach: float | None = None
) -> nn.Module:
    """A copy, calibrated on x and packed but for "fc"; `reach`: with one range for all layers."""
    model = copy.deepcopy(model).eval()
    with torch.no_grad(), gs.calibrate(model, observer="minmax"):
        model(x)
    for module in model.modules():
        seen = observed(module)
        if seen is not None and reach is not None:
            alike = dataclasses.replace(seen, low=-reach, high=reach)
            vars(module)["_gossamer_observed"] = alike
    patterns = {"re:.*fc|classifier": gs.Int8(), "*": format}
    names = dict(model.named_modules())
    gs.compress_(model, patterns if {"fc", "classifier"} & names.keys() else format)
    return model


def calibrated(model: Any, x: Tensor, **more: Any) -> Any:
    """Observed while it runs on x."""
    with torch.no_grad(), gs.calibrate(model, observer="minmax", **more):
        model(x)
    return model


def run(model: Any, *inputs: Tensor) -> Tensor:
    """Without gradients."""
    with torch.no_grad():
        y: Tensor = model(*inputs)
    return y


def gives(fused: Any) -> dict[str, str]:
    """What each node of the report gives."""
    return {row.name: row.gives for row in fused.report}


FORMATS: dict[str, Any] = {
    "int8": gs.Int8(activations="static"),
    "1x4": gs.SparseInt8(activations="static"),
    "fp32": gs.Sparse(),
}


def fused_net(net: nn.Module, format: str, x: Tensor) -> Any:
    if format != "fp32":
        return gs.fuse(static(lively(net), x, FORMATS[format]), x)
    dense = lively(net)
    gs.prune_(dense, 0.5, "unstructured")
    gs.compress_(dense, FORMATS[format])
    return gs.fuse(dense, x)


def one_by_one(fused: Any, x: Tensor) -> Any:
    with torch.no_grad():
        return fx.Interpreter(fused).run(x)


def assert_same(got: Any, want: Any) -> None:
    got, want = (v if isinstance(v, tuple) else (v,) for v in (got, want))
    assert len(got) == len(want) and all(map(same_bits, got, want))
