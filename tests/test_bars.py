"""bench/: the scripts run, on layers small enough to say nothing, and write what they promise."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from builds import ROOT, output

from gossamer import _C, bench


def run(script: str, folder: Path, *options: str) -> str:
    command = (sys.executable, ROOT / "bench" / script, "--folder", folder, "--seconds", "0")
    return output(*command, "--shrink", "64", *options)


def test_every_bar_is_measured(tmp_path: Path) -> None:
    shown = run("bars.py", tmp_path)
    bars = json.loads((tmp_path / "bars.json").read_text())["bars"]
    assert {bar["item"] for bar in bars} == {1, 2, 3, 4, 5, 6, 7, 10}
    for bar in bars:
        assert math.isfinite(bar["measured"]) and bar["measured"] >= 0
        kept = bar["measured"] >= bar["limit"]
        assert bar["passed"] == (kept if bar["sense"] == ">=" else bar["measured"] <= bar["limit"])
    for name in bench.FORMATS:
        assert sum(bar["what"].startswith(f"{name}, call of the operator") for bar in bars) == 1
    page = (tmp_path / "bars.md").read_text()
    assert all(bar["what"] in page and bar["what"] in shown for bar in bars)


def test_files_go_to_a_folder_that_is_made_first(tmp_path: Path) -> None:
    run("bars.py", tmp_path / "new" / "folder", "--items", "1")
    assert (tmp_path / "new" / "folder" / "bars.md").exists()
    taken = tmp_path / "file"
    taken.write_text("")
    command = [sys.executable, str(ROOT / "bench" / "bars.py"), "--folder", str(taken)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and f"--folder: {taken}: File exists" in done.stderr


@pytest.mark.skipif("avx2" not in _C.isas(), reason="this CPU has no AVX2")
def test_avx2_is_compared_with_avx2(tmp_path: Path) -> None:
    run("bars.py", tmp_path, "--isa", "avx2", "--items", "1")
    figures = json.loads((tmp_path / "bars-avx2.json").read_text())
    assert (figures["machine"]["isa"], figures["machine"]["fbgemm"]) == ("avx2", "AVX2")
    assert len(figures["bars"]) == 3


def test_layers_give_figures_a_page_and_two_plots(tmp_path: Path) -> None:
    run("linear.py", tmp_path, "--peers", "none")
    figures = json.loads((tmp_path / "results.json").read_text())
    page = (tmp_path / "results.md").read_text()
    assert all(f"## {result['layer']}: " in page for result in figures["results"])
    assert figures["ceilings"]["fp32"] > 0 and f"ceilings of {_C.isa()}" in page
    for name in ("roofline.png", "speedup.png"):
        assert (tmp_path / name).stat().st_size < 150_000
        assert f"({name})" in page

    tables = ("minilm", "demo", "training", "fashion", "minilm_distil", "fashion_resnet", "resnet")
    tables += ("mobilenet",)
    for name in ("README.md", *(f"bench/{table}.json" for table in tables)):
        shutil.copy(ROOT / name, tmp_path)
    readme = tmp_path / "README.md"
    command = (sys.executable, ROOT / "bench" / "readme.py", "--readme", readme)
    output(*command, "--folder", tmp_path)
    before, after = (ROOT / "README.md").read_text(), readme.read_text()
    first, *_ = (r for r in figures["results"] if r["layer"] != "call overhead")
    assert f"({first['m']}, {first['k']} -> {first['n']}) | " in after
    prose = [[line for line in text.split("\n") if "|" not in line] for text in (before, after)]
    assert prose[0] == prose[1], "nothing but tables is written"


def test_training_steps_are_timed(tmp_path: Path) -> None:
    shown = run("training.py", tmp_path)
    figures = json.loads((tmp_path / "training.json").read_text())
    assert [row["bar"] for row in figures["rows"] if row["bar"]] == [4.0, 6.5]
    assert all(row["sparse_ms"] > 0 for row in figures["rows"])
    assert shown.strip() in (tmp_path / "training.md").read_text()


def test_a_distillation_step_is_timed(tmp_path: Path) -> None:
    shown = run("distil.py", tmp_path)
    figures = json.loads((tmp_path / "distil.json").read_text())
    assert figures["ratio"] > 0 and figures["loss_difference"] < 0.05
    assert all(step["ms"] > 0 for group in ("steps", "cache") for step in figures[group].values())
    assert shown.strip() in (tmp_path / "distil.md").read_text()


def test_an_encoder_is_timed_and_its_parts(tmp_path: Path) -> None:
    shown = run("encoder.py", tmp_path)
    figures = json.loads((tmp_path / "encoder.json").read_text())
    assert [row["bar"] for row in figures["rows"] if row["bar"]] == [2.0, 4.0]
    assert all(row["ms"] > 0 for row in figures["rows"])
    assert figures["shares"]["Int8, fused"]["GELU"] == 0 < figures["shares"]["Int8"]["GELU"]
    assert all(sum(own.values()) == pytest.approx(1) for own in figures["shares"].values())
    assert (tmp_path / "encoder.md").read_text().strip() in shown
