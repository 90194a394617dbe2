"""spmm: y = act(x @ w^T + bias), w fp32 of which only non-zeros are stored.

    x       rows x k            float32, bfloat16 or float16; or an image (operands.py)
    values  entries             float32
    bitmap  n x k up to 32 / 32 x 2   int32: which columns are stored, and the first one's entry
    y       rows x n            the dtype of x

A step is a word of the bitmap, 32 inputs: a dense tile of w is gathered and multiplied in float32
(three tf32 products on CUDA, which keep 22 bits of each operand). Sums are float32. A row with a
NaN or an Inf is NaN: see gemm_w8.py.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from .bitmap import find
from .epilogue import finish
from .operands import corner, float_rows, launch, programs, put, result_of, way_to
from .tiles import Tile, chip, choose

STEP = 32
TILES = (
    Tile(128, 64, STEP, 8, 3),
    Tile(64, 64, STEP, 4, 3),
    Tile(16, 64, STEP, 4, 4),
    Tile(16, 32, STEP, 4, 4),
)


@triton.jit
def _spmm(
    x, values, bitmap, bias, y,
    m, n, k, words,
    plane, width, image_step, line_step, row_step, taps, channels, tap_line, tap_step,
    y_image, y_row, y_output,
    CONV: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    row, output, start = corner(
        m, n, plane, width, image_step, line_step, row_step, CONV, ROWS, OUTPUTS
    )
    line = bitmap + tl.minimum(output, n - 1).to(tl.int64) * words * 2
    bit = tl.arange(0, INPUTS)
    sums = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for word in range(0, words):
        column = word * INPUTS + bit
        way = way_to(column, taps, channels, tap_line, tap_step, CONV)
        a = tl.load(x + start[:, None] + way[None, :], mask=column[None, :] < k, other=0.0)
        stored, below = find(tl.load(line + word * 2)[:, None], bit[None, :])
        first = values + tl.load(line + word * 2 + 1).to(tl.int64)
        b = tl.load(first[:, None] + below, mask=stored, other=0.0)
        sums = tl.dot(a.to(tl.float32), b.T, sums, input_precision=PRECISION)
    value = finish(sums + sums * 0.0, bias, output, n, ACTIVATION, BIAS)
    put(y, value, row, output, m, n, plane, y_image, y_row, y_output, CONV)


@triton_op("gossamer_triton::spmm", mutates_args=())
def spmm(
    x: Tensor,
    values: Tensor,
    bitmap: Tensor,
    n: int,
    bias: Tensor | None,
    k: int,
    activation: int,
    conv: list[int] | None,
) -> Tensor:
    """See `gossamer.ops.spmm`; the bitmap stands for the index."""
    rows = float_rows(x, conv)
    result = result_of(x, n, rows, conv)
    if result.y.numel():
        on = chip(x.device)
        tile = choose(TILES, rows.m, n, on, 4, 4)
        launch(
            wrap_triton(_spmm), programs(rows.m, n, tile.rows, tile.outputs),
            rows.x, values, bitmap, values if bias is None else bias, result.y,
            rows.m, n, k, bitmap.shape[1], *rows.walk(), *result.steps(),
            CONV=rows.conv, BIAS=bias is not None, ACTIVATION=activation,
            PRECISION=on.precision, **tile.meta(),
        )  # fmt: skip
    return result.y
