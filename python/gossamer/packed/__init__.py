"""Packed weights: modules of plain buffers, and the only folder that knows how they are laid out.

docs/formats.md draws every buffer byte for byte. Layouts do not depend on the CPU, so a state_dict
moves between machines.
"""

from __future__ import annotations

from torch import Tensor

from gossamer.formats import Format, Int4, Int8, Sparse, SparseInt8

from .affine import affine_of, range_of
from .base import MAX_K, Packed
from .int4 import PackedInt4
from .int8 import PackedInt8, PackedW8
from .lanes import LANE_LIMIT, check_scale, quantize_lanes
from .sparse import PackedSparse, PackedSparseInt8
from .trainable import PackedTrainableSparse

__all__ = [
    "LANE_LIMIT",
    "MAX_K",
    "Packed",
    "PackedInt4",
    "PackedInt8",
    "PackedSparse",
    "PackedSparseInt8",
    "PackedTrainableSparse",
    "PackedW8",
    "affine_of",
    "pack",
    "packed_from_buffers",
    "packs_depthwise",
    "quantize_lanes",
    "range_of",
]


def _packed_type(format: Format) -> type[Packed]:
    if isinstance(format, Int8):
        return PackedW8 if format.activations == "none" else PackedInt8
    if isinstance(format, Sparse):
        return PackedTrainableSparse if format.trainable else PackedSparse
    types: dict[type[Format], type[Packed]] = {
        Int4: PackedInt4,
        SparseInt8: PackedSparseInt8,
    }
    if type(format) not in types:
        raise ValueError(
            f"unknown format {format!r}: use gs.Int8(), gs.Int4(), gs.Sparse() or gs.SparseInt8()"
        )
    return types[type(format)]


def packs_depthwise(format: Format) -> bool:
    """Whether there are kernels for depthwise convolutions of that format."""
    cls = _packed_type(format)
    return cls.depthwise and "x_affine" in cls.buffers_of(format)


def pack(
    weight: Tensor,
    format: Format,
    x_range: tuple[float, float] | None = None,
    scale: Tensor | None = None,
    hessian: Tensor | None = None,
) -> Packed:
    """Packs a weight.

    Args:
        weight: (n, k) of a float dtype on the CPU, k <= 65536.
        format: what to pack it to.
        x_range: the lowest and highest input, of static activations.
        scale: (n) float32, of each output; the default is the best for this weight. Weights that
            do not fit are cut off. For `Int8` and `SparseInt8`.
        hessian: (k, k), the mean of x x^T over inputs x. Rounds by GPTQ, so that the least of the
            output changes, not of the weight. `Sparse`, which does not round, ignores it.

    Raises:
        ValueError: if the weight is not a finite (n, k) matrix on the CPU, k is too large, the
            format unknown, or the range or the scale does not go with it.
        TypeError: if the weight is not of a float dtype.

    >>> import torch
    >>> packed = pack(torch.eye(16), Int8())
    >>> torch.allclose(packed.unpack(), torch.eye(16))
    True
    """
    cls = _packed_type(format)
    if x_range is None and "x_affine" in cls.buffers_of(format):
        raise ValueError(f"{format} needs the range of its input: calibrate first")
    if scale is not None:
        if not isinstance(format, Int8 | SparseInt8):
            raise ValueError(f"{format} chooses its own scales: only Int8 and SparseInt8 take one")
        check_scale(scale, len(weight))
    packed = cls.pack(weight, format, scale, hessian)
    return packed if x_range is None else packed.with_range(*x_range)


def packed_from_buffers(n: int, k: int, format: Format, buffers: dict[str, Tensor]) -> Packed:
    """The packed weight that these buffers hold, checked: see `Packed.from_buffers`."""
    return _packed_type(format).from_buffers(n, k, format, buffers)
