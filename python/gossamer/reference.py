"""The specification: every stem in plain torch, written to be read, and the error bound of floats.

A product here takes the weight as plain numbers (dense floats, or integers and a scale per output),
never as a packed layout, and returns float64. What the kernels promise of it:

- integers (`quantize_rows`, the int32 sums) and moved bytes (`im2col`) are equal, bit for bit;
- floats lie within `bound`, which is computed from the operands;
- a row that holds a NaN or an Inf gives NaN everywhere in that row, whatever the weights are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

EPS32 = 2.0**-23


def activate(y: Tensor, activation: str) -> Tensor:
    """activation(y) in the dtype of y; "gelu" is the exact one, by erf.

    >>> activate(torch.tensor([-1.0, 2.0]), "relu")
    tensor([0., 2.])
    """
    functions = {
        "none": lambda v: v,
        "relu": torch.relu,
        "gelu": torch.nn.functional.gelu,
        "silu": torch.nn.functional.silu,
        "relu6": torch.nn.functional.relu6,
        "hardswish": torch.nn.functional.hardswish,
    }
    return functions[activation](y)


def quantize_rows(x: Tensor, x_affine: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """q = clamp(round(x / scale) + zero, 0, 255) a row, so that x ~ (q - zero) * scale.

    Every step is one float32 operation, because its bits are the contract: the same q on every CPU.
    A row that holds a NaN or an Inf has q = 0, zero = 0 and scale = NaN.

    Args:
        x: (..., k) float32, bfloat16 or float16, k >= 1.
        x_affine: (2) float32, scale and zero point for all rows; None: of each row's own range.

    Returns:
        q (..., k) uint8, scale (...) float32, zero (...) int32.

    >>> quantize_rows(torch.tensor([[0.0, 255.0], [-1.0, 0.0]]))[0]
    tensor([[  0, 255],
            [  0, 255]], dtype=torch.uint8)
    """
    x = x.float()
    finite = torch.isfinite(x).all(-1)
    x = torch.where(finite[..., None], x, 0.0)
    if x_affine is None:
        low, high = x.amin(-1).clamp(max=0), x.amax(-1).clamp(min=0)
        scale = (high / 255 - low / 255).clamp(min=2.0**-126)
        zero = (-low * (1 / scale)).round()
    else:
        scale, zero = x_affine[0].expand_as(finite), torch.where(finite, x_affine[1], 0.0)
    q = ((x * (1 / scale)[..., None]).round() + zero[..., None]).clamp(0, 255)
    return q.to(torch.uint8), torch.where(finite, scale, torch.nan), zero.to(torch.int32)


def gemm_int8(
    x: Tensor,
    q: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    x_affine: Tensor | None = None,
) -> Tensor:
    """y = act(sum((x_q - zero) * q) * x_scale * scale + bias).

    The sum is exact: float64 holds every integer up to 2^53, the largest here is 255 * 127 * 65536.

    Args:
        x: (..., k) floats, quantized by `quantize_rows`.
        q: (n, k) int8, the weight.
        scale: (n) float32, of each output of q.
        bias: (n) float32.
        activation: see `activate`.
        x_affine: see `quantize_rows`.

    Returns:
        (..., n) float64.

    >>> gemm_int8(torch.tensor([[0.0, 255.0]]), torch.tensor([[1, 2]]), torch.ones(1))
    tensor([[510.]], dtype=torch.float64)
    """
    x_q, x_scale, zero = quantize_rows(x, x_affine)
    sums = (x_q.double() - zero.double()[..., None]) @ q.double().T
    y = sums * (x_scale.double()[..., None] * scale.double())
    return activate(y if bias is None else y + bias.double(), activation)


def gemm_w8(
    x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None = None, activation: str = "none"
) -> Tensor:
    """y = act((x @ q^T) * scale + bias), x as it is. Arguments as in `gemm_int8`."""
    return spmm(x, q.double() * scale.double()[:, None], bias, activation)


def gemm_int4(
    x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None = None, activation: str = "none"
) -> Tensor:
    """`gemm_int8` with q (n, k) the product of each weight's value and its group's scale."""
    return gemm_int8(x, q, scale, bias, activation)


def spmm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """y = act(x @ weight^T + bias + residual).

    Args:
        x: (..., k) floats.
        weight: (n, k) floats, zeros included.
        bias: (n) float32.
        activation: see `activate`.
        residual: (..., n) floats.

    Returns:
        (..., n) float64.
    """
    ill = ~torch.isfinite(x).all(-1, keepdim=True)
    y = (x.double() @ weight.double().T).masked_fill(ill, torch.nan)
    for addend in (bias, residual):
        y = y if addend is None else y + addend.double()
    return activate(y, activation)


def spmm_int8(
    x: Tensor,
    q: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    x_affine: Tensor | None = None,
) -> Tensor:
    """`gemm_int8`: blocks that are not stored are zeros, which add nothing to an exact sum."""
    return gemm_int8(x, q, scale, bias, activation, x_affine)


def sddmm(x: Tensor, dy: Tensor) -> Tensor:
    """dw = dy^T @ x, the gradient of w in y = x @ w^T; a kernel gives it at w's entries only.

    Args:
        x: (rows, k) floats.
        dy: (rows, n) floats.

    Returns:
        (n, k) float64. For the bound: `bound(sddmm(x, dy), dy.T, x.T)`.

    >>> sddmm(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0]]))
    tensor([[3., 6.]], dtype=torch.float64)
    """
    return dy.double().T @ x.double()


def im2col(x: Tensor, conv: list[int]) -> Tensor:
    """rows[pixel] = (tap row, tap column, channel up to 4) of what lies under it; 0 is outside.

    Args:
        x: (images, channels, height, width).
        conv: kernel, stride, dilation (height, width each), padding (top, bottom, left, right);
            what follows is not read.

    Returns:
        (images * out_h * out_w, kernel_h * kernel_w * channels up to 4) in the dtype of x.
    """
    kh, kw, sh, sw, dh, dw, top, bottom, left, right = conv[:10]
    x = torch.nn.functional.pad(x, (left, right, top, bottom, 0, -x.shape[1] % 4))
    out_h = (x.shape[2] - dh * (kh - 1) - 1) // sh + 1
    out_w = (x.shape[3] - dw * (kw - 1) - 1) // sw + 1
    taps = [
        x[:, :, i * dh :: sh, j * dw :: sw][:, :, :out_h, :out_w]
        for i in range(kh)
        for j in range(kw)
    ]
    # (taps, images, channels, out_h, out_w) -> pixels x (taps, channels)
    return torch.stack(taps).permute(1, 3, 4, 0, 2).reshape(-1, kh * kw * x.shape[1])


def block(x: Tensor, affine: Tensor) -> Tensor:
    """The blocked image of x: (images, ceil(channels / 4), height, width, 4) uint8.

    Args:
        x: (images, channels, height, width) float32, bfloat16 or float16, finite.
        affine: (2) float32, scale and zero point; channels that are added hold the latter.

    >>> block(torch.tensor([[[[0.5]], [[-9.0]]]]), torch.tensor([0.25, 7.0]))
    tensor([[[[[9, 0, 7, 7]]]]], dtype=torch.uint8)
    """
    padded = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % 4))
    return quantize_rows(padded, affine)[0].unflatten(1, (-1, 4)).movedim(2, -1).contiguous()


def unblock(q: Tensor, affine: Tensor, channels: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The floats (images, channels, height, width) that a blocked image stands for.

    >>> q = torch.tensor([[[[[9, 0, 7, 7]]]]], dtype=torch.uint8)
    >>> unblock(q, torch.tensor([0.25, 7.0]), 2).flatten()
    tensor([ 0.5000, -1.7500])
    """
    planes = q.movedim(-1, 2).flatten(1, 2)[:, :channels]
    return ((planes.float() - affine[1]) * affine[0]).to(dtype).contiguous()


