"""fuse: tracing, what goes into the layers, and that the result is an ordinary module."""

from __future__ import annotations

import copy
import dataclasses
from operator import methodcaller
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fused_nets import Block, MobileNet, ResNet, lively, run, static
from nets import FORMATS, snapshot
from products import same_bits
from torch import Tensor, nn

import gossamer as gs
from gossamer import reference

ACTIVATIONS: list[tuple[str, Any]] = [
    *[("relu", form) for form in (nn.ReLU(), nn.ReLU(inplace=True), torch.relu, torch.relu_)],
    *[("relu", form) for form in (F.relu, methodcaller("relu"), methodcaller("relu_"))],
    *[("relu6", form) for form in (nn.ReLU6(), F.relu6, nn.ReLU6(inplace=True))],
    *[("silu", form) for form in (nn.SiLU(), F.silu)],
    *[("hardswish", form) for form in (nn.Hardswish(), F.hardswish)],
    *[("gelu", form) for form in (nn.GELU(), F.gelu)],
]


class Then(nn.Module):
    """A layer and what comes behind it."""

    def __init__(self, layer: nn.Module, *behind: Any) -> None:
        super().__init__()
        self.layer, self.behind = layer, behind
        self.inside = nn.ModuleList([b for b in behind if isinstance(b, nn.Module)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        for step in self.behind:
            x = step(x)
        return x


# BatchNorm.


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("format", [*FORMATS, None], ids=str)
def test_batch_norm_goes_into_the_layer(format: Any, kind: str, bias: bool) -> None:
    if kind == "linear":
        layer: nn.Module = nn.Linear(20, 12, bias=bias)
        model, x = nn.Sequential(layer, nn.BatchNorm1d(12), nn.ReLU()), torch.randn(6, 20)
    else:
        layer = nn.Conv2d(5, 12, 3, padding=1, bias=bias)
        model, x = nn.Sequential(layer, nn.BatchNorm2d(12), nn.ReLU()), torch.randn(2, 5, 8, 8)
    lively(model)
    if format is not None:
        gs.compress_(model, format)
    before = snapshot(model)
    fused = gs.fuse(model, x)
    assert before == snapshot(model)
    row = fused.report.rows[0]
    assert row.fused == ("BatchNorm" if format is None else "BatchNorm, ReLU")
    # (z + b) * f + s with z and b rounded, or z * f + (b * f + s): a few roundings of their sizes.
    bn: Any = model[1]
    factor = (bn.weight / (bn.running_var + bn.eps).sqrt()).abs().max().detach()
    plain = run(model[0], x).abs().max() * factor
    size = plain + bn.bias.abs().max().detach() + (bn.running_mean * factor).abs().max()
    terms = 16 if format != gs.Sparse() and format is not None else 64
    assert (run(fused, x) - run(model, x)).abs().max() <= terms * reference.EPS32 * size


def test_where_batch_norm_stays() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.lin = nn.Conv2d(3, 4, 1), nn.Linear(4, 4)
            self.read, self.first = nn.BatchNorm2d(4), nn.BatchNorm2d(3)
            self.tokens, self.live = nn.BatchNorm1d(5), nn.BatchNorm2d(4, track_running_stats=False)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(self.first(x))
            y = self.read(y) + y
            y = self.live(self.conv(x)) + y
            z: Tensor = self.tokens(self.lin(y.flatten(2).transpose(1, 2)[:, :5]))
            return z

    model, x = Net().eval(), torch.randn(2, 3, 4, 4)
    gs.compress_(model, gs.Int8())
    fused = gs.fuse(model, x)
    assert same_bits(run(fused, x), run(model, x))
    notes = {row.name: row.note for row in fused.report if row.runs.startswith("BatchNorm")}
    assert notes == {
        "first": "not folded: follows x, which is no layer",
        "read": "not folded: conv is read by add too",
        "live": "not folded: has no running statistics",
        "tokens": "not folded: normalizes dimension 1 of 3",
    }


def test_batch_norm_in_training_is_refused() -> None:
    model = ResNet()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"6 BatchNorm .* such as 'bn1': .* call model.eval\(\)"):
        gs.fuse(model, torch.randn(1, 3, 32, 32))
    assert before == snapshot(model)


def test_what_must_not_be_changed_is_left_alone() -> None:
    x = torch.randn(2, 4)
    hooked = lively(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU()))
    gs.compress_(hooked, gs.Int8())
    hooked[0].register_forward_hook(lambda m, args, out: out + 1)
    fused = gs.fuse(hooked, x)
    assert same_bits(run(fused, x), run(hooked, x))
    assert "0 has forward hooks" in fused.report.rows[1].note
    trains = lively(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU()))
    gs.compress_(trains, gs.Sparse(trainable=True))
    assert "0 trains" in gs.fuse(trains, x).report.rows[1].note

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.norm(self.lin(x)), self.lin.weight)

    tied = lively(Tied())
    fused = gs.fuse(tied, x)
    assert same_bits(run(fused, x), run(tied, x))
    assert "the weight of lin is read elsewhere" in fused.report.rows[1].note


