"""Max-pools, of 8-bit images and of floats."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer import ops
from gossamer.dtypes import KeepsDtypes

from .match import MaxPool


def _pooled(x: Tensor, pool: MaxPool) -> Tensor:
    """`ops.max_pool` of that geometry."""
    return ops.max_pool(x, *pool.geometry(x.size(2), x.size(3)))


class ImageMaxPool2d(KeepsDtypes):
    """max_pool2d of bytes, whose order is that of the values: exact."""

    def __init__(self, pool: MaxPool) -> None:
        super().__init__()
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        """The largest byte under each window."""
        return _pooled(x, self.pool)

    def extra_repr(self) -> str:
        return str(self.pool)


def _is_alone(x: Tensor) -> bool:
    """Whether nothing but the values of x is asked for: no gradient, no graph of torch's."""
    plain = x.device.type == "cpu" and x.dim() == 4 and not x.requires_grad
    return plain and not torch.compiler.is_compiling()


class SeparableMaxPool2d(nn.Module):
    """max_pool2d of floats, down the columns and then along the rows.

    By `ops.max_pool` where they are contiguous, or shall be, else by torch.maximum.
    """

    def __init__(self, pool: MaxPool) -> None:
        super().__init__()
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        """Exact, NaN included; the result has the memory format of x."""
        if x.is_contiguous() and self._is_ours(x):
            return _pooled(x, self.pool)
        if _is_alone(x):
            return self._along(self._along(x, 0), 1)
        pool = self.pool
        return F.max_pool2d(
            x, pool.kernel, pool.stride, pool.padding, pool.dilation, pool.ceil_mode
        )

    def planes(self, x: Tensor) -> Tensor:
        """The same, contiguous; of x in channels_last without a copy."""
        if x.is_contiguous(memory_format=torch.channels_last) and self._is_ours(x):
            return _pooled(x, self.pool)
        return self(x).contiguous()

    def _is_ours(self, x: Tensor) -> bool:
        """Whether `ops.max_pool` takes x, but for its layout."""
        if x.dtype != torch.float32 or not _is_alone(x):
            return False
        return min(self.pool.windows(size, i) for i, size in enumerate(x.shape[2:])) > 0

    def _along(self, x: Tensor, i: int) -> Tensor:
        """The largest of each window's rows (i = 0) or columns (1)."""
        pool, size, dim = self.pool, x.size(2 + i), 2 + i
        kernel, stride, padding, dilation = (
            value[i] for value in (pool.kernel, pool.stride, pool.padding, pool.dilation)
        )
        windows = pool.windows(size, i)
        # What each tap reads: of all windows, or of those from one on that are not padding there.
        whole: list[Tensor] = []
        some: list[tuple[int, Tensor]] = []
        for first in range(-padding, kernel * dilation - padding, dilation):
            begin = max(0, -(first // stride))
            count = min(windows, (size - 1 - first) // stride + 1) - begin
            places = slice(first + begin * stride, first + (begin + count) * stride, stride)
            if 0 < count == windows:
                whole.append(x[:, :, places] if i == 0 else x[..., places])
            elif count > 0:
                some.append((begin, x[:, :, places] if i == 0 else x[..., places]))
        if len(whole) < 2:
            both = ((kernel, 1), (stride, 1), (padding, 0), (dilation, 1))
            sizes = [b if i == 0 else b[::-1] for b in both]
            return F.max_pool2d(x, sizes[0], sizes[1], sizes[2], sizes[3], pool.ceil_mode)
        y = torch.maximum(whole[0], whole[1])
        for begin, part in [(0, part) for part in whole[2:]] + some:
            # Clamping from below by a tensor is torch.maximum in place.
            y.narrow(dim, begin, part.size(dim)).clamp_min_(part)
        return y

    def extra_repr(self) -> str:
        return str(self.pool)
