"""calibrate: the statistics against plain torch on all rows at once, and what it leaves behind."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from nets import image, snapshot, trained
from torch import Tensor, nn

import gossamer as gs
from gossamer.calibrate import OBSERVERS, observed, set_weight_, weight_matrix
from gossamer.geometry import conv_matrix


def calibrated(model: nn.Module, *batches: Tensor, **options: Any) -> nn.Module:
    with gs.calibrate(model, **options):
        for batch in batches:
            model(batch)
    return model


def seen(model: nn.Module) -> Any:
    found = observed(model)
    assert found is not None
    return found


def test_statistics_of_a_linear() -> None:
    batches = [torch.randn(3, 2, 5) * 10**i for i in range(3)] + [torch.zeros(0, 2, 5)]
    model = calibrated(nn.Sequential(nn.Linear(5, 4)), *batches, hessian=True)
    rows = torch.cat(batches).reshape(-1, 5).double()
    got = seen(model[0])
    assert got.rows == len(rows) == 18
    assert (got.low, got.high) == (rows.min(), rows.max())
    torch.testing.assert_close(got.mean.double(), rows.mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.square.double(), rows.square().mean(0), rtol=1e-5, atol=0)
    assert torch.equal(got.absmax.double(), rows.abs().amax(0))
    torch.testing.assert_close(got.hessian.double(), rows.T @ rows / 18, rtol=1e-4, atol=1e-3)
    assert {got.mean.dtype, got.square.dtype, got.absmax.dtype, got.hessian.dtype} == {torch.float}


CONVS = [
    dict(kernel_size=3, padding=1),
    dict(kernel_size=(2, 3), stride=(2, 1), padding="valid"),
    dict(kernel_size=3, padding="same", dilation=2),
    dict(kernel_size=3, padding=1, padding_mode="reflect"),
]


@pytest.mark.parametrize("options", CONVS, ids=str)
def test_rows_of_a_convolution_are_its_output_pixels(options: dict[str, Any]) -> None:
    conv = nn.Conv2d(6, 5, **options)
    x = image().repeat(1, 2, 1, 1)
    model = calibrated(nn.Sequential(conv), x, hessian=True)
    got, y = seen(model[0]), conv(x)
    assert got.rows == y.numel() / 5
    assert (
        got.mean.shape
        == got.square.shape
        == got.absmax.shape
        == (conv_matrix(conv.weight).shape[1],)
    )
    # The mean of the output is linear in the mean of the rows, that of its square in the hessian.
    w = weight_matrix(conv)
    torch.testing.assert_close(w @ got.mean + conv.bias, y.mean((0, 2, 3)))
    raw = (y - conv.bias[:, None, None]).square().mean((0, 2, 3))
    torch.testing.assert_close((w @ got.hessian * w).sum(1), raw, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.hessian.diagonal(), got.square)
    assert (got.low, got.high) == (x.min(), x.max())


def test_one_image_without_a_batch_is_seen_too() -> None:
    conv, x = nn.Conv2d(3, 2, 3), image()
    one, two = (seen(calibrated(nn.Sequential(copy.deepcopy(conv)), x)[0]) for x in (x[:1], x[0]))
    assert torch.equal(one.mean, two.mean) and one.rows == two.rows


def test_it_leaves_no_trace_but_the_attribute() -> None:
    model = trained()
    before, keys = snapshot(model), list(model.state_dict())
    calibrated(model, image())
    assert snapshot(model) == before and list(model.state_dict()) == keys
    twin = copy.deepcopy(model)
    assert torch.equal(seen(twin.fc).mean, seen(model.fc).mean)
    assert observed(model.norm) is None
    first = seen(model.fc)
    calibrated(model, image() * 2)
    assert seen(model.fc) is not first


def test_only_layers_that_run_are_observed() -> None:
    model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4), nn.Conv1d(4, 4, 1)])
    with gs.calibrate(model):
        model[0](torch.zeros(1, 4))
        model[2](torch.zeros(1, 4, 2))
    assert observed(model[0]) and not observed(model[1]) and not observed(model[2])


def test_layers_in_a_fused_transformer_run() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    with torch.no_grad(), gs.calibrate(model):
        model(torch.randn(2, 3, 8))
    assert seen(model.linear1).rows == 6
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_halves_are_summed_in_floats(dtype: torch.dtype) -> None:
    x = torch.randn(50, 4).to(dtype)
    got = seen(calibrated(nn.Sequential(nn.Linear(4, 2).to(dtype)), x)[0])
    torch.testing.assert_close(got.mean, x.float().mean(0), rtol=1e-5, atol=1e-6)


# Ranges.


def range_of(observer: str, *batches: Tensor, **options: Any) -> tuple[float, float]:
    width = batches[0].shape[-1]
    model = nn.Sequential(nn.Linear(width, 1))
    got = seen(calibrated(model, *batches, observer=observer, **options)[0])
    return got.low, got.high


def error(x: Tensor, low: float, high: float) -> float:
    step = max((high - low) / 255, 1e-30)
    zero = round(-low / step)
    q = ((x / step).round() + zero).clamp(0, 255)
    return float(((q - zero) * step - x).square().sum())


@pytest.mark.parametrize("observer", OBSERVERS)
def test_a_range_holds_zero_and_lies_in_the_data(observer: str) -> None:
    for x in (
        torch.rand(9, 8) + 5,
        -torch.rand(9, 8),
        torch.zeros(2, 8),
        torch.randn(9, 8) * 1e-30,
    ):
        low, high = range_of(observer, x)
        assert min(float(x.min()), 0) <= low <= 0 <= high <= max(float(x.max()), 0)
    assert range_of(observer, torch.zeros(2, 8)) == (0, 0)


def test_percentile_cuts_the_outermost_values() -> None:
    x = torch.linspace(-1, 3, 4000).view(-1, 10)
    low, high = range_of("percentile", x, percentile=90.0)
    assert low == pytest.approx(-0.8, abs=0.008) and high == pytest.approx(2.8, abs=0.008)
    assert range_of("percentile", x, percentile=100.0) == range_of("minmax", x)
    outlier = torch.cat([x, torch.full((1, 10), 100.0)])
    assert range_of("percentile", outlier, percentile=99.0)[1] < 3.2


@pytest.mark.parametrize("shape", ["normal", "tails", "relu", "outlier"])
def test_mse_is_about_the_best_range(shape: str) -> None:
    torch.manual_seed(1)
    x = torch.randn(500, 40)
    if shape == "tails":
        x = x**5
    elif shape == "relu":
        x = x.relu()
    elif shape == "outlier":
        x[0, 0] = 40
    low, high = range_of("mse", x)
    edges = torch.linspace(0.02, 1, 50)
    ends = min(float(x.min()), 0.0), float(x.max())
    best = min(error(x, ends[0] * float(a), ends[1] * float(b)) for a in edges for b in edges)
    assert error(x, low, high) <= best * 1.05 + 1e-9
    assert error(x, low, high) <= error(x, *range_of("minmax", x)) * 1.001


@pytest.mark.parametrize("observer", OBSERVERS)
def test_one_pass_is_as_good_as_all_at_once(observer: str) -> None:
    # The reach of the histogram doubles several times; powers of two merge bins without a rest.
    batches = [torch.randn(64, 8) * 3**i for i in range(-4, 4)]
    whole, parts = range_of(observer, torch.cat(batches)), range_of(observer, *batches)
    assert parts == pytest.approx(whole, rel=0.02)


# Bad input.


def test_bad_arguments_are_sentences() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    for options, message in (
        (dict(observer="max"), "observer='max' is unknown: use one of minmax, percentile, mse"),
        (dict(percentile=0.0), "percentile=0.0 must be above 0"),
        (dict(percentile=101.0), "percentile=101.0 must be"),
        (dict(percentile=float("nan")), "percentile=nan must be"),
    ):
        with pytest.raises(ValueError, match=message), gs.calibrate(model, **options):  # type: ignore[arg-type]
            pass
    with (
        pytest.raises(ValueError, match="no layer ran: call the model on your"),
        gs.calibrate(model),
    ):
        pass
    with pytest.raises(ValueError, match="no layer ran"), gs.calibrate(model):
        model(torch.zeros(0, 4))
    with (
        pytest.raises(ValueError, match="nothing to calibrate: Flatten"),
        gs.calibrate(nn.Flatten()),
    ):
        pass


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_an_ill_input_names_its_layer(value: float) -> None:
    model = trained()
    with torch.no_grad():
        model.stem.weight[0, 0, 0, 0] = value
    before = snapshot(model)
    with (
        pytest.raises(ValueError, match="the input of layer 'fc' holds a NaN or an Inf"),
        gs.calibrate(model),
    ):
        model(image())
    assert snapshot(model) == before and observed(model.stem) is None


# The matrix of a layer.


@pytest.mark.parametrize("module", [nn.Linear(5, 3), nn.Conv2d(6, 5, (2, 3)), nn.Conv2d(4, 2, 1)])
def test_set_weight_is_the_inverse(module: nn.Module) -> None:
    want = module.weight.clone()  # type: ignore[operator]
    matrix = weight_matrix(module).clone()
    nn.init.zeros_(module.weight)  # type: ignore[arg-type]
    set_weight_(module, matrix)
    assert torch.equal(module.weight, want) and module.weight.requires_grad  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"the matrix is .*, this layer's is"):
        set_weight_(module, matrix[:, 1:])
