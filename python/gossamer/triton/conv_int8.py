"""conv_int8: y = act(dequantize(conv(q, w)) + bias + residual), dense weights, blocked images.

    q         images x blocks x height x width x 4   u8, by blocked.py channels innermost
    w         n up to 16 x k up to 8                 s8, as gemm_int8 has it
    residual  a blocked image of y's shape, or none
    y         images x n / 4 x out_h x out_w x 4     u8; without its numbers, as gemm_int8 has it

The kernel is gemm_int8's, which writes words when it is given the numbers of a result in bytes.
High tiles are 64 outputs wide: with 128, the epilogue on sm_100, where a thread has a whole row,
took 255 registers and 8 to 144 bytes of stack in every order of its steps, and 16 warps leave
tcgen05. Many a CNN has layers of 64 channels.
"""

from __future__ import annotations

from torch import Tensor
from torch.library import triton_op, wrap_triton

from . import depthwise
from .blocked import image_in, image_result, turned, words_of
from .gemm_int8 import _gemm_int8, by_rows
from .operands import launch, programs
from .tiles import Tile, chip, choose

TILES = (
    Tile(128, 64, 128, 8, 3),
    Tile(64, 64, 128, 4, 4),
    Tile(16, 128, 128, 4, 4),
    Tile(16, 32, 256, 4, 4),
)


@triton_op("gossamer_triton::conv_int8", mutates_args=())
def conv_int8(
    q: Tensor,
    panels: Tensor,
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
    """See `gossamer.ops.conv_int8`."""
    n, w = scale.shape[0], by_rows(panels)
    if depthwise.is_depthwise(k, conv):
        images = (y_affine, residual, residual_affine, activation, conv)
        return depthwise.conv_int8(q, w[:n, :k], scale, x_affine, bias, *images)
    rows, x_scale, x_zero, sharing = turned(q, x_affine, k, conv)
    result = image_result(q, n, rows, conv, y_affine, residual, residual_affine)
    other = (None, None) if residual is None else (words_of(residual), residual_affine)
    if result.y.numel():
        tile = choose(TILES, rows.m, n, chip(q.device), 1, 1)
        launch(
            wrap_triton(_gemm_int8), programs(rows.m, n, tile.rows, tile.outputs),
            rows.x, x_scale, x_zero, w, scale, wsum, scale if bias is None else bias, result.y,
            y_affine, *other,
            rows.m, n, k, sharing, w.stride(0), w.shape[0] - 1, *rows.walk(), *result.steps(),
            CONV=rows.conv, WHOLE=k % tile.inputs == 0, BIAS=bias is not None,
            ACTIVATION=activation, **tile.meta(),
        )  # fmt: skip
    return image_in(result.y)