# Activations.


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize(("name", "form"), ACTIVATIONS, ids=lambda v: v if type(v) is str else None)
def test_an_activation_goes_into_the_layer(name: str, form: Any, kind: str) -> None:
    if kind == "linear":
        layer, x = nn.Linear(20, 12), torch.randn(6, 20) * 4
    else:
        layer, x = nn.Conv2d(5, 12, 3), torch.randn(2, 5, 8, 8) * 4  # type: ignore[assignment]
    model = Then(layer, form)
    gs.compress_(model, gs.Int8())
    fused = gs.fuse(model, x)
    (row,) = fused.report.rows
    assert row.runs.endswith("Int8") and fused.layer.activation == name
    assert model.layer.activation == "none"
    torch.testing.assert_close(run(fused, x), run(model, x), rtol=2e-6, atol=2e-6)


def test_what_is_no_activation_of_a_kernel_stays() -> None:
    x = torch.randn(3, 8)
    for form, note in (
        (nn.GELU(approximate="tanh"), ""),
        (nn.Tanh(), ""),
        (lambda y: F.relu(y) + y, "not fused: layer is read by others too"),
        (lambda y: F.silu(F.relu(y)), "not fused: layer has relu already"),
    ):
        model = Then(nn.Linear(8, 8), form)
        gs.compress_(model, gs.Int8())
        fused = gs.fuse(model, x)
        assert same_bits(run(fused, x), run(model, x))
        assert fused.report.rows[1].note == note


def test_writing_in_place_reaches_all_later_readers() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            y = self.a(x)
            F.relu_(y)
            z = self.b(y)
            F.dropout(z, 0.5, self.training).add_(1)
            return y, z

    model, x = Net().eval(), torch.randn(3, 8)
    gs.compress_(model, gs.Int8())
    fused = gs.fuse(model, x)
    assert fused.a.activation == "relu"
    with torch.no_grad():
        for got, want in zip(fused(x), model(x), strict=True):
            assert same_bits(got, want)


# Tracing.


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin, self.act = nn.Linear(4, 4), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(self.lin(x))
        if y.sum() > 0:  # this line is named
            return y
        return -y


def test_a_model_that_cannot_be_traced_is_named_with_its_line() -> None:
    model = Branches()
    gs.compress_(model, gs.Int8())
    before = snapshot(model)
    text = Path(__file__).read_text().split("\n")
    line = next(i for i, code in enumerate(text, 1) if code.endswith("# this line is named"))
    with pytest.raises(ValueError, match=rf"Branches cannot be traced: .*test_fuse.py:{line}: `if"):
        gs.fuse(model, torch.randn(2, 4))
    assert before == snapshot(model)


def test_a_part_that_cannot_be_traced_stays_whole() -> None:
    first, last = nn.Linear(4, 4), nn.Linear(4, 4)
    model = nn.Sequential(first, nn.ReLU(), nn.Sequential(Branches()), last, nn.ReLU()).eval()
    gs.compress_(model, gs.Int8())
    x = torch.randn(2, 4)
    fused = gs.fuse(model, x)
    assert same_bits(run(fused, x), run(model, x))
    names = [(row.name, row.fused) for row in fused.report]
    assert names == [("0", "ReLU"), ("2.0", ""), ("3", "ReLU")]
    assert "not traced: " in fused.report.rows[1].note
    assert "used as inputs to control flow" in fused.report.rows[1].note


def test_arguments_without_tensors_are_fixed() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(4, 4)

        def forward(self, x: Tensor, mask: Any = None, *more: Tensor, twice: bool = False) -> Any:
            x = self.lin(x)
            if mask is not None:
                x = x * mask
            for other in more:
                x = x + other
            return {"y": x * 2 if twice else x}

    model, x = Net().eval(), torch.randn(2, 4)
    calls: list[tuple[Any, dict[str, Any]]] = [
        ((x,), {}),
        ((x, torch.rand(4)), {}),
        ((x, None, torch.rand(4), torch.rand(4)), {}),
    ]
    for args, kwargs in calls:
        fused = gs.fuse(model, args)
        tensors = [a for a in args if a is not None]
        assert same_bits(fused(*tensors)["y"], model(*args, **kwargs)["y"])
    fused = gs.fuse(model, {"x": x, "twice": True})
    assert same_bits(fused(x)["y"], model(x, twice=True)["y"])
    with pytest.raises(TypeError, match=r"write example_inputs=\(x,\)"):
        gs.fuse(model, 3)
    with pytest.raises(TypeError, match="missing a required argument: 'x'"):
        gs.fuse(model, ())


