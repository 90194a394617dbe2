"""compress_: what is swapped, what is left alone and why, and that errors change nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from nets import FORMATS, image, snapshot, trained
from torch import nn

import gossamer as gs
from gossamer.compress import format_name


@pytest.fixture(autouse=True)
def _one_thread_and_a_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def notes(report: gs.Report) -> dict[str, str]:
    return {row.name: row.note for row in report}


# What is swapped.


@pytest.mark.parametrize("format", FORMATS, ids=format_name)
def test_swaps_every_linear_and_conv2d(format: gs.Int8) -> None:
    model, x = trained(), image()
    dense = copy.deepcopy(model)
    report = gs.compress_(model, format)
    assert type(model.stem) is gs.Conv2d and type(model.head) is gs.Linear
    assert [row.name for row in report] == ["stem", "fc", "head"]
    for row in report:
        layer: Any = model.get_submodule(row.name)
        assert row.shape == tuple(dense.get_submodule(row.name).weight.shape)
        assert row.after == f"{row.before} {format_name(format)}"
        assert row.kernel == layer.packed.kernel and not row.note
        assert row.bytes_before == sum(p.nbytes for p in dense.get_submodule(row.name).parameters())
        assert row.bytes_after == sum(b.nbytes for b in layer.buffers())
        assert row.zeros == pytest.approx(float((layer.unpack() == 0).float().mean()))
    twin = copy.deepcopy(dense)
    for row in report:
        weight = model.get_submodule(row.name).unpack()  # type: ignore[operator]
        twin.get_submodule(row.name).weight.data.copy_(weight)  # type: ignore[union-attr]
    bound = 0.1 * dense(x).abs().max()
    assert (model(x) - twin(x)).abs().max() <= bound


def test_zeros_of_a_convolution_do_not_count_the_padding_to_four_channels() -> None:
    report = gs.compress_(nn.Sequential(nn.Conv2d(3, 8, 3)), gs.Sparse())
    assert report.rows[0].zeros == 0.0


@pytest.mark.parametrize("training", [False, True])
def test_layers_are_inference_only_and_keep_the_mode(training: bool) -> None:
    model = trained().train(training)
    gs.compress_(model, gs.Int8())
    assert model.head.training is training and model.stem.training is training
    assert {name for name, _ in model.named_parameters()} == {"norm.weight", "norm.bias"}


def test_no_bias_and_bf16() -> None:
    model = nn.Sequential(nn.Linear(16, 8, bias=False)).to(torch.bfloat16)
    gs.compress_(model, gs.Int8())
    y = model(torch.randn(2, 16, dtype=torch.bfloat16))
    assert y.dtype is torch.bfloat16 and y.isfinite().all()


def test_first_pattern_wins_and_none_leaves_alone() -> None:
    model = trained()
    report = gs.compress_(model, {"re:f.": gs.SparseInt8(), "head": None, "*[cd]": gs.Int8()})
    assert [row.after for row in report] == ["", "Linear SparseInt8", ""]
    assert notes(report)["head"] == "left alone by pattern 'head'"
    assert notes(report)["stem"] == "no pattern matches its name"
    assert type(model.head) is nn.Linear and type(model.stem) is nn.Conv2d


def test_format_name_shows_what_differs_from_the_default() -> None:
    assert format_name(gs.Int8()) == "Int8"
    assert format_name(gs.Int8(activations="none")) == "Int8(activations=none)"


# What is left alone.


class Own(nn.Linear):
    pass


def hooked() -> nn.Linear:
    layer = nn.Linear(4, 4)
    layer.register_forward_hook(lambda *_: None)
    return layer


def patched() -> nn.Linear:
    layer = nn.Linear(4, 4)
    layer.forward = layer.forward  # type: ignore[method-assign]
    return layer


def pruned() -> nn.Linear:
    from torch.nn.utils import prune

    return prune.identity(nn.Linear(4, 4), "weight")  # type: ignore[no-any-return]


LEFT_ALONE = {
    "subclass of Linear": lambda: Own(4, 4),
    "parametrized": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
    "computed in a hook": pruned,
    "forward hooks": hooked,
    "would lose": patched,
    "groups=2": lambda: nn.Conv2d(4, 4, 3, groups=2),
    "Conv1d has no packed layer": lambda: nn.Conv1d(4, 4, 3),
    "ConvTranspose2d has no packed layer": lambda: nn.ConvTranspose2d(4, 4, 3),
    "run the model once": lambda: nn.LazyLinear(4),
}


@pytest.mark.parametrize("reason", LEFT_ALONE)
def test_left_alone_with_the_reason(reason: str) -> None:
    module = LEFT_ALONE[reason]()
    kind = type(module)
    model = nn.Sequential(module, nn.Linear(4, 4))
    report = gs.compress_(model, gs.Int8())
    assert reason in report.rows[0].note and not report.rows[0].after
    assert model[0] is module and type(module) is kind and type(model[1]) is gs.Linear
    assert "1 of 2 layers" in str(report)


def test_attention_keeps_its_out_proj() -> None:
    model = nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(8, 8))
    report = gs.compress_(model, gs.Int8())
    assert "subclass of Linear" in notes(report)["0.out_proj"]
    assert report.rows[0].before == "NonDynamicallyQuantizableLinear"


@pytest.mark.parametrize("mask", [False, True])
def test_transformer_encoder_runs_in_eval_mode(mask: bool) -> None:
    """torch's fused path reads linear1.weight, which a packed layer has not: it must be off."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(2, 5, 16)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if mask else None
    dense = copy.deepcopy(model)
    report = gs.compress_(model, gs.Int8(activations="none"))
    assert sum(bool(row.after) for row in report) == 4
    with torch.no_grad():
        y = model(x, src_key_padding_mask=padding)
        expected = dense(x, src_key_padding_mask=padding)
    seen = slice(None) if padding is None else ~padding
    assert (y[seen] - expected[seen]).abs().max() < 0.1 * expected.abs().max()


