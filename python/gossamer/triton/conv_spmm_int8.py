"""conv_spmm_int8: conv_int8 with w in blocks of 1 output x 4 inputs.

    q, residual, y   as in conv_int8
    values, bitmap   as in spmm_int8

The kernel is spmm_int8's, which writes words when it is given the numbers of a result in bytes; for
the width of the tiles see conv_int8.
"""

from __future__ import annotations

from torch import Tensor
from torch.library import triton_op, wrap_triton

from .blocked import image_in, image_result, turned, words_of
from .operands import launch, programs
from .spmm_int8 import STEP, _spmm_int8
from .tiles import Tile, chip, choose

TILES = (
    Tile(128, 64, STEP, 8, 3),
    Tile(64, 64, STEP, 4, 3),
    Tile(16, 64, STEP, 4, 4),
    Tile(16, 32, STEP, 4, 4),
)


@triton_op("gossamer_triton::conv_spmm_int8", mutates_args=())
def conv_spmm_int8(
    q: Tensor,
    values: Tensor,
    bitmap: Tensor,
    scale: Tensor,
    wsum: Tensor,
    x_affine: Tensor,
    bias: Tensor | None,
    y_affine: Tensor | None,
    residual: Tensor | None,
    residual_affine: Tensor | None,
    k: int,
    activation: int,
    conv: list[int],
) -> Tensor:
    """See `gossamer.ops.conv_spmm_int8`; the bitmap stands for the index."""
    rows, x_scale, x_zero, sharing = turned(q, x_affine, k, conv)
    n = scale.shape[0]
    result = image_result(q, n, rows, conv, y_affine, residual, residual_affine)
    other = (None, None) if residual is None else (words_of(residual), residual_affine)
    if result.y.numel():
        tile = choose(TILES, rows.m, n, chip(q.device), 1, 1)
        launch(
            wrap_triton(_spmm_int8), programs(rows.m, n, tile.rows, tile.outputs),
            rows.x, x_scale, x_zero, values, bitmap, bitmap, scale, wsum,
            scale if bias is None else bias, result.y, y_affine, *other,
            rows.m, n, k, bitmap.shape[1], sharing, *rows.walk(), *result.steps(),
            CONV=rows.conv, LISTED=False, BIAS=bias is not None, ACTIVATION=activation,
            **tile.meta(),
        )  # fmt: skip
    return image_in(result.y)