# An ordinary module.


def nets() -> dict[str, tuple[nn.Module, Tensor]]:
    """Fused: of static and dynamic layers, in floats and bytes."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32)
    dynamic = lively(MobileNet(nn.Hardswish))
    gs.compress_(dynamic, gs.Int8())
    return {
        "static": (gs.fuse(static(lively(ResNet()), x), x), x),
        "sparse": (gs.fuse(static(lively(ResNet()), x, gs.SparseInt8("static")), x), x),
        "dynamic": (gs.fuse(dynamic, x), x),
    }


ALL = ["static", "sparse", "dynamic"]


@pytest.mark.parametrize("kind", ALL)
def test_deepcopy_keeps_the_report(kind: str) -> None:
    fused, x = nets()[kind]
    own: Any = copy.deepcopy(fused)
    assert same_bits(run(own, x), run(fused, x))
    assert str(own.report) == str(fused.report)
    next(b for name, b in own.named_buffers() if name.endswith("bias")).add_(1)
    assert not same_bits(run(own, x), run(fused, x))
    assert not own.training


@pytest.mark.parametrize("kind", ALL)
def test_state_dict_and_files(kind: str, tmp_path: Path) -> None:
    fused, x = nets()[kind]
    torch.manual_seed(1)
    other: Any = nets()[kind][0]
    for module in other.modules():
        for name, buffer in list(module._buffers.items()):
            if buffer is not None and name in ("bias", "y_affine", "affine"):
                module._buffers[name] = buffer.clone()
                module._buffers[name][0] *= 2  # type: ignore[index]
    assert not same_bits(run(other, x), run(fused, x))
    gs.save(fused, tmp_path / "fused.safetensors")
    loaded = gs.load_(copy.deepcopy(other), tmp_path / "fused.safetensors")
    assert same_bits(run(loaded, x), run(fused, x))
    other.load_state_dict(fused.state_dict())
    assert same_bits(run(other, x), run(fused, x))
    with pytest.raises(ValueError, match=r"does not fit ResNet: .*model has not"):
        gs.load_(lively(ResNet()), tmp_path / "fused.safetensors")


def test_fusing_what_was_loaded_is_fusing_what_was_saved(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 32, 32)
    model = static(lively(ResNet()), x)
    gs.save(model, tmp_path / "model.safetensors")
    loaded = gs.load_(ResNet().eval(), tmp_path / "model.safetensors")
    assert same_bits(run(gs.fuse(loaded, x), x), run(gs.fuse(model, x), x))


@pytest.mark.parametrize("kind", ALL)
def test_compile_and_export(kind: str) -> None:
    fused, x = nets()[kind]
    with torch.no_grad():
        want = fused(x)
        compiled: Any = torch.compile(fused, fullgraph=True, backend="aot_eager")
        assert same_bits(compiled(x), want)
        assert same_bits(torch.export.export(fused, (x,)).module()(x), want)
        sizes = ({0: torch.export.Dim("images", min=1, max=64)},)
        exported = torch.export.export(fused, (x,), dynamic_shapes=sizes).module()
        others = torch.randn(5, 3, 32, 32)
        assert same_bits(exported(others), fused(others))


def test_fusing_again_changes_nothing() -> None:
    fused, x = nets()["static"]
    again = gs.fuse(fused, x)
    assert [row.name for row in again.report] == [row.name for row in fused.report]
    assert same_bits(run(again, x), run(fused, x))


def test_tensors_are_shared_where_nothing_was_folded() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU()).eval()
    gs.compress_(model, gs.Int8())
    fused = gs.fuse(model, torch.randn(2, 64))
    assert fused.get_submodule("0").packed.panels is model[0].packed.panels  # type: ignore[union-attr]
    fused.train()
    assert not model.training


def test_the_report_reads_well() -> None:
    fused, _ = nets()["static"]
    text = str(fused.report).split("\n")
    assert text[0].split(" | ")[0].strip() == "| node"
    assert text[-1] == "10 nodes run, 14 more are fused into them, 8 give int8"
    entry = fused.report.to_json()[1]
    assert entry["name"] == "conv1" and entry["shape"] == [2, 8, 16, 16]
    assert dataclasses.asdict(fused.report.rows[1])["gives"] == "int8"
    blocks = [row for row in fused.report if row.name.endswith("conv2")]
    assert [row.fused for row in blocks] == [
        "BatchNorm, + maxpool, ReLU",
        "BatchNorm, + layers.1.downsample.0, ReLU",
    ]
    assert isinstance(Block(1, 1), nn.Module)
