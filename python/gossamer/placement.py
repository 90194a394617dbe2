"""Where operands are and how they lie in memory, before a kernel is chosen."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def _refuse(x: Tensor) -> None:
    """Raises the sentence that fits an x which no kernel takes."""
    if x.dtype not in FLOATS:
        raise TypeError(f"x has dtype {x.dtype}: use float32, bfloat16 or float16")
    raise RuntimeError(
        f"x is on {x.device}, but kernels are for CPUs and CUDA devices: move x with x.cpu(), or "
        "keep the dense model on that device"
    )


def on_gpu(x: Tensor, weight: Tensor) -> bool:
    """Which kernels are to run; RuntimeError if x and the weight are not in one place."""
    if x.is_cpu and weight.is_cpu:
        return False
    if x.device != weight.device:
        raise RuntimeError(
            f"x is on {x.device} and the packed weight on {weight.device}: move x with "
            f"x.to({str(weight.device)!r}), or the model with model.to({str(x.device)!r})"
        )
    return True


def placed(bitmap: Tensor | None) -> Tensor:
    """What a GPU reads in the place of an index; RuntimeError if it was never made."""
    if bitmap is None:
        raise RuntimeError(
            "the weight was packed for the CPU and its buffers were moved one by one: move the "
            "whole layer with layer.cuda(), which makes the bitmap that a GPU reads"
        )
    return bitmap


def prepare(x: Tensor, conv: list[int] | None, any_layout: bool = False) -> Tensor:
    """x in memory that a kernel can walk, `any_layout` of images too; almost always x itself."""
    if x.dtype not in FLOATS or not (x.is_cpu or x.is_cuda):
        _refuse(x)
    if conv is not None and not (any_layout and x.is_contiguous()):
        return x.contiguous(memory_format=torch.channels_last) if x.is_cpu else x
    if x.is_contiguous() or (x.dim() == 2 and x.stride(1) == 1 and x.stride(0) >= x.size(1)):
        return x
    return x.contiguous()
