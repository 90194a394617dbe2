"""The layers: what torch's own give with the weight in use, memory formats, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from products import INT8_STEMS, INTEGER_STEMS, STEMS, expected, same_bits
from torch import Tensor, nn
from torch.nn import functional as F

import gossamer as gs
from gossamer import layers, ops, reference, testing
from gossamer.formats import Format
from gossamer.packed import pack
from gossamer.testing import FORMATS, Case, assert_close
from gossamer.timing import threads

EVERY_FORMAT = pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)


def linear(format: Format, k: int = 24, n: int = 20, **settings: Any) -> gs.Linear:
    torch.manual_seed(0)
    return gs.Linear.from_dense(nn.Linear(k, n), format, **settings)


def conv(format: Format, *sizes: Any, activation: str = "none", **settings: Any) -> gs.Conv2d:
    torch.manual_seed(0)
    return gs.Conv2d.from_dense(nn.Conv2d(*sizes, **settings), format, activation=activation)


# Linear.


@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@EVERY_FORMAT
def test_linear(isa: str, format: Format, activation: str) -> None:
    layer = linear(format, activation=activation)
    x = torch.randn(3, 5, 24)
    y = layer(x)
    assert y.shape == (3, 5, 20)
    assert_close(y, *expected(layer.packed, x, layer.bias, activation))


@EVERY_FORMAT
def test_linear_is_about_the_dense_one(format: Format) -> None:
    torch.manual_seed(0)
    dense = nn.Linear(64, 32)
    layer, x = gs.Linear.from_dense(dense, format), torch.randn(50, 64)
    # Each input and weight moves by less than one step of its grid.
    step = (x.amax(1).clamp(min=0) - x.amin(1).clamp(max=0))[:, None] / 255
    move = (layer.unpack() - dense.weight).abs()
    bound = x.abs() @ move.T + step * layer.unpack().abs().sum(1) + 1e-5
    assert_close(layer(x), dense(x), bound)
    assert gs.Linear.from_dense(nn.Linear(64, 32, bias=False), format).bias is None


@EVERY_FORMAT
def test_linear_refuses(format: Format) -> None:
    layer = linear(format)
    for x in (torch.zeros(2, 23), torch.zeros(24, 2), torch.tensor(1.0)):
        with pytest.raises(ValueError, match="its last dimension must be in_features=24"):
            layer(x)
    with pytest.raises(ValueError, match=r"bias has shape \(3,\), the weight has n=20"):
        gs.Linear(layer.packed, torch.zeros(3))
    with pytest.raises(ValueError, match="bias holds a NaN or an Inf"):
        gs.Linear(layer.packed, torch.full((20,), torch.inf))
    with pytest.raises(ValueError, match="activation 'tanh' is unknown"):
        gs.Linear(layer.packed, activation="tanh")
    with pytest.raises(RuntimeError, match="inference only"):
        layer(torch.zeros(2, 24, requires_grad=True)).sum().backward()


# Conv2d.

# in, out, kernel, settings of nn.Conv2d, height and width of x.
GEOMETRIES: dict[str, tuple[int, int, Any, dict[str, Any], tuple[int, int]]] = {
    "1x1": (8, 20, 1, {}, (5, 6)),
    "3x3": (8, 20, 3, {"padding": 1}, (7, 9)),
    "3 channels, strided": (3, 17, 7, {"stride": 2, "padding": 3}, (23, 22)),
    "one channel": (1, 5, 3, {"padding": 1}, (6, 6)),
    "7 channels": (7, 6, (2, 3), {"stride": (2, 1), "padding": (0, 2)}, (6, 7)),
    "one output": (4, 1, 3, {}, (5, 5)),
    "one pixel": (6, 9, 1, {}, (1, 1)),
    "one pixel, padded": (6, 9, 3, {"padding": 1}, (1, 1)),
    "no bias": (4, 8, 3, {"bias": False}, (5, 5)),
    "dilated": (4, 8, 3, {"dilation": (2, 3), "padding": 2}, (9, 11)),
    "valid": (4, 8, 3, {"padding": "valid"}, (6, 5)),
    "same": (4, 8, 3, {"padding": "same"}, (6, 5)),
    "same, even and dilated": (5, 8, (2, 4), {"padding": "same", "dilation": (3, 1)}, (6, 7)),
    "reflect": (4, 8, 3, {"padding": (1, 2), "padding_mode": "reflect"}, (6, 5)),
    "replicate": (3, 8, 3, {"padding": (3, 1), "padding_mode": "replicate"}, (4, 5)),
    "circular, strided": (4, 8, 3, {"padding": 2, "padding_mode": "circular", "stride": 2}, (6, 5)),
    "same, reflect, even": (4, 8, 4, {"padding": "same", "padding_mode": "reflect"}, (6, 7)),
    "more pixels than a tile": (4, 8, 3, {"padding": 1}, (15, 17)),
}


def conv_expected(layer: gs.Conv2d, x: Tensor, activation: str = "none") -> tuple[Tensor, Tensor]:
    """F.conv2d in float64 with the weight in use, of what quantizing leaves of each image."""
    dense = layer.to_dense().double()
    kept = x.double()
    if layer.packed.kernel in INTEGER_STEMS:
        q, scale, zero = reference.quantize_rows(x.flatten(1))
        kept = ((q.double() - zero[:, None]) * scale.double()[:, None]).view(x.shape)
    with torch.no_grad():
        y = reference.activate(dense(kept), activation)
        dense.weight.abs_()
        if dense.bias is not None:
            dense.bias.abs_()
        total = dense(kept.abs())
        if layer.packed.kernel == "gemm_int4":
            # Sums bytes in floats, and takes their zero off at the end, both 255 at most.
            sums = dense.weight.sum((1, 2, 3))[:, None, None]
            total = total + 510 * scale.double()[:, None, None, None] * sums
    terms = 8 if layer.packed.kernel in INT8_STEMS else 8 + layer.packed.k
    info = torch.finfo(x.dtype)
    return y, terms * reference.EPS32 * total + info.eps * y.abs() + info.smallest_normal


@pytest.mark.parametrize("name", GEOMETRIES)
@EVERY_FORMAT
def test_conv2d_unpacks_to_the_dense_weight(format: Format, name: str) -> None:
    channels, outputs, kernel, settings, _ = GEOMETRIES[name]
    dense = nn.Conv2d(channels, outputs, kernel, **settings)
    layer = gs.Conv2d.from_dense(dense, format)
    weight = dense.weight.detach()
    if format == gs.Sparse():
        assert torch.equal(layer.unpack(), weight)
    elif isinstance(format, gs.Int4):  # a group's largest weight may lose 6 of 38
        most = weight.abs().amax((1, 2, 3), keepdim=True)
        assert_close(layer.unpack(), weight, 0.2 * most.expand_as(weight))
    else:
        step = layer.packed.get_buffer("scale")[:, None, None, None]
        assert_close(layer.unpack(), weight, (0.75 + 2.0**-15) * step.expand_as(weight))


@pytest.mark.parametrize("name", GEOMETRIES)
@EVERY_FORMAT
def test_conv2d(isa: str, format: Format, name: str) -> None:
    channels, outputs, kernel, settings, size = GEOMETRIES[name]
    layer = conv(format, channels, outputs, kernel, **settings)
    assert layer.unpack().shape == (outputs, channels, *layer.kernel_size)
    x = torch.randn(3, channels, *size)
    want = conv_expected(layer, x)
    y = layer(x)
    assert_close(y, *want)
    assert y.is_contiguous()
    # channels_last in, channels_last out, and the same bits.
    last = layer(x.contiguous(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last) or channels == 1 or size == (1, 1)
    assert same_bits(last, y)
    # One image, without the dimension of images; alone as in its batch.
    for i, image in enumerate(x):
        assert same_bits(layer(image), y[i])
        assert same_bits(layer(x[i : i + 1]), y[i : i + 1])
    assert layer(x[:0]).shape == (0, *y.shape[1:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@EVERY_FORMAT
def test_conv2d_of_16_bit_images(isa: str, format: Format, dtype: torch.dtype) -> None:
    for name in ("3x3", "3 channels, strided", "reflect"):
        channels, outputs, kernel, settings, size = GEOMETRIES[name]
        layer = conv(format, channels, outputs, kernel, activation="relu", **settings)
        x = torch.randn(2, channels, *size).to(dtype)
        for form in (torch.contiguous_format, torch.channels_last):
            y = layer(x.contiguous(memory_format=form))
            assert y.dtype == dtype and y.is_contiguous(memory_format=form)
            assert_close(y, *conv_expected(layer, x, "relu"))


@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@EVERY_FORMAT
def test_conv2d_activations(isa: str, format: Format, activation: str) -> None:
    layer, x = conv(format, 4, 8, 3, activation=activation), torch.randn(2, 4, 6, 7)
    assert_close(layer(x), *conv_expected(layer, x, activation))


@EVERY_FORMAT
def test_conv2d_memory_formats_are_those_of_torch(format: Format) -> None:
    layer, dense = conv(format, 4, 8, 3, padding=1), nn.Conv2d(4, 8, 3, padding=1)
    x = torch.randn(2, 4, 5, 12)
    last = x.contiguous(memory_format=torch.channels_last)
    wide = torch.randn(2, 9, 5, 6)
    views = {
        "contiguous": x,
        "channels_last": last,
        "every other column": x[..., ::2],
        "every other column, channels_last": last[..., ::2],
        "some channels": wide[:, 2:6],
        "some channels, channels_last": wide.contiguous(memory_format=torch.channels_last)[:, 2:6],
        "one image many times": x[:1].expand(3, -1, -1, -1),
        "turned": x.transpose(2, 3),
    }
    for name, view in views.items():
        assert layer(view).stride() == dense(view).stride(), name
        assert same_bits(layer(view), layer(view.clone(memory_format=torch.contiguous_format))), (
            name
        )


@EVERY_FORMAT
def test_conv2d_bits_do_not_depend_on_threads_or_isa(format: Format) -> None:
    layer, x = conv(format, 16, 40, 3, padding=1, activation="silu"), torch.randn(3, 16, 20, 21)
    for form in (torch.contiguous_format, torch.channels_last):
        image = x.contiguous(memory_format=form)
        results = []
        for name in testing._C.isas():
            with testing.isa(name):
                one = layer(image)
                with threads(2):
                    assert same_bits(layer(image), one), name
                results.append(one)
        if layer.packed.kernel in INTEGER_STEMS:
            assert all(same_bits(results[0], y) for y in results)


@pytest.mark.parametrize("ill", [torch.nan, torch.inf])
@EVERY_FORMAT
def test_an_ill_image_is_ill_alone(isa: str, format: Format, ill: float) -> None:
    layer, x = conv(format, 4, 8, 3, padding=1), torch.randn(3, 4, 6, 6)
    healthy = layer(x)
    x[1, 2, 0, 0] = ill
    y = layer(x)
    assert same_bits(y[[0, 2]], healthy[[0, 2]])
    # Dynamic int8 has one scale for the image; floats are ill where the ill pixel is seen.
    ill_pixels = y[1] if layer.packed.kernel in INTEGER_STEMS else y[1, :, :2, :2]
    assert ill_pixels.isnan().all()


@EVERY_FORMAT
def test_conv2d_refuses(format: Format) -> None:
    layer = conv(format, 4, 8, 3)
    for shape in ((2, 3, 6, 6), (6, 6), (4,), (1, 2, 4, 6, 6), (6, 6, 4)):
        with pytest.raises(ValueError, match="with channels=4"):
            layer(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"input is 2 x 6, smaller than the kernel 3 x 3"):
        layer(torch.zeros(1, 4, 2, 6))
    with pytest.raises(TypeError, match=r"torch.int64: use float32"):
        layer(torch.zeros(1, 4, 6, 6, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="x is on meta"):
        layer(torch.zeros(1, 4, 6, 6, device="meta"))
    with pytest.raises(RuntimeError, match="inference only"):
        layer(torch.zeros(1, 4, 6, 6, requires_grad=True)).sum().backward()
    good: dict[str, Any] = {"in_channels": 4, "out_channels": 8, "kernel_size": (3, 3)}
    for size, value in (("in_channels", 8), ("out_channels", 9), ("kernel_size", (3, 4))):
        with pytest.raises(ValueError, match="the packed weight is 8 x 36, this convolution needs"):
            gs.Conv2d(layer.packed, None, **{**good, size: value})
    with pytest.raises(ValueError, match="padding_mode='mirror' is unknown"):
        gs.Conv2d(layer.packed, None, **good, padding_mode="mirror")
    with pytest.raises(ValueError, match="padding='full' is unknown: use numbers, 'same'"):
        gs.Conv2d(layer.packed, None, **good, padding="full")


def test_what_stays_with_torch() -> None:
    class Own(nn.Linear):
        pass

    assert layers.unsupported(nn.Linear(2, 2)) is None
    assert layers.unsupported(nn.Conv2d(2, 2, 1)) is None
    assert layers.unsupported(nn.Conv2d(4, 4, 1, groups=2), gs.Int8()) == (
        "groups=2: grouped convolutions are for Int8(activations='static')"
    )
    assert "Own is not exactly nn.Linear or nn.Conv2d" in str(layers.unsupported(Own(2, 2)))
    with pytest.raises(ValueError, match="groups=4"):
        gs.Conv2d.from_dense(nn.Conv2d(4, 4, 1, groups=4), gs.Int8())


# Back to torch.


@EVERY_FORMAT
def test_a_model_may_read_the_weight(format: Format) -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.one(x.to(self.one.weight.device)).mean((2, 3))
            return F.linear(x, self.two.weight, self.two.bias)

    model, x = Reads().eval(), torch.randn(2, 3, 5, 5)
    gs.compress_(model, format)
    state, two = model.state_dict(), model.two
    with torch.no_grad(), pytest.warns(UserWarning, match="weight of a packed Linear was read"):
        y = model(x)
        assert same_bits(two.weight, two.unpack()) and two.weight.shape == (4, 8)
        want = F.linear(model.one(x).mean((2, 3)), two.unpack(), two.bias)
        assert same_bits(y, want)
    assert not any(name.endswith(("one.weight", "two.weight")) for name in state)
    with pytest.warns(UserWarning, match="weight of a packed"):
        fused = gs.fuse(model, x)
    with torch.no_grad():
        assert same_bits(fused(x), y)


@EVERY_FORMAT
def test_to_dense_and_back(format: Format) -> None:
    layer: Any
    for layer in (linear(format), conv(format, 5, 8, (3, 2), padding=1, stride=2, bias=False)):
        dense = layer.to_dense()
        assert type(layer).from_dense(dense, format).geometry() == layer.geometry()
        assert torch.equal(dense.weight, layer.unpack())
        assert dense.weight.shape == layer.unpack().shape
        assert layer.bias is None or torch.equal(dense.bias, layer.bias)
        assert layer.geometry()["kind"] == type(layer).__name__ and "activation=none" in repr(layer)


@pytest.mark.parametrize("stem", STEMS)
def test_shared_weights(stem: str) -> None:
    packed = pack(Case("shared", 1, 24, 20).weight(), FORMATS[stem])
    a, b = gs.Linear(packed), gs.Linear(packed, torch.ones(20))
    assert len(list(nn.Sequential(a, b).buffers())) == len(list(packed.buffers())) + 1
    x = torch.randn(2, 24)
    assert_close(b(x) - 1, a(x), (b(x).abs() + 1) * 2.0**-22)
    dense = gs.Linear.from_dense(nn.Linear(24, 20), FORMATS[stem], packed=packed)
    assert dense.packed is packed
    assert torch.equal(F.linear(x, dense.unpack()), F.linear(x, a.to_dense().weight))
