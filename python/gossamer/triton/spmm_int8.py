"""spmm_int8: y = act(dequantize(q @ w^T) + bias), w int8 in blocks of 1 output x 4 inputs.

    q       rows x k            s8, quantize_rows' bytes less 128; or an image (operands.py)
    values  entries x 4         s8
    bitmap  n x k up to 128 / 128 x 2   int32: which blocks are stored, and the first one's entry
    steps   see bitmap.py       int32, of a weight in blocks
    y       rows x n            the dtype of x

A step is a word of the bitmap, 32 blocks, or where steps are listed a byte of it: a dense tile of
w is gathered, 4 bytes at a time, and multiplied on tensor cores. Sums are exact in int32, and
equal to those of the CPU.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from .bitmap import BLOCK, find, span, step_at
from .blocked import put_words
from .epilogue import dequantize, finish
from .operands import corner, launch, programs, put, result_of, way_to
from .quantize_rows import quantized
from .tiles import Tile, chip, choose

STEP = 128
TILES = (
    Tile(128, 128, STEP, 8, 3),
    Tile(64, 64, STEP, 4, 3),
    Tile(16, 64, STEP, 4, 4),
    Tile(16, 32, STEP, 4, 4),
)
BLOCK_TILES = (
    Tile(128, BLOCK, BLOCK, 4, 4),
    Tile(16, BLOCK, BLOCK, 4, 4),
)


@triton.jit
def _spmm_int8(
    x, x_scale, x_zero, values, bitmap, steps, scale, wsum, bias, y,
    y_affine, residual, residual_affine,
    m, n, k, words, sharing,
    plane, width, image_step, line_step, row_step, taps, channels, tap_line, tap_step,
    y_image, y_row, y_output,
    CONV: tl.constexpr, LISTED: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    row, output, start = corner(
        m, n, plane, width, image_step, line_step, row_step, CONV, ROWS, OUTPUTS
    )
    line = bitmap + tl.minimum(output, n - 1).to(tl.int64) * words * 2
    sums = tl.zeros((ROWS, OUTPUTS), tl.int32)
    parts: tl.constexpr = 128 // INPUTS  # steps of a word
    begin, end = span(steps, output, words, OUTPUTS, LISTED)
    for at in range(begin, end):
        step = step_at(steps, at, LISTED)
        word = step // parts
        column = step * INPUTS + tl.arange(0, INPUTS)
        way = way_to(column, taps, channels, tap_line, tap_step, CONV)
        a = tl.load(x + start[:, None] + way[None, :], mask=column[None, :] < k, other=0)
        bits = tl.load(line + word * 2)[:, None]
        bit = step % parts * (INPUTS // 4) + tl.arange(0, INPUTS // 4)
        stored, below = find(bits, bit[None, :])
        first = values + tl.load(line + word * 2 + 1).to(tl.int64) * 4
        place = (first[:, None] + below * 4)[:, :, None] + tl.arange(0, 4)[None, None, :]
        every = stored[:, :, None] & (tl.arange(0, 4) >= 0)[None, None, :]
        b = tl.load(place, mask=every, other=0).reshape(OUTPUTS, INPUTS)
        sums = tl.dot(a, b.T, sums, out_dtype=tl.int32)
    value = dequantize(sums, x_scale, x_zero, row, m, sharing, scale, wsum, output, n)
    if y_affine is None:
        value = finish(value, bias, output, n, ACTIVATION, BIAS)
        put(y, value, row, output, m, n, plane, y_image, y_row, y_output, CONV)
    else:
        put_words(
            y, value, bias, y_affine, residual, residual_affine, row, output, m, n,
            plane, y_image, y_row, y_output, ACTIVATION, BIAS,
        )  # fmt: skip


@triton_op("gossamer_triton::spmm_int8", mutates_args=())
def spmm_int8(
    x: Tensor,
    values: Tensor,
    bitmap: Tensor,
    steps: Tensor | None,
    scale: Tensor,
    wsum: Tensor,
    x_affine: Tensor | None,
    bias: Tensor | None,
    k: int,
    activation: int,
    conv: list[int] | None,
) -> Tensor:
    """See `gossamer.ops.spmm_int8`; bitmap and steps stand for the index."""
    rows, x_scale, x_zero, sharing = quantized(x, x_affine, conv)
    n = scale.shape[0]
    result = result_of(x, n, rows, conv)
    if result.y.numel():
        listed = steps is not None
        tile = choose(BLOCK_TILES if listed else TILES, rows.m, n, chip(x.device), 1, 1)
        launch(
            wrap_triton(_spmm_int8), programs(rows.m, n, tile.rows, tile.outputs),
            rows.x, x_scale, x_zero, values, bitmap, bitmap if steps is None else steps,
            scale, wsum, scale if bias is None else bias, result.y, None, None, None,
            rows.m, n, k, bitmap.shape[1], sharing, *rows.walk(), *result.steps(),
            CONV=rows.conv, LISTED=listed, BIAS=bias is not None, ACTIVATION=activation,
            **tile.meta(),
        )  # fmt: skip
    return result.y
