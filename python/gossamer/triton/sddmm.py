"""sddmm: dw[entry of output o, input i] = sum over rows of dy[row][o] * x[row][i].

    x       rows x k            float32, bfloat16 or float16; or an image (operands.py)
    dy      rows x n            the same dtype
    bitmap  n x k up to 32 / 32 x 2   int32, as in spmm
    dw      entries             float32

A program computes a dense tile of dy^T x, outputs by inputs, and writes what has an entry; one
without any stops before it begins. Of a weight in blocks (its `steps` are listed, see bitmap.py)
the tile is as large as a block. Precision as in spmm. Rows beyond the last are zeros.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from .bitmap import BLOCK, find
from .operands import float_rows, launch, start_of, way_to
from .tiles import Tile, chip, choose

TILES = (
    Tile(64, 64, 32, 4, 3),
    Tile(BLOCK, BLOCK, 32, 4, 4),
)


@triton.jit
def _sddmm(
    x, dy, bitmap, dw,
    m, n, k, words, dy_step,
    plane, width, image_step, line_step, row_step, taps, channels, tap_line, tap_step,
    CONV: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    column = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside = (output < n)[:, None] & (column < k)[None, :]
    place = output.to(tl.int64)[:, None] * words * 2 + (column // 32 * 2)[None, :]
    bits = tl.load(bitmap + place, mask=inside, other=0)
    if tl.max(tl.max((bits != 0).to(tl.int32), 1), 0) == 0:
        return
    way = way_to(column, taps, channels, tap_line, tap_step, CONV)
    sums = tl.zeros((OUTPUTS, ROWS), tl.float32)
    for begin in range(0, m, INPUTS):
        row = begin + tl.arange(0, INPUTS)
        start = start_of(row, plane, width, image_step, line_step, row_step, CONV)
        a = tl.load(
            dy + row.to(tl.int64)[:, None] * dy_step + output[None, :],
            mask=(row < m)[:, None] & (output < n)[None, :], other=0.0,
        )  # fmt: skip
        b = tl.load(
            x + start[:, None] + way[None, :],
            mask=(row < m)[:, None] & (column < k)[None, :], other=0.0,
        )  # fmt: skip
        sums = tl.dot(a.T, b, sums, input_precision=PRECISION)
    stored, below = find(bits, (column % 32)[None, :])
    first = tl.load(bitmap + place + 1, mask=inside, other=0).to(tl.int64)
    tl.store(dw + first + below, sums, mask=stored & inside)


@triton_op("gossamer_triton::sddmm", mutates_args=())
def sddmm(
    x: Tensor,
    dy: Tensor,
    bitmap: Tensor,
    steps: Tensor | None,
    entries: int,
    n: int,
    k: int,
    conv: list[int] | None,
) -> Tensor:
    """See `gossamer.ops.sddmm`; the bitmap stands for the index, dy is (rows, n)."""
    rows = float_rows(x, conv)
    if dy.dtype != x.dtype:
        rows, dy = rows._replace(x=rows.x.float()), dy.float()
    dw = torch.zeros(entries, dtype=torch.float32, device=x.device)
    if entries and rows.m:
        on = chip(x.device)
        # Of its tile, `rows` are inputs of w, and what is summed over are the rows of x.
        table = TILES if steps is None else TILES[-1:]
        tile = choose(table, k, n, on, rows.x.element_size(), rows.x.element_size())
        launch(
            wrap_triton(_sddmm), (triton.cdiv(n, tile.outputs), triton.cdiv(k, tile.rows)),
            rows.x, dy, bitmap, dw, rows.m, n, k, bitmap.shape[1], dy.stride(0), *rows.walk(),
            CONV=rows.conv, PRECISION=on.precision, **tile.meta(),
        )  # fmt: skip
    return dw
