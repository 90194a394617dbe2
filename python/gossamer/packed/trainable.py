"""`Sparse(trainable=True)`: the same values and index, and gradients by the same kernels.

y = x w^T, with dy the gradient of y:

- dx = dy w is `spmm` too, through an index of w^T. Its entries are those of w in another order, so
  it has no values of its own: one permutation leads into the same ones.
- dw = dy^T x only where w has an entry is `sddmm`.

A convolution's dx is a convolution of dy, spread by the stride, with its taps in reverse order;
that is how its transposed index is laid out. Neither w nor dw is ever a dense matrix.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gossamer import ops, reference
from gossamer.formats import Format

from .base import MAX_K, round_up
from .index import INDEX_BUFFERS, Index, entry_places, index_of_places
from .sparse import PackedSparse

# Columns, rows, cells and (on a GPU) bitmap and steps of w, the same of w^T, and the order of its
# entries.
_Indices = tuple[Any, ...]


class _Product(torch.autograd.Function):
    """x w^T + bias; `order` permutes w's values to those of w^T."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor,
        bias: Tensor | None,
        indices: _Indices,
        n: int,
        k: int,
        channels: int,
        conv: list[int] | None,
    ) -> Tensor:
        ctx.save_for_backward(x, values, *indices)
        ctx.sizes, ctx.conv = (n, k, channels), conv
        columns, rows, cells, bitmap, steps, *_ = indices
        return ops.spmm(x, values, columns, rows, cells, n, bias, k, 0, conv, bitmap, steps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, values, columns, rows, cells, bitmap, steps, *back, order = ctx.saved_tensors
        (n, k, channels), conv = ctx.sizes, ctx.conv
        dx = dvalues = dbias = None
        if ctx.needs_input_grad[0]:
            weight = (values.detach().index_select(0, order), *back)
            dx = _gradient_of_x(dy, x, weight, k if conv is None else channels, conv)
        if ctx.needs_input_grad[1]:
            dvalues = ops.sddmm(x, dy, columns, rows, cells, n, k, conv, bitmap, steps)
        if ctx.needs_input_grad[2]:
            by_row = dy if conv is None else dy.movedim(1, -1)
            dbias = by_row.reshape(-1, n).sum(0, dtype=values.dtype)
        return dx, dvalues, dbias, None, None, None, None, None


def _gradient_of_x(
    dy: Tensor, x: Tensor, weight: tuple[Tensor, ...], channels: int, conv: list[int] | None
) -> Tensor:
    """dy times w; `weight` is w^T, its values and index, in the shape of x."""
    values, columns, rows, cells, *mapped = weight
    index = (values, columns, rows, cells)
    if conv is None:
        return ops.spmm(dy, *index, channels, None, dy.shape[-1], 0, None, *mapped)
    kh, kw, sh, sw, dh, dw, top, _, left, _, planar = conv
    images, n, height, width = dy.shape
    if (sh, sw) != (1, 1):
        spread = dy.new_zeros(images, n, (height - 1) * sh + 1, (width - 1) * sw + 1)
        spread[:, :, ::sh, ::sw] = dy
        dy = spread
    # A stride may leave inputs at the end that nothing reads, and padding be wider than the taps:
    # these sides make the result as large as x, where negative ones cut off.
    reach_h, reach_w = dh * (kh - 1), dw * (kw - 1)
    first = (reach_h - top, reach_w - left)
    last = (
        x.shape[2] + reach_h - dy.shape[2] - first[0],
        x.shape[3] + reach_w - dy.shape[3] - first[1],
    )
    dy = F.pad(dy, [min(side, 0) for side in (first[1], last[1], first[0], last[0])])
    sides = [max(side, 0) for side in (first[0], last[0], first[1], last[1])]
    geometry = [kh, kw, 1, 1, dh, dw, *sides, planar]
    k = kh * kw * round_up(n, 4)
    return ops.spmm(dy, *index, channels, None, k, 0, geometry, *mapped)


class PackedTrainableSparse(PackedSparse):
    """`Sparse(trainable=True)`: `values` is a Parameter, of one float for each non-zero."""

    trainable = True
    adds = False

    def __init__(self, n: int, k: int, format: Format, buffers: dict[str, Tensor]) -> None:
        super().__init__(n, k, format, buffers)
        # The same name, so that a file of either kind of Sparse has the same tensors.
        del self.values
        self.register_parameter("values", nn.Parameter(buffers["values"]))
        self._channels, self._taps = k, 0
        self._transpose()

    def bind(self, taps: int, channels: int, groups: int) -> None:
        self._channels, self._taps = channels, taps
        self._transpose()

    def _transpose(self) -> None:
        """The index of w^T, and which entry of w each of its entries is."""
        output, column = entry_places(self.n, 1, self._index())
        width = self.n
        if self._taps:
            # (channel, taps reversed, outputs up to 4) of (output, taps, channels up to 4).
            tap, column = column // (self.k // self._taps), column % (self.k // self._taps)
            output = (self._taps - 1 - tap) * round_up(self.n, 4) + output
            width = self._taps * round_up(self.n, 4)
        if width > MAX_K:
            raise ValueError(
                f"the backward would sum over {width} outputs and taps (limit {MAX_K}): "
                "split the layer"
            )
        if len(column) and int(column.max()) >= self._channels:
            raise ValueError(f"the weight has entries behind its {self._channels} channels")
        order = (column * width + output).argsort()
        index, entry = index_of_places(column[order], output[order], self._channels, width, 1)
        entries = torch.empty(len(entry), dtype=torch.int32)
        entries[entry] = order.to(torch.int32)
        for name, buffer in (*index._asdict().items(), ("order", entries)):
            self.register_buffer(f"transposed_{name}", buffer, persistent=False)

    def _arrange(self, gpu: bool) -> None:
        super()._arrange(gpu)
        self._map("transposed_", self._channels, self._taps * round_up(self.n, 4) or self.n, gpu)

    def _take(self, loaded: Any) -> None:
        for name in INDEX_BUFFERS:
            setattr(self, name, getattr(loaded, name).clone())
        # The same Parameter, which an optimizer may hold, though it may change its length.
        self.values.data = loaded.values.detach().clone()
        self._transpose()

    def multiply(
        self,
        x: Tensor,
        bias: Tensor | None,
        activation: int,
        conv: list[int] | None,
        residual: Tensor | None = None,
        reuse: bool = False,
    ) -> Tensor:
        """As every format; it takes no residual (`adds`)."""
        b, values = self._tensors(), self.values
        index, mapped = (b["columns"], b["rows"], b["cells"]), (b.get("bitmap"), b.get("steps"))
        learns = any(t is not None and t.requires_grad for t in (x, values, bias))
        if not (learns and torch.is_grad_enabled()):
            weight = (values.detach(), *index)
            return ops.spmm(x, *weight, self.n, bias, self.k, activation, conv, *mapped)
        names = (*Index._fields, "bitmap", "steps", "order")
        indices = (*index, *mapped, *(b.get(f"transposed_{name}") for name in names))
        y = _Product.apply(x, values, bias, indices, self.n, self.k, self._channels, conv)
        # torch's own, for its gradient.
        return reference.activate(y, ops.ACTIVATIONS[activation])
