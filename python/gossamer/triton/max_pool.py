"""max_pool: the largest of each window of a blocked image: bytes have the order of their values.

    q  images x blocks x height x width x 4      u8
    y  images x blocks x out_h x out_w x 4       u8

Tap by tap, y takes the larger; outside of the image is 0, the smallest. Moves bytes only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from .blocked import check_blocked
from .operands import launch

PIXELS = 256


@triton.jit
def _max_pool(
    q, y, pixels, plane, width, height_in, width_in, top, left,
    taps_high, taps_wide, stride_high, stride_wide, step_high, step_wide,
    PIXELS: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    image = place // plane
    pixel = (place - image * plane).to(tl.int32)  # 64-bit division is a call that needs a stack
    line = pixel // width * stride_high - top
    across = pixel % width * stride_wide - left
    image = q + image * (height_in * width_in * 4)
    byte = tl.arange(0, 4)[None, :]
    most = tl.zeros((PIXELS, 4), tl.int32)
    for i in range(0, taps_high):
        for j in range(0, taps_wide):
            h, w = line + i * step_high, across + j * step_wide
            inside = (h >= 0) & (h < height_in) & (w >= 0) & (w < width_in) & (place < pixels)
            tap = (image + (h * width_in + w) * 4)[:, None] + byte
            mask = inside[:, None] & (byte >= 0)
            most = tl.maximum(most, tl.load(tap, mask=mask, other=0).to(tl.int32))
    to = y + place[:, None] * 4 + byte
    tl.store(to, most.to(y.dtype.element_ty), mask=(place < pixels)[:, None] & (byte >= 0))


@triton_op("gossamer_triton::max_pool", mutates_args=())
def max_pool(
    q: Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int]
) -> Tensor:
    """See `gossamer.ops.max_pool`."""
    check_blocked(q, "q")
    images, blocks, height, width = q.shape[:4]
    top, bottom, left, right = padding
    out_h = (height + top + bottom - dilation[0] * (kernel[0] - 1) - 1) // stride[0] + 1
    out_w = (width + left + right - dilation[1] * (kernel[1] - 1) - 1) // stride[1] + 1
    if out_h < 1 or out_w < 1:
        raise RuntimeError(
            f"the padded image is {height + top + bottom} x {width + left + right}, the result "
            f"would be {out_h} x {out_w}: both must be at least 1"
        )
    y = torch.empty((images, blocks, out_h, out_w, 4), dtype=torch.uint8, device=q.device)
    if y.numel():
        launch(
            wrap_triton(_max_pool), (triton.cdiv(y.numel() // 4, PIXELS),),
            q, y, y.numel() // 4, out_h * out_w, out_w, height, width, top, left,
            *kernel, *stride, *dilation, PIXELS=PIXELS, num_warps=4,
        )  # fmt: skip
    return y
