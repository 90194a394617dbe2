"""The multiplying stems as tests call them: packed once a case, and what the reference says."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import torch
from torch import Tensor

from gossamer import reference, testing
from gossamer.packed import Packed, pack
from gossamer.testing import Case

STEMS = tuple(testing.FORMATS)
INT8_STEMS = ("gemm_int8", "spmm_int8")
INTEGER_STEMS = (*INT8_STEMS, "gemm_int4")  # the same bits on every Isa
RANGE = (-1.5, 2.0)


@cache
def packed_case(stem: str, case: Case) -> Any:
    """A `Packed`, whose buffers no type names."""
    return pack(case.weight(), testing.FORMATS[stem])


@cache
def static_case(stem: str, case: Case) -> Any:
    """The same weight, with static activations whose range cuts off some normal inputs."""
    format = dataclasses.replace(testing.FORMATS[stem], activations="static")  # type: ignore[call-arg]
    return pack(case.weight(), format, RANGE)


def integers(packed: Any) -> Tensor:
    """The integer weight (n, k) behind `unpack`, as float."""
    return (packed.unpack() / packed.scale[:, None]).round()


def expected(
    packed: Packed, x: Tensor, bias: Tensor | None = None, activation: str = "none"
) -> tuple[Tensor, Tensor]:
    """The reference's result for a packed weight, and how far a kernel may be from it."""
    weight = packed.unpack()
    product = getattr(reference, packed.kernel)
    if packed.kernel == "spmm":
        y = product(x, weight, bias, activation)
    else:
        affine = {"x_affine": packed.x_affine} if hasattr(packed, "x_affine") else {}
        y = product(x, integers(packed), packed.scale, bias, activation, **affine)
    if packed.kernel == "gemm_int4":  # sums bytes in floats, and takes their zero off at the end
        q, scale, zero = reference.quantize_rows(x)
        x = ((q + zero[..., None]) * scale[..., None]).to(x.dtype)
    terms = 0 if packed.kernel in INT8_STEMS else None
    return y, reference.bound(y, x, weight, bias, terms)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal dtype, shape and bits, but for the payload of a NaN."""
    if (a.dtype, a.shape) != (b.dtype, b.shape) or not torch.equal(a.isnan(), b.isnan()):
        return False
    word = torch.int32 if a.dtype == torch.float32 else torch.int16
    a, b = (torch.where(t.isnan(), 0.0, t).contiguous().view(word) for t in (a, b))
    return torch.equal(a, b)
