"""bench/gpu.py where there is no GPU: its sentence, its shapes, its arithmetic, its pages."""

from __future__ import annotations

import doctest
import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from builds import ROOT
from torch import nn

import gossamer as gs


@pytest.fixture(scope="module")
def bench() -> Any:
    spec = importlib.util.spec_from_file_location("gpu_bench", ROOT / "bench/gpu.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_bench"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would measure")
def test_without_a_gpu_it_says_so() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "bench/gpu.py"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert done.stderr.strip().endswith("torch sees none: nothing was measured")


def test_its_examples_run(bench: Any) -> None:
    assert doctest.testmod(bench).failed == 0


def test_layers_are_those_of_llama_and_bert_from_one_row_on(bench: Any) -> None:
    assert {name.split(".")[0].split("-")[0].rstrip("3") for name in bench.LAYERS} == {
        "llama",
        "bert",
    }
    assert bench.ROWS[0] == 1 and bench.ROWS[-1] == 8192
    assert all(k % 16 == 0 and n % 16 == 0 for k, n in bench.LAYERS.values())  # for torch._int_mm
    assert bench.SECONDS + bench.TESTS_SECONDS <= 9 * 60 - 30


def test_the_roofline_is_memory_for_one_row_and_arithmetic_for_many(bench: Any) -> None:
    best = bench.Ceilings(4e12, 1e15, 2e15, 1e14)
    assert best.seconds(1, 4096, 4096, 4096 * 4096, "int8") == (4096 * 4096 + 2 * 8192) / 4e12
    assert best.seconds(8192, 4096, 4096, 4096 * 4096, "int8") == 2 * 8192 * 4096 * 4096 / 2e15


def test_a_training_step_has_the_gradients_of_both(bench: Any) -> None:
    dense = nn.Linear(64, 96, bias=False)
    with torch.no_grad():
        dense.weight.copy_(bench.pruned(torch.randn(96, 64), (32, 32)))
    x = torch.randn(3, 64, requires_grad=True)
    for name, (format, block) in bench.TRAINED.items():
        layer = gs.Linear.from_dense(dense, format)
        of_x, of_values = bench.step(x, layer)
        want_x, want = bench.step(x, dense)
        torch.testing.assert_close(of_x, want_x, msg=name)
        assert block in ((1, 1), (32, 32))
        torch.testing.assert_close(of_values.sum(), want[dense.weight != 0].sum(), msg=name)


def test_turns_rotate_inputs_and_weights(bench: Any) -> None:
    seen = []
    contender = bench.Contender("a", "int8", 1.0, [0, 1], lambda x, w: seen.append((int(x), w)))
    for call in bench.turns(contender, [torch.tensor(i) for i in range(3)]):
        call()
    assert seen == [(0, 0), (1, 1), (2, 0)]


def test_the_page_and_the_plot(bench: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [
        {"layer": "a", "m": m, "k": 2, "n": 3, "name": name, "seconds": 1e-6, "tflops": 1.0}
        | {"roofline": 0.5, "speedup": 2.0}
        for m in (1, 8)
        for name in ("torch float16", "Int8")
        if (m, name) != (8, "torch float16")
    ]
    lines = bench.table(rows).splitlines()
    assert lines[0].endswith("| torch float16 | Int8 |")
    assert lines[3] == "| a (8, 2 -> 3) |  | 1.0 us (2.00x, 1.0 TFLOP/s, 50 %) |"
    bench.plot(rows, tmp_path / "gpu.png")
    assert (tmp_path / "gpu.png").stat().st_size > 1000
