"""Recipes: a mistake has a line, a killed run goes on to the same bits, and the docs are true."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builds import ROOT
from recipe_tables import MODELS, table
from safetensors.torch import load_file
from torch import nn

import gossamer as gs
from gossamer import recipe, road
from gossamer.tasks import Rows, Task, mlp

GOOD = """\
task: {name: test_recipe:small, width: 32}
seed: 3
train:
  epochs: 2
  optimizer: {name: AdamW, lr: 1e-2}
prune:
  sparsity: 0.75
  pattern: 1x4
  exclude: [fc3]
distil:
  steps: 9
  every: 2
  scheduler: {name: OneCycleLR, max_lr: 1e-2}
  losses:
    - {name: KD, temperature: 2.0}
    - {name: SquareHead, match: "re:fc[12]"}
  hard: 0.5
quantize:
  formats:
    fc3: Int8
    "*": SparseInt8
pack: {rounds: 3}
"""


def small(width, batch=16, die=0):
    """A task of 96 random samples; `die` kills the process while that evaluation runs."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(96, 64, generator=generator), torch.arange(96) % 10
    calls = 0

    def evaluate(model):
        nonlocal calls
        calls += 1
        if calls == int(os.environ.get("DIE", 0)):
            os.kill(os.getpid(), signal.SIGKILL)
        return (model(x).argmax(1) == y).float().mean()

    rows = Rows(96, lambda chosen: (x[chosen], y[chosen]))
    return Task(lambda: mlp.MLP(width), rows.loader(batch), evaluate, (x[:4],))


def normed():
    """The same, with a norm in front."""
    task = small(16)
    return replace(task, model=lambda: nn.Sequential(nn.LayerNorm(64), task.model()))


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "my.yaml"
        path.write_text(text)
        return path

    return write


def test_a_recipe_goes_the_whole_road(write, tmp_path):
    outcome = road.run(recipe.load(write(GOOD)), tmp_path / "run", progress=False)
    assert list(outcome.scores) == ["train", "distil", "pack"]
    assert [len(history.losses) for history in outcome.histories.values()] == [12, 9]
    kinds = {row.name: (row.after, round(row.zeros, 2)) for row in outcome.layers}
    assert kinds["fc1"] == ("Linear SparseInt8", 0.75) and kinds["fc3"][0] == "Linear Int8"
    loaded = gs.load_(mlp.MLP(32), tmp_path / "run" / "model.safetensors")
    assert isinstance(loaded.fc1, gs.Linear)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["scores"] == outcome.scores and report["compared"]["rounds"] == 3
    assert report["compared"]["models"][1]["accuracy"] == outcome.scores["pack"]
    text = (tmp_path / "run" / "report.txt").read_text()
    assert text == f"{outcome}\n"
    assert all(word in text for word in ("size on disk", "latency p50", "fc1", "distil"))
    kept = {path.name for path in (tmp_path / "run").iterdir()}
    stages = {f"{name}.{kind}" for name in ("train", "distil") for kind in ("json", "safetensors")}
    assert kept == {*stages, "model.safetensors", "recipe.json", "report.json", "report.txt"}


def command(path, out, *options, die=0):
    code = "import sys; from gossamer.cli import main; sys.exit(main())"
    env = {**os.environ, "DIE": str(die), "PYTHONPATH": str(Path(__file__).parent)}
    call = [sys.executable, "-c", code, "compress", str(path), "--out", str(out), *options]
    return subprocess.run(call, env=env, capture_output=True, text=True, timeout=300)


