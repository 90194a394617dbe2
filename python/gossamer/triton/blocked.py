"""Blocked images as products read and write them: (images, blocks, height, width) words.

    q  images x blocks x height x width x 4     u8; a word is four channels of a pixel
    x  images x height x width x (blocks x 4)   s8, with its padding: what operands.py walks

A product wants the channels of a pixel after each other: a thread then copies 16 bytes at a time,
of a blocked image only 4, each tested for the border. And it wants signed bytes. So what
quantize_rows does for floats, one kernel does for words: it turns pixels and blocks around, flips
the signs and surrounds all with the zero point, for a byte read and one written of each input. The
result is packed to words in registers: neighbouring pixels are neighbours in memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from .epilogue import activate, finish
from .operands import Result, Rows, check_addend, image_rows, launch, result_of
from .quantize_rows import SIGNED, bytes_of

FLIP = tl.constexpr(-0x7F7F7F80)  # 0x80808080: four bytes less 128 each


def check_blocked(q: Tensor, name: str) -> None:
    """RuntimeError unless q is a blocked image."""
    if q.dim() != 5 or q.shape[4] != 4 or q.dtype != torch.uint8 or not q.is_contiguous():
        raise RuntimeError(
            f"{name} of shape {tuple(q.shape)} must be a blocked image: contiguous uint8 (images, "
            "blocks, height, width, 4)"
        )


def words_of(q: Tensor) -> Tensor:
    """The words (images, blocks, height, width) int32 of a blocked image, in the same memory."""
    return q.view(torch.int32).squeeze(-1)


@triton.jit
def load_byte(affine):
    """The zero point of (scale, zero), int32."""
    return tl.load(affine + 1).to(tl.int32)


@triton.jit
def _turn(
    q, affine, x, scale, zero,
    blocks, height, width, top, left, x_width, x_pixels, signed,
    BLOCKS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(2).to(tl.int64)
    block = (tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS))[:, None]
    pixel = (tl.program_id(0) * PIXELS + tl.arange(0, PIXELS))[None, :]
    line, across = pixel // x_width - top, pixel % x_width - left
    inside = (line >= 0) & (line < height) & (across >= 0) & (across < width) & (block < blocks)
    plane = q + (image * blocks + block) * (height * width)
    words = tl.load(plane + line * width + across, mask=inside, other=0)
    outside = load_byte(affine)
    outside = outside | (outside << 8)
    words = tl.where(inside, words, outside | (outside << 16)) ^ FLIP
    place = x + (image * x_pixels + pixel) * blocks + block
    tl.store(place, words, mask=(pixel < x_pixels) & (block < blocks))
    tl.store(scale, tl.load(affine))
    tl.store(zero, load_byte(affine) - signed)


def turned(q: Tensor, affine: Tensor, k: int, conv: list[int]) -> tuple[Rows, Tensor, Tensor, int]:
    """q as products of bytes read it, see `quantize_rows.quantized`: one scale and zero for all."""
    check_blocked(q, "q")
    images, blocks, height, width = q.shape[:4]
    if (columns := conv[0] * conv[1] * blocks * 4) != k:
        raise RuntimeError(f"q of shape {tuple(q.shape)} has {columns} columns, the weight k={k}")
    top, bottom, left, right = conv[6:10]
    shape = (images, height + top + bottom, width + left + right, blocks)
    x = torch.empty(shape, dtype=torch.int32, device=q.device)
    scale = torch.empty(1, dtype=torch.float32, device=q.device)
    zero = torch.empty(1, dtype=torch.int32, device=q.device)
    if x.numel():
        wide = min(triton.next_power_of_2(blocks), 32)
        many, pixels = 2048 // wide, shape[1] * shape[2]
        launch(
            wrap_triton(_turn), (triton.cdiv(pixels, many), triton.cdiv(blocks, wide), images),
            words_of(q), affine, x, scale, zero,
            blocks, height, width, top, left, shape[2], pixels, SIGNED,
            BLOCKS=wide, PIXELS=many, num_warps=4,
        )  # fmt: skip
    rows = image_rows(x.view(torch.int8), conv)
    return rows, scale, zero, max(rows.m, 1)


def image_result(
    q: Tensor,
    n: int,
    rows: Rows,
    conv: list[int],
    y_affine: Tensor | None,
    residual: Tensor | None,
    residual_affine: Tensor | None,
) -> Result:
    """An empty result of n channels, in words or, without y_affine, floats, and its steps.

    RuntimeError for a residual that does not fit.
    """
    check_addend(y_affine, residual, residual_affine)
    if y_affine is None:
        return result_of(q, n, rows, conv, torch.float32)
    height, width = rows.plane // max(rows.width, 1), rows.width
    y = torch.empty((q.shape[0], -(-n // 4), height, width), dtype=torch.int32, device=q.device)
    if residual is not None:
        check_blocked(residual, "residual")
        if residual.shape[:4] != y.shape:
            raise RuntimeError(
                f"residual of shape {tuple(residual.shape)} must have that of y, {(*y.shape, 4)}"
            )
    return Result(y, y.shape[1] * rows.plane, 1, rows.plane)


def image_in(y: Tensor) -> Tensor:
    """What y is: floats, or the blocked image of its words."""
    return y if y.is_floating_point() else y.unsqueeze(-1).view(torch.uint8)


@triton.jit
def _byte(
    value, word, y_affine, residual_affine, PLACE: tl.constexpr, ACTIVATION: tl.constexpr
):  # fmt: skip
    """The byte of act(value + residual) at its place in a word; word: the residual's, if any."""
    if residual_affine is not None:
        other = ((word >> (8 * PLACE)) & 255) - load_byte(residual_affine)
        value = value + other.to(tl.float32) * tl.load(residual_affine)
    zero = load_byte(y_affine).to(tl.float32)
    return bytes_of(activate(value, ACTIVATION), tl.load(y_affine), zero, 0) << (8 * PLACE)


@triton.jit
def put_words(
    y, value, bias, y_affine, residual, residual_affine, row, output, m, n,
    plane, y_image, y_row, y_block,
    ACTIVATION: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """y[row][output / 4] = bytes of act(value + bias + residual); outputs from n on hold zeros.

    One byte of all words after the other: activations of a whole tile have no room (epilogue.py).
    """
    rows: tl.constexpr = value.shape[0]
    words: tl.constexpr = value.shape[1] // 4
    value = finish(value, bias, output, n, 0, BIAS)
    even, odd = value.reshape(rows, words, 2, 2).split()
    first, third = even.split()
    second, fourth = odd.split()
    block = tl.min(output, 0) // 4 + tl.arange(0, words)
    place = (row // plane).to(tl.int64) * y_image + (row % plane).to(tl.int64) * y_row
    place = place[:, None] + block.to(tl.int64)[None, :] * y_block
    inside = (row < m)[:, None] & (block * 4 < n)[None, :]
    word = 0
    if residual is not None:
        word = tl.load(residual + place, mask=inside, other=0)
    made = _byte(first, word, y_affine, residual_affine, 0, ACTIVATION)
    made |= _byte(second, word, y_affine, residual_affine, 1, ACTIVATION)
    made |= _byte(third, word, y_affine, residual_affine, 2, ACTIVATION)
    made |= _byte(fourth, word, y_affine, residual_affine, 3, ACTIVATION)
    tl.store(y + place, made, mask=inside)
