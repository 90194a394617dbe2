"""The operators, as functions that choose by device; only this file names `torch.ops.gossamer`."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gossamer
from gossamer.inference import added as _added
from gossamer.inference import finish as _finish
from gossamer.placement import FLOATS as _FLOATS
from gossamer.placement import on_gpu as _on_gpu
from gossamer.placement import placed as _placed
from gossamer.placement import prepare as _prepare

ACTIVATIONS = ("none", "relu", "gelu", "silu", "relu6", "hardswish")


def _path() -> str:
    # An editable install spreads the package over two folders; __path__ knows both.
    for folder in gossamer.__path__:
        library = Path(folder) / "lib" / "libgossamer_torch.so"
        if library.exists():
            return str(library)
    raise ImportError(
        "gossamer's compiled library lib/libgossamer_torch.so is missing: install the package with "
        "`pip install .` (a C++ compiler is needed) instead of importing the source folder"
    )


if not hasattr(torch.ops.gossamer, "gemm_int8"):  # loading it twice is an error
    torch.ops.load_library(_path())
from gossamer import fakes  # noqa: E402, F401  (of what was just loaded)

_OPS = torch.ops.gossamer
_quantize_rows = _OPS.quantize_rows.default
_gemm_int8 = _OPS.gemm_int8.default
_gemm_w8 = _OPS.gemm_w8.default
_gemm_int4 = _OPS.gemm_int4.default
_spmm_int8 = _OPS.spmm_int8.default
_sddmm = _OPS.sddmm.default
_im2col = _OPS.im2col.default
_block = _OPS.block.default
_unblock = _OPS.unblock.default
_max_pool = _OPS.max_pool.default
_mean = _OPS.mean.default
# Those that end with _ write over their residual.
_spmm = _OPS.spmm.default
_spmm_ = _OPS.spmm_.default
_conv_int8 = _OPS.conv_int8.default
_conv_int8_ = _OPS.conv_int8_.default
_conv_spmm_int8 = _OPS.conv_spmm_int8.default
_conv_spmm_int8_ = _OPS.conv_spmm_int8_.default
# csrc/torch/chain.cpp
chain = _OPS.chain.default
chain_keep = _OPS.chain_keep.default
_drop_chain = ctypes.CDLL(_path()).gossamer_drop_chain
_drop_chain.argtypes, _drop_chain.restype = [ctypes.c_int64], None


def chain_drop(number: int) -> None:
    """What `chain_keep` gave the number is no longer kept; nothing happens if it was not."""
    _drop_chain(number)


def activation_index(name: str) -> int:
    """Position of an activation in ACTIVATIONS, as the kernels count them.

    Raises:
        ValueError: if the name is unknown.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"activation {name!r} is unknown: use one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS.index(name)


def _gpu(device: torch.device) -> Any:
    """The kernels of a GPU: Triton's, or of an old one what multiplies floats there."""
    from gossamer import triton

    return triton if triton.multiplies_bytes(device) else triton.older