def max_pool(
    q: Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int]
) -> Tensor:
    """The largest of each window of a blocked image, or of floats; padding as in `ops.max_pool`.

    >>> q = torch.tensor([1, 5, 3], dtype=torch.uint8).view(1, 1, 1, 3, 1).expand(-1, -1, -1, -1, 4)
    >>> max_pool(q, [1, 2], [1, 1], [0, 0, 0, 0], [1, 1])[..., 0]
    tensor([[[[5, 5]]]], dtype=torch.uint8)
    """
    top, bottom, left, right = padding
    if q.dim() == 4:
        wide = torch.nn.functional.pad(q, (left, right, top, bottom), value=-torch.inf)
        return torch.nn.functional.max_pool2d(wide, kernel, stride, 0, dilation)
    planes = torch.nn.functional.pad(q.movedim(-1, 2).flatten(1, 2), (left, right, top, bottom))
    # As float64: torch pools no bytes, and pads by no more than half a window.
    y = torch.nn.functional.max_pool2d(planes.double(), kernel, stride, 0, dilation)
    return y.to(torch.uint8).unflatten(1, (-1, 4)).movedim(2, -1).contiguous()


def mean(q: Tensor, affine: Tensor, channels: int, keepdim: bool = False) -> Tensor:
    """The mean of all pixels of each channel of a blocked image, rounded once to float32.

    >>> q = torch.tensor([[[[[9, 0, 7, 7], [8, 1, 7, 7]]]]], dtype=torch.uint8)
    >>> mean(q, torch.tensor([0.5, 7.0]), 2)
    tensor([[ 0.7500, -3.2500]])
    """
    pixels = q.shape[2] * q.shape[3]
    sums = q.sum((2, 3), dtype=torch.int64).flatten(1)[:, :channels]
    y = (sums - pixels * affine[1].long()).double() * (affine[0].double() / pixels)
    return y.float()[:, :, None, None] if keepdim else y.float()


