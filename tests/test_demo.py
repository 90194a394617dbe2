"""The demo: its data, a short run of the whole, and that what it measures is what it loaded."""

from __future__ import annotations

import copy
import io
import json
import sys

import pytest
import torch

from gossamer import _C, cli, demo
from gossamer.calibrate import calibrate
from gossamer.compress import Layer, compress_
from gossamer.digits import TEST_IMAGES, TextbookCNN, digits, max_pool
from gossamer.formats import Int8
from gossamer.fuse import fuse
from gossamer.prune import prune_

QUICK = demo.Settings(dense_epochs=2, prune_epochs=3, rounds=2)
DENSE, INT8, SPARSE = demo.NAMES


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def figures(folder):
    return demo.run(QUICK, folder)


@pytest.fixture
def untrained(monkeypatch):
    """Makes `demo.run` skip the training: one-shot pruning of random weights."""

    def prune(dense, *_):
        pruned = copy.deepcopy(dense)
        prune_(pruned, QUICK.sparsity, "1x4", exclude=demo.UNPRUNED)
        return pruned

    monkeypatch.setattr(demo, "train", lambda *_: TextbookCNN().eval())
    monkeypatch.setattr(demo, "prune", prune)


def test_the_model_is_the_textbook_one():
    model = TextbookCNN()
    assert sum(p.numel() for p in model.parameters()) == 545_098
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    x = torch.randn(2, 5, 8, 6)
    assert torch.equal(max_pool(x), torch.nn.functional.max_pool2d(x, 2))


def test_the_model_can_be_fused():
    model, x = TextbookCNN().eval(), torch.randn(3, 3, 32, 32)
    with calibrate(model):
        model(x)
    compress_(model, demo.INT8)
    fused = fuse(model, example_inputs=(x,))
    assert [row.gives for row in fused.report.rows].count("int8") == 3  # x, conv1 and its pooling
    with torch.no_grad():
        assert torch.equal(fused(x), model(x))


def test_the_test_images_are_held_out_stratified_and_always_the_same():
    one, two = digits(), digits()
    assert torch.equal(one.test_x, two.test_x) and torch.equal(one.train_y, two.train_y)
    assert len(one.test_x) == TEST_IMAGES and len(one.train_x) + TEST_IMAGES == 1797
    assert one.test_x.shape[1:] == (3, 32, 32)
    counts = one.test_y.bincount()
    assert counts.min() >= 34 and counts.max() <= 38
    rows = torch.cat([one.train_x, one.test_x])[:, 0].flatten(1)
    assert len(rows.unique(dim=0)) == 1797  # no image is in both
    assert one.train_x.mean().abs() < 1e-4 and abs(one.train_x.std() - 1) < 1e-3


def test_a_short_run_yields_every_figure(figures):
    assert json.loads(json.dumps(figures)) == figures
    assert figures["parameters"] == 545_098 and figures["threads"] == 1
    assert figures["machine"]["isa"] == _C.isa()
    for name in demo.NAMES:
        assert figures["accuracy"][name] > 80
        for batch in demo.BATCHES:
            latency = figures["latency_ms"][str(batch)][name]
            assert 0 < latency["p50"] <= latency["p95"]
    assert abs(figures["accuracy"][SPARSE] - figures["pruned_accuracy"]) <= 1
    assert figures["bytes"][SPARSE] * 8 <= figures["bytes"][DENSE]
    assert figures["bytes"][INT8] * 3 <= figures["bytes"][DENSE]


def test_ninety_percent_are_really_gone(figures):
    zeros = figures["checks"]["zeros"]
    assert zeros["together"] >= 0.9
    assert set(zeros) == {"conv2", "fc1", "together"}
    layers = {row["name"]: row for row in figures["layers"]}
    assert list(layers) == ["conv1", "conv2", "fc1", "fc2"]
    for name in ("conv2", "fc1"):
        assert layers[name]["kernel"] == "spmm_int8"
        assert layers[name]["zeros"] == pytest.approx(zeros[name])


