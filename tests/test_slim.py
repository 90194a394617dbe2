"""slim_: fewer channels, the same function where they were zero, saved, loaded, refused."""

from __future__ import annotations

import builtins
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import gossamer as gs

pytest.importorskip("torch_pruning")


class Residual(nn.Module):
    """A stem and a block whose outputs are added: both must lose the same channels."""

    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16) if norm else nn.GroupNorm(4, 16)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.up = nn.Conv2d(16, 32, 1)
        self.down = nn.Conv2d(32, 16, 1)
        self.hidden = nn.Linear(16 * 4, 24)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu_()
        x = x + self.down(self.up(self.depthwise(x)).relu_())
        x = nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)
        return self.head(self.hidden(x).relu_())


def residual(norm: bool = True) -> Residual:
    torch.manual_seed(0)
    model = Residual(norm)
    for _ in range(2):
        model(torch.randn(4, 3, 6, 6))
    return model.eval()


IMAGE = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("norm", [True, False], ids=["batch norm", "group norm"])
@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("score", ["magnitude", "wanda", "taylor", "random:1"])
def test_the_model_gets_smaller_and_keeps_its_outputs(norm: bool, scope: str, score: str) -> None:
    model = residual(norm)
    if score == "wanda":
        with gs.calibrate(model):
            model(IMAGE)
    model(IMAGE).square().sum().backward()
    before, mode = parameters(model), [module.training for module in model.modules()]
    # Wanda knows no grouped convolutions: what reaches the depthwise one is left as it is.
    exclude = ("stem", "depthwise", "down") if score == "wanda" else ()
    report = gs.slim_(model, IMAGE, 0.5, scope=scope, score=score, exclude=exclude)
    assert model(IMAGE).shape == (2, 5) and parameters(model) < 0.75 * before
    rows = {row.name: row for row in report}
    assert rows["head"].note == "makes the model's outputs: keeps them"
    assert rows["head"].after == f"Linear 5 x {model.hidden.out_features}"
    assert f"{before:,d} -> {parameters(model):,d} parameters" in report.title
    assert [module.training for module in model.modules()] == mode
    if scope == "layer" and not exclude:
        assert model.stem.out_channels == model.down.out_channels == 8
        assert model.up.out_channels == 16 and model.depthwise.groups == 8
        assert model.hidden.weight.shape == (12, 32)


def test_zero_channels_go_first_and_nothing_changes() -> None:
    model = residual()
    dead = torch.arange(0, 16, 2)
    with torch.no_grad():
        for maker in (model.stem, model.depthwise, model.down, model.norm):
            maker.weight[dead] = 0
            maker.bias[dead] = 0
        model.norm.running_mean[dead] = 0
        model.up.weight[:, dead] = 0
        model.hidden.weight.view(24, 16, 4)[:, dead] = 0
        for maker, reader in ((model.up, model.down), (model.hidden, model.head)):
            half = torch.arange(0, len(maker.weight), 2)
            maker.weight[half], maker.bias[half], reader.weight[:, half] = 0, 0, 0
    expected, before = model(IMAGE), parameters(model)
    gs.slim_(model, IMAGE, 0.5)
    assert model.stem.out_channels == 8 and parameters(model) < before / 2
    torch.testing.assert_close(model(IMAGE), expected, rtol=1e-5, atol=1e-6)


def test_a_ratio_of_zero_changes_nothing(tmp_path: Path) -> None:
    model = residual()
    expected, before = model(IMAGE), {k: v.clone() for k, v in model.state_dict().items()}
    gs.slim_(model, IMAGE, 0.0)
    assert torch.equal(model(IMAGE), expected)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    gs.save(model, tmp_path / "x")
    with safe_open(tmp_path / "x", "pt") as file:
        assert json.loads(file.metadata()["gossamer"])["slim"] == {}


@pytest.mark.parametrize("ratio", [0.3, 0.99])
def test_what_is_left_is_a_multiple_and_no_group_is_emptied(ratio: float) -> None:
    model = residual(norm=False)
    gs.slim_(model, IMAGE, ratio, round_to=8)
    widths = [model.stem.out_channels, model.up.out_channels, model.hidden.out_features]
    assert all(width >= 8 and width % 8 == 0 for width in widths), widths
    model = residual()
    gs.slim_(model, IMAGE, 0.99)
    assert model.up.out_channels == 1 and model(IMAGE).shape == (2, 5)


def test_excluded_layers_and_frozen_and_tied_weights() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(5)))
    model[2].weight = model[1].weight
    model[3].requires_grad_(False)
    gs.slim_(model, torch.randn(1, 16), 0.5, exclude=("0", "1", "2"))
    assert model[1].weight is model[2].weight and model[1].weight.shape == (16, 16)
    assert model[3].weight.shape == (8, 16) and not model[3].weight.requires_grad
    assert model[4].weight.shape == (16, 8) and model[4].weight.requires_grad


def test_transformers_lose_their_hidden_neurons_only() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 16), nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), nn.Linear(16, 3)
    ).eval()
    report = gs.slim_(model, torch.randn(2, 5, 6), 0.5, scope="layer")
    assert model[1].linear1.out_features == model[1].linear2.in_features == 16
    assert model[0].out_features == 16 and model(torch.randn(2, 5, 6)).shape == (2, 5, 3)
    notes = {row.name: row.note for row in report}
    assert "reach a MultiheadAttention, whose size cannot be set" in notes["0"]


