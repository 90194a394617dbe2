"""gemm_int4: y = act((sum over groups of s[g] (q[g] . v[g])  -  zero wsum) (x_scale scale) + bias),
bytes times 4-bit weights, which are decoded in registers.

    q            rows x k                 s8, quantize_rows' bytes less 128; or an image
    panels       n up to 16 x k up to 32 / 2   u8, row-major as in gemm_int8: byte j of every four
                                          holds the inputs j (low half) and 4 + j of eight
    group_scale  (n / 16, k / group, 16)  s8
    y            rows x n                 the dtype of x

A step is 32 inputs, the least that a tensor core takes of bytes: one group of 32, or two of 16 of
which each meets the other's weights as zeros. The halves of a byte stay neighbours, and x is read
in that order instead.

The sum of a group and its product with the scale are exact, as on the CPU. Only adding up groups
rounds; what is added is less by 128 wsum, which the zero point takes into account, so sums are
smaller than the CPU's and may differ from them by that rounding.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from .epilogue import finish
from .gemm_int8 import by_rows
from .operands import corner, launch, programs, put, result_of, way_to
from .quantize_rows import quantized
from .tiles import Tile, chip, choose

STEP = 32
TILES = (
    Tile(128, 64, STEP, 8, 3),
    Tile(64, 64, STEP, 4, 3),
    Tile(16, 64, STEP, 4, 4),
    Tile(16, 32, STEP, 2, 4),
)


@triton.jit
def decode(code):
    """What a 4-bit code stands for, int8: byte code % 4 of the word code / 4 of packed.VALUES."""
    low = tl.where(code < 4, 0xF1ECE7E0 - (1 << 32), 0xFDFBF8F4 - (1 << 32)).to(tl.int32)
    high = tl.where(code < 12, 0x09060300, 0x1B15100C).to(tl.int32)
    word = tl.where(code < 8, low, high)
    return (word >> ((code & 3) * 8)).to(tl.int8)


@triton.jit
def _gemm_int4(
    x, x_scale, x_zero, w, group_scale, scale, wsum, bias, y,
    m, n, k, groups, sharing, w_step, w_last,
    plane, width, image_step, line_step, row_step, taps, channels, tap_line, tap_step,
    y_image, y_row, y_output,
    CONV: tl.constexpr, GROUP: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    row, output, start = corner(
        m, n, plane, width, image_step, line_step, row_step, CONV, ROWS, OUTPUTS
    )
    kept = tl.minimum(output, w_last)
    codes = w + kept.to(tl.int64)[:, None] * w_step + tl.arange(0, INPUTS // 2)[None, :]
    scales = group_scale + (kept // 16).to(tl.int64) * groups * 16 + kept % 16
    place = tl.arange(0, INPUTS)
    order = place // 8 * 8 + place % 2 * 4 + place // 2 % 4
    total = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for begin in range(0, k, INPUTS):
        column = begin + order
        way = way_to(column, taps, channels, tap_line, tap_step, CONV)
        a = tl.load(x + start[:, None] + way[None, :], mask=column[None, :] < k, other=0)
        both = tl.load(codes + begin // 2).to(tl.int32)
        b = tl.join(decode(both & 15), decode(both >> 4)).reshape(OUTPUTS, INPUTS)
        for g in tl.static_range(INPUTS // GROUP):
            own = b
            if GROUP < INPUTS:
                own = tl.where((place // GROUP == g)[None, :], b, 0).to(tl.int8)
            sums = tl.dot(a, own.T, out_dtype=tl.int32)
            factor = tl.load(scales + (begin // GROUP + g) * 16).to(tl.float32)
            total += sums.to(tl.float32) * factor[None, :]
    shared = tl.minimum(row, m - 1) // sharing
    zero = tl.load(x_zero + shared).to(tl.float32)
    weight_sum = tl.load(wsum + output, mask=output < n, other=0).to(tl.float32)
    own_scale = tl.load(scale + output, mask=output < n, other=0.0)
    value = total - zero[:, None] * weight_sum[None, :]
    value = value * (tl.load(x_scale + shared)[:, None] * own_scale[None, :])
    value = finish(value, bias, output, n, ACTIVATION, BIAS)
    put(y, value, row, output, m, n, plane, y_image, y_row, y_output, CONV)


@triton_op("gossamer_triton::gemm_int4", mutates_args=())
def gemm_int4(
    x: Tensor,
    panels: Tensor,
    group_scale: Tensor,
    scale: Tensor,
    wsum: Tensor,
    bias: Tensor | None,
    k: int,
    activation: int,
    conv: list[int] | None,
) -> Tensor:
    """See `gossamer.ops.gemm_int4`."""
    rows, x_scale, x_zero, sharing = quantized(x, None, conv)
    n, w, groups = scale.shape[0], by_rows(panels), group_scale.shape[1]
    result = result_of(x, n, rows, conv)
    if result.y.numel():
        tile = choose(TILES, rows.m, n, chip(x.device), 1, 1)
        launch(
            wrap_triton(_gemm_int4), programs(rows.m, n, tile.rows, tile.outputs),
            rows.x, x_scale, x_zero, w, group_scale, scale, wsum, scale if bias is None else bias,
            result.y, rows.m, n, k, groups, sharing, w.stride(0), w.shape[0] - 1,
            *rows.walk(), *result.steps(),
            CONV=rows.conv, GROUP=w.shape[1] * 2 // groups, BIAS=bias is not None,
            ACTIVATION=activation, **tile.meta(),
        )  # fmt: skip
    return result.y
