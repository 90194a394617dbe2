"""Sensitivity: each layer alone, the model given back whole, the table, JSON and the plot."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import gossamer as gs


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 6))


def same(model: nn.Module, other: nn.Module) -> bool:
    pairs = zip(model.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(one, two) for one, two in pairs)


def test_one_layer_at_a_time_is_pruned_and_restored() -> None:
    model = net()
    before, seen = copy.deepcopy(model), []

    def evaluate(model: nn.Module) -> float:
        seen.append([int((model[i].weight == 0).sum()) for i in (0, 3)])
        return -float(sum(seen[-1]))

    found = gs.sensitivity(model, evaluate, (0.25, 0.75), "1x4")
    assert seen == [[0, 0], [72, 0], [216, 0], [0, 12], [0, 36]]
    assert same(model, before) and found.dense == 0.0
    assert found.quality == {"0": (-72.0, -216.0), "3": (-12.0, -36.0)}
    assert found.weights == {"0": 288, "3": 48}
    data = json.loads(json.dumps(found.to_json()))
    assert data["layers"][1] == {"name": "3", "weights": 48, "quality": [-12.0, -36.0]}
    assert "| 3     |      48 | -12.0000 |  -36.0000 |" in str(found)


def test_the_model_is_restored_when_evaluate_raises() -> None:
    model = net()
    before, calls = copy.deepcopy(model), []

    def evaluate(model: nn.Module) -> float:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of data")
        return 0.0

    with pytest.raises(RuntimeError, match="out of data"):
        gs.sensitivity(model, evaluate)
    assert same(model, before)


def test_n_of_m_has_one_sparsity_and_data_is_used() -> None:
    model = net()
    with gs.calibrate(model):
        model(torch.randn(8, 4, 3, 3))
    found = gs.sensitivity(
        model, lambda m: float((m[0].weight == 0).float().mean()), (), "1:4", "wanda", "3"
    )
    assert found.sparsities == (0.75,) and found.quality == {"0": (0.75,)}


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="sparsities is empty"):
        gs.sensitivity(net(), lambda m: 0.0, ())
    with pytest.raises(ValueError, match="'0': layer '' was not observed"):
        gs.sensitivity(net(), lambda m: 0.0, score="wanda")


def test_the_plot_is_a_png(tmp_path: Path) -> None:
    gs.sensitivity(net(), lambda m: float(m[0].weight.detach().square().sum())).plot(
        tmp_path / "plot.png"
    )
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
