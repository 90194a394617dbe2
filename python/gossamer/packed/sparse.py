"""Sparse weights: fp32 values, or int8 values in blocks of four inputs, and their index."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gossamer import ops
from gossamer.formats import Format

from .base import Packed, round_up
from .index import (
    INDEX_BUFFERS,
    Index,
    bitmap_of,
    build_index,
    check_index,
    concat_indices,
    entry_places,
    steps_of,
)
from .lanes import (
    check_lanes,
    check_scale,
    gptq_lanes,
    lane_ids,
    lane_scale,
    lanes_of,
    quantize_lanes,
    scale_signs,
    times_sign,
    unlanes,
)


class _Indexed(Packed):
    """A packed weight with the buffers of an index, and on a GPU with its bitmap and steps."""

    UNIT: ClassVar[int]  # inputs of an entry
    values: Tensor
    columns: Tensor
    rows: Tensor
    cells: Tensor

    def _index(self) -> Index:
        return Index(self.columns, self.rows, self.cells)

    @staticmethod
    def _concat(parts: Sequence[_Indexed]) -> dict[str, Tensor]:
        index, entry = concat_indices([part.n for part in parts], [p._index() for p in parts])
        values = torch.cat([part.values.detach() for part in parts])[entry]
        return {"values": values, **index._asdict()}

    def _arrange(self, gpu: bool) -> None:
        self._map("", self.n, self.k, gpu)

    def _map(self, prefix: str, n: int, k: int, gpu: bool) -> None:
        """Derives what a GPU reads from the (n, k) index whose names begin so, or forgets it."""
        bitmap = steps = None
        if gpu:
            device = self.columns.device
            index = Index(*(self.get_buffer(prefix + name).cpu() for name in Index._fields))
            bitmap = bitmap_of(n, k, self.UNIT, index)
            steps = steps_of(bitmap, k, self.UNIT)
            bitmap, steps = bitmap.to(device), None if steps is None else steps.to(device)
        self.register_buffer(f"{prefix}bitmap", bitmap, persistent=False)
        self.register_buffer(f"{prefix}steps", steps, persistent=False)


class PackedSparse(_Indexed):
    """`Sparse()`: fp32 values and their index."""

    kernel = "spmm"
    adds = True
    UNIT = 1
    BUFFERS: ClassVar = {"values": torch.float32, **INDEX_BUFFERS}

    @classmethod
    def _pack(
        cls, weight: Tensor, format: Format, scale: Tensor | None, hessian: Tensor | None
    ) -> Packed:
        n, k = weight.shape
        mask = weight != 0
        index, entry = build_index(mask, 1)
        values = torch.empty(len(index.columns))
        values[entry] = weight[mask]
        return cls(n, k, format, {"values": values, **index._asdict()})

    def _validate(self) -> None:
        check_index(self.n, self.k, 1, self.values, self._index())
        if not torch.isfinite(self.values).all():
            raise ValueError("values hold a NaN or an Inf: the file is damaged")

    def multiply(
        self,
        x: Tensor,
        bias: Tensor | None,
        activation: int,
        conv: list[int] | None,
        residual: Tensor | None = None,
        reuse: bool = False,
    ) -> Tensor:
        b = self._tensors()
        weight = (b["values"], b["columns"], b["rows"], b["cells"])
        more: Any = (b.get("bitmap"), b.get("steps"), residual)
        return ops.spmm(x, *weight, self.n, bias, self.k, activation, conv, *more, reuse=reuse)

    def unpack(self) -> Tensor:
        weight = self.values.new_zeros(self.n, self.k)
        # A file may list a place twice: a kernel adds what is there, and so does this.
        return weight.index_put_(
            entry_places(self.n, 1, self._index()), self.values, accumulate=True
        )

    def _scaled(self, factor: Tensor) -> dict[str, Tensor]:
        outputs, _ = entry_places(self.n, 1, self._index())
        values = self.values * factor.float()[outputs]
        if not torch.isfinite(values).all():
            raise ValueError("the factor of an output takes its weights beyond what a float holds")
        return {"values": values}


class PackedSparseInt8(_Indexed):
    """`SparseInt8()`: int8 values in blocks of 1 output x 4 inputs, and their index."""

    scale: Tensor
    wsum: Tensor

    kernel = "spmm_int8"
    convolves = True
    UNIT = 4
    BUFFERS: ClassVar = {
        "values": torch.int8,
        **INDEX_BUFFERS,
        "scale": torch.float32,
        "wsum": torch.int32,
    }

    @classmethod
    def _pack(
        cls, weight: Tensor, format: Format, scale: Tensor | None, hessian: Tensor | None
    ) -> Packed:
        n, k = weight.shape
        blocks = nn.functional.pad(weight, (0, round_up(k, 4) - k)).reshape(n, -1, 4)
        mask = (blocks != 0).any(2)
        index, entry = build_index(mask, 4)
        values = torch.zeros(len(index.columns), 4)
        values[entry] = blocks[mask]
        outputs = torch.empty(len(values), dtype=torch.int64)
        outputs[entry] = mask.nonzero(as_tuple=True)[0]
        # A pair of entries shares its lanes; the first of a pair is never padding.
        lanes, owners = lanes_of(values.reshape(-1, 8)), outputs[::2].repeat_interleave(2)
        if hessian is None:
            lanes, scale = quantize_lanes(lanes, owners, n, scale)
            q = unlanes(lanes, len(values), 4) if len(values) else lanes.reshape(0, 4)
        else:
            scale = lane_scale(lanes, owners, n) if scale is None else scale
            ids = lane_ids(len(lanes), len(values), 4)
            lane = torch.full(blocks.shape, -1)
            lane[mask] = ids[entry]
            whole = gptq_lanes(weight, hessian, lane.flatten(1)[:, :k], scale)
            q = torch.zeros(len(values), 4, dtype=torch.int8)
            q[entry] = nn.functional.pad(whole, (0, -k % 4)).view_as(blocks)[mask]
        wsum = torch.zeros(n, dtype=torch.int32)
        wsum.index_add_(0, outputs[entry], q[entry].sum(1, dtype=torch.int32))
        return cls(n, k, format, {"values": q, **index._asdict(), "scale": scale, "wsum": wsum})

    def _validate(self) -> None:
        check_index(self.n, self.k, 4, self.values, self._index())
        check_lanes(lanes_of(self.values.reshape(-1, 8)), "values")
        check_scale(self.scale, self.n)
        outputs, inputs = entry_places(self.n, 4, self._index())
        beyond = inputs[:, None] + torch.arange(4) >= self.k
        if self.values[beyond].any():
            raise ValueError("values hold weights behind the last input: the file is damaged")
        wsum = torch.zeros(self.n, dtype=torch.int32)
        wsum.index_add_(0, outputs, self.values.sum(1, dtype=torch.int32))
        if not torch.equal(wsum, self.wsum):
            raise ValueError("wsum is not the sum of each output's weights: the file is damaged")

    def bind(self, taps: int, channels: int, groups: int) -> None:
        if groups == 1:
            return
        outputs, inputs = entry_places(self.n, 4, self._index())
        channel = inputs[:, None] % round_up(channels, 4) + torch.arange(4)
        other = channel // (channels // groups) != outputs[:, None] // (self.n // groups)
        if self.values[other].any():
            raise ValueError(f"groups={groups}: an output has weights outside of its group")
        self._grouped = (taps, channels, groups)

    def multiply(
        self, x: Tensor, bias: Tensor | None, activation: int, conv: list[int] | None
    ) -> Tensor:
        b = self._tensors()
        weight = (b["values"], b["columns"], b["rows"], b["cells"], b["scale"], b["wsum"])
        affine, mapped = b.get("x_affine"), (b.get("bitmap"), b.get("steps"))
        return ops.spmm_int8(x, *weight, affine, bias, self.k, activation, conv, *mapped)

    def _convolve(self, q: Tensor, *tail: Any, reuse: bool) -> Tensor:
        b: Any = self._buffers
        weight = (b["values"], b["columns"], b["rows"], b["cells"], b["scale"], b["wsum"])
        arguments: tuple[Any, ...] = (*weight, *tail, b.get("bitmap"))
        return ops.conv_spmm_int8(q, *arguments, reuse=reuse)

    def unpack(self) -> Tensor:
        weight = self.scale.new_zeros(self.n, round_up(self.k, 4))
        outputs, inputs = entry_places(self.n, 4, self._index())
        # Padding entries are zeros at column 0 of their block: adding them changes nothing.
        places = (outputs[:, None], inputs[:, None] + torch.arange(4, device=inputs.device))
        weight.index_put_(places, self.values.float() * self.scale[outputs, None], accumulate=True)
        return weight[:, : self.k].contiguous()

    def _scaled(self, factor: Tensor) -> dict[str, Tensor]:
        sign, scale = scale_signs(self.scale, factor)
        outputs, _ = entry_places(self.n, 4, self._index())
        values = times_sign(self.values, sign[outputs, None])
        return {"values": values, "scale": scale, "wsum": self.wsum * sign}
