"""`Packed.scaled` and `scale_`: what folds a BatchNorm into a packed weight of any format."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from nets import FORMATS
from products import RANGE
from torch import nn

import gossamer as gs
from gossamer.formats import Format
from gossamer.packed import pack, packed_from_buffers

ALL: list[Format] = [*FORMATS, gs.Int8(activations="static"), gs.SparseInt8(activations="static")]
EVERY = pytest.mark.parametrize("format", ALL, ids=str)
FACTOR = torch.tensor([1.0, -1.0, 0.0, -0.3, 7.0, 1e-38, -1e30] * 3)[:20]


def packed(format: Format) -> Any:
    weight = torch.randn(20, 27)
    weight[:, 4:16][torch.rand(20, 12) < 0.5] = 0
    static = getattr(format, "activations", "") == "static"
    return pack(weight, format, RANGE if static else None)


@EVERY
def test_every_output_is_multiplied(format: Format) -> None:
    before = packed(format)
    after = before.scaled(FACTOR)
    want = before.unpack() * FACTOR[:, None]
    # Beyond what a scale can hold, a weight is 0.
    torch.testing.assert_close(after.unpack(), want, rtol=2e-7, atol=1e-37)
    # A kernel may run it: it passes what a file has to.
    buffers = dict(after.named_buffers())
    packed_from_buffers(20, 27, format, buffers)
    x, bias = torch.rand(3, 27), torch.randn(20)
    got, plain = after.matmul(x, bias), before.matmul(x)
    torch.testing.assert_close(got, plain * FACTOR + bias, rtol=1e-5, atol=1e-5)


@EVERY
def test_positive_factors_share_the_integers(format: Format) -> None:
    before = packed(format)
    after = before.scaled(torch.rand(20) + 0.5)
    shared = [n for n, b in before.named_buffers() if dict(after.named_buffers())[n] is b]
    weight = {"PackedSparse": "columns", "PackedSparseInt8": "values"}
    assert weight.get(type(before).__name__, "panels") in shared
    for bad in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match=r"not finite|beyond what a float holds"):
            before.scaled(torch.full((20,), bad))


def test_the_smallest_integer_has_no_negative() -> None:
    before = packed(gs.Int8())
    before.panels[0, 0, 0, 0] = -128
    assert before.scaled(torch.ones(20)).panels is before.panels
    with pytest.raises(ValueError, match="holds a -128, whose negative is no int8"):
        before.scaled(-torch.ones(20))


@pytest.mark.parametrize("bias", [True, False])
@EVERY
def test_a_layer_is_scaled_and_shifted(format: Format, bias: bool) -> None:
    layer = gs.Linear(packed(format), torch.randn(20) if bias else None, "relu")
    x, factor, shift = torch.rand(3, 27), torch.randn(20), torch.randn(20)
    plain = layer.packed.matmul(x, layer.bias)
    layer.scale_(factor.double(), shift.double())
    torch.testing.assert_close(layer(x), (plain * factor + shift).relu(), rtol=1e-5, atol=1e-5)
    assert layer.bias is not None and layer.bias.dtype == torch.float32
    layer.activate_with("none")
    assert layer.activation == "none" and (layer(x) < 0).any()
    with pytest.raises(ValueError, match="unknown"):
        layer.activate_with("tanh")
    assert isinstance(layer, nn.Module)