def quantize_rows(x: Tensor, x_affine: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """q = clamp(round(x / scale) + zero, 0, 255) for each row of x.

    Args:
        x: (..., k) float32, bfloat16 or float16.
        x_affine: (2) float32, scale and zero point for all rows; None: of each row's own range.

    Returns:
        q (..., k) uint8; scale (...) float32, NaN for a row with NaN or Inf; zero (...) int32.
    """
    x = _prepare(x, None).detach()
    run = _gpu(x.device).quantize_rows if _on_gpu(x, x) else _quantize_rows
    return run(x, x_affine)


def gemm_int8(
    x: Tensor,
    panels: Tensor,
    scale: Tensor,
    wsum: Tensor,
    x_affine: Tensor | None,
    bias: Tensor | None,
    k: int,
    activation: int = 0,
    conv: list[int] | None = None,
) -> Tensor:
    """y = act(x @ w^T + bias), w dense int8 in panels, x quantized to u8 on the way.

    Args:
        x: (..., k), or with `conv` (images, channels, height, width); float32, bfloat16, float16.
        panels, scale, wsum: see docs/formats.md, Int8.
        x_affine: as in `quantize_rows`.
        bias: (n) float32.
        activation: position in ACTIVATIONS.
        conv: kernel, stride, dilation (height, width each), padding (top, bottom, left, right), and
            1 if the result is to be contiguous, 0 for channels_last.
    """
    x_ = _prepare(x, conv, any_layout=True)
    run = _gpu(x.device).gemm_int8 if _on_gpu(x, panels) else _gemm_int8
    return _finish(x, run(x_, panels, scale, wsum, x_affine, bias, k, activation, conv))


def gemm_w8(
    x: Tensor,
    panels: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    k: int,
    activation: int = 0,
    conv: list[int] | None = None,
) -> Tensor:
    """y = act(x @ w^T + bias), w dense int8 in panels, x as it is. Arguments as in `gemm_int8`."""
    x_ = _prepare(x, conv)
    run = _gpu(x.device).gemm_w8 if _on_gpu(x, panels) else _gemm_w8
    return _finish(x, run(x_, panels, scale, bias, k, activation, conv))


def gemm_int4(
    x: Tensor,
    panels: Tensor,
    group_scale: Tensor,
    scale: Tensor,
    wsum: Tensor,
    bias: Tensor | None,
    k: int,
    activation: int = 0,
    conv: list[int] | None = None,
) -> Tensor:
    """y = act(x @ w^T + bias), w dense int4 in panels, x quantized to u8 a row on the way.

    Buffers: docs/formats.md, Int4. Other arguments as in `gemm_int8`.
    """
    x_ = _prepare(x, conv)
    run = _gpu(x.device).gemm_int4 if _on_gpu(x, panels) else _gemm_int4
    return _finish(x, run(x_, panels, group_scale, scale, wsum, bias, k, activation, conv))


def spmm(
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    rows: Tensor,
    cells: Tensor,
    n: int,
    bias: Tensor | None,
    k: int,
    activation: int = 0,
    conv: list[int] | None = None,
    bitmap: Tensor | None = None,
    steps: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    reuse: bool = False,
) -> Tensor:
    """y = act(x @ w^T + bias + residual), w fp32 and sparse. Index: docs/formats.md, Sparse.

    Images are read as they lie, contiguous or channels_last. A GPU reads `bitmap` and, of a
    weight in blocks, `steps` in place of columns, rows and cells. `residual` has the shape and
    dtype of y; on a GPU it is added behind the kernel. `reuse`: nobody reads it later, and y may
    take its memory.
    """
    x_ = _prepare(x, conv, any_layout=True)
    if _on_gpu(x, values):
        last = activation if residual is None else 0
        y = _gpu(x.device).spmm(x_, values, _placed(bitmap), steps, n, bias, k, last, conv)
        if residual is not None:
            y = gossamer.reference.activate(y + residual, ACTIVATIONS[activation])
        return _finish(x, y)
    if residual is not None:
        last = conv is not None and not conv[-1]
        lies = torch.channels_last if last else torch.contiguous_format
        residual = residual.contiguous(memory_format=lies)
    arguments = (x_, values, columns, rows, cells, n, residual, bias, k, activation, conv)
    y = _added((_spmm, _spmm_), x, residual, *arguments) if reuse else _spmm(*arguments)
    return _finish(x if residual is None or x.requires_grad else residual, y)


def spmm_int8(
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    rows: Tensor,
    cells: Tensor,
    scale: Tensor,
    wsum: Tensor,
    x_affine: Tensor | None,
    bias: Tensor | None,
    k: int,
    activation: int = 0,
    conv: list[int] | None = None,
    bitmap: Tensor | None = None,
    steps: Tensor | None = None,
) -> Tensor:
    """y = act(x @ w^T + bias), w int8 in 1x4 blocks; as `spmm`. docs/formats.md, SparseInt8."""
    x_ = _prepare(x, conv, any_layout=True)
    tail = (scale, wsum, x_affine, bias, k, activation, conv)
    if _on_gpu(x, values):
        y = _gpu(x.device).spmm_int8(x_, values, _placed(bitmap), steps, *tail)
    else:
        y = _spmm_int8(x_, values, columns, rows, cells, *tail)
    return _finish(x, y)


def sddmm(
    x: Tensor,
    dy: Tensor,
    columns: Tensor,
    rows: Tensor,
    cells: Tensor,
    n: int,
    k: int,
    conv: list[int] | None = None,
    bitmap: Tensor | None = None,
    steps: Tensor | None = None,
) -> Tensor:
    """dw[entry of output o, input i] = sum over rows of dy[row, o] * x[row, i]: float32 (entries).

    The gradient of a sparse weight's values: of y = x @ w^T, at the places that `spmm` stores.

    Args:
        x: as in `spmm`.
        dy: (..., n), or with `conv` (images, n, out height, out width).
        columns, rows, cells: the index of w, docs/formats.md, Sparse; on a GPU `bitmap`, `steps`.
        n, k: the shape of w.
    """
    by_row = (dy if conv is None else dy.movedim(1, -1)).reshape(-1, n)
    x_, dy_ = _prepare(x, conv), _prepare(by_row, None)
    if _on_gpu(x, columns):
        return _gpu(x.device).sddmm(x_, dy_, _placed(bitmap), steps, len(columns), n, k, conv)
    return _sddmm(x_, dy_, columns, rows, cells, n, k, conv)


def im2col(x: Tensor, conv: list[int]) -> Tensor:
    """The rows that a convolution multiplies: (images * out_h * out_w, taps * channels up to 4).

    Args:
        x: (images, channels, height, width) float32, bfloat16 or float16.
        conv: as in `gemm_int8`.
    """
    x = _prepare(x, conv).detach()
    return _gpu(x.device).im2col(x, conv) if _on_gpu(x, x) else _im2col(x, conv)


# Blocked images: contiguous uint8 (images, ceil(channels / 4), height, width, 4): docs/formats.md.


def block(x: Tensor, affine: Tensor) -> Tensor:
    """The blocked image of floats, rounded as `quantize_rows` does.

    Args:
        x: (images, channels, height, width) float32, bfloat16 or float16, in either memory format.
        affine: (2) float32, scale and zero point.

    Raises:
        RuntimeError: x holds a NaN or an Inf, which no byte can stand for; on a GPU asynchronously.
    """
    run = _gpu(x.device).block if _on_gpu(x, affine) else _block
    return run(_prepare(x, [], any_layout=True).detach(), affine)


def unblock(q: Tensor, affine: Tensor, channels: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The floats (images, channels, height, width), contiguous, that a blocked image stands for."""
    if dtype not in _FLOATS:
        raise TypeError(f"dtype {dtype} is unknown: use float32, bfloat16 or float16")
    run = _gpu(q.device).unblock if _on_gpu(q, affine) else _unblock
    return run(q, affine, channels, _FLOATS.index(dtype))


def max_pool(
    x: Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int]
) -> Tensor:
    """The largest of each window, exactly; a NaN is the largest.

    Args:
        x: a blocked image; on a CPU also (images, channels, height, width) float32, contiguous or
            channels_last, of which the result is contiguous.
        kernel, stride, dilation: height and width.
        padding: top, bottom, left, right; what lies there is never the largest.
    """
    run = _gpu(x.device).max_pool if _on_gpu(x, x) else _max_pool
    return run(x, kernel, stride, padding, dilation)


def mean(q: Tensor, affine: Tensor, channels: int, keepdim: bool = False) -> Tensor:
    """The mean of all pixels of each channel of a blocked image: exact sums, rounded once.

    Returns:
        (images, channels) float32; with `keepdim` (images, channels, 1, 1).
    """
    run = _gpu(q.device).mean if _on_gpu(q, affine) else _mean
    return run(q, affine, channels, int(keepdim))


def conv_int8(
    q: Tensor,
    panels: Tensor,
    scale: Tensor,
    wsum: Tensor,
    x_affine: Tensor,
    bias: Tensor | None,
    y_affine: Tensor | None,
    residual: Tensor | None,
    residual_affine: Tensor | None,
    k: int,
    activation: int,
    conv: list[int],
    *,
    reuse: bool = False,
) -> Tensor:
    """y = act(conv(q, w) + bias + residual), all images blocked; w dense int8 in panels.

    Args:
        q, x_affine, y_affine: a blocked image and its numbers, and those of y; where they are None
            y is (images, n, out height, out width) float32, and takes no residual.
        residual, residual_affine: a blocked image of y's shape, or None.
        panels, scale, wsum, bias, k, activation, conv: as in `gemm_int8`.
        reuse: nobody reads the residual later: y may take its memory.
    """
    tail = (x_affine, bias, y_affine, residual, residual_affine, k, activation, conv)
    arguments = (q, panels, scale, wsum, *tail)
    if _on_gpu(q, panels):
        return _gpu(q.device).conv_int8(*arguments)
    if reuse:
        return _added((_conv_int8, _conv_int8_), q, residual, *arguments)
    return _conv_int8(*arguments)


def conv_spmm_int8(
    q: Tensor,
    values: Tensor,
    columns: Tensor,
    rows: Tensor,
    cells: Tensor,
    scale: Tensor,
    wsum: Tensor,
    x_affine: Tensor,
    bias: Tensor | None,
    y_affine: Tensor | None,
    residual: Tensor | None,
    residual_affine: Tensor | None,
    k: int,
    activation: int,
    conv: list[int],
    bitmap: Tensor | None = None,
    *,
    reuse: bool = False,
) -> Tensor:
    """`conv_int8` with w in 1x4 blocks. Index: docs/formats.md, SparseInt8; a GPU's: bitmap."""
    tail = (x_affine, bias, y_affine, residual, residual_affine, k, activation, conv)
    if _on_gpu(q, values):
        return _gpu(q.device).conv_spmm_int8(q, values, _placed(bitmap), scale, wsum, *tail)
    arguments = (q, values, columns, rows, cells, scale, wsum, *tail)
    if reuse:
        return _added((_conv_spmm_int8, _conv_spmm_int8_), q, residual, *arguments)
    return _conv_spmm_int8(*arguments)
