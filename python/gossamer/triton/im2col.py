"""im2col: rows[pixel] = (tap row, tap column, channel up to 4) of what lies under it.

    image  images x height x width x channels   any dtype, padded (operands.py)
    y      rows x k                             the same

No product needs it, as those read an image where it lies; calibration does.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from .operands import float_rows, launch, start_of, way_to


@triton.jit
def _im2col(
    x, y, m, k,
    plane, width, image_step, line_step, row_step, taps, channels, tap_line, tap_step,
    ROWS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * INPUTS + tl.arange(0, INPUTS)
    start = start_of(row, plane, width, image_step, line_step, row_step, True)
    way = way_to(column, taps, channels, tap_line, tap_step, True)
    inside = (row < m)[:, None] & (column < k)[None, :]
    v = tl.load(x + start[:, None] + way[None, :], mask=inside)
    tl.store(y + row.to(tl.int64)[:, None] * k + column[None, :], v, mask=inside)


@triton_op("gossamer_triton::im2col", mutates_args=())
def im2col(x: Tensor, conv: list[int]) -> Tensor:
    """See `gossamer.ops.im2col`."""
    rows = float_rows(x, conv)
    k = conv[0] * conv[1] * rows.channels
    y = torch.empty((rows.m, k), dtype=x.dtype, device=x.device)
    if y.numel():
        launch(
            wrap_triton(_im2col), (triton.cdiv(rows.m, 32), triton.cdiv(k, 128)),
            rows.x, y, rows.m, k, *rows.walk(), ROWS=32, INPUTS=128, num_warps=4,
        )  # fmt: skip
    return y
