"""The operators on a GPU without tensor cores for bytes: weights become floats, torch multiplies.

Activations are not quantized there: the results are those of the weights in a file, not the bits.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gossamer import reference
from gossamer.ops import ACTIVATIONS
from gossamer.packed.int4 import VALUES

from .depthwise import is_depthwise
from .gemm_int8 import by_rows
from .operands import check_addend, laid_out
from .unblock import DTYPES as FLOATS

INT4_VALUES = VALUES.tolist()
block = reference.block
im2col = reference.im2col
max_pool = reference.max_pool
mean = reference.mean
quantize_rows = reference.quantize_rows


def _product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: int,
    conv: list[int] | None,
) -> Tensor:
    """act(x @ weight^T + bias) in the dtype of x, of a weight (n, k) in floats."""
    weight = weight.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    if conv is None:
        y = F.linear(x, weight, bias)
    else:
        kernel, top, bottom, left, right = conv[:2], *conv[6:10]
        groups = len(weight) if is_depthwise(weight.shape[1], conv) else 1
        x = x[:, :groups] if groups > 1 else x
        taps = weight.unflatten(1, (*kernel, -1))[..., : x.shape[1]].permute(0, 3, 1, 2)
        padded = F.pad(x, (left, right, top, bottom))
        y = F.conv2d(padded, taps, bias, conv[2:4], 0, conv[4:6], groups)
        y = laid_out(y, conv)
    return reference.activate(y, ACTIVATIONS[activation])


def _entries(bitmap: Tensor) -> tuple[Tensor, Tensor]:
    """Which columns (n, columns) are stored, and the entry of each that is."""
    bit = torch.arange(32, device=bitmap.device)
    stored = (bitmap[..., :1] >> bit) & 1 > 0
    entry = bitmap[..., 1:] + stored.cumsum(-1) - 1
    return stored.flatten(1), entry.flatten(1)[stored.flatten(1)]


def _dense(values: Tensor, bitmap: Tensor, k: int) -> Tensor:
    stored, entry = _entries(bitmap)
    weight = values.new_zeros(*stored.shape, *values.shape[1:])
    weight[stored] = values[entry]
    return weight.flatten(1)[:, :k]


def gemm_int8(
    x: Tensor,
    panels: Tensor,
    scale: Tensor,
    wsum: Tensor,
    x_affine: Tensor | None,
    bias: Tensor | None,
    k: int,
    activation: int,
    conv: list[int] | None,
) -> Tensor:
    """See `gossamer.ops.gemm_int8`."""
    return gemm_w8(x, panels, scale, bias, k, activation, conv)


def gemm_w8(
    x: Tensor,
    panels: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    k: int,
    activation: int,
    conv: list[int] | None,
) -> Tensor:
    """See `gossamer.ops.gemm_w8`."""
    weight = by_rows(panels)[: len(scale), :k] * scale[:, None]
    return _product(x, weight, bias, activation, conv)


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
    lines = panels.transpose(1, 2)
    codes = torch.stack([lines & 15, lines >> 4], -2).flatten(2).flatten(0, 1)
    values = torch.tensor(INT4_VALUES, dtype=torch.float32, device=x.device)[codes.int()]
    groups = group_scale.transpose(1, 2).flatten(0, 1)
    weight = values.view(*groups.shape, -1) * groups[..., None]
    weight = weight.flatten(1)[: len(scale), :k] * scale[:, None]
    return _product(x, weight, bias, activation, conv)


def spmm(
    x: Tensor,
    values: Tensor,
    bitmap: Tensor,
    steps: Tensor | None,
    n: int,
    bias: Tensor | None,
    k: int,
    activation: int,
    conv: list[int] | None,
) -> Tensor:
    """See `gossamer.ops.spmm`."""
    return _product(x, _dense(values, bitmap, k), bias, activation, conv)


def spmm_int8(
    x: Tensor,
    values: Tensor,
    bitmap: Tensor,
    steps: Tensor | None,
    scale: Tensor,
    wsum: Tensor,
    x_affine: Tensor | None,
    bias: Tensor | None,
    k: int,
    activation: int,
    conv: list[int] | None,
) -> Tensor:
    """See `gossamer.ops.spmm_int8`."""
    weight = _dense(values, bitmap, k) * scale[:, None]
    return _product(x, weight, bias, activation, conv)


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
    """See `gossamer.ops.sddmm`."""
    rows = x.reshape(-1, k) if conv is None else im2col(x, conv)
    dense = dy.float().T @ rows.float()
    stored, entry = _entries(bitmap)
    dw = dense.new_zeros(entries)
    dw[entry] = F.pad(dense, (0, stored.shape[1] - k))[stored]
    return dw


def unblock(q: Tensor, affine: Tensor, channels: int, to: int) -> Tensor:
    """See `gossamer.ops.unblock`; `to` is a place among the dtypes."""
    return reference.unblock(q, affine, channels, FLOATS[to])


def _image_product(
    q: Tensor,
    weight: Tensor,
    activation: int,
    conv: list[int],
    x_affine: Tensor,
    bias: Tensor | None,
    y_affine: Tensor | None,
    residual: Tensor | None,
    residual_affine: Tensor | None,
) -> Tensor:
    """A blocked image to another, by way of floats; to these without y_affine."""
    check_addend(y_affine, residual, residual_affine)
    x = reference.unblock(q, x_affine, 4 * q.shape[1])
    y = _product(x, weight, bias, 0, conv)
    if residual is not None and residual_affine is not None:
        y = y + reference.unblock(residual, residual_affine, y.shape[1])
    y = reference.activate(y, ACTIVATIONS[activation])
    return y if y_affine is None else reference.block(y, y_affine)


def conv_int8(
    q: Tensor,
    panels: Tensor,
    scale: Tensor,
    wsum: Tensor,
    *images: Any,
) -> Tensor:
    """See `gossamer.ops.conv_int8`."""
    *operands, k, activation, conv = images
    weight = by_rows(panels)[: len(scale), :k] * scale[:, None]
    return _image_product(q, weight, activation, conv, *operands)


def conv_spmm_int8(
    q: Tensor,
    values: Tensor,
    bitmap: Tensor,
    scale: Tensor,
    wsum: Tensor,
    *images: Any,
) -> Tensor:
    """See `gossamer.ops.conv_spmm_int8`; the bitmap stands for the index."""
    *operands, k, activation, conv = images
    weight = _dense(values, bitmap, k) * scale[:, None]
    return _image_product(q, weight, activation, conv, *operands)
