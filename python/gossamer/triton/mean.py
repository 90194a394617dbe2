"""Means over the pixels of a blocked image; no kernel of its own: torch adds up floats."""

from __future__ import annotations

from torch import Tensor

from .unblock import unblock


def mean(q: Tensor, affine: Tensor, channels: int, keepdim: int) -> Tensor:
    """See `gossamer.ops.mean`; sums of floats, in torch's order."""
    y: Tensor = unblock(q, affine, channels, 0).mean((2, 3), keepdim=bool(keepdim))
    return y
