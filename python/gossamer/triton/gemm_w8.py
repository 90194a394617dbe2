"""gemm_w8: y = act((x @ q^T) * scale + bias), floats times bytes that are widened in registers.

    x  rows x k                    float32, bfloat16 or float16; or an image (operands.py)
    w  n up to 16 x k up to 8      s8, row-major, as in gemm_int8
    y  rows x n                    the dtype of x

A byte is exact in all three dtypes, so products are those of the weight that was packed, and sums
are float32. Tails as in gemm_int8.
A row with a NaN or an Inf: all of its sums are NaN or infinite, since zeros are multiplied too
(0 * Inf is NaN); adding sum * 0 makes them NaN, and a sum that overflowed as well.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from .epilogue import finish
from .gemm_int8 import by_rows
from .operands import corner, dense_step, float_rows, launch, programs, put, result_of, way_to
from .tiles import Tile, chip, choose

TILES = (
    Tile(128, 128, 32, 8, 3),
    Tile(64, 64, 32, 4, 3),
    Tile(16, 64, 64, 4, 4),
    Tile(16, 32, 64, 4, 4),
)


@triton.jit
def _gemm_w8(
    x, w, scale, bias, y,
    m, n, k, w_step, w_last,
    plane, width, image_step, line_step, row_step, taps, channels, tap_line, tap_step,
    y_image, y_row, y_output,
    CONV: tl.constexpr, WHOLE: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    row, output, start = corner(
        m, n, plane, width, image_step, line_step, row_step, CONV, ROWS, OUTPUTS
    )
    weights = w + tl.minimum(output, w_last).to(tl.int64)[:, None] * w_step
    sums = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for begin in range(0, k, INPUTS):
        column = begin + tl.arange(0, INPUTS)
        way = way_to(column, taps, channels, tap_line, tap_step, CONV)
        a, b = dense_step(x, start, way, weights, column, k, WHOLE)
        sums = tl.dot(a, b.to(a.dtype).T, sums, input_precision=PRECISION)
    own = tl.load(scale + output, mask=output < n, other=0.0)
    value = (sums + sums * 0.0) * own[None, :]
    value = finish(value, bias, output, n, ACTIVATION, BIAS)
    put(y, value, row, output, m, n, plane, y_image, y_row, y_output, CONV)


@triton_op("gossamer_triton::gemm_w8", mutates_args=())
def gemm_w8(
    x: Tensor,
    panels: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    k: int,
    activation: int,
    conv: list[int] | None,
) -> Tensor:
    """See `gossamer.ops.gemm_w8`."""
    rows = float_rows(x, conv)
    n, w = scale.shape[0], by_rows(panels)
    result = result_of(x, n, rows, conv)
    if result.y.numel():
        on, item = chip(x.device), x.element_size()
        tile = choose(TILES, rows.m, n, on, item, item)
        launch(
            wrap_triton(_gemm_w8), programs(rows.m, n, tile.rows, tile.outputs),
            rows.x, w, scale, scale if bias is None else bias, result.y,
            rows.m, n, k, w.stride(0), w.shape[0] - 1, *rows.walk(), *result.steps(),
            CONV=rows.conv, WHOLE=k % tile.inputs == 0, BIAS=bias is not None,
            ACTIVATION=activation, PRECISION=on.precision, **tile.meta(),
        )  # fmt: skip
    return result.y
