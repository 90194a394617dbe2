"""The operands of every product: rows of a matrix or pixels under a convolution, and the result.

A convolution is a product of rows too, and needs no copy of them (implicit GEMM): in an image that
carries its own padding, row m begins at some place, and column k lies some way behind it,

    x[m][k] = image[start(m) + way(k)]

where start depends on the output pixel alone and way on the tap and the channel alone. So a kernel
computes two vectors of offsets and adds them, and no element is tested for the border.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor


class Rows(NamedTuple):
    """x as kernels walk it: `m` rows of `k` columns; a matrix, or an image (images, h, w, c)."""

    x: Tensor
    m: int
    plane: int  # rows of an image
    width: int  # rows of a line of an image
    image_step: int
    line_step: int
    row_step: int
    taps: int  # taps in a line of the kernel
    channels: int
    tap_line: int
    tap_step: int
    conv: bool

    def walk(self) -> tuple[int, ...]:
        """What `start_of` and `way_to` read, as a kernel's arguments."""
        return self[2:11]


def matrix_rows(x: Tensor) -> Rows:
    """The rows of x (m, k), each of them contiguous."""
    step = x.stride(0)
    return Rows(x, x.shape[0], 1, 1, step, step, step, 1, 1, 1, 1, False)


def image_rows(image: Tensor, conv: list[int]) -> Rows:
    """The rows under a convolution of a padded image (images, height, width, channels), dense."""
    kh, kw, sh, sw, dh, dw = conv[:6]
    images, height, width, channels = image.shape
    out_h, out_w = (height - dh * (kh - 1) - 1) // sh + 1, (width - dw * (kw - 1) - 1) // sw + 1
    line = width * channels
    return Rows(
        image,
        images * out_h * out_w,
        out_h * out_w,
        out_w,
        height * line,
        sh * line,
        sw * channels,
        kw,
        channels,
        dh * line,
        dw * channels,
        True,
    )


def float_rows(x: Tensor, conv: list[int] | None) -> Rows:
    """The rows of x (..., k) or (images, channels, height, width), in its own dtype."""
    if conv is None:
        return matrix_rows(x.reshape(-1, x.shape[-1]))
    top, bottom, left, right = conv[6:10]
    padded = F.pad(x, (left, right, top, bottom, 0, -x.shape[1] % 4))
    return image_rows(padded.permute(0, 2, 3, 1).contiguous(), conv)


class Result(NamedTuple):
    """y, and its steps from image to image, row to row and output to output."""

    y: Tensor
    image_step: int
    row_step: int
    output_step: int

    def steps(self) -> tuple[int, int, int]:
        """As a kernel's arguments."""
        return self[1:]


def result_of(
    x: Tensor, n: int, rows: Rows, conv: list[int] | None, dtype: torch.dtype | None = None
) -> Result:
    """An empty y for x (..., k) or an image, contiguous or channels_last as conv asks."""
    if conv is None:
        return Result(x.new_empty((*x.shape[:-1], n), dtype=dtype), 0, n, 1)
    shape = (x.shape[0], n, rows.plane // max(rows.width, 1), rows.width)
    if conv[10]:
        return Result(x.new_empty(shape, dtype=dtype), n * rows.plane, 1, rows.plane)
    y = torch.empty(
        shape, dtype=dtype or x.dtype, device=x.device, memory_format=torch.channels_last
    )
    return Result(y, n * rows.plane, n, 1)


def laid_out(y: Tensor, conv: list[int]) -> Tensor:
    """An image as conv asks: contiguous or channels_last."""
    return y.contiguous(memory_format=torch.contiguous_format if conv[10] else torch.channels_last)


@triton.jit
def start_of(m, plane, width, image_step, line_step, row_step, CONV: tl.constexpr):
    """Where row m begins, int64: a row may lie further than 2^31 elements from the first."""
    if CONV:
        pixel = m % plane
        start = (m // plane).to(tl.int64) * image_step + (pixel // width).to(tl.int64) * line_step
        return start + (pixel % width) * row_step
    else:
        return m.to(tl.int64) * row_step


@triton.jit
def way_to(k, taps, channels, tap_line, tap_step, CONV: tl.constexpr):
    """How far column k lies behind the beginning of its row."""
    if CONV:
        tap = k // channels
        return (tap // taps) * tap_line + (tap % taps) * tap_step + k % channels
    else:
        return k


@triton.jit
def dense_step(x, start, way, weights, column, k, WHOLE: tl.constexpr):
    """Columns of x (rows, columns) and of the weights (outputs, columns); zeros from k on.

    WHOLE: k is a multiple of a step, and nothing is masked.
    """
    if WHOLE:
        a = tl.load(x + start[:, None] + way[None, :])
        b = tl.load(weights + column[None, :])
    else:
        a = tl.load(x + start[:, None] + way[None, :], mask=column[None, :] < k, other=0)
        b = tl.load(weights + column[None, :], mask=column[None, :] < k, other=0)
    return a, b


@triton.jit
def corner(
    m, n, plane, width, image_step, line_step, row_step,
    CONV: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    """A program's rows and outputs, and where its rows begin (clamped to the last).

    Eight tiles of rows after each other share the weights in L2.
    """
    across, down = tl.cdiv(m, ROWS), tl.cdiv(n, OUTPUTS)
    program = tl.program_id(0)
    group = program // (8 * down)
    within = program % (8 * down)
    height = tl.minimum(across - group * 8, 8)
    row = (group * 8 + within % height) * ROWS + tl.arange(0, ROWS)
    output = within // height * OUTPUTS + tl.arange(0, OUTPUTS)
    start = start_of(tl.minimum(row, m - 1), plane, width, image_step, line_step, row_step, CONV)
    return row, output, start


@triton.jit
def put(
    y, value, row, output, m, n, plane, y_image, y_row, y_output, CONV: tl.constexpr
):  # fmt: skip
    """y[row][output] = value (rows, outputs), in the dtype of y; nothing beyond m and n."""
    if CONV:
        place = (row // plane).to(tl.int64) * y_image + (row % plane).to(tl.int64) * y_row
    else:
        place = row.to(tl.int64) * y_row
    place = place[:, None] + output.to(tl.int64)[None, :] * y_output
    inside = (row < m)[:, None] & (output < n)[None, :]
    tl.store(y + place, value.to(y.dtype.element_ty), mask=inside)


def programs(m: int, n: int, rows: int, outputs: int) -> tuple[int]:
    """The grid that `corner` divides."""
    return (triton.cdiv(m, rows) * triton.cdiv(n, outputs),)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **meta: Any) -> None:
    """kernel[grid](*arguments, **meta), and no multiply fused with an addition.

    While torch traces, that cannot be said: what it launches later may differ by one rounding.

    Args:
        kernel: of `wrap_triton`, called where the kernel has its name: torch finds the kernels of
            an operator by reading its source.
        grid, arguments, meta: as Triton takes them.
    """
    if isinstance(kernel, triton.runtime.KernelInterface):
        meta["enable_fp_fusion"] = False
    kernel[grid](*arguments, **meta)


def check_addend(
    y_affine: Tensor | None, residual: Tensor | None, residual_affine: Tensor | None
) -> None:
    """RuntimeError for a residual of a result in floats, or one without its numbers."""
    if residual is None:
        return
    if y_affine is None:
        raise RuntimeError("a residual is for results in bytes: it needs y_affine")
    if residual_affine is None:
        raise RuntimeError("a residual needs its residual_affine")
