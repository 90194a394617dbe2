"""Modules on 8-bit images: (images, ceil(channels / 4), height, width, 4) uint8.

A value is (byte - zero) * scale, of one scale and zero point, the (2) float32 of an affine. Four
channels of a pixel are one word, which is what moves; channels behind the last hold the zero point.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer import ops
from gossamer.dtypes import KeepsDtypes
from gossamer.layers import Conv2d


def shape_of(x: Tensor, channels: int, dim: int | None = None) -> Any:
    """The shape that an 8-bit image has as floats, or one dimension of it."""
    shape = torch.Size((x.size(0), channels, x.size(2), x.size(3)))
    return shape if dim is None else shape[dim]


class ToInt8(KeepsDtypes):
    """Floats (images, channels, height, width) to bytes."""

    affine: Tensor

    def __init__(self, affine: Tensor) -> None:
        super().__init__()
        self.register_buffer("affine", affine.clone())

    def forward(self, x: Tensor) -> Tensor:
        """As a static layer quantizes its input."""
        if x.dim() != 4:
            raise ValueError(
                f"x has shape {tuple(x.shape)}: this model was fused for (images, channels, "
                "height, width)"
            )
        return ops.block(x, self.affine)


class ToFloat(KeepsDtypes):
    """Bytes to floats, of the dtype that the model had here in the example."""

    affine: Tensor

    def __init__(self, affine: Tensor, channels: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("affine", affine.clone())
        self.channels, self.dtype = channels, dtype

    def forward(self, x: Tensor) -> Tensor:
        """(images, channels, height, width), contiguous."""
        return ops.unblock(x, self.affine, self.channels, self.dtype)


class ImageConv2d(KeepsDtypes):
    """y = activation(conv2d(x, w) + bias + residual), bytes in and out; floats without y_affine.

    Those are of the dtype that the model had here in the example, contiguous.
    """

    layer: Conv2d
    y_affine: Tensor | None
    residual_affine: Tensor | None

    def __init__(
        self,
        layer: Conv2d,
        y_affine: Tensor | None,
        residual_affine: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.layer, self.dtype = layer, dtype
        for name, affine in (("y_affine", y_affine), ("residual_affine", residual_affine)):
            self.register_buffer(name, None if affine is None else affine.clone())

    def forward(self, x: Tensor, residual: Tensor | None = None, reuse: bool = False) -> Tensor:
        """All sums in int32, one rounding at the end; `reuse` as in `ops.conv_int8`."""
        # Not through nn.Module's slow path, as in gs.Linear: a network calls this fifty times.
        layer: Any = self._modules["layer"]
        buffers = self._buffers
        y_affine, addend = buffers["y_affine"], (residual, buffers["residual_affine"], reuse)
        y = layer.convolve(x, y_affine, *addend)
        return y if y_affine is not None else y.to(self.dtype)


def gives_floats(module: nn.Module | None) -> bool:
    """Whether it is a convolution of bytes to floats."""
    return isinstance(module, ImageConv2d) and module.y_affine is None


class ImageUpsample(KeepsDtypes):
    """Nearest upsampling: words at the places that torch takes for this size: exact."""

    def __init__(self, scale_factor: Any) -> None:
        super().__init__()
        self.scale_factor = scale_factor

    def forward(self, x: Tensor, size: Any = None) -> Tensor:
        """Rows, then columns; `size` counts where there is no factor."""
        words = x.view(torch.int32).squeeze(-1)
        for i in (0, 1):
            # Which input row or column each output has: torch's own answer for their numbers.
            count = torch.arange(words.size(2 + i), dtype=torch.float32, device=x.device)
            numbers = count.view(1, 1, -1)
            to, by = self._of(size, i), self._of(self.scale_factor, i)
            places = F.interpolate(numbers, to, by, mode="nearest").view(-1).int()
            words = words.index_select(2 + i, places)
        return words.unsqueeze(-1).view(torch.uint8)

    @staticmethod
    def _of(value: Any, i: int) -> Any:
        return value[i] if isinstance(value, tuple | list) else value

    def extra_repr(self) -> str:
        return f"scale_factor={self.scale_factor}"


class ImageRelu(KeepsDtypes):
    """max(x, 0): no byte below the zero point."""

    zero: Tensor

    def __init__(self, affine: Tensor) -> None:
        super().__init__()
        self.register_buffer("zero", affine[1].to(torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        """Exact."""
        return torch.maximum(x, self.zero)


class ImageMean(KeepsDtypes):
    """The mean of all pixels of a channel, in floats."""

    affine: Tensor

    def __init__(self, affine: Tensor, channels: int, dtype: torch.dtype, keepdim: bool) -> None:
        super().__init__()
        self.register_buffer("affine", affine.clone())
        self.channels, self.dtype, self.keepdim = channels, dtype, keepdim

    def forward(self, x: Tensor) -> Tensor:
        """(images, channels), or with two dimensions of 1 behind."""
        return ops.mean(x, self.affine, self.channels, self.keepdim).to(self.dtype)
