"""Static activations and bias correction: from a calibrated model to a layer, a file and back."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import Net, image, trained
from products import INT8_STEMS, RANGE, same_bits, static_case
from torch import Tensor, nn

import gossamer as gs
from gossamer import ops, reference
from gossamer.calibrate import correct_bias_, observed, weight_matrix
from gossamer.formats import Format
from gossamer.packed import pack, packed_from_buffers
from gossamer.testing import Case

STATIC: list[Format] = [gs.Int8(activations="static"), gs.SparseInt8(activations="static")]
EVERY_STATIC = pytest.mark.parametrize("format", STATIC, ids=lambda f: f.name)
CASE = Case("static", 6, 24, 20)


def calibrated(model: nn.Module, *batches: Tensor, **options: Any) -> nn.Module:
    with torch.no_grad(), gs.calibrate(model, **options):
        for batch in batches:
            model(batch)
    return model


# The packed weight.


@pytest.mark.parametrize("stem", INT8_STEMS)
def test_a_range_of_the_row_gives_the_bits_of_dynamic(stem: str) -> None:
    static = static_case(stem, CASE)
    dynamic = pack(CASE.weight(), type(static.format)())
    for row in CASE.x():
        own = static.with_range(float(row.min()), float(row.max()))
        assert same_bits(own.matmul(row), dynamic.matmul(row))
        assert own.panels is static.panels if stem == "gemm_int8" else own.values is static.values


@EVERY_STATIC
def test_the_affine_holds_zero_exactly(format: Format) -> None:
    for low, high in (
        (-3.0, 5.0),
        (1.0, 2.0),
        (-2.0, -1.0),
        (0.0, 0.0),
        (-1e-40, 0.0),
        (-3e38, 3e38),
    ):
        packed: Any = pack(CASE.weight(), format, (low, high))
        scale, zero = packed.x_affine.tolist()
        assert 0 <= zero <= 255 and zero == int(zero) and scale > 0
        ends = torch.tensor([[min(low, 0.0), 0.0, max(high, 0.0)]])
        q = ops.quantize_rows(ends, packed.x_affine)[0]
        assert q[0, 1] == zero and (low == high or {*q[0].tolist()} >= {0, 255} or low > -1e-38)
    for ends in ((1.0, 0.0), (float("nan"), 1.0), (0.0, float("inf"))):
        with pytest.raises(ValueError, match="is not a range: calibrate again"):
            pack(CASE.weight(), format, ends)
    with pytest.raises(ValueError, match="needs the range of its input: calibrate first"):
        pack(CASE.weight(), format)
    with pytest.raises(ValueError, match="quantizes no input by a range"):
        pack(CASE.weight(), type(format)(), RANGE)


AFFINE_ATTACKS = [
    *([value, 3.0] for value in (0.0, -1.0, 1e-39, float("nan"), float("inf"))),
    *([0.1, value] for value in (-1.0, 256.0, 0.5, float("nan"), float("inf"))),
    *([], [1.0], [1.0, 2.0, 3.0], [[1.0, 2.0]]),
]


@pytest.mark.parametrize("affine", AFFINE_ATTACKS, ids=str)
@pytest.mark.parametrize("stem", INT8_STEMS)
def test_a_damaged_affine_is_refused(stem: str, affine: list[Any]) -> None:
    packed = static_case(stem, CASE)
    bad = {**dict(packed.named_buffers()), "x_affine": torch.tensor(affine)}
    with pytest.raises(ValueError, match="x_affine"):
        packed_from_buffers(packed.n, packed.k, packed.format, bad)
    layer = gs.Linear(copy.deepcopy(packed))
    with pytest.raises(RuntimeError, match="x_affine"):
        layer.load_state_dict({f"packed.{name}": b for name, b in bad.items()})
    if len(torch.tensor(affine)) != 2 or torch.tensor(affine).dim() != 1 or affine[1] == 0.5:
        return
    with pytest.raises(RuntimeError, match=r"x_affine|x has scale"):
        ops.quantize_rows(CASE.x(), torch.tensor(affine))


def test_a_dynamic_file_has_no_affine_and_a_static_one_needs_it() -> None:
    packed = static_case("gemm_int8", CASE)
    buffers = dict(packed.named_buffers())
    with pytest.raises(ValueError, match="has the buffers"):
        packed_from_buffers(20, 24, gs.Int8(), buffers)
    del buffers["x_affine"]
    with pytest.raises(ValueError, match="has the buffers"):
        packed_from_buffers(20, 24, packed.format, buffers)


# Ill rows and images.


@pytest.mark.parametrize("ill", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("stem", INT8_STEMS)
def test_an_ill_row_is_ill_alone(isa: str, stem: str, ill: float) -> None:
    case = Case("ill", 67, 50, 20)
    packed, x = static_case(stem, case), case.x()
    healthy = packed.matmul(x, activation="relu")
    x[5, 49] = x[66, 0] = ill
    y = packed.matmul(x, activation="relu")
    others = [r for r in range(67) if r not in (5, 66)]
    assert y[[5, 66]].isnan().all() and same_bits(y[others], healthy[others])


@EVERY_STATIC
def test_an_image_is_quantized_by_the_range(isa: str, format: Format) -> None:
    conv = nn.Conv2d(6, 5, (3, 2), stride=(2, 1), padding=1)
    x = torch.randn(3, 6, 9, 8)
    calibrated(nn.Sequential(conv), x[:1], observer="minmax")
    layer: Any = gs.Conv2d.from_dense(conv, format)
    q, scale, zero = reference.quantize_rows(x.flatten(1), layer.packed.x_affine)
    assert (q == 0).any() and (q == 255).any()  # the others are cut off
    kept = ((q.double() - zero[:, None]) * scale.double()[:, None]).view(x.shape)
    torch.testing.assert_close(
        layer(x).double(), layer.to_dense().double()(kept), rtol=1e-5, atol=1e-5
    )
    sick = x.clone()
    sick[1, 2, 3, 4] = torch.nan
    y = layer(sick)
    assert y[1].isnan().all() and same_bits(y[::2], layer(x)[::2])


# compress_, save and load_.


@EVERY_STATIC
def test_compress_needs_calibration(format: Format) -> None:
    model = trained()
    with pytest.raises(ValueError, match=r"layer 'stem': static .* run `with gs.calibrate"):
        gs.compress_(model, format)
    assert type(model.stem) is nn.Conv2d
    calibrated(model, image())
    report = gs.compress_(model, {"stem": format, "fc": format})
    assert [row.kernel for row in report.rows][:2] == [model.stem.packed.kernel] * 2  # type: ignore[union-attr]
    assert "activations=static" in report.rows[0].after


@EVERY_STATIC
def test_save_and_load(format: Format, tmp_path: Path) -> None:
    x = image()
    model = calibrated(trained(bias=False), x)
    gs.compress_(model, format)
    gs.save(model, tmp_path / "m.safetensors")
    copied = gs.load_(Net(bias=False).eval(), tmp_path / "m.safetensors")
    assert same_bits(copied(x), model(x))
    assert copied.fc.bias is not None  # bias correction made it
    again = gs.load_(copied, tmp_path / "m.safetensors")
    assert same_bits(again(x), model(x))


@EVERY_STATIC
def test_layers_that_share_a_weight_share_it_and_not_their_range(format: Format) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    model[2].weight = model[0].weight
    calibrated(model, torch.randn(20, 16) * 3)
    report = gs.compress_(model, format)
    first, second = (dict(model[i].packed.named_buffers()) for i in (0, 2))
    assert not torch.equal(first.pop("x_affine"), second.pop("x_affine"))
    assert all(first[name] is second[name] for name in first)
    assert "shares the weight of '0'" in report.rows[1].note
    assert (report.rows[1].bytes_after or 0) < 200  # its bias and its range


def test_compile_and_export() -> None:
    model = calibrated(nn.Sequential(nn.Linear(16, 12)), torch.randn(4, 16))
    gs.compress_(model, STATIC[0])
    x = torch.randn(5, 16)
    assert same_bits(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))
    assert same_bits(torch.export.export(model, (x,)).module()(x), model(x))


# Bias correction.

CORRECTED = [gs.Int8(), *STATIC, gs.Int8(activations="none"), gs.Int4(), gs.SparseInt8()]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("format", CORRECTED, ids=str)
def test_the_mean_output_error_falls(format: Format, kind: str, bias: bool) -> None:
    if kind == "linear":
        module: nn.Module = nn.Linear(64, 32, bias=bias)
        x = torch.randn(500, 64).abs() + torch.rand(64)
    else:
        module, x = nn.Conv2d(8, 32, 3, padding=1, bias=bias), torch.randn(5, 8, 12, 12).relu()
    model = calibrated(nn.Sequential(module), x, observer="minmax")
    plain, corrected = copy.deepcopy(model), copy.deepcopy(model)
    report = gs.compress_(plain, format, bias_correction=False)
    assert "bias" not in report.rows[0].note
    report = gs.compress_(corrected, format)
    assert report.rows[0].note == "bias corrected"
    dims = (0,) if kind == "linear" else (0, 2, 3)
    with torch.no_grad():
        before, after = ((m(x) - model(x)).mean(dims).abs().mean() for m in (plain, corrected))
    assert after < before / 3
    # Exactly what Nagel 2021 says of the layer alone.
    w, wq = weight_matrix(module), corrected[0].packed.unpack()
    seen = observed(module)
    assert seen is not None
    want = (w - wq) @ seen.mean + (module.bias if bias else 0)
    torch.testing.assert_close(corrected[0].bias, want.detach())


def test_nothing_to_correct() -> None:
    module = nn.Linear(8, 4, bias=False)
    layer = gs.Linear.from_dense(module, gs.Int8())
    assert not correct_bias_(layer, module) and layer.bias is None  # not calibrated
    calibrated(nn.Sequential(module), torch.randn(9, 8))
    exact = gs.Linear.from_dense(module, gs.Sparse())
    assert not correct_bias_(exact, module) and exact.bias is None
