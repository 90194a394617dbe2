"""Depthwise convolutions of `gemm_int8` and `conv_int8`, whose k is the taps of one channel.

No kernel of its own: a tap is a strided view of the image, and torch multiplies and adds these. All
are integers below 2^24, so that floats hold them exactly and the bits are those of the CPU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gossamer import reference
from gossamer.ops import ACTIVATIONS

from .operands import check_addend, laid_out


def is_depthwise(k: int, conv: list[int]) -> bool:
    """Whether a weight has the columns of one channel."""
    return k == conv[0] * conv[1]


def _activated(y: Tensor, activation: int) -> Tensor:
    """In the CPU's order of operations; GELU and SiLU may round otherwise."""
    if ACTIVATIONS[activation] == "hardswish":
        return y * ((y + 3).clamp(0, 6) * (1 / 6))
    return reference.activate(y, ACTIVATIONS[activation])


def _dequantized(
    q: Tensor, weight: Tensor, scale: Tensor, x_affine: Tensor, bias: Tensor | None, conv: list[int]
) -> Tensor:
    """Floats (images, n, out_h, out_w) of integers (images, n, height, width) and (n, k)."""
    kh, kw, sh, sw, dh, dw, top, bottom, left, right, _ = conv
    x = F.pad(q.float() - x_affine[1], (left, right, top, bottom))
    out_h = (x.shape[2] - dh * (kh - 1) - 1) // sh + 1
    out_w = (x.shape[3] - dw * (kw - 1) - 1) // sw + 1
    total = x.new_zeros(*x.shape[:2], out_h, out_w)
    for tap in range(kh * kw):
        rows = x[:, :, tap // kw * dh :: sh, tap % kw * dw :: sw]
        total = total + rows[:, :, :out_h, :out_w] * weight[:, tap, None, None].float()
    y = total * (x_affine[0] * scale)[:, None, None]
    return y if bias is None else y + bias[:, None, None]


def gemm_int8(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    x_affine: Tensor | None,
    bias: Tensor | None,
    activation: int,
    conv: list[int],
) -> Tensor:
    """Of floats x, quantized by x_affine, and integers (n, k); y has the dtype and layout of x."""
    if x_affine is None:
        raise ValueError("depthwise convolutions are static: x_affine must not be None")
    q = reference.quantize_rows(x, x_affine)[0]
    y = _dequantized(q, weight, scale, x_affine, bias, conv)
    well = torch.isfinite(x).all(3).all(2).all(1)[:, None, None, None]
    y = torch.where(well, _activated(y, activation), torch.nan).to(x.dtype)
    return laid_out(y, conv)


def conv_int8(
    q: Tensor,
    weight: Tensor,
    scale: Tensor,
    x_affine: Tensor,
    bias: Tensor | None,
    y_affine: Tensor | None,
    residual: Tensor | None,
    residual_affine: Tensor | None,
    activation: int,
    conv: list[int],
) -> Tensor:
    """Of a blocked image, to another, or without y_affine to floats."""
    n = len(scale)
    image = q.movedim(-1, 2).flatten(1, 2)[:, :n]
    check_addend(y_affine, residual, residual_affine)
    y = _dequantized(image, weight, scale, x_affine, bias, conv)
    if residual is not None and residual_affine is not None:
        y = y + reference.unblock(residual, residual_affine, n)
    y = _activated(y, activation)
    return laid_out(y, conv) if y_affine is None else reference.block(y, y_affine)