def conv_int8(
    q: Tensor,
    weight: Tensor,
    scale: Tensor,
    conv: list[int],
    x_affine: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """y = act(conv(q - zero, weight) * x_scale * scale + bias + residual), before it is quantized.

    Args:
        q: a blocked image.
        weight: (n, taps * channels up to 4) int8.
        scale: (n) float32, of each output.
        conv: the geometry, see `im2col`.
        x_affine: scale and zero point of q.
        bias: (n) float32.
        activation: see `activate`.
        residual: (images, n, out_h, out_w) floats.

    Returns:
        (images, n, out_h, out_w) float64.
    """
    images = q.movedim(-1, 2).flatten(1, 2).double() - x_affine[1].double()
    rows = im2col(images, conv) @ weight.double().T * (x_affine[0].double() * scale.double())
    y = (rows if bias is None else rows + bias.double()).T
    out_h, out_w = (
        (q.shape[2 + i] + conv[6 + 2 * i] + conv[7 + 2 * i] - conv[4 + i] * (conv[i] - 1) - 1)
        // conv[2 + i]
        + 1
        for i in (0, 1)
    )
    y = y.reshape(len(weight), q.shape[0], out_h, out_w).movedim(0, 1)
    return activate(y if residual is None else y + residual.double(), activation)


def conv_spmm_int8(*arguments: Any, **more: Any) -> Tensor:
    """`conv_int8`: blocks that are not stored are zeros."""
    return conv_int8(*arguments, **more)


def bound(
    expected: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    terms: int | None = None,
) -> Tensor:
    """The largest |kernel - expected| that rounding can explain, (..., n) float64.

    (terms + 8) * eps32 * (|x| @ |weight|^T + |bias|): each of `terms` additions, and the few steps
    of epilogue and activation, may be off by eps32 of what it adds up. On top, one rounding to the
    dtype of x, which is that of the result, and the underflow of a product of two scales.

    Args:
        expected: (..., n) float64, from a function above.
        x, weight, bias: its operands; weight (n, k) float, that is q * scale.
        terms: additions of floats; default k. 0 for integer sums, which are exact.
    """
    k = weight.shape[1]
    total = x.double().abs() @ weight.double().abs().T
    if bias is not None:
        total = total + bias.double().abs()
    smallest = torch.finfo(x.dtype).smallest_normal * torch.finfo(x.dtype).eps
    underflow = smallest + 2.0**-149 * 255 * 128 * k
    steps = (k if terms is None else terms) + 8
    return steps * EPS32 * total + torch.finfo(x.dtype).eps * expected.abs() + underflow
