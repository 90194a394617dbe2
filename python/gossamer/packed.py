"""Packed weights: modules of plain buffers, and the only file that knows how they are laid out.

docs/formats.md draws every buffer byte for byte. Layouts do not depend on the CPU, so a state_dict moves between
machines.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gossamer import _C, ops
from gossamer.formats import Format, Int8, Sparse, SparseInt8

MAX_K = 65536
PANEL = 16  # outputs in a panel of dense int8
STEP = 8  # inputs whose products share 16-bit lanes, two by two
# Four weights whose products one 16-bit lane sums: 255 * 128 fits in int16, for either sign.
LANE_LIMIT = 128


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


class Packed(nn.Module):
    """A weight of n outputs and k inputs in some format: buffers and the product with them.

    Attributes:
        n, k: the shape of the weight.
        format: the `Format` it was packed with.
        kernel: name of the operator that multiplies it.
    """

    kernel: str
    BUFFERS: dict[str, torch.dtype]

    def __init__(self, n: int, k: int, format: Format, buffers: dict[str, Tensor]) -> None:
        super().__init__()
        self.n, self.k, self.format = n, k, format
        for name in self.BUFFERS:
            self.register_buffer(name, buffers[name])

    @classmethod
    def pack(cls, weight: Tensor, format: Format) -> Packed:
        raise NotImplementedError

    @classmethod
    def from_buffers(cls, n: int, k: int, format: Format, buffers: dict[str, Tensor]) -> Packed:
        """A packed weight from the buffers of another, say out of a file; nothing is trusted.

        Raises:
            ValueError: if a buffer is missing, or has another dtype, shape or content than packing makes.
        """
        _check_sizes(n, k)
        if set(buffers) != set(cls.BUFFERS):
            raise ValueError(
                f"{format.name} has the buffers {sorted(cls.BUFFERS)}, the file has {sorted(buffers)}"
            )
        for name, dtype in cls.BUFFERS.items():
            buffer = buffers[name]
            if not isinstance(buffer, Tensor) or buffer.is_meta or buffer.layout != torch.strided:
                raise ValueError(f"buffer {name} is not a dense tensor that holds data")
            if buffer.dtype != dtype:
                raise ValueError(f"buffer {name} is {buffer.dtype}, {format.name} has {dtype}")
        clean = {name: b.detach().cpu().contiguous() for name, b in buffers.items()}
        packed = cls(n, k, format, clean)
        packed._validate()
        return packed

    def _validate(self) -> None:
        raise NotImplementedError

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """For `load_state_dict`: all buffers or none, as little trusted as those of a file.

        They may hold another number of non-zeros than those they replace.
        """
        names = {prefix + name: name for name in self.BUFFERS}
        missing = [key for key in names if key not in state_dict]
        missing_keys += missing
        if strict:
            unexpected_keys += [k for k in state_dict if k.startswith(prefix) and k not in names]
        if missing:
            return
        buffers = {name: state_dict[key] for key, name in names.items()}
        try:
            loaded = self.from_buffers(self.n, self.k, self.format, buffers)
        except ValueError as error:
            error_msgs.append(f"{prefix.removesuffix('.')}: {error}")
            return
        for name, buffer in loaded.named_buffers():
            setattr(self, name, buffer.clone())

    def matmul(
        self,
        x: Tensor,
        bias: Tensor | None = None,
        activation: str = "none",
        conv: list[int] | None = None,
    ) -> Tensor:
        """y = activation(x @ w^T + bias).

        Args:
            x: (..., k) float32, bfloat16 or float16; with `conv` (images, channels, height, width).
            bias: (n) float32, or None.
            activation: "none", "relu", "gelu" (exact, by erf) or "silu".
            conv: the geometry of a convolution, see `gossamer.ops.gemm_int8`.

        Returns:
            (..., n), or (images, n, out_h, out_w), in the dtype of x.
        """
        return self.multiply(x, bias, ops.activation_index(activation), conv)

    def multiply(
        self, x: Tensor, bias: Tensor | None, activation: int, conv: list[int] | None
    ) -> Tensor:
        """`matmul` with the activation as its index: what layers call."""
        raise NotImplementedError

    def unpack(self) -> Tensor:
        """The weight that is really used, (n, k) float32."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(b.nbytes for b in self.buffers())

    @property
    def zeros(self) -> float:
        """Share of weights that are exactly zero, 0 to 1."""
        return 1 - torch.count_nonzero(self.unpack()).item() / (self.n * self.k)

    def extra_repr(self) -> str:
        return f"n={self.n}, k={self.k}, format={self.format}"


