"""gs.fit: what it trains, that a killed run ends with the same bits, and what it refuses."""

from __future__ import annotations

import copy
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import fit_script
import pytest
import torch
import torch.nn.functional as F
from fit_script import data, parts
from torch import nn

import gossamer as gs
from gossamer.resume import Checkpoints, require_same
from gossamer.tasks import Rows

SCRIPT = Path(fit_script.__file__)


def start(target, *options, launcher=(), **environment):
    command = [sys.executable, *launcher, str(SCRIPT), str(target), *map(str, options)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


def result(target, rank=0):
    state, masks = torch.load(f"{target}.{rank}")
    return state, masks, json.loads(Path(f"{target}.{rank}.json").read_text())


def quick(model, optimizer, loader=None, **options):
    options = {"epochs": 1, "progress": False, **options}
    loader = data(8, noisy=False) if loader is None else loader
    return gs.fit(model, loader, optimizer=optimizer, **options)


def equal(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The weights, masks and history of a run that nothing disturbed."""
    target = tmp_path_factory.mktemp("whole") / "run"
    done = start(target, "--checkpoint", target.with_name("kept"))
    assert done.returncode == 0, done.stderr
    return result(target)


# 10 batches an epoch, 2 a step, a checkpoint every 3 steps: deaths in the first epoch before any
# checkpoint, right after one in mid-epoch, at an epoch's end, late.
@pytest.mark.parametrize("deaths", [(4, 8), (14, 20, 3)], ids=str)
def test_a_killed_run_goes_on_to_the_same_bits(whole, deaths, tmp_path):
    target, folder = tmp_path / "run", tmp_path / "kept"
    for death in deaths:
        done = start(target, "--checkpoint", folder, "--die", death)
        assert done.returncode == -signal.SIGKILL, done.stderr
    done = start(target, "--checkpoint", folder)
    assert done.returncode == 0, done.stderr
    state, masks, history = result(target)
    assert equal(state, whole[0]) and equal(masks, whole[1])
    assert history["losses"] == whole[2]["losses"] and len(history["losses"]) == 20
    assert history["evaluations"] == whole[2]["evaluations"]
    assert history["resumed"] == {(4, 8): 3, (14, 20, 3): 15}[deaths]
    assert [path.name for path in folder.iterdir()] == ["step-20"]


def test_a_run_that_was_done_is_not_done_again(tmp_path):
    model, optimizer, scheduler, pruner = parts()
    first = quick(model, optimizer, checkpoint=tmp_path, scheduler=scheduler, pruner=pruner)
    again, optimizer, scheduler, pruner = parts()
    second = quick(again, optimizer, checkpoint=tmp_path, scheduler=scheduler, pruner=pruner)
    assert second.losses == first.losses and second.resumed == 6
    assert equal(model.state_dict(), again.state_dict())
    fresh, optimizer, scheduler, pruner = parts()
    options = {"checkpoint": tmp_path, "scheduler": scheduler, "pruner": pruner, "resume": False}
    assert quick(fresh, optimizer, **options).resumed == 0


def test_two_processes_train_as_one_with_the_double_batch(tmp_path):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = start(
        tmp_path / "two", "--plain", "--batch", 4, launcher=torchrun, ACCELERATE_USE_CPU="1"
    )
    assert done.returncode == 0, done.stderr
    assert start(tmp_path / "one", "--plain", "--batch", 8).returncode == 0
    weights, masks, history = result(tmp_path / "one")
    for rank in (0, 1):
        state, theirs, losses = result(tmp_path / "two", rank)
        assert equal(masks, theirs) and not masks["0"].all()
        for key, value in weights.items():
            torch.testing.assert_close(state[key], value, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(losses["losses"], history["losses"], rtol=1e-5, atol=1e-6)
    assert equal(result(tmp_path / "two", 0)[0], result(tmp_path / "two", 1)[0])


def test_accumulated_batches_are_one_large_batch():
    one, two = (nn.Linear(16, 4) for _ in range(2))
    two.load_state_dict(one.state_dict())
    x, y = torch.randn(48, 16), torch.randint(4, (48,))
    rows = Rows(48, lambda chosen: (x[chosen], y[chosen]))
    large, small = rows.loader(16, shuffle=False), rows.loader(4, shuffle=False)
    first = quick(one, torch.optim.SGD(one.parameters(), lr=0.5), large)
    second = quick(two, torch.optim.SGD(two.parameters(), lr=0.5), small, accumulate=4)
    assert len(first.losses) == len(second.losses) == 3
    torch.testing.assert_close(second.losses, first.losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(two.weight, one.weight, rtol=1e-5, atol=1e-6)


def test_a_step_is_a_plain_step_with_clipping_scheduler_and_pruner():
    x, y = torch.randn(48, 16), torch.randint(4, (48,))
    loader = Rows(48, lambda chosen: (x[chosen], y[chosen])).loader(8, shuffle=False)
    model, optimizer, scheduler, pruner = parts(noisy=False)
    options = {"scheduler": scheduler, "pruner": pruner, "clip": 0.5, "epochs": 2}
    history = quick(model, optimizer, loader, **options)
    twin, optimizer, scheduler, pruner = parts(noisy=False)
    losses = []
    for chosen in [*torch.arange(48).split(8)] * 2:
        losses.append(F.cross_entropy(twin(x[chosen]), y[chosen]))
        losses[-1].backward()
        nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        pruner.step()
    assert equal(model.state_dict(), twin.state_dict()) and not model.training
    assert history.losses == [loss.item() for loss in losses]


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_distiller_trains_its_student_and_leaves_no_wrapper(precision):
    torch.manual_seed(0)
    teacher, student = nn.Linear(16, 4), nn.Linear(16, 4)
    distiller = gs.Distiller(student, teacher, losses=[gs.KD()])
    optimizer = torch.optim.Adam(student.parameters(), lr=0.05)
    options = {"distiller": distiller, "mixed_precision": precision}
    history = quick(student, optimizer, epochs=10, **options)
    assert history.losses[-1] < history.losses[0] / 4
    assert distiller.student is student and "forward" not in vars(student)
    assert student.weight.dtype == copy.deepcopy(student)(torch.ones(1, 16)).dtype == torch.float32


def test_a_distiller_needs_no_labels_and_takes_tuples_and_dicts():
    class Sum(nn.Linear):
        def forward(self, x, y):
            return super().forward(x + y)

    teacher, student = Sum(4, 2), Sum(4, 2)
    x, y = torch.randn(2, 8, 4)
    for batch in (
        lambda chosen: ((x[chosen], y[chosen]), None),
        lambda chosen: ({"y": y[chosen], "x": x[chosen]}, None),
    ):
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        distiller = gs.Distiller(student, teacher, losses=[gs.KD()], hard=0.5)
        history = quick(student, optimizer, Rows(8, batch).loader(4), distiller=distiller)
        assert len(history.losses) == 2 and list(distiller.parts) == ["KD"]


def test_the_history_is_a_table_of_the_evaluations():
    model, optimizer, *_ = parts()
    history = quick(model, optimizer, epochs=2, every=4, evaluate=lambda model: 0.5)
    assert [step for step, _ in history.evaluations] == [4, 8, 12]
    assert f"{sum(history.losses[4:8]) / 4:.3f}" in str(history) and "12 steps" in str(history)
    assert json.loads(json.dumps(history.to_json()))["losses"] == history.losses


@pytest.mark.parametrize("checkpoint", [True, False])
def test_a_loss_that_is_nan_stops_and_the_good_checkpoint_stays(tmp_path, checkpoint):
    model, optimizer, *_ = parts()
    calls = 0

    def loss(output, labels):
        nonlocal calls
        calls += 1
        return F.cross_entropy(output, labels) * (float("nan") if calls == 8 else 1)

    kept = {"checkpoint": tmp_path / "kept", "every": 3} if checkpoint else {}
    with pytest.raises(FloatingPointError) as error:
        quick(model, optimizer, epochs=2, loss=loss, **kept)
    assert "the loss is nan at step 8, epoch 2, batch 2: " in str(error.value)
    assert ("step-6 is the last good one" if checkpoint else "no checkpoint") in str(error.value)
    assert all(p.isfinite().all() for p in model.parameters())


def test_weights_that_are_not_finite_are_never_kept(tmp_path):
    model, optimizer, *_ = parts()
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: float("inf") if step > 4 else 1
    )
    with pytest.raises(FloatingPointError, match=r"step-3 is the last good one"):
        quick(model, optimizer, scheduler=scheduler, checkpoint=tmp_path, every=3)
    assert [path.name for path in tmp_path.iterdir()] == ["step-3"]


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path):
    model, optimizer, *_ = parts()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def evaluate(model):
        if (tmp_path / "step-3").exists():  # from now on, no file may grow beyond 1000 bytes
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        return 0.0

    try:
        with pytest.raises(OSError, match=r"step 6 could not be written .*step-3 is the last good"):
            quick(model, optimizer, checkpoint=tmp_path, every=3, evaluate=evaluate)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["step-3"]
    model, optimizer, *_ = parts()
    assert quick(model, optimizer, checkpoint=tmp_path, every=3).resumed == 3


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"clip": 2.0}, "clip=1.0, and now clip=2.0"),
        ({"epochs": 2}, "steps=6, and now steps=12"),
        ({"rate": 0.1}, "optimizer.lr=0.02, and now optimizer.lr=0.1"),
        ({"sparsity": 0.5}, r"pruner._target.*=0.75, and now .*=0.5"),
        ({"seed": 1}, "seed=0, and now seed=1"),
    ],
    ids=str,
)
def test_another_configuration_is_refused_by_name(tmp_path, change, difference):
    def run(rate=0.02, sparsity=0.75, **options):
        model, optimizer, *_ = parts()
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
        pruner = gs.Pruner(model, sparsity, "1x4")
        options = {"clip": 1.0, "checkpoint": tmp_path, "pruner": pruner, **options}
        return quick(model, optimizer, **options)

    run()
    with pytest.raises(ValueError, match=f"made with {difference}"):
        run(**change)
    assert run().resumed == 6


def test_arguments_are_refused_in_sentences():
    model, optimizer, *_ = parts()
    other = gs.Distiller(nn.Linear(16, 4), nn.Linear(16, 4))
    empty, three = (
        Rows(0, len).loader(1, shuffle=False),
        Rows(4, lambda chosen: (1, 2, 3)).loader(2),
    )
    for options, kind, sentence in [
        ({"loader": empty}, ValueError, "the loader is empty"),
        ({"loader": [(1, 2)]}, TypeError, "the loader is a list"),
        ({"loader": three}, ValueError, "a batch of the loader is 3 parts"),
        ({"epochs": None}, ValueError, "epochs=None and steps=None"),
        ({"steps": 3}, ValueError, "epochs=1 and steps=3"),
        ({"accumulate": 0}, ValueError, "accumulate=0 must be at least 1"),
        ({"clip": 0.0}, ValueError, "clip=0.0 must be positive"),
        ({"loss": F.cross_entropy, "distiller": other}, ValueError, "a loss or a distiller"),
        ({"distiller": other}, ValueError, "student is another model"),
    ]:
        with pytest.raises(kind, match=sentence):
            quick(model, optimizer, **options)


def test_without_accelerate_the_sentence_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    model, optimizer, *_ = parts()
    with pytest.raises(ImportError, match="pip install accelerate"):
        quick(model, optimizer)


def test_half_a_checkpoint_does_not_count(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.newest() is None
    checkpoints.prepare(7)
    (tmp_path / "step-x").mkdir()
    assert checkpoints.newest() is None
    for step in (9, 10):
        checkpoints.prepare(step)
        checkpoints.publish(step)
    assert sorted(path.name for path in tmp_path.glob("step-[0-9]*")) == ["step-10"]
    checkpoints.clear()
    assert [path.name for path in tmp_path.iterdir()] == ["step-x"]


def test_a_difference_is_found_at_any_depth():
    old = {"a": {"b": [1, 2]}, "c": None}
    require_same(old, copy.deepcopy(old), "it")
    for new, sentence in [
        ({"a": {"b": [1, 3]}, "c": None}, r"at 4: it was made with a.b=\[1, 2\], and now"),
        ({"a": {"b": [1, 2]}}, "c=None, and now c=absent"),
        ({**old, "d": 1}, "d=absent, and now d=1"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            require_same(old, new, "it", where=lambda key: "at 4: ")
