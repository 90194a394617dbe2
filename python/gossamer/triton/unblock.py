"""unblock: a blocked image of bytes to planes of floats, y = (q - zero) * scale.

    q  images x channels / 4 x height x width x 4    u8
    y  images x channels x height x width            float32, bfloat16 or float16, contiguous

One product, rounded once to float32 and once more to the dtype of y.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from .blocked import check_blocked, load_byte, words_of
from .operands import launch

PIXELS = 1024
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # as the CPU's operator counts them


@triton.jit
def _unblock(
    q, affine, y, pixels, channels, blocks, plane, PIXELS: tl.constexpr
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    word = tl.load(q + place, mask=place < pixels, other=0)
    upper = place // plane
    image = upper // blocks
    block = upper - image * blocks
    to = y + (image * channels + block * 4 - upper) * plane + place
    scale, zero = tl.load(affine), load_byte(affine)
    for i in tl.static_range(4):
        value = (((word >> (8 * i)) & 255) - zero).to(tl.float32) * scale
        mask = (place < pixels) & (block * 4 + i < channels)
        tl.store(to + i * plane, value.to(y.dtype.element_ty), mask=mask)


@triton_op("gossamer_triton::unblock", mutates_args=())
def unblock(q: Tensor, affine: Tensor, channels: int, to: int) -> Tensor:
    """See `gossamer.ops.unblock`; `to` is a place in DTYPES."""
    check_blocked(q, "q")
    if -(-channels // 4) != q.shape[1]:
        raise RuntimeError(f"q of shape {tuple(q.shape)} does not hold {channels} channels")
    images, blocks, height, width = q.shape[:4]
    y = torch.empty((images, channels, height, width), dtype=DTYPES[to], device=q.device)
    if y.numel():
        words = words_of(q)
        launch(
            wrap_triton(_unblock), (triton.cdiv(words.numel(), PIXELS),),
            words, affine, y, words.numel(), channels, blocks, height * width,
            PIXELS=PIXELS, num_warps=4,
        )  # fmt: skip
    return y
