"""bench/resnet.py and its nets: tiny runs, and what their parts promise."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from builds import ROOT, output
from torch import nn

from gossamer import _C
from gossamer.tasks.resnet import Block, ResNet, fashion_resnet, resnet50, settle_

NEEDS = ("onnx", "onnxruntime", "openvino")
WITH_PEERS = all(importlib.util.find_spec(name) for name in NEEDS)


def run(script: str, folder: Path, *options: str | Path) -> str:
    return output(sys.executable, ROOT / "bench" / script, "--folder", folder, *options)


def held(figures: dict) -> dict[str, bool]:
    """What -> passed, after a look at each verdict."""
    for bar in figures["bars"]:
        kept = bar["measured"] >= bar["limit"]
        assert bar["passed"] == (kept if bar["sense"] == ">=" else bar["measured"] <= bar["limit"])
    return {bar["what"]: bar["passed"] for bar in figures["bars"]}


def test_resnet50_is_the_known_one() -> None:
    model = resnet50()
    assert sum(p.numel() for p in model.parameters()) == 25_557_032
    strides = [m.stride for m in model.modules() if isinstance(m, nn.Conv2d) and m.stride != (1, 1)]
    assert len(strides) == 7  # the stem, and in three blocks the 3x3 and the shortcut
    assert sum(isinstance(m, nn.Conv2d) for m in model.modules()) == 53
    # v1.5: the 3x3 of a block strides, not the 1x1 before it.
    halves = [m for m in model.modules() if isinstance(m, Block) and m.body[3].stride == (2, 2)]
    assert len(halves) == 3 and all(block.body[0].stride == (1, 1) for block in halves)


def test_the_small_resnet_is_as_large_as_it_says() -> None:
    model = fashion_resnet()
    assert sum(p.numel() for p in model.parameters()) == 308_650
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_settled_activations_keep_their_size() -> None:
    torch.manual_seed(0)
    model, x = ResNet([2, 2, 2], 8, 10, bottleneck=True), torch.randn(16, 3, 32, 32) * 30 + 5
    momentum = [m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    settle_(model.train(), x)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert not any(module.training for module in model.modules())
    assert [norm.momentum for norm in norms] == momentum
    seen = []
    for norm in norms:
        norm.register_forward_hook(lambda module, args, y: seen.append((y.mean(), y.std())))
    model(x)
    assert all(abs(mean) < 0.05 and abs(std - 1) < 0.05 for mean, std in seen)


def test_a_small_resnet50_is_measured_in_every_kind(tmp_path: Path) -> None:
    shown = run("resnet.py", tmp_path, "--shrink", "8", "--seconds", "0")
    figures = json.loads((tmp_path / "resnet.json").read_text())
    fp32 = {"sparse fp32 90 %", "sparse fp32 90 %, stem too"}
    ours = {"int8", *fp32, "sparse int8 80 %", "sparse int8 90 %"}
    for batch in ("1", "16"):
        assert figures["ms"][batch].keys() >= ours | {f"{name}, two threads" for name in ours}
        assert ("openvino int8" in figures["ms"][batch]) == WITH_PEERS
        assert all(value > 0 for value in figures["ms"][batch].values())
    assert figures["cosine"].keys() >= ours and all(figures["cosine"][n] > 0.9999 for n in fp32)
    assert len(held(figures)) == 17 + 2 * WITH_PEERS
    assert figures["memory"]["int8"]["weights"] < figures["memory"]["torch fp32"]["weights"]
    page = (tmp_path / "resnet.md").read_text()
    assert page == shown.removesuffix("\n") and all(bar["what"] in page for bar in figures["bars"])
    calls = {name: sum(row["calls"] for row in rows) for name, rows in figures["layers"].items()}
    # 53 convolutions, bytes from the floats, pooling, mean, linear.
    assert calls["int8"] == calls["sparse int8 90 %"] == 57


def test_a_small_mobile_net_is_measured(tmp_path: Path) -> None:
    shown = run("mobilenet.py", tmp_path, "--shrink", "4", "--seconds", "0")
    figures = json.loads((tmp_path / "mobilenet.json").read_text())
    ours = {"int8", "int8, depthwise in fp32"}
    for batch in ("1", "16"):
        assert figures["ms"][batch].keys() >= ours | {f"{name}, two threads" for name in ours}
        assert ("openvino int8" in figures["ms"][batch]) == WITH_PEERS
    assert (tmp_path / "mobilenet.md").read_text() == shown.removesuffix("\n")
    depthwise = [row for row in figures["layers"] if row["name"].startswith("depthwise 3x3")]
    assert sum(row["calls"] for row in depthwise) == 17


@pytest.mark.skipif("avx2" not in _C.isas(), reason="this CPU has no AVX2")
def test_avx2_is_compared_with_avx2(tmp_path: Path) -> None:
    run(
        "resnet.py", tmp_path, "--shrink", "8", "--seconds", "0", "--peers", "none", "--isa", "avx2"
    )
    figures = json.loads((tmp_path / "resnet-avx2.json").read_text())
    assert figures["machine"]["isa"] == "avx2"
    assert "ONEDNN_MAX_CPU_ISA=AVX2" in figures["machine"]["others"]
    assert not any("openvino" in name for name in figures["ms"]["1"]), "--peers none"


def test_a_wrong_net_is_not_timed(bench) -> None:
    lab = bench("resnet").Lab()
    lab.check("right", torch.ones(2, 3), torch.ones(2, 3), 0.95)
    with pytest.raises(SystemExit, match=r"wrong: cosine -1.0000 to torch fp32"):
        lab.check("wrong", -torch.ones(2, 3), torch.ones(2, 3), 0.95)
    assert lab.cosines == {"right": pytest.approx(1)}


def test_operations_count_the_weights_that_are_left(bench) -> None:
    conv = nn.Conv2d(4, 8, 3, 2, 1, bias=False)
    with torch.no_grad():
        conv.weight[:4] = 0
    model = torch.fx.symbolic_trace(nn.Sequential(conv, nn.ReLU()))
    rows = {
        row["name"]: row for row in bench("layer_times").layer_times(model, torch.ones(2, 4, 8, 8))
    }
    row = rows["3x3 / 2, 4 -> 8, 4 x 4"]
    assert row["gops"] * row["ms"] * 1e6 == pytest.approx(2 * 2 * 16 * 4 * 36)
    assert rows["ReLU"]["gops"] == 0 and rows["ReLU"]["calls"] == 1