def test_a_killed_run_goes_on_to_the_same_bits(write, tmp_path):
    path, whole, cut = write(GOOD), tmp_path / "whole", tmp_path / "cut"
    assert command(path, whole).returncode == 0
    # Evaluations: 1 2 after the epochs of train, 3 of its result, from 4 on each 2 steps of distil.
    assert command(path, cut, die=5).returncode == -signal.SIGKILL
    assert not (cut / "distil.safetensors").exists() and any((cut / "distil").iterdir())
    refused = command(path, cut)
    assert refused.returncode == 2 and "has a run: go on with --resume" in refused.stderr
    done = command(path, cut, "--resume")
    assert done.returncode == 0 and "| distil |" in done.stdout, done.stderr
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (cut, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    ours, theirs = (json.loads((folder / "report.json").read_text()) for folder in (cut, whole))
    assert ours["scores"] == theirs["scores"]
    assert ours["stages"]["distil"]["losses"] == theirs["stages"]["distil"]["losses"]
    assert ours["stages"]["distil"]["resumed"] == 2


def test_another_recipe_is_refused_by_its_line(write, tmp_path):
    folder = tmp_path / "run"
    road.run(
        recipe.load(write("task: {name: test_recipe:small, width: 8}\nprune:\n  sparsity: 0.5\n")),
        folder,
    )
    changed = write("task: {name: test_recipe:small, width: 8}\nprune:\n  sparsity: 0.6\n")
    with pytest.raises(ValueError, match=r"my.yaml:3: the run in .* prune.sparsity=0.5, and now"):
        road.run(recipe.load(changed), folder, resume=True)
    added = write(
        "task: {name: test_recipe:small, width: 8}\nprune:\n  sparsity: 0.5\n  scope: layer"
    )
    with pytest.raises(ValueError, match=r"my.yaml:4: .*prune.scope=absent, and now prune.scope=l"):
        road.run(recipe.load(added), folder, resume=True)


def static():
    try:
        return gs.Int8(activations="static")
    except ValueError:
        return None


@pytest.mark.parametrize(
    ("old", "new", "line", "sentence"),
    [
        ("  epochs: 2", "  epochs: two", 4, "train.epochs: should be a valid integer, got 'two'"),
        ("  epochs: 2", "  epochs: 0", 4, "greater than or equal to 1, got 0"),
        ("  epochs: 2", "  epochs: yes", 4, "train.epochs: should be a valid integer, got True"),
        ("  epochs: 2", "  epoch: 2", 4, "train.epoch: unknown key; did you mean epochs?"),
        ("  epochs: 2\n", "", 3, "train: how long? give epochs or steps"),
        ("  epochs: 2", "  epochs: 2\n  steps: 4", 5, "epochs are given too"),
        ("seed: 3", "seeds: 3", 2, "seeds: unknown key; did you mean seed?"),
        ("  sparsity: 0.75\n", "", 6, "prune.sparsity: is missing"),
        ("  sparsity: 0.75", "  sparsity: 1", 7, "less than 1, got 1"),
        ("  sparsity: 0.75", "  sparsity: {fc1: 0.5, fc2: yes}", 7, "less than 1, got True"),
        ("AdamW", "Adamw", 5, "unknown optimizer 'Adamw': use "),
        ("lr: 1e-2}", "rate: 1e-2}", 5, "AdamW has no 'rate': it has lr, betas"),
        ("temperature: 2.0", "temperature: -1", 15, "temperature=-1 must be positive"),
        ("name: KD", "name: KL", 15, "unknown loss 'KL': use "),
        ("SparseInt8", "SparseInt7", 21, "unknown format 'SparseInt7': use Int4, Int8"),
        ("fc3: Int8", "fc3: {name: Int8, activations: odd}", 20, "activations='odd' is unknown"),
        pytest.param(
            *("fc3: Int8", "fc3: {name: Int8, activations: static}", 20, "need quantize.calib"),
            marks=pytest.mark.skipif(not static(), reason="there is no static quantization yet"),
        ),
        ("pack: {rounds: 3}", "", 18, "quantize: needs a stage pack"),
        ("pack: {rounds: 3}", "pack: {rounds: 3}\ntrain: {epochs: 1}", 23, "train is given twice"),
        ("scheduler: {n", "cap: 2\n  scheduler: {n", 13, "distil.cap: unknown key"),
        ("exclude: [fc3]", "cap: 2", 9, "prune.cap: should be less than or equal to 1, got 2"),
        ("exclude: [fc3]", "score: wanda", 9, "prune.score: wanda needs prune.calibration"),
        ("exclude: [fc3]", "schedule: {name: Polynomial, power: 0}", 9, "power=0 is not a posi"),
        ("quantize:", "quantize:\n  gptq: true", 19, "gptq: needs quantize.calibration"),
        ("quantize:", "quantize:\n  smooth: true", 19, "smooth: needs quantize.calibration"),
        ("quantize:", "quantize:\n  qat: {clip: 1.0}", 19, "qat: how long? give epochs or ste"),
        ("quantize:", "quantize:\n  qat: {epoch: 1}", 19, "qat.epoch: unknown key; did you m"),
        (
            *("quantize:", "quantize:\n  gptq: true\n  qat: {steps: 1}", 19),
            "gptq: qat would train its rounding away",
        ),
        ("seed: 3", "pack: {}", 3, "train: comes after pack: the order is train, prune"),
        ("seed: 3", "seed: [3", 3, "this is no YAML"),
    ],
    ids=str,
)
def test_a_mistake_has_a_line(write, old, new, line, sentence):
    text = GOOD.replace(old, new, 1)
    if new == "pack: {}":
        text = text.replace("pack: {rounds: 3}\n", "")
    path = write(text)
    with pytest.raises(ValueError, match=re.escape(sentence)) as error:
        recipe.load(path)
    assert str(error.value).startswith(f"{path}:{line}: ")


def test_all_mistakes_are_named_at_once(write):
    path = write(GOOD.replace("seed: 3", "seed: x").replace("steps: 9", "steps: y"))
    with pytest.raises(ValueError) as error:
        recipe.load(path)
    assert [line.split(":")[1] for line in str(error.value).splitlines()] == ["2", "11"]


@pytest.mark.parametrize(
    ("old", "new", "line", "sentence"),
    [
        ("sparsity: 0.75", "sparsity: {fc9: 0.5}", 7, "pattern 'fc9' matches no layer"),
        ("sparsity: 0.75", "sparsity: {fc1: 0.5}", 6, "a sparsity for each layer needs scope='l"),
        ("[fc3]", "[fc3, fc9]", 9, "pattern 'fc9' matches no layer; layers are: fc1, fc2, fc3"),
        ("    fc3: Int8", "    fc4: Int8", 20, "pattern 'fc4' matches no layer"),
        ("re:fc[12]", "re:fc[45]", 16, "matches no layer"),
        ("pattern: 1x4", "pattern: 1x5", 6, "pattern='1x5' is unknown"),
        ("test_recipe:small", "small", 1, "task: unknown task 'small'"),
        ("width: 32", "height: 32", 1, "missing a required argument: 'width'"),
    ],
    ids=str,
)
def test_what_does_not_fit_the_task_has_a_line(write, tmp_path, old, new, line, sentence):
    path = write(GOOD.replace(old, new, 1).replace("  epochs: 2", "  steps: 1"))
    with pytest.raises(ValueError, match=re.escape(sentence)) as error:
        road.run(recipe.load(path), tmp_path / "run", progress=False)
    assert str(error.value).startswith(f"{path}:{line}: ")


@pytest.mark.parametrize(
    "stages, zeros",
    [
        ("prune: {sparsity: 0.5}", 0.5),
        ("prune: {sparsity: 0.5, epochs: 1}", 0.5),
        ("prune: {sparsity: 0.5, steps: 5}\ndistil: {steps: 3, losses: [KD]}", 0.5),
        ("distil: {steps: 3, losses: [KD], teacher_format: Int8}", 0.0),
    ],
    ids=str,
)
def test_stages_stand_alone(write, tmp_path, stages, zeros):
    path = write(f"task: {{name: test_recipe:small, width: 16}}\n{stages}\n")
    outcome = road.run(recipe.load(path), tmp_path / "run", progress=False)
    last = list(outcome.scores)[-1]
    weights = load_file(tmp_path / "run" / f"{last}.safetensors")
    weights = torch.cat([w.flatten() for name, w in weights.items() if w.dim() == 2])
    assert (weights == 0).float().mean().item() == pytest.approx(zeros, abs=1e-3)
    assert outcome.compared is None and "as it came" in str(outcome)


def test_a_packed_model_may_be_timed_and_calibrated(write, tmp_path):
    stages = "quantize: {formats: Int8, calibration: {batches: 2}}\npack: {timed: true, rounds: 2}"
    path = write(f"task: {{name: test_recipe:small, width: 16}}\n{stages}\n")
    outcome = road.run(recipe.load(path), tmp_path / "run", progress=False)
    assert all(row.ms_before is not None for row in outcome.layers)


@pytest.mark.parametrize(
    "how",
    [
        "score: wanda, scope: layer, calibration: {batches: 3}",
        "score: sparsegpt, scope: layer, calibration: {}",
        "score: taylor, cap: 0.6, epochs: 1, schedule: {name: Polynomial, power: 2}",
        "score: random",
    ],
)
def test_prune_knows_what_the_pruner_knows(write, tmp_path, how):
    path = write(f"task: {{name: test_recipe:small, width: 16}}\nprune: {{sparsity: 0.5, {how}}}\n")
    road.run(recipe.load(path), tmp_path / "run", progress=False)
    weights = load_file(tmp_path / "run" / "prune.safetensors")
    zeros = {n: (w == 0).float().mean().item() for n, w in weights.items() if w.dim() == 2}
    for zero in zeros.values():
        assert zero == pytest.approx(0.5, abs=0.005) or "scope" not in how
        assert "cap" not in how or zero < 0.61
    pruned = load_file(tmp_path / "run" / "prune.safetensors")["fc1.weight"] == 0
    torch.manual_seed(0)
    magnitude = mlp.MLP(16)
    gs.prune_(magnitude, 0.5, scope="layer" if "layer" in how else "global")
    assert not torch.equal(pruned, magnitude.fc1.weight == 0)


def test_each_layer_may_have_a_sparsity_of_its_own(write, tmp_path):
    prune = 'prune: {sparsity: {fc1: 0.75, "*": 0.5}, scope: layer, exclude: [fc3]}'
    path = write(f"task: {{name: test_recipe:small, width: 16}}\n{prune}\n")
    road.run(recipe.load(path), tmp_path / "run", progress=False)
    weights = load_file(tmp_path / "run" / "prune.safetensors")
    zeros = [(weights[f"fc{i}.weight"] == 0).float().mean().item() for i in (1, 2, 3)]
    assert zeros == [0.75, 0.5, 0.0]


def test_static_int8_is_trained_with_and_packs_to_what_was_trained(write, tmp_path):
    text = (
        "task: {name: test_recipe:small, width: 16}\n"
        "prune: {sparsity: 0.75, pattern: 1x4, exclude: [fc3]}\n"
        "quantize:\n  formats:\n    fc3: {name: Int8, activations: static}\n"
        '    "*": {name: SparseInt8, activations: static}\n'
        "  calibration: {batches: 2}\n  qat: {epochs: 2, optimizer: {name: Adam, lr: 1e-2}}\n"
        "pack: {rounds: 1}\n"
    )
    document = recipe.load(write(text))
    outcome = road.run(document, tmp_path / "run", progress=False)
    assert len(outcome.histories["qat"].losses) == 12
    assert outcome.scores["qat"] == outcome.scores["pack"]
    assert {row.after for row in outcome.layers} == {
        f"Linear {kind}(activations=static)" for kind in ("SparseInt8", "Int8")
    }
    before, after = (load_file(tmp_path / "run" / f"{n}.safetensors") for n in ("prune", "qat"))
    assert not torch.equal(before["fc1.weight"], after["fc1.weight"])
    assert torch.equal(before["fc1.weight"] == 0, after["fc1.weight"] == 0), "zeros stay"
    assert re.search(r"quantize +\| +12 ", road.plan(document))
    # What is trained is not trained again, and packs to the same bits.
    first = load_file(tmp_path / "run" / "model.safetensors")
    again = road.run(document, tmp_path / "run", resume=True, progress=False)
    second = load_file(tmp_path / "run" / "model.safetensors")
    assert again.scores == outcome.scores
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_smooth_and_gptq_make_another_model(write, tmp_path):
    def packed(name, more):
        keys = f"{{formats: Int8, calibration: {{batches: 2}}, {more}}}"
        path = write(f"task: {name}\nquantize: {keys}\npack: {{rounds: 1}}\n")
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        road.run(recipe.load(path), folder, progress=False)
        return load_file(folder / "model.safetensors")

    plain = packed("test_recipe:normed", "gptq: false")
    for more in ("gptq: true", "smooth: true, gptq: true"):
        found = packed("test_recipe:normed", more)
        assert found.keys() == plain.keys()
        changed = {key for key in plain if not torch.equal(plain[key], found[key])}
        assert any(key.startswith("1.fc1") for key in changed)
        assert ("0.weight" in changed) == ("smooth" in more)
    with pytest.raises(ValueError, match=r"my.yaml:2: quantize.smooth: MLP has no nn.LayerNorm"):
        packed("{name: test_recipe:small, width: 16}", "smooth: true")


def test_the_dry_run_trains_nothing(write, tmp_path):
    done = command(write(GOOD), tmp_path / "run", "--dry-run")
    assert done.returncode == 0 and re.search(r"distil +\| +9 ", done.stdout), done.stderr
    assert not (tmp_path / "run").exists()
    wrong = command(write(GOOD.replace("seed: 3", "seed: x")), tmp_path / "run")
    assert wrong.returncode == 2 and wrong.stderr.startswith("gossamer: ")
    assert "my.yaml:2: seed: should be a valid integer, got 'x'" in wrong.stderr


def test_files_that_are_no_recipe(write, tmp_path):
    with pytest.raises(FileNotFoundError, match="no recipe ships by that name: digits-mlp, fash"):
        recipe.load(tmp_path / "absent.yaml")
    for text, sentence in [("", "is a mapping"), ("- 1", "is a mapping"), ("task: x", "no stage")]:
        with pytest.raises(ValueError, match=sentence):
            recipe.load(write(text))


@pytest.mark.parametrize("path", sorted(recipe.FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_recipes_that_ship_are_good(path):
    document = recipe.load(Path(path.stem))
    assert document.path == path
    assert f"`{path.stem}`" in (ROOT / "docs" / "recipes.md").read_text()


@pytest.mark.parametrize("name", MODELS)
def test_the_docs_list_every_key(name):
    page = (ROOT / "docs" / "recipes.md").read_text()
    assert table(MODELS[name]) in page, f"run python tests/recipe_tables.py for {name}"


def test_the_example_of_the_docs_is_good(write):
    page = (ROOT / "docs" / "recipes.md").read_text()
    (example,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    document = recipe.load(write(example))
    document.check_layers(mlp.MLP())
    assert isinstance(mlp.MLP(), nn.Module) and document.recipe.prune.sparsity == 0.9
