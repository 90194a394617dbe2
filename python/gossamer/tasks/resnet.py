"""Residual networks for images: ResNet-50 (v1.5), and a small one for Fashion-MNIST."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

EXPANSION = 4  # outputs of a bottleneck, in widths


class Block(nn.Module):
    """y = relu(body(x) + shortcut(x)): (b, inputs, h, w) -> (b, outputs, h / stride, w / stride).

    Args:
        inputs: channels of x.
        width: channels of the 3x3 convolutions.
        stride: of the first 3x3 convolution, as in v1.5.
        bottleneck: body is 1x1, 3x3, 1x1 with 4 x width outputs, else 3x3, 3x3 with width outputs.
    """

    def __init__(self, inputs: int, width: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        self.outputs = EXPANSION * width if bottleneck else width
        self.body = nn.Sequential(
            *(unit(inputs, width, 1) if bottleneck else ()),
            *unit(width if bottleneck else inputs, width, 3, stride),
            *unit(width, self.outputs, 1 if bottleneck else 3, act=None),
        )
        same = stride == 1 and inputs == self.outputs
        projection = unit(inputs, self.outputs, 1, stride, act=None)
        self.shortcut: nn.Module = nn.Identity() if same else nn.Sequential(*projection)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.relu(self.body(x) + self.shortcut(x))
        return y


def unit(
    inputs: int,
    outputs: int,
    kernel: int,
    stride: int = 1,
    groups: int = 1,
    act: type[nn.Module] | None = nn.ReLU,
) -> list[nn.Module]:
    """A convolution that keeps the size but for its stride, BatchNorm, and an activation."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return [conv, nn.BatchNorm2d(outputs), *([act()] if act else [])]


class ResNet(nn.Module):
    """He 2016: a stem, stages of blocks that halve the image and double the width, mean, linear.

    Args:
        depths: blocks of each stage.
        width: of the first stage.
        classes: outputs.
        bottleneck: kind of the blocks.
        stem: kernel and stride of the first convolution; max-pooling halves the image after it.

    Example:
        >>> model = ResNet([1, 1], width=8, classes=10)
        >>> model(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        depths: Iterable[int],
        width: int,
        classes: int,
        bottleneck: bool = False,
        stem: tuple[int, int] = (3, 1),
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(*unit(3, width, *stem), nn.MaxPool2d(3, 2, 1))
        channels, blocks = width, []
        for stage, depth in enumerate(depths):
            for index in range(depth):
                stride = 2 if stage and not index else 1
                blocks.append(Block(channels, width << stage, stride, bottleneck))
                channels = blocks[-1].outputs
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(self.pool(self.blocks(self.stem(x))).flatten(1))
        return y


def resnet50(width: int = 64, classes: int = 1000) -> ResNet:
    """ResNet-50 (v1.5) with random weights: 25,557,032 parameters, (b, 3, 224, 224) -> (b, 1000).

    Args:
        width: of the first stage; less than 64 makes a smaller net of the same shape.
        classes: outputs.
    """
    return ResNet([3, 4, 6, 3], width, classes, bottleneck=True, stem=(7, 2))


def fashion_resnet() -> ResNet:
    """Three blocks of 32, 64 and 128 channels, 308,650 parameters: (b, 3, 32, 32) -> (b, 10)."""
    return ResNet([1, 1, 1], 32, classes=10)


@torch.no_grad()
def settle_(model: nn.Module, x: Tensor) -> None:
    """Sets the statistics of each BatchNorm to those of its input for the images x, in place.

    With them, activations keep their size through any depth, whatever the weights are. The model
    is left in eval mode.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momentum = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.train()
        norm.momentum = 1.0  # the mean and variance of the latest batch alone
    model(x)
    for norm, before in zip(norms, momentum, strict=True):
        norm.eval()
        norm.momentum = before