def test_compressing_twice_says_so_and_changes_nothing() -> None:
    model = trained()
    gs.compress_(model, gs.Int8())
    before = snapshot(model)
    report = gs.compress_(model, gs.SparseInt8())
    assert before == snapshot(model)
    assert set(notes(report).values()) == {"already Int8"}
    assert report.title == "nothing changed: every layer is already compressed"
    assert all(row.before.endswith(" Int8") and not row.after for row in report)


@pytest.mark.parametrize("formats", [gs.Int8(), {"*": gs.Int8()}])
def test_nothing_to_compress_says_so(formats: Any) -> None:
    report = gs.compress_(nn.Sequential(nn.ReLU()), formats)
    assert len(report) == 0 and "nothing to compress: Sequential" in str(report)


def test_all_left_alone_says_so() -> None:
    assert "left alone" in gs.compress_(trained(), {"*": None}).title


# Sharing.


def test_a_shared_weight_is_packed_once_and_counts_once() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    model[2].weight = model[0].weight
    report = gs.compress_(model, gs.Int8())
    assert model[0].packed is model[2].packed and model[0] is not model[2]
    assert notes(report)["2"] == "shares the weight of '0'"
    first, second = report.rows
    assert first.bytes_before == 16 * 16 * 4 + 64 and second.bytes_before == 64
    assert first.bytes_after == model[0].packed.nbytes + 64 and second.bytes_after == 64


def test_a_weight_shared_under_two_formats_is_packed_for_each() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    model[1].weight = model[0].weight
    gs.compress_(model, {"0": gs.Int8(), "1": gs.Sparse()})
    assert model[0].packed is not model[1].packed


def test_a_layer_with_two_names_stays_one() -> None:
    layer = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": layer, "b": nn.Sequential(layer)})
    report = gs.compress_(model, gs.Int8())
    assert model["a"] is model["b"][0] and type(model["a"]) is gs.Linear  # type: ignore[index]
    assert len(report) == 1 and report.rows[0].note == "also at 'b.0'"


@pytest.mark.parametrize("name", ["a", "b"])
def test_a_pattern_may_use_either_name(name: str) -> None:
    layer = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": layer, "b": layer})
    report = gs.compress_(model, {name: None, "*": gs.Int8()})
    assert model["a"] is layer and f"pattern {name!r}" in report.rows[0].note


def test_a_head_tied_to_an_embedding_saves_no_memory_and_says_so() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(32, 8), "head": nn.Linear(8, 32)})
    model["head"].weight = model["embed"].weight
    report = gs.compress_(model, gs.Int8())
    assert "tied to 'embed', which stays dense: no memory is saved" in notes(report)["head"]
    assert report.rows[0].bytes_before == 32 * 4
    assert model["embed"].weight.shape == (32, 8)


def test_tied_to_a_linear_that_stays_dense() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    report = gs.compress_(model, {"0": gs.Int8(), "1": None})
    assert "tied to '1'" in notes(report)["0"]
    assert [row.bytes_before for row in report] == [32, 8 * 8 * 4 + 32]


# Bad input: a sentence, and the model is as it was.


def broken(name: str, value: float) -> nn.Module:
    model = trained()
    with torch.no_grad():
        model.get_parameter(name).view(-1)[0] = value
    return model


BAD: dict[str, tuple[Callable[[], nn.Module], Any, type[Exception], str]] = {
    "NaN weight": (lambda: broken("fc.weight", float("nan")), gs.Int8(), ValueError, "'fc'"),
    "Inf weight": (lambda: broken("head.weight", float("inf")), gs.Sparse(), ValueError, "'head'"),
    "unknown pattern": (trained, {"stem": gs.Int8(), "hed": None}, ValueError, "'hed'.*stem.*head"),
    "broken regex": (trained, {"re:(": gs.Int8()}, ValueError, "regular expression"),
    "a class": (trained, gs.Int8, TypeError, r"write Int8\(\)"),
    "a string": (trained, "int8", TypeError, "expected a format"),
    "nothing": (trained, None, TypeError, "expected a format"),
    "a list in a dict": (trained, {"stem": [gs.Int8()]}, TypeError, "expected a format"),
    "a key that is no string": (trained, {1: gs.Int8()}, TypeError, "a pattern is a string"),
    "one Linear": (lambda: nn.Linear(4, 4), gs.Int8(), ValueError, r"gs\.Linear\.from_dense"),
    "one Conv2d": (lambda: nn.Conv2d(4, 4, 3), gs.Int8(), ValueError, r"gs\.Conv2d\.from_dense"),
    "meta": (lambda: trained().to("meta"), gs.Int8(), ValueError, "stem.*load the weights"),
    "K": (lambda: nn.Sequential(nn.Linear(65540, 1)), gs.Int8(), ValueError, "layer .0.: k=65540"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_a_sentence_and_nothing_changes(case: str) -> None:
    make, formats, error, match = BAD[case]
    model = make()
    before = snapshot(model)
    with pytest.raises(error, match=match):
        gs.compress_(model, formats)
    assert before == snapshot(model)


def test_a_layer_that_cannot_be_packed_can_be_left_out_by_name() -> None:
    model = broken("head.weight", float("nan"))
    report = gs.compress_(model, {"head": None, "*": gs.Int8()})
    assert sum(bool(row.after) for row in report) == 2
