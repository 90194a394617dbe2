"""compare: the figures that can be known are right, and everything is as it was afterwards."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import Net, image, snapshot, trained
from torch import Tensor, nn

import gossamer as gs
from gossamer.compare import Comparison, Measured


@pytest.fixture(autouse=True)
def _one_thread_and_a_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def pair() -> tuple[Net, Net]:
    dense = trained()
    compressed = copy.deepcopy(dense)
    gs.compress_(compressed, gs.Int8())
    return dense, compressed


def test_sizes_are_those_of_the_file_and_of_memory(tmp_path: Path) -> None:
    models = pair()
    comparison = gs.compare(*models, (image(),), rounds=2)
    for model, measured in zip(models, comparison.models, strict=True):
        path = tmp_path / "model.safetensors"
        gs.save(model, path)
        assert measured.disk_bytes == path.stat().st_size
        tensors = [*model.parameters(), *model.buffers()]
        assert measured.weight_bytes == sum(tensor.nbytes for tensor in tensors)
        assert 0 < measured.p50_ms <= measured.p95_ms
        assert measured.accuracy is None
    assert [m.name for m in comparison.models] == ["dense", "compressed"]


def test_peak_memory_of_a_forward_is_exact_where_it_can_be_counted() -> None:
    class Chain(nn.Module):
        """Holds 1000 floats, makes 3000 more, frees them, makes 500: 16000 bytes at the peak."""

        def forward(self, x: Tensor) -> Tensor:
            kept = x.new_empty(1000)
            x.new_empty(3000)
            return kept[:500] + x.new_empty(500)

    class Less(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.new_empty(1000)

    comparison = gs.compare(Chain(), Less(), torch.zeros(1), rounds=1)
    assert [model.peak_bytes for model in comparison.models] == [16_000, 4_000]


def test_a_shared_weight_counts_once_in_memory() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    model[1].weight = model[0].weight
    comparison = gs.compare(model, model, torch.zeros(1, 8), rounds=1)
    assert comparison.models[0].weight_bytes == 256


def test_accuracy_is_asked_of_each_model_in_eval_mode_without_gradients() -> None:
    seen: list[nn.Module] = []

    def evaluate(model: nn.Module) -> float:
        assert not model.training and not torch.is_grad_enabled()
        seen.append(model)
        return 0.75 + 0.125 * len(seen)

    models = pair()
    comparison = gs.compare(*models, (image(),), evaluate, rounds=1)
    assert seen == list(models)
    assert [m.accuracy for m in comparison.models] == [0.875, 1.0]
    assert "+0.125" in str(comparison).splitlines()[-2]


def test_all_is_restored() -> None:
    models = pair()
    models[0].train()
    models[0].norm.eval()
    before = [snapshot(model) for model in models]
    comparison = gs.compare(*models, (image(),), rounds=1, threads=2)
    assert comparison.threads == 2 and torch.get_num_threads() == 1
    assert [snapshot(model) for model in models] == before and torch.is_grad_enabled()


@pytest.mark.parametrize("fails", ["forward", "evaluate"])
def test_all_is_restored_after_an_error(fails: str) -> None:
    model = trained().train()
    before = snapshot(model)

    def evaluate(_: nn.Module) -> float:
        raise ZeroDivisionError

    inputs = torch.zeros(2, 5, 8, 8) if fails == "forward" else image()
    with pytest.raises((RuntimeError, ZeroDivisionError)):
        gs.compare(model, model, inputs, evaluate, rounds=1, threads=2)
    assert snapshot(model) == before and torch.get_num_threads() == 1


@pytest.mark.parametrize("inputs", [image(), (image(),), {"x": image()}])
def test_batch_is_that_of_the_first_tensor(inputs: Any) -> None:
    assert gs.compare(*pair(), inputs, rounds=1).batch == 2


def test_inputs_without_a_batch() -> None:
    class Constant(nn.Module):
        def forward(self, value: float) -> float:
            return value

    comparison = gs.compare(Constant(), Constant(), (1.0,), rounds=1)
    assert comparison.batch is None and str(comparison).splitlines()[-1].startswith("1 thread")


def test_more_than_two_models_by_name() -> None:
    dense, compressed = pair()
    models = {"dense": dense, "int8": compressed, "again": compressed}
    comparison = gs.compare(models, example_inputs=(image(),), rounds=3)
    assert [m.name for m in comparison.models] == list(models)
    header, *_, last = str(comparison).splitlines()
    assert header.count("ratio") == 2 and last == "batch 2, 1 thread, 3 interleaved rounds"


def test_rounds_are_chosen_within_bounds() -> None:
    comparison = gs.compare(*pair(), (image(),))
    assert 20 <= comparison.rounds <= 200


def test_a_model_that_cannot_be_saved_is_measured_all_the_same() -> None:
    class Foreign(nn.Linear):
        def get_extra_state(self) -> Any:
            return {}

    model = nn.Sequential(Foreign(4, 4))
    comparison = gs.compare(model, model, torch.zeros(1, 4), names=("a", "b"), rounds=1)
    assert comparison.models[0].disk_bytes is comparison.models[0].weight_bytes is None
    text = str(comparison)
    assert "size on disk" not in text.split("batch")[0] and "pickle" in text.splitlines()[-1]


def test_table_and_json() -> None:
    a = Measured("dense", 1000, 2000, 0, 3.0, 4.0, 0.9)
    b = Measured("int8", 250, 500, 0, 1.5, 8.0, 0.8875)
    comparison = Comparison([a, b], batch=64, threads=2, rounds=50)
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in str(comparison).split("\n")
    ]
    assert lines[0] == ["", "dense", "int8", "ratio"]
    assert lines[2] == ["size on disk", "1 kB", "250 B", "4x"]
    assert lines[4] == ["peak of a forward", "0 B", "0 B", ""]
    assert lines[6] == ["latency p95", "4 ms", "8 ms", "0.5x"]
    assert lines[7] == ["accuracy", "0.9", "0.8875", "-0.0125"]
    assert str(comparison).endswith("batch 64, 2 threads, 50 interleaved rounds")
    data = json.loads(json.dumps(comparison.to_json()))
    assert data["threads"] == 2 and data["models"][1]["p95_ms"] == 8.0


@pytest.mark.parametrize(
    ("arguments", "options", "error", "match"),
    [
        ((Net(), Net()), {}, TypeError, "example_inputs must be a tuple"),
        ((Net(), Net(), "x"), {}, TypeError, "example_inputs must be a tuple"),
        ((Net(), None, image()), {}, TypeError, "'compressed' must be an nn.Module, got NoneType"),
        (({"a": Net()}, Net(), image()), {}, ValueError, "two models or one dict"),
        (({}, None, image()), {}, ValueError, "two models or one dict"),
        ((Net(), Net(), image()), {"names": ("a",)}, ValueError, "two different names"),
        ((Net(), Net(), image()), {"names": ("a", "a")}, ValueError, "two different names"),
        ((Net(), Net(), image()), {"rounds": 0}, ValueError, "rounds=0"),
        ((Net(), Net(), image()), {"threads": 0}, ValueError, "threads=0"),
    ],
)
def test_bad_input_gets_a_sentence(
    arguments: Any, options: Any, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        gs.compare(*arguments, **options)


def test_nothing_is_written_to_the_console(capfd: pytest.CaptureFixture[str]) -> None:
    gs.compare(*pair(), (image(),), rounds=1)
    assert capfd.readouterr() == ("", "")
