"""quantize_rows: each row of x to bytes, with a scale and an exact zero point.

    low = min(x, 0)  high = max(x, 0)  scale = high / 255 - low / 255  zero = round(-low / scale)
    q = round(clamp(x / scale, -zero, 255 - zero)) + zero

    x      rows x k       float32, bfloat16 or float16
    q      rows x stride  bytes: q for the caller; q - 128 for our products, as a tensor core
                          multiplies signed bytes with signed ones
    scale  rows           float32; NaN for a row that holds a NaN or an Inf
    zero   rows           int32; what q has for x = 0

A program takes a row, in two passes: the second finds it in the cache. An image of a convolution is
one row too: torch finds its range, and a second kernel writes it channels innermost, with its
padding (zeros, which quantize to the zero point), for `operands.image_rows`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from .epilogue import MAGIC
from .operands import Rows, image_rows, launch, matrix_rows

SIGNED = 128
STRIDE = 16  # rows of q begin at multiples of it: 16-byte loads


@triton.jit
def affine_of(low, high, ill, affine, STATIC: tl.constexpr):
    """Scale and zero point, float32, of a range that is widened to 0, or given; ill: NaN and 0."""
    if STATIC:
        scale, zero = tl.load(affine), tl.load(affine + 1)
    else:
        scale = tl.div_rn(high, 255.0) - tl.div_rn(low, 255.0)
        scale = tl.maximum(scale, 1.1754943508222875e-38)  # 2^-126: 1 / scale is finite
        # Clamped, though it is in there: what stands between keeps the multiply unfused.
        zero = tl.minimum(tl.maximum(-low * tl.div_rn(1.0, scale), 0.0), 255.0)
        zero = (zero + MAGIC) - MAGIC
    return tl.where(ill, float("nan"), scale), tl.where(ill, 0.0, zero)


@triton.jit
def bytes_of(x, scale, zero, OFFSET: tl.constexpr):
    """q - OFFSET, int32; 0 - OFFSET where the scale is NaN."""
    inverse = tl.div_rn(1.0, tl.where(scale == scale, scale, 1.0))
    clamped = tl.minimum(tl.maximum(x * inverse, -zero), 255.0 - zero)
    q = ((clamped + MAGIC) - MAGIC + zero).to(tl.int32)
    return tl.where(scale == scale, q, 0) - OFFSET


@triton.jit
def _quantize_rows(
    x, affine, q, scale, zero, k, x_step, q_step,
    STATIC: tl.constexpr, OFFSET: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x += row * x_step
    q += row * q_step
    low = tl.zeros((BLOCK,), tl.float32)
    high = tl.zeros((BLOCK,), tl.float32)
    bad = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, k, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        v = tl.load(x + column, mask=column < k, other=0.0).to(tl.float32)
        low, high, bad = tl.minimum(low, v), tl.maximum(high, v), bad + v * 0.0
    ill = tl.sum(bad, 0) != 0.0  # x * 0 is NaN just for a NaN or an Inf
    row_scale, row_zero = affine_of(tl.min(low, 0), tl.max(high, 0), ill, affine, STATIC)
    for begin in range(0, k, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        v = tl.load(x + column, mask=column < k, other=0.0).to(tl.float32)
        v = tl.where(ill, 0.0, v)
        byte = bytes_of(v, row_scale, row_zero, OFFSET)
        tl.store(q + column, byte.to(q.dtype.element_ty), mask=column < k)
    tl.store(scale + row, row_scale)
    tl.store(zero + row, row_zero.to(tl.int32) - OFFSET)


@triton.jit
def _quantize_images(
    x, low, high, affine, q, scale, zero,
    channels, height, width, top, left, image_step, channel_step, line_step, pixel_step,
    q_channels, q_width, q_pixels,
    STATIC: tl.constexpr, OFFSET: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(2).to(tl.int64)
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    bottom, peak = tl.load(low + image), tl.load(high + image)
    ill = (bottom * 0.0 + peak * 0.0) != 0.0
    own_scale, own_zero = affine_of(
        tl.minimum(bottom, 0.0), tl.maximum(peak, 0.0), ill, affine, STATIC
    )
    y, across = pixel // q_width - top, pixel % q_width - left
    inside = (y >= 0) & (y < height) & (across >= 0) & (across < width)
    place = y.to(tl.int64) * line_step + across.to(tl.int64) * pixel_step
    place = place[:, None] + channel.to(tl.int64)[None, :] * channel_step
    mask = inside[:, None] & (channel < channels)[None, :]
    v = tl.load(x + image * image_step + place, mask=mask, other=0.0).to(tl.float32)
    byte = bytes_of(tl.where(ill, 0.0, v), own_scale, own_zero, OFFSET)
    to = q + image * q_pixels * q_channels + pixel.to(tl.int64)[:, None] * q_channels
    there = (pixel < q_pixels)[:, None] & (channel < q_channels)[None, :]
    tl.store(to + channel[None, :], byte.to(q.dtype.element_ty), mask=there)
    tl.store(scale + image, own_scale)
    tl.store(zero + image, own_zero.to(tl.int32) - OFFSET)


def _rows(
    x: Tensor, x_affine: Tensor | None, q: Tensor, offset: int
) -> tuple[Tensor, Tensor, Tensor]:
    m, k = x.shape
    scale = torch.empty(m, dtype=torch.float32, device=x.device)
    zero = torch.empty(m, dtype=torch.int32, device=x.device)
    if m:
        block = min(triton.next_power_of_2(k), 4096)
        launch(
            wrap_triton(_quantize_rows), (m,),
            x, scale if x_affine is None else x_affine, q, scale, zero, k, x.stride(0), q.stride(0),
            STATIC=x_affine is not None, OFFSET=offset, BLOCK=block,
            num_warps=8 if block > 2048 else 4,
        )  # fmt: skip
    return q, scale, zero


@triton_op("gossamer_triton::quantize_rows", mutates_args=())
def quantize_rows(x: Tensor, x_affine: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """q, scale, zero of x (..., k): see `gossamer.ops.quantize_rows`."""
    rows = x.reshape(-1, x.shape[-1])
    q = torch.empty(rows.shape, dtype=torch.uint8, device=x.device)
    q, scale, zero = _rows(rows, x_affine, q, 0)
    return q.view(x.shape), scale.view(x.shape[:-1]), zero.view(x.shape[:-1])


def quantized(
    x: Tensor, x_affine: Tensor | None, conv: list[int] | None
) -> tuple[Rows, Tensor, Tensor, int]:
    """x as products of bytes read it: q - 128, scales, zeros - 128, how many rows share them."""
    if conv is not None:
        return _quantized_images(x, x_affine, conv)
    rows = x.reshape(-1, x.shape[-1])
    m, k = rows.shape
    stride = -(-k // STRIDE) * STRIDE
    # What is behind the last column is never more than multiplied by a weight that is 0.
    q = torch.empty((m, stride), dtype=torch.int8, device=x.device)
    q, scale, zero = _rows(rows, x_affine, q, SIGNED)
    return matrix_rows(q), scale, zero, 1


def _quantized_images(
    x: Tensor, x_affine: Tensor | None, conv: list[int]
) -> tuple[Rows, Tensor, Tensor, int]:
    images, channels, height, width = x.shape
    top, bottom, left, right = conv[6:10]
    shape = (images, height + top + bottom, width + left + right, -(-channels // 4) * 4)
    q = torch.empty(shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(images, dtype=torch.float32, device=x.device)
    zero = torch.empty(images, dtype=torch.int32, device=x.device)
    rows = image_rows(q, conv)
    if q.numel():
        low, high = x.amin((1, 2, 3)).float(), x.amax((1, 2, 3)).float()
        wide = min(triton.next_power_of_2(shape[3]), 64)
        tall = 2048 // wide
        pixels = shape[1] * shape[2]
        launch(
            wrap_triton(_quantize_images),
            (triton.cdiv(pixels, tall), triton.cdiv(shape[3], wide), images),
            x, low, high, scale if x_affine is None else x_affine, q, scale, zero,
            channels, height, width, top, left, *x.stride()[:1], *x.stride()[1:], shape[3],
            shape[2], pixels,
            STATIC=x_affine is not None, OFFSET=SIGNED, PIXELS=tall, CHANNELS=wide, num_warps=4,
        )  # fmt: skip
    return rows, scale, zero, rows.plane
