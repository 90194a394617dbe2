"""The operators on a GPU: a Triton kernel for each stem, in the file of its name.

`gossamer.ops` imports this when the first CUDA tensor arrives, and not before.
"""

from __future__ import annotations

try:
    import triton as _triton  # noqa: F401
except ImportError as error:
    raise ImportError(
        "gossamer runs CUDA tensors on Triton kernels, and triton is not installed: CUDA builds of "
        "torch bring it, or `pip install triton`; or keep model and inputs on the CPU"
    ) from error

import warnings

import torch

from . import older
from .block import block
from .conv_int8 import conv_int8
from .conv_spmm_int8 import conv_spmm_int8
from .gemm_int4 import gemm_int4
from .gemm_int8 import gemm_int8
from .gemm_w8 import gemm_w8
from .im2col import im2col
from .max_pool import max_pool
from .mean import mean
from .quantize_rows import quantize_rows
from .sddmm import sddmm
from .spmm import spmm
from .spmm_int8 import spmm_int8
from .tiles import chip
from .unblock import unblock

OLDEST = 75  # the first with tensor cores for bytes


# torch.compile asks once and does not look inside.
@torch.compiler.assume_constant_result
def multiplies_bytes(device: torch.device) -> bool:
    """Whether a GPU has tensor cores for int8; `older` is for those that have none."""
    on = chip(device)
    if on.backend == "cuda" and on.capability < OLDEST:
        warnings.warn(
            f"{device} has compute capability {on.capability / 10}, and tensor cores for int8 come "
            f"with {OLDEST / 10}: packed weights are multiplied as floats, which is no faster",
            stacklevel=4,
        )
        return False
    return True


__all__ = [
    "block",
    "conv_int8",
    "conv_spmm_int8",
    "gemm_int4",
    "gemm_int8",
    "gemm_w8",
    "im2col",
    "max_pool",
    "mean",
    "multiplies_bytes",
    "older",
    "quantize_rows",
    "sddmm",
    "spmm",
    "spmm_int8",
    "unblock",
]
