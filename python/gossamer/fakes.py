"""What the operators return, in shapes without data, for torch.compile and torch.export."""

from __future__ import annotations

import torch
from torch import Tensor


def _conv_shape(x: Tensor, conv: list[int]) -> tuple[int, int]:
    kh, kw, sh, sw, dh, dw, top, bottom, left, right, _ = conv
    return (
        (x.shape[2] + top + bottom - dh * (kh - 1) - 1) // sh + 1,
        (x.shape[3] + left + right - dw * (kw - 1) - 1) // sw + 1,
    )


def _product_like(x: Tensor, n: int, conv: list[int] | None) -> Tensor:
    if conv is None:
        return x.new_empty((*x.shape[:-1], n))
    y = x.new_empty((x.shape[0], n, *_conv_shape(x, conv)))
    return y if conv[10] else y.to(memory_format=torch.channels_last)


@torch.library.register_fake("gossamer::quantize_rows")
def _(x, x_affine):
    return (
        x.new_empty(x.shape, dtype=torch.uint8),
        x.new_empty(x.shape[:-1], dtype=torch.float32),
        x.new_empty(x.shape[:-1], dtype=torch.int32),
    )


@torch.library.register_fake("gossamer::gemm_int8")
def _(x, panels, scale, wsum, x_affine, bias, k, activation, conv):
    return _product_like(x, scale.shape[0], conv)


@torch.library.register_fake("gossamer::gemm_w8")
def _(x, panels, scale, bias, k, activation, conv):
    return _product_like(x, scale.shape[0], conv)


@torch.library.register_fake("gossamer::gemm_int4")
def _(x, panels, group_scale, scale, wsum, bias, k, activation, conv):
    return _product_like(x, scale.shape[0], conv)


@torch.library.register_fake("gossamer::spmm")
def _(x, values, columns, rows, cells, n, residual, bias, k, activation, conv):
    return _product_like(x, n, conv)


@torch.library.register_fake("gossamer::spmm_")
def _(x, values, columns, rows, cells, n, residual, bias, k, activation, conv):
    return None


@torch.library.register_fake("gossamer::spmm_int8")
def _(x, values, columns, rows, cells, scale, wsum, x_affine, bias, k, activation, conv):
    return _product_like(x, scale.shape[0], conv)


@torch.library.register_fake("gossamer::sddmm")
def _(x, dy, columns, rows, cells, n, k, conv):
    return x.new_empty(columns.shape, dtype=torch.float32)


@torch.library.register_fake("gossamer::im2col")
def _(x, conv):
    height, width = _conv_shape(x, conv)
    return x.new_empty((x.shape[0] * height * width, conv[0] * conv[1] * -(-x.shape[1] // 4) * 4))


def _blocked(q: Tensor, channels: int, height: int, width: int) -> Tensor:
    return q.new_empty((q.shape[0], -(-channels // 4), height, width, 4), dtype=torch.uint8)


def _convolved(q: Tensor, y_affine: Tensor | None, n: int, conv: list[int]) -> Tensor:
    if y_affine is not None:
        return _blocked(q, n, *_conv_shape(q[..., 0], conv))
    return _product_like(q[..., 0].float(), n, conv)


@torch.library.register_fake("gossamer::block")
def _(x, affine):
    return _blocked(x, *x.shape[1:])


@torch.library.register_fake("gossamer::unblock")
def _(q, affine, channels, to):
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    return q.new_empty((q.shape[0], channels, *q.shape[2:4]), dtype=dtypes[to])


@torch.library.register_fake("gossamer::max_pool")
def _(q, kernel, stride, padding, dilation):
    geometry = [*kernel, *stride, *dilation, *padding, 1]
    if q.dim() == 4:
        return _product_like(q, q.shape[1], geometry)
    return _blocked(q, 4 * q.shape[1], *_conv_shape(q[..., 0], geometry))


@torch.library.register_fake("gossamer::mean")
def _(q, affine, channels, keepdim):
    shape = (q.shape[0], channels, *[1, 1] * bool(keepdim))
    return q.new_empty(shape, dtype=torch.float32)


@torch.library.register_fake("gossamer::conv_int8")
def _(q, panels, scale, wsum, x, bias, y, residual, residual_affine, k, activation, conv):
    return _convolved(q, y, scale.shape[0], conv)


@torch.library.register_fake("gossamer::conv_spmm_int8")
def _(q, v, c, r, e, scale, wsum, x, bias, y, residual, residual_affine, k, activation, conv):
    return _convolved(q, y, scale.shape[0], conv)


@torch.library.register_fake("gossamer::conv_int8_")
def _(q, panels, scale, wsum, x, bias, y, residual, residual_affine, k, activation, conv):
    return None


@torch.library.register_fake("gossamer::conv_spmm_int8_")
def _(q, v, c, r, e, scale, wsum, x, bias, y, residual, residual_affine, k, activation, conv):
    return None