def test_the_tables_show_the_figures(figures):
    text = demo.text(figures)
    for word in (*demo.NAMES, "545,098", "spmm_int8", "batch 64, p95", "1 thread of"):
        assert word in text
    assert f"{figures['accuracy'][SPARSE]:.2f} %" in text


def test_the_command_prints_what_run_returns(figures, monkeypatch, capsys, tmp_path):
    given = []

    def run(*args):
        given.extend(args)
        return figures

    monkeypatch.setattr(demo, "run", run)
    for target in ("-", str(tmp_path / "demo.json")):
        args = ["demo", "--seed", "3", "--threads", "2", "--folder", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", ["gossamer", *args, "--json", target])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        assert not exit.value.code
        out = capsys.readouterr().out
        if target == "-":
            assert json.loads(out) == figures
        else:
            assert out.strip() == demo.text(figures).strip()
            assert json.loads((tmp_path / "demo.json").read_text()) == figures
    assert given[:2] == [demo.Settings(seed=3, threads=2), tmp_path]


def test_progress_is_shown_where_there_is_a_console(untrained):
    from rich.console import Console

    console = Console(file=io.StringIO(), record=True, width=80)
    demo.run(QUICK, console=console)
    shown = console.export_text()
    assert "pack, verify, save, load, fuse" in shown and "100 %" in shown


def test_a_file_that_is_damaged_before_loading_is_an_error(untrained, monkeypatch, tmp_path):
    def save_and_damage(model, path):
        whole(model, path)
        content = bytearray(path.read_bytes())
        content[-1000] ^= 1
        path.write_bytes(content)

    whole = demo.save
    monkeypatch.setattr(demo, "save", save_and_damage)
    with pytest.raises(ValueError, match="damaged"):
        demo.run(QUICK, tmp_path)


def _load_and_change(model, path):
    from gossamer.checkpoint import load_

    load_(model, path)
    model.conv1.bias.data.fill_(torch.nan)
    return model


def test_a_loaded_model_that_differs_is_an_error(untrained, monkeypatch):
    monkeypatch.setattr(demo, "load_", _load_and_change)
    with pytest.raises(RuntimeError, match=r"loaded .* do not return the same bits"):
        demo.run(QUICK)


def test_a_fused_model_that_differs_is_an_error(untrained, monkeypatch):
    monkeypatch.setattr(demo, "fuse", lambda *_, **__: TextbookCNN().eval())
    with pytest.raises(RuntimeError, match=r"fused .* do not return the same bits"):
        demo.run(QUICK)


def test_the_loaded_model_is_the_one_that_is_evaluated(untrained, monkeypatch):
    monkeypatch.setattr(demo, "load_", _load_and_change)
    monkeypatch.setattr(demo, "_require_equal", lambda *_: None)
    seen = []
    monkeypatch.setattr(demo, "compare", lambda models, **_: seen.append(models) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        demo.run(QUICK)
    assert seen[0][SPARSE].conv1.layer.bias.isnan().all()


def test_verify_refuses_a_model_with_too_few_zeros(figures):
    model = TextbookCNN()
    compress_(model, Int8())
    with pytest.raises(RuntimeError, match=r"zeros, 90\.00% asked"):
        demo.verify(model, digits().test_x, 0.9)


def test_verify_refuses_a_kernel_that_is_off(untrained, monkeypatch):
    model, data = demo.prune(TextbookCNN()), digits()
    demo.pack(model, demo.SPARSE_INT8, data)
    x = data.test_x
    assert demo.verify(model, x, 0.9)["agreement"] > 90
    right = Layer.__args__[0].forward
    monkeypatch.setattr(Layer.__args__[0], "forward", lambda self, x: 1.1 * right(self, x))
    with pytest.raises(RuntimeError, match="packed logits are off"):
        demo.verify(model, x, 0.9)
