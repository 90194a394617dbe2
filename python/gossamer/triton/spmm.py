"""spmm: y = act(x @ w^T + bias), w fp32 of which only non-zeros are stored.

    x       rows x k            float32, bfloat16 or float16; or an image (operands.py)
    values  entries             float32
    bitmap  n x k up to 32 / 32 x 2   int32: which columns are stored, and the first one's entry
    steps   see bitmap.py       int32, of a weight in blocks
    y       rows x n            the dtype of x

A step is a word of the bitmap, 32 inputs: a dense tile of w is gathered and multiplied in float32
(three tf32 products on CUDA, which keep 22 bits of each operand). Sums are float32. A row with a
NaN or an Inf is NaN: see gemm_w8.py; steps that are not in a list would miss it, so that there it
is looked for before.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from .bitmap import BLOCK, find, span, step_at
from .epilogue import finish
from .operands import Rows, corner, float_rows, launch, programs, put, result_of, start_of, way_to
from .tiles import Tile, chip, choose

STEP = 32
TILES = (
    Tile(128, 64, STEP, 8, 3),
    Tile(64, 64, STEP, 4, 3),
    Tile(16, 64, STEP, 4, 4),
    Tile(16, 32, STEP, 4, 4),
)
BLOCK_TILES = (
    Tile(128, BLOCK, BLOCK, 4, 3),
    Tile(16, BLOCK, BLOCK, 4, 4),
)


@triton.jit
def _illness(
    x, ill, m, k,
    plane, width, image_step, line_step, row_step, taps, channels, tap_line, tap_step,
    CONV: tl.constexpr, ROWS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    """ill[row] = NaN if x[row] holds a NaN or an Inf, else 0."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    start = start_of(row, plane, width, image_step, line_step, row_step, CONV)
    sums = tl.zeros((ROWS, INPUTS), tl.float32)
    for begin in range(0, k, INPUTS):
        column = begin + tl.arange(0, INPUTS)
        way = way_to(column, taps, channels, tap_line, tap_step, CONV)
        inside = (row < m)[:, None] & (column < k)[None, :]
        v = tl.load(x + start[:, None] + way[None, :], mask=inside, other=0.0)
        sums += v.to(tl.float32) * 0.0
    tl.store(ill + row, tl.sum(sums, 1), mask=row < m)


def illness(rows: Rows, k: int) -> Tensor:
    """NaN for each row that holds a NaN or an Inf, else 0: float32 (m)."""
    ill = torch.empty(rows.m, dtype=torch.float32, device=rows.x.device)
    launch(
        wrap_triton(_illness), (triton.cdiv(rows.m, 8),),
        rows.x, ill, rows.m, k, *rows.walk(), CONV=rows.conv, ROWS=8, INPUTS=128, num_warps=4,
    )  # fmt: skip
    return ill


@triton.jit
def _spmm(
    x, ill, values, bitmap, steps, bias, y,
    m, n, k, words,
    plane, width, image_step, line_step, row_step, taps, channels, tap_line, tap_step,
    y_image, y_row, y_output,
    CONV: tl.constexpr, LISTED: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    row, output, start = corner(
        m, n, plane, width, image_step, line_step, row_step, CONV, ROWS, OUTPUTS
    )
    line = bitmap + tl.minimum(output, n - 1).to(tl.int64) * words * 2
    bit = tl.arange(0, INPUTS)
    sums = tl.zeros((ROWS, OUTPUTS), tl.float32)
    begin, end = span(steps, output, words, OUTPUTS, LISTED)
    for place in range(begin, end):
        word = step_at(steps, place, LISTED)
        column = word * INPUTS + bit
        way = way_to(column, taps, channels, tap_line, tap_step, CONV)
        a = tl.load(x + start[:, None] + way[None, :], mask=column[None, :] < k, other=0.0)
        stored, below = find(tl.load(line + word * 2)[:, None], bit[None, :])
        first = values + tl.load(line + word * 2 + 1).to(tl.int64)
        b = tl.load(first[:, None] + below, mask=stored, other=0.0)
        sums = tl.dot(a.to(tl.float32), b.T, sums, input_precision=PRECISION)
    if LISTED:
        sums += tl.load(ill + row, mask=row < m, other=0.0)[:, None]
    value = finish(sums + sums * 0.0, bias, output, n, ACTIVATION, BIAS)
    put(y, value, row, output, m, n, plane, y_image, y_row, y_output, CONV)


@triton_op("gossamer_triton::spmm", mutates_args=())
def spmm(
    x: Tensor,
    values: Tensor,
    bitmap: Tensor,
    steps: Tensor | None,
    n: int,
    bias: Tensor | None,
    k: int,
    activation: int,
    conv: list[int] | None,
) -> Tensor:
    """See `gossamer.ops.spmm`; bitmap and steps stand for the index."""
    rows = float_rows(x, conv)
    result = result_of(x, n, rows, conv)
    if result.y.numel():
        on = chip(x.device)
        listed = steps is not None
        tile = choose(BLOCK_TILES if listed else TILES, rows.m, n, on, 4, 4)
        launch(
            wrap_triton(_spmm), programs(rows.m, n, tile.rows, tile.outputs),
            rows.x, illness(rows, k) if listed else values, values, bitmap,
            bitmap if steps is None else steps, values if bias is None else bias, result.y,
            rows.m, n, k, bitmap.shape[1], *rows.walk(), *result.steps(),
            CONV=rows.conv, LISTED=listed, BIAS=bias is not None, ACTIVATION=activation,
            PRECISION=on.precision, **tile.meta(),
        )  # fmt: skip
    return result.y
