"""MobileNetV2 (Sandler 2018): inverted residuals around depthwise convolutions."""

from __future__ import annotations

from torch import Tensor, nn

from .resnet import unit

# Expansion, outputs, blocks and the stride of the first, of each stage.
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
STEM, LAST = 32, 1280


class InvertedResidual(nn.Module):
    """1x1 up, 3x3 depthwise, 1x1 down, and x added where the shapes are equal.

    (b, inputs, h, w) -> (b, outputs, h / stride, w / stride).
    """

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = expansion * inputs
        self.body = nn.Sequential(
            *(unit(inputs, wide, 1, act=nn.ReLU6) if expansion > 1 else ()),
            *unit(wide, wide, 3, stride, wide, act=nn.ReLU6),
            *unit(wide, outputs, 1, act=None),
        )
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return x + y if self.adds else y


class MobileNetV2(nn.Module):
    """(b, 3, h, w) -> logits (b, classes); h and w are halved five times.

    Args:
        width: times the channels of the paper.
        classes: outputs.

    Example:
        >>> import torch
        >>> MobileNetV2(0.25, 10)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(self, width: float = 1.0, classes: int = 1000) -> None:
        super().__init__()

        def scaled(channels: int) -> int:
            return max(8, round(channels * width / 8) * 8)

        channels, blocks = scaled(STEM), list[nn.Module]()
        self.stem = nn.Sequential(*unit(3, channels, 3, 2, act=nn.ReLU6))
        for expansion, outputs, depth, stride in STAGES:
            for index in range(depth):
                first = stride if not index else 1
                blocks.append(InvertedResidual(channels, scaled(outputs), first, expansion))
                channels = scaled(outputs)
        self.blocks = nn.Sequential(*blocks)
        last = max(LAST, scaled(LAST))
        pixels = unit(channels, last, 1, act=nn.ReLU6)
        self.last = nn.Sequential(*pixels, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(last, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        y: Tensor = self.fc(self.last(self.blocks(self.stem(x))))
        return y
