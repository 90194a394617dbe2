"""qat_: the forward is that of the packed model, the backward that of the integers, straight on."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from nets import FORMATS, Net, image, snapshot
from products import same_bits
from torch import Tensor, nn

import gossamer as gs
from gossamer.formats import Format
from gossamer.qat import QatConv2d, QatLinear

QAT: list[Format] = [
    *(gs.Int8(), gs.Int8(activations="static"), gs.Int8(activations="none")),
    *(gs.SparseInt8(), gs.SparseInt8(activations="static")),
]
EVERY_FORMAT = pytest.mark.parametrize("format", QAT, ids=str)


def calibrated(model: nn.Module, x: Tensor) -> nn.Module:
    with torch.no_grad(), gs.calibrate(model):
        model(x)
    return model


def prepared(model: nn.Module, format: Format, x: Tensor) -> nn.Module:
    gs.qat_(calibrated(model, x), format)
    return model


def train(model: nn.Module, steps: int, rate: float = 0.05, seed: int = 0) -> None:
    g = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    for _ in range(steps):
        x = torch.randn(8, 3, 8, 8, generator=g)
        loss = nn.functional.cross_entropy(model(x), x.mean((2, 3)).argmax(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


# The forward.


@EVERY_FORMAT
def test_the_trained_model_packs_to_the_function_it_trained_with(format: Format) -> None:
    model, x = prepared(Net(), format, image()), image()
    before = copy.deepcopy(model.state_dict())
    train(model, 6)
    assert all(not torch.equal(before[name], v) for name, v in model.state_dict().items())
    model.eval()
    packed = copy.deepcopy(model)
    report = gs.compress_(packed, format)
    assert [row.before for row in report.rows] == ["QatConv2d", "QatLinear", "QatLinear"]
    assert all(row.after and "corrected" not in row.note for row in report.rows)
    with torch.no_grad():
        assert same_bits(packed(x), model(x))
        for name in ("stem", "fc", "head"):
            one, other = (getattr(m, name) for m in (model, packed))
            rows = x if name == "stem" else torch.randn(7, 8)
            assert same_bits(other(rows), one(rows))


GEOMETRIES: list[dict[str, Any]] = [
    dict(kernel_size=1),
    dict(kernel_size=3, padding=1, stride=2),
    dict(kernel_size=(2, 4), padding="same", dilation=(3, 1)),
    dict(kernel_size=3, padding=(1, 2), padding_mode="reflect"),
    dict(kernel_size=3, padding=1, padding_mode="circular", bias=False),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", GEOMETRIES, ids=str)
def test_a_convolution_of_any_geometry(options: dict[str, Any], dtype: torch.dtype) -> None:
    x = torch.randn(2, 5, 9, 8)
    model = prepared(nn.Sequential(nn.Conv2d(5, 6, **options)), QAT[1], x)
    layer = gs.Conv2d.from_dense(model[0], QAT[1])  # type: ignore[index, arg-type]
    for part in (x, x[0], x.contiguous(memory_format=torch.channels_last)):
        y = model(part.to(dtype))
        want = layer(part.to(dtype))
        assert same_bits(y.detach(), want) and y.stride() == want.stride()


# The backward.


@pytest.mark.parametrize("options", [None, *GEOMETRIES], ids=str)
@EVERY_FORMAT
def test_gradients_are_those_of_the_weights_in_use(
    format: Format, options: dict[str, Any] | None
) -> None:
    if options is None:
        module: Any = nn.Linear(12, 7)
        x = torch.randn(2, 5, 12)
    else:
        module, x = nn.Conv2d(5, 6, **options), torch.randn(2, 5, 9, 8)
    # A range that cuts nothing off, and weights that fit their scales.
    model = prepared(nn.Sequential(module), format, 2 * x)
    dense = gs.layers.LAYERS[type(module)].from_dense(module, format).to_dense()
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = model(a)
    dy = torch.randn_like(y)
    y.backward(dy)
    dense(b).backward(dy)
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(module.weight.grad, dense.weight.grad, rtol=1e-4, atol=1e-4)
    if module.bias is not None:
        torch.testing.assert_close(module.bias.grad, dense.bias.grad, rtol=1e-5, atol=1e-5)


def test_what_is_cut_off_has_no_gradient() -> None:
    linear = nn.Linear(8, 2)
    x = torch.linspace(-1, 1, 8)[None]
    model = prepared(nn.Sequential(linear), QAT[1], x)
    wide = (x * 3).requires_grad_()
    with torch.no_grad():
        linear.weight[1] *= 0.5
        linear.weight[0, 3] = 100.0
    model(wide).sum().backward()
    assert wide.grad is not None and linear.weight.grad is not None
    inside = (wide.abs() <= 1.01).squeeze()
    assert torch.equal(wide.grad.squeeze() != 0, inside)
    # Inputs are cut off in dw as they are in y.
    kept = wide.detach()[0].clamp(-1, 1)
    torch.testing.assert_close(linear.weight.grad[1], kept, rtol=0, atol=2e-3)
    assert linear.weight.grad[0, 3] == 0
    # 0 1 4 5 share a 16-bit lane, 2 3 6 7 the other: only the weight that is too large is cut off.
    assert (linear.weight.grad[0, [0, 1, 4, 5]] != 0).all()


def test_a_frozen_model_has_no_gradient_to_give() -> None:
    model = prepared(nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2)), gs.Int8(), torch.randn(3, 8))
    model[0].requires_grad_(False)  # type: ignore[index]
    model(torch.randn(3, 8)).sum().backward()
    assert model[0].weight.grad is None and model[1].weight.grad is not None  # type: ignore[index]
    with torch.no_grad():
        assert not model(torch.randn(3, 8)).requires_grad


@EVERY_FORMAT
def test_integers_stay_valid_however_far_the_weights_go(format: Format) -> None:
    model: Any = prepared(nn.Sequential(nn.Linear(16, 8)), format, torch.randn(3, 16))
    with torch.no_grad():
        for factor in (3.0, -40.0, 1e6):
            model[0].weight *= factor
            layer = gs.Linear.from_dense(model[0], format)
            layer.packed._validate()
            assert torch.isfinite(model(torch.randn(3, 16))).all()


# The modules.


def test_checkpoints_interchange_and_parameters_stay() -> None:
    model = Net()
    parameters, keys = list(model.parameters()), list(model.state_dict())
    gs.qat_(model, gs.Int8())
    assert type(model.stem) is QatConv2d and type(model.fc) is QatLinear
    assert isinstance(model.fc, nn.Linear)
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == keys
    Net().load_state_dict(model.state_dict())
    model.load_state_dict(Net().state_dict())
    twin = copy.deepcopy(model)
    train(twin, 2)
    assert not torch.equal(twin.fc.weight, model.fc.weight)
    assert model.train().fc.training and not model.eval().fc.training


def test_resuming_gives_the_same_weights() -> None:
    start, x = Net().state_dict(), image()

    def fresh() -> nn.Module:
        model = Net()
        model.load_state_dict(start)
        return prepared(model.eval(), QAT[1], x)

    whole = fresh()
    train(whole, 2)
    middle = copy.deepcopy(whole.state_dict())
    train(whole, 2, seed=1)
    resumed = fresh()
    resumed.load_state_dict(middle)
    train(resumed, 2, seed=1)
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_shared_weight_stays_shared() -> None:
    model: Any = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    prepared(model, QAT[1], torch.randn(9, 8))
    assert model[2].weight is model[0].weight
    x = torch.randn(3, 8)
    y = model(x).detach()
    gs.compress_(model, QAT[1])
    assert model[0].packed.panels is model[2].packed.panels and same_bits(model(x), y)


def test_training_recovers_what_rounding_loses() -> None:
    # All weights but the first of an output lie below half a step: rounding alone drops them.
    g = torch.Generator().manual_seed(0)
    linear = nn.Linear(32, 8)
    with torch.no_grad():
        linear.weight.copy_(torch.rand(8, 32, generator=g) / 260)
        linear.weight[:, 0] = 1
    x = torch.rand(256, 32, generator=g)
    want = linear(x).detach()
    model = prepared(nn.Sequential(linear), gs.Int8(), x)

    def error() -> float:
        with torch.no_grad():
            return float((model(x) - want).square().mean())

    before = error()
    optimizer = torch.optim.Adam(model.parameters(), 2e-4)
    for _ in range(40):
        optimizer.zero_grad()
        (model(x) - want).square().mean().backward()
        optimizer.step()
    assert error() < before / 5


# Bad input.


def test_refusals_are_sentences_and_change_nothing() -> None:
    model = Net()
    before = snapshot(model)
    for format in FORMATS[2:4]:
        with pytest.raises(ValueError, match=r"layer 'stem': .* has no training: use Int8"):
            gs.qat_(model, format)
    with pytest.raises(ValueError, match="layer 'stem': static activations need"):
        gs.qat_(model, QAT[1])
    with pytest.raises(ValueError, match=r"matches no layer"):
        gs.qat_(model, {"tail": gs.Int8()})
    with pytest.raises(TypeError, match=r"expected a format such as gs.Int8"):
        gs.qat_(model, "int8")  # type: ignore[arg-type]
    assert snapshot(model) == before and type(model.fc) is nn.Linear
    gs.qat_(model, {"fc": gs.Int8()})
    report = gs.qat_(model, gs.Int8(activations="none"))
    assert [row.note for row in report.rows] == ["", "is prepared already", ""]
    with pytest.raises(ValueError, match=r"layer 'stem': it trains for .*none.* and cannot become"):
        gs.compress_(model, gs.Int8())
    with pytest.raises(RuntimeError, match="must end with k=8"):
        model.fc(torch.randn(2, 7))


def test_the_report_says_what_trains() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Conv2d(4, 4, 1, groups=2))
    report = gs.qat_(model, gs.Int8())
    assert [row.after for row in report.rows] == ["QatLinear Int8", ""]
    assert "groups=2" in report.rows[1].note
    assert "nothing changed" in str(gs.qat_(nn.Sequential(nn.ReLU()), gs.Int8()))
