"""Plots: files that a viewer can open, and a sentence where matplotlib is missing."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest

from gossamer import bench, ceilings, plots


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    results = [
        bench.linear(m, k, n, layer=name, seconds=0, against=against)
        for name, m, k, n, against in (
            ("small", 2, 16, 16, []),
            ("large", 16, 160, 160, ["fbgemm"]),
        )
    ]
    limits = ceilings.of(results[0].isa, 1).to_json()
    return {
        "machine": bench.machine(),
        "ceilings": limits,
        "results": [result.to_json() for result in results],
    }


@pytest.mark.parametrize("plot", [plots.roofline, plots.speedup])
def test_a_png_is_written(plot: Any, figures: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "plot.png"
    plot(figures, path)
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n") and content.rstrip().endswith(b"IEND\xaeB`\x82")
    assert 10_000 < len(content) < 150_000


@pytest.mark.parametrize("plot", [plots.roofline, plots.speedup])
def test_small_layers_alone_can_be_drawn(
    plot: Any, figures: dict[str, Any], tmp_path: Path
) -> None:
    plot({**figures, "results": figures["results"][:1]}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").exists()


def test_results_survive_json(figures: dict[str, Any]) -> None:
    for data in figures["results"]:
        assert bench.Result.from_json(data).to_json() == data


def test_without_matplotlib_there_is_a_sentence(
    figures: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def absent(name: str, *rest: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        plots.roofline(figures, tmp_path / "plot.png")