# Saved and loaded.


def slimmed() -> Residual:
    model = residual()
    gs.slim_(model, IMAGE, 0.5, round_to=4)
    return model


@pytest.mark.parametrize("format", [None, gs.Int8(), gs.SparseInt8()], ids=["dense", "int8", "1x4"])
@torch.no_grad()  # with gradients, relu_ may not follow a packed layer
def test_it_is_loaded_into_the_original_class(format: Any, tmp_path: Path) -> None:
    model = slimmed()
    if format is not None:
        gs.compress_(model, format)
    gs.save(model, tmp_path / "one")
    loaded = gs.load_(Residual().eval(), tmp_path / "one")
    assert torch.equal(loaded(IMAGE), model(IMAGE))
    assert loaded.norm.num_features == model.norm.num_features < 16
    gs.save(loaded, tmp_path / "two")  # what was loaded can be saved again, and loaded over
    for fresh in (Residual().eval(), slimmed(), loaded, copy.deepcopy(model)):
        assert torch.equal(gs.load_(fresh, tmp_path / "two")(IMAGE), model(IMAGE))
    with torch.device("meta"):
        empty = Residual().eval()
    assert torch.equal(gs.load_(empty, tmp_path / "one")(IMAGE), model(IMAGE))


def test_slimmed_twice_the_first_sizes_count(tmp_path: Path) -> None:
    model = slimmed()
    gs.slim_(model, IMAGE, 0.5)
    gs.save(model, tmp_path / "x")
    assert torch.equal(gs.load_(Residual().eval(), tmp_path / "x")(IMAGE), model(IMAGE))


class Wider(Residual):
    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(64, 32), nn.Linear(32, 5)


def altered(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["gossamer"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(about)
    save_file(tensors, path, {"gossamer": json.dumps(about)})


@pytest.mark.parametrize(
    ("make", "change", "message"),
    [
        (Wider, lambda a: 0, "layer 'hidden' had out_features=24 before it was slimmed, the model"),
        (
            lambda: nn.Sequential(nn.Linear(2, 2)),
            lambda a: 0,
            "slimmed layer 'stem' that the model",
        ),
        (Residual, lambda a: a.update(slim=[]), "slim must be a table of tables"),
        (Residual, lambda a: a["slim"].pop("up"), "of another shape: up.weight"),
        (Residual, lambda a: a["slim"]["up"].pop("groups"), "'up' is a Conv2d, the file has"),
        (
            Residual,
            lambda a: a["slim"]["up"].update(groups=[1, 2]),
            "damaged: groups of layer 'up'",
        ),
        (
            Residual,
            lambda a: a["slim"]["up"].update(groups=[1, 0]),
            "damaged: groups of layer 'up'",
        ),
        (Residual, lambda a: a["slim"]["up"].update(groups="x"), "damaged: groups of layer 'up'"),
        (Residual, lambda a: a["slim"]["hidden"].update(in_features=[64, 1]), "hidden.weight"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(
    make: Any, change: Any, message: str, tmp_path: Path
) -> None:
    gs.save(slimmed(), tmp_path / "x")
    altered(tmp_path / "x", change)
    model = make().eval()
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=message):
        gs.load_(model, tmp_path / "x")
    assert str(model) == str(before)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before.state_dict()[name])


# Refusals.


class Heads(nn.Module):
    """Attention whose code holds the size of a head."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.out = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k = (f(x).view(*x.shape[:-1], 4, 4).transpose(1, 2) for f in (self.query, self.key))
        y = (q @ k.mT).softmax(-1) @ q
        return self.out(y.transpose(1, 2).reshape(x.shape))


def test_a_model_that_holds_a_size_is_left_as_it_was() -> None:
    model, x = Heads().train(), torch.randn(2, 5, 16)
    expected, before = model(x), str(model)
    with pytest.raises(ValueError, match="does not run with fewer channels, perhaps because its"):
        gs.slim_(model, x, 0.3)
    assert torch.equal(model(x), expected) and str(model) == before and model.training


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ratio": 1.0}, r"ratio=1.0 is not in \[0, 1\)"),
        ({"scope": "local"}, "scope='local' is unknown"),
        ({"score": "sparsegpt"}, "score='sparsegpt' is for single weights"),
        ({"score": "taylor"}, r"layer '\w+' has no gradient"),
        ({"score": "wanda"}, r"layer '\w+' was not observed"),
        ({"round_to": 0}, "round_to=0 is too small"),
        ({"exclude": "haed"}, "pattern 'haed' matches no layer"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    model = residual()
    before = str(model)
    with pytest.raises(ValueError, match=message):
        gs.slim_(model, IMAGE, **{"ratio": 0.5, **arguments})
    assert str(model) == before


def test_packed_models_and_a_missing_library(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(16, 16))
    gs.compress_(model, gs.Int8())
    with pytest.raises(ValueError, match=r"no nn.Linear or convolution to slim"):
        gs.slim_(model, torch.randn(1, 16), 0.5)
    real = builtins.__import__

    def absent(name: str, *rest: Any) -> Any:
        if name == "torch_pruning":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ImportError, match="pip install torch-pruning"):
        gs.slim_(residual(), IMAGE, 0.5)