def _check_sizes(n: int, k: int) -> None:
    if not (isinstance(n, int) and isinstance(k, int) and 1 <= n < 2**31 and k >= 1):
        raise ValueError(f"n={n}, k={k}: a weight has 1 .. 2^31 - 1 outputs and at least one input")
    if k > MAX_K:
        raise ValueError(f"k={k} overflows int32 (limit {MAX_K}): split the layer")


def _checked_weight(weight: Tensor) -> Tensor:
    if weight.dim() != 2:
        raise ValueError(f"a weight must be (n, k), got shape {tuple(weight.shape)}")
    if not weight.is_floating_point():
        raise TypeError(f"weight has dtype {weight.dtype}: use a float dtype")
    if weight.device.type != "cpu":
        raise ValueError(f"weight is on {weight.device}: move the model with .cpu() to pack it")
    _check_sizes(*weight.shape)
    weight = weight.detach().float().contiguous()
    if not torch.isfinite(weight).all():
        raise ValueError("the weight holds a NaN or an Inf: it cannot be quantized or pruned soundly")
    return weight


# --- The saturation-aware scale ------------------------------------------------------------------


def quantize_lanes(lanes: Tensor, outputs: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Symmetric int8 such that no lane can overflow 16 bits.

    A lane is the set of four weights whose u8 x s8 products a CPU without a 4-way dot sums in int16. The scale
    of an output is the smallest for which every weight fits in 127 and, of every lane, the positive weights
    together in 128 and the negative ones too, so that 255 * 128 <= 32767 (docs/formats.md derives it).
    Rounding may overshoot 128 by one or two: the weight that gained most by it gives that back.

    Args:
        lanes: (lanes, 4) float32.
        outputs: (lanes) int64, the output each lane belongs to.
        n: number of outputs.

    Returns:
        q (lanes, 4) int8, scale (n) float32.
    """
    # Divided first: four of the largest floats would overflow.
    share = lanes / LANE_LIMIT
    positive, negative = share.clamp(min=0).sum(1), share.clamp(max=0).sum(1).neg()
    need = torch.maximum(lanes.abs().amax(1) / 127, torch.maximum(positive, negative))
    scale = torch.zeros(n).scatter_reduce_(0, outputs, need, "amax")
    # An output of zeros, or of denormals that a float cannot divide by: any scale does.
    scale = torch.where(scale < 2.0**-120, torch.ones(()), scale)
    exact = lanes / scale[outputs, None]
    q = exact.round().clamp_(-127, 127)
    for sign in (1, -1):
        for _ in range(4):
            over = (q * sign).clamp(min=0).sum(1) > LANE_LIMIT
            if not over.any():
                break
            part, goal = q[over] * sign, exact[over] * sign
            gain = torch.where(part > 0, part - goal, torch.full_like(part, -9.0))
            part[torch.arange(len(part)), gain.argmax(1)] -= 1
            q[over] = part * sign
    return q.to(torch.int8), scale


def _check_lanes(lanes: Tensor, what: str) -> None:
    wide = lanes.to(torch.int32)
    if (wide.clamp(min=0).sum(1) > LANE_LIMIT).any() or (wide.clamp(max=0).sum(1) < -LANE_LIMIT).any():
        raise ValueError(f"{what} holds weights whose products overflow 16 bits: the file is damaged")


def _check_scale(scale: Tensor, n: int) -> None:
    if scale.shape != (n,) or not (torch.isfinite(scale).all() and (scale > 0).all()):
        raise ValueError(f"scale must be {n} finite positive numbers, the file is damaged")


def _check_wsum(wsum: Tensor, q: Tensor) -> None:
    if wsum.shape != q.shape[:1] or not torch.equal(wsum, q.sum(1, dtype=torch.int32)):
        raise ValueError("wsum is not the sum of each output's weights: the file is damaged")


# --- Dense int8 ----------------------------------------------------------------------------------


def _lanes_of(q: Tensor) -> Tensor:
    """(n, k) with k a multiple of 8 -> (n * k / 4, 4): inputs 0 1 4 5 and 2 3 6 7 of every 8."""
    return q.reshape(-1, 2, 2, 2).transpose(1, 2).reshape(-1, 4)


def _unlanes(lanes: Tensor, n: int, k: int) -> Tensor:
    return lanes.reshape(-1, 2, 2, 2).transpose(1, 2).reshape(n, k)


class _Int8Panels(Packed):
    """Dense int8: panels of 16 outputs, (ceil(n / 16), k up to 8 / 4, 16, 4)."""

    @classmethod
    def pack(cls, weight: Tensor, format: Format) -> Packed:
        weight = _checked_weight(weight)
        n, k = weight.shape
        padded = nn.functional.pad(weight, (0, _round_up(k, STEP) - k))
        outputs = torch.arange(n).repeat_interleave(padded.shape[1] // 4)
        lanes, scale = quantize_lanes(_lanes_of(padded), outputs, n)
        q = _unlanes(lanes, n, padded.shape[1])
        whole = nn.functional.pad(q, (0, 0, 0, _round_up(n, PANEL) - n))
        panels = whole.reshape(-1, PANEL, padded.shape[1] // 4, 4).transpose(1, 2).contiguous()
        buffers = {"panels": panels, "scale": scale, "wsum": q.sum(1, dtype=torch.int32)}
        return cls(n, k, format, {name: buffers[name] for name in cls.BUFFERS})

    def _integers(self) -> Tensor:
        """(n up to 16, k up to 8) int8."""
        panels = self.panels
        return panels.transpose(1, 2).reshape(panels.shape[0] * PANEL, -1)

    def _validate(self) -> None:
        n, k = self.n, self.k
        shape = (_round_up(n, PANEL) // PANEL, _round_up(k, STEP) // 4, PANEL, 4)
        if self.panels.shape != shape:
            raise ValueError(f"panels have shape {tuple(self.panels.shape)}, n={n}, k={k} need {shape}")
        q = self._integers()
        if q[n:].any() or q[:, k:].any():
            raise ValueError("panels hold weights in their padding: the file is damaged")
        _check_lanes(_lanes_of(q), "panels")
        _check_scale(self.scale, n)

    def unpack(self) -> Tensor:
        return self._integers()[: self.n, : self.k].float() * self.scale[:, None]


class PackedInt8(_Int8Panels):
    """`Int8(activations="dynamic")`: integers times integers."""

    kernel = "gemm_int8"
    BUFFERS = {"panels": torch.int8, "scale": torch.float32, "wsum": torch.int32}

    def _validate(self) -> None:
        super()._validate()
        _check_wsum(self.wsum, self._integers()[: self.n])

    def multiply(
        self, x: Tensor, bias: Tensor | None, activation: int, conv: list[int] | None
    ) -> Tensor:
        b = self._buffers
        return ops.gemm_int8(x, b["panels"], b["scale"], b["wsum"], bias, self.k, activation, conv)


class PackedW8(_Int8Panels):
    """`Int8(activations="none")`: integers widened to floats on the way."""

    kernel = "gemm_w8"
    BUFFERS = {"panels": torch.int8, "scale": torch.float32}

    def multiply(
        self, x: Tensor, bias: Tensor | None, activation: int, conv: list[int] | None
    ) -> Tensor:
        b = self._buffers
        return ops.gemm_w8(x, b["panels"], b["scale"], bias, self.k, activation, conv)


# --- The sparse index ----------------------------------------------------------------------------


class _Index(NamedTuple):
    """Where the non-zeros of a matrix lie; both sparse formats use it."""

    columns: Tensor  # (entries) uint8, column inside its block
    rows: Tensor  # (rows, 2) uint16: output inside its chunk, entries
    cells: Tensor  # (blocks * chunks + 1, 2) int32: first row, first entry


INDEX_BUFFERS = {"columns": torch.uint8, "rows": torch.uint16, "cells": torch.int32}


def _build_index(mask: Tensor, unit: int) -> tuple[_Index, Tensor]:
    """The index of the true places of a mask.

    Args:
        mask: (n, columns) bool.
        unit: inputs a column stands for: 1, or 4 where every row is padded to an even number of entries.

    Returns:
        The index, and for each true place of the mask, in row-major order, its entry (int64).
    """
    n, width = mask.shape
    block, chunk = _C.block_columns(unit), _C.chunk_rows(n)
    blocks, chunks = -(-width // block), -(-n // chunk)
    output, column = mask.nonzero(as_tuple=True)
    # A row is one output in one block. Its entries follow each other in row-major order already.
    row = output * blocks + column // block
    length = torch.bincount(row, minlength=n * blocks)
    within = torch.arange(len(row)) - (length.cumsum(0) - length)[row]
    stored = length + length % 2 if unit == 4 else length

    output_of = torch.arange(n).repeat_interleave(blocks)
    cell = torch.arange(blocks).repeat(n) * chunks + output_of // chunk
    filled = stored.nonzero().squeeze(1)
    # Cell by cell, longest row first, then by output: the order in which a kernel walks.
    key = (cell[filled] * (block + 2) + block + 1 - stored[filled]) * n + output_of[filled]
    order = filled[key.argsort()]
    start = torch.empty_like(stored)
    start[order] = stored[order].cumsum(0) - stored[order]

    columns = torch.zeros(int(stored.sum()), dtype=torch.uint8)
    entry = start[row] + within
    columns[entry] = (column % block).to(torch.uint8)
    rows = torch.stack([output_of[order] % chunk, stored[order]], 1).to(torch.uint16)
    cells = torch.zeros(blocks * chunks + 1, 2, dtype=torch.int64)
    cells[1:, 0] = torch.bincount(cell[order], minlength=blocks * chunks)
    cells[1:, 1].index_add_(0, cell[order], stored[order])
    if len(columns) > 2**31 - 1:
        raise ValueError(f"{len(columns)} stored weights overflow the int32 index: split the layer")
    return _Index(columns, rows, cells.cumsum(0).to(torch.int32)), entry


def _entry_places(packed: Packed, unit: int) -> tuple[Tensor, Tensor]:
    """Output and first input of every entry of a valid index, both int64."""
    rows, cells = packed.rows.to(torch.int64), packed.cells.to(torch.int64)
    block, chunk = _C.block_columns(unit), _C.chunk_rows(packed.n)
    chunks = -(-packed.n // chunk)
    cell = torch.repeat_interleave(cells[1:, 0] - cells[:-1, 0])
    output = rows[:, 0] + cell % chunks * chunk
    columns = packed.columns.to(torch.int64) + torch.repeat_interleave(
        cell // chunks * block, rows[:, 1]
    )
    return torch.repeat_interleave(output, rows[:, 1]), columns * unit


def _check_index(packed: Packed, unit: int, values: Tensor) -> None:
    columns, rows, cells = packed.columns, packed.rows, packed.cells
    if columns.dim() != 1 or rows.dim() != 2 or rows.shape[1] != 2:
        raise ValueError(
            f"columns {tuple(columns.shape)} and rows {tuple(rows.shape)} must be (entries,) and (rows, 2)"
        )
    if cells.dim() != 2 or cells.shape[1] != 2 or cells.shape[0] < 1:
        raise ValueError(f"cells have shape {tuple(cells.shape)}: they must be (cells + 1, 2)")
    shape = columns.shape if unit == 1 else (*columns.shape, 4)
    if values.shape != shape:
        raise ValueError(f"values have shape {tuple(values.shape)}, the index needs {tuple(shape)}")
    _C.check_index(
        packed.n, packed.k, len(columns), len(rows), columns.data_ptr(), rows.data_ptr(), cells.data_ptr(),
        len(cells) - 1, unit,
    )  # fmt: skip


class PackedSparse(Packed):
    """`Sparse()`: fp32 values and their index."""

    kernel = "spmm"
    BUFFERS = {"values": torch.float32, **INDEX_BUFFERS}

    @classmethod
    def pack(cls, weight: Tensor, format: Format) -> Packed:
        weight = _checked_weight(weight)
        n, k = weight.shape
        mask = weight != 0
        index, entry = _build_index(mask, 1)
        values = torch.empty(len(index.columns))
        values[entry] = weight[mask]
        return cls(n, k, format, {"values": values, **index._asdict()})

    def _validate(self) -> None:
        _check_index(self, 1, self.values)
        if not torch.isfinite(self.values).all():
            raise ValueError("values hold a NaN or an Inf: the file is damaged")

    def multiply(
        self, x: Tensor, bias: Tensor | None, activation: int, conv: list[int] | None
    ) -> Tensor:
        b = self._buffers
        return ops.spmm(
            x, b["values"], b["columns"], b["rows"], b["cells"], self.n, bias, self.k, activation, conv
        )  # fmt: skip

    def unpack(self) -> Tensor:
        weight = torch.zeros(self.n, self.k)
        # A file may list a place twice: a kernel adds what is there, and so does this.
        return weight.index_put_(_entry_places(self, 1), self.values, accumulate=True)


class PackedSparseInt8(Packed):
    """`SparseInt8()`: int8 values in blocks of 1 output x 4 inputs, and their index."""

    kernel = "spmm_int8"
    BUFFERS = {
        "values": torch.int8, **INDEX_BUFFERS, "scale": torch.float32, "wsum": torch.int32,
    }  # fmt: skip

    @classmethod
    def pack(cls, weight: Tensor, format: Format) -> Packed:
        weight = _checked_weight(weight)
        n, k = weight.shape
        blocks = nn.functional.pad(weight, (0, _round_up(k, 4) - k)).reshape(n, -1, 4)
        mask = (blocks != 0).any(2)
        index, entry = _build_index(mask, 4)
        values = torch.zeros(len(index.columns), 4)
        values[entry] = blocks[mask]
        outputs = torch.empty(len(values), dtype=torch.int64)
        outputs[entry] = mask.nonzero(as_tuple=True)[0]
        # A pair of entries shares its lanes; the first of a pair is never padding.
        lanes, scale = quantize_lanes(_lanes_of(values.reshape(-1, 8)), outputs[::2].repeat_interleave(2), n)
        q = _unlanes(lanes, len(values), 4) if len(values) else lanes.reshape(0, 4)
        wsum = torch.zeros(n, dtype=torch.int32)
        wsum.index_add_(0, outputs[entry], q[entry].sum(1, dtype=torch.int32))
        return cls(n, k, format, {"values": q, **index._asdict(), "scale": scale, "wsum": wsum})

    def _validate(self) -> None:
        _check_index(self, 4, self.values)
        _check_lanes(_lanes_of(self.values.reshape(-1, 8)), "values")
        _check_scale(self.scale, self.n)
        outputs, inputs = _entry_places(self, 4)
        beyond = inputs[:, None] + torch.arange(4) >= self.k
        if self.values[beyond].any():
            raise ValueError("values hold weights behind the last input: the file is damaged")
        wsum = torch.zeros(self.n, dtype=torch.int32)
        wsum.index_add_(0, outputs, self.values.sum(1, dtype=torch.int32))
        if not torch.equal(wsum, self.wsum):
            raise ValueError("wsum is not the sum of each output's weights: the file is damaged")

    def multiply(
        self, x: Tensor, bias: Tensor | None, activation: int, conv: list[int] | None
    ) -> Tensor:
        b = self._buffers
        return ops.spmm_int8(
            x, b["values"], b["columns"], b["rows"], b["cells"], b["scale"], b["wsum"], bias, self.k,
            activation, conv,
        )  # fmt: skip

    def unpack(self) -> Tensor:
        weight = torch.zeros(self.n, _round_up(self.k, 4))
        outputs, inputs = _entry_places(self, 4)
        # Padding entries are zeros at column 0 of their block: adding them changes nothing.
        places = (outputs[:, None], inputs[:, None] + torch.arange(4))
        weight.index_put_(places, self.values.float() * self.scale[outputs, None], accumulate=True)
        return weight[:, : self.k].contiguous()


# --- By format -----------------------------------------------------------------------------------


def _packed_type(format: Format) -> type[Packed]:
    if isinstance(format, Int8):
        return PackedInt8 if format.activations == "dynamic" else PackedW8
    types: dict[type[Format], type[Packed]] = {Sparse: PackedSparse, SparseInt8: PackedSparseInt8}
    if type(format) not in types:
        raise ValueError(f"unknown format {format!r}: use gs.Int8(), gs.Sparse() or gs.SparseInt8()")
    return types[type(format)]


def pack(weight: Tensor, format: Format) -> Packed:
    """Packs a weight.

    Args:
        weight: (n, k) of a float dtype on the CPU, k <= 65536.
        format: what to pack it to.

    Raises:
        ValueError: if the weight is not a finite (n, k) matrix on the CPU, k is too large, or the format unknown.
        TypeError: if the weight is not of a float dtype.

    >>> packed = pack(torch.eye(16), Int8())
    >>> torch.allclose(packed.unpack(), torch.eye(16))
    True
    """
    return _packed_type(format).pack(weight, format)


def packed_from_buffers(n: int, k: int, format: Format, buffers: dict[str, Tensor]) -> Packed:
    """The packed weight that these buffers hold, checked: see `Packed.from_buffers`."""
    return _packed_type(format).from_buffers(n, k, format, buffers)


