"""gemm_int8: y = act(dequantize(q @ w^T) + bias), bytes times bytes on tensor cores, dense.

    q       rows x k          s8, quantize_rows' bytes less 128; or an image (operands.py)
    w       n up to 16 x k up to 8   s8, row-major: the panels of docs/formats.md as a view
    y       rows x n          the dtype of x

Sums are exact in int32, and so equal to those of the CPU; the epilogue is epilogue.py's.
Tails: rows and outputs beyond the last read the last one and are not written; columns are masked.

w is row-major in memory, though it has the shape of panels: `Packed` lays it out so when it moves
to a GPU. In the order of the CPU's panels a thread can copy 4 bytes at a time, not 16: 725 lines of
PTX for 566 in the tile 128 x 128 x 128 on sm_90, and 60 asynchronous copies for 24.
w is loaded as (outputs, inputs) and turned for the dot: loaded as (inputs, outputs), Triton 3.9
sorts bytes in registers on sm_80, 266 PRMT and 241 registers for 0 and 121 in the tile 128 x 128 x
64, and spills with 4 warps.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from . import depthwise
from .blocked import put_words
from .epilogue import dequantize, finish
from .operands import corner, dense_step, launch, programs, put, result_of, way_to
from .quantize_rows import quantized
from .tiles import Tile, chip, choose

TILES = (
    Tile(128, 128, 128, 8, 3),
    Tile(64, 128, 128, 4, 3),
    Tile(64, 64, 128, 4, 4),
    Tile(16, 128, 128, 4, 4),
    Tile(16, 32, 256, 4, 4),
)


@triton.jit
def _gemm_int8(
    x, x_scale, x_zero, w, scale, wsum, bias, y, y_affine, residual, residual_affine,
    m, n, k, sharing, w_step, w_last,
    plane, width, image_step, line_step, row_step, taps, channels, tap_line, tap_step,
    y_image, y_row, y_output,
    CONV: tl.constexpr, WHOLE: tl.constexpr, BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    row, output, start = corner(
        m, n, plane, width, image_step, line_step, row_step, CONV, ROWS, OUTPUTS
    )
    weights = w + tl.minimum(output, w_last).to(tl.int64)[:, None] * w_step
    sums = tl.zeros((ROWS, OUTPUTS), tl.int32)
    for begin in range(0, k, INPUTS):
        column = begin + tl.arange(0, INPUTS)
        way = way_to(column, taps, channels, tap_line, tap_step, CONV)
        a, b = dense_step(x, start, way, weights, column, k, WHOLE)
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


def by_rows(panels: Tensor) -> Tensor:
    """Panels (P, S, 16, b) as the matrix (16 P, S b); a view, if `Packed` laid them out for it."""
    return panels.transpose(1, 2).reshape(panels.shape[0] * 16, -1)


@triton_op("gossamer_triton::gemm_int8", mutates_args=())
def gemm_int8(
    x: Tensor,
    panels: Tensor,
    scale: Tensor,
    wsum: Tensor,
    x_affine: Tensor | None,
    bias: Tensor | None,
    k: int,
    activation: int,
    conv: list[int] | None,
) -> Tensor:
    """See `gossamer.ops.gemm_int8`."""
    n, w = scale.shape[0], by_rows(panels)
    if conv is not None and depthwise.is_depthwise(k, conv):
        return depthwise.gemm_int8(x, w[:n, :k], scale, x_affine, bias, activation, conv)
    rows, x_scale, x_zero, sharing = quantized(x, x_affine, conv)
    result = result_of(x, n, rows, conv)
    if result.y.numel():
        tile = choose(TILES, rows.m, n, chip(x.device), 1, 1)
        launch(
            wrap_triton(_gemm_int8), programs(rows.m, n, tile.rows, tile.outputs),
            rows.x, x_scale, x_zero, w, scale, wsum, scale if bias is None else bias, result.y,
            None, None, None,
            rows.m, n, k, sharing, w.stride(0), w.shape[0] - 1, *rows.walk(), *result.steps(),
            CONV=rows.conv, WHOLE=k % tile.inputs == 0, BIAS=bias is not None,
            ACTIVATION=activation, **tile.meta(),
        )  # fmt: skip
    return result.y
