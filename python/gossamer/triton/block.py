"""block: an image of floats to a blocked image of bytes, q = round(x / scale) + zero.

    x  images x channels x height x width            float32, bfloat16 or float16, any strides
    q  images x channels / 4 x height x width x 4    u8; added channels hold the zero point

A program writes the bytes of neighbouring pixels. No byte stands for a NaN or an Inf: where there
is one, an assertion on the device stops what follows, and nobody has to wait for its result.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from .operands import launch
from .quantize_rows import bytes_of

PIXELS = 256


@triton.jit
def _block(
    x, affine, q, bad, pixels, channels, blocks, plane, width,
    image_step, channel_step, line_step, pixel_step,
    PIXELS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    place = program * PIXELS + tl.arange(0, PIXELS)
    upper = place // plane
    image = upper // blocks
    block, pixel = upper - image * blocks, (place - upper * plane).to(tl.int32)
    line = (pixel // width).to(tl.int64) * line_step
    begin = image * image_step + line + (pixel % width).to(tl.int64) * pixel_step
    channel = block[:, None] * 4 + tl.arange(0, 4)[None, :]
    mask = (place < pixels)[:, None] & (channel < channels)
    v = tl.load(x + begin[:, None] + channel * channel_step, mask=mask, other=0.0).to(tl.float32)
    byte = bytes_of(v, tl.load(affine), tl.load(affine + 1), 0)
    to = q + place[:, None] * 4 + tl.arange(0, 4)[None, :]
    tl.store(to, byte.to(q.dtype.element_ty), mask=(place < pixels)[:, None] & (channel >= 0))
    tl.store(bad + program, tl.sum(tl.sum(v * 0.0, 1), 0))  # x * 0 is NaN just for a NaN or an Inf


@triton_op("gossamer_triton::block", mutates_args=())
def block(x: Tensor, affine: Tensor) -> Tensor:
    """See `gossamer.ops.block`."""
    if x.dim() != 4:
        raise RuntimeError(f"x of shape {tuple(x.shape)} must be (images, channels, height, width)")
    images, channels, height, width = x.shape
    q = torch.empty(
        (images, -(-channels // 4), height, width, 4), dtype=torch.uint8, device=x.device
    )
    if q.numel():
        programs = triton.cdiv(q.numel() // 4, PIXELS)
        bad = torch.empty(programs, dtype=torch.float32, device=x.device)
        launch(
            wrap_triton(_block), (programs,),
            x, affine, q, bad, q.numel() // 4, channels, q.shape[1], height * width, width,
            x.stride(0), x.stride(1), x.stride(2), x.stride(3), PIXELS=PIXELS, num_warps=4,
        )  # fmt: skip
        torch._assert_async(
            (bad == 0).all(), "an image holds a NaN or an Inf: no byte can stand for it"
        )
    return q
