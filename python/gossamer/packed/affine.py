"""The scale and zero point of static activations: x ~ (q - zero) * scale, (2) float32."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SMALLEST = 2.0**-126  # 1 / scale is finite


def affine_of(low: float, high: float) -> Tensor:
    """Scale and zero point of u8 over a range, which is widened to hold 0: zero is exact.

    Raises:
        ValueError: the range is empty or not finite.
    """
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise ValueError(f"the range {low} .. {high} of the input is not a range: calibrate again")
    ends = torch.tensor([min(low, 0.0), max(high, 0.0)])
    scale = (ends[1] / 255 - ends[0] / 255).clamp(min=SMALLEST)
    return torch.stack([scale, (-ends[0] * (1 / scale)).round()])


def range_of(affine: Tensor) -> tuple[float, float]:
    """The values of the bytes 0 and 255, which `affine_of` made it of, but for rounding."""
    scale, zero = affine.tolist()
    return -zero * scale, (255 - zero) * scale


def check_affine(affine: Tensor) -> None:
    """ValueError unless it is a scale that a kernel can divide by, and a zero point of a byte."""
    if affine.shape != (2,):
        raise ValueError(f"x_affine has shape {tuple(affine.shape)}: it must be (2,)")
    scale, zero = affine.tolist()
    if not (math.isfinite(scale) and scale >= SMALLEST):
        raise ValueError(f"x_affine has scale {scale}: it must be finite and at least 2^-126")
    if not (0 <= zero <= 255 and zero == int(zero)):
        raise ValueError(f"x_affine has zero point {zero}: it must be a whole number, 0 to 255")
