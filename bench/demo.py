"""Runs `gossamer demo` with three seeds and writes their mean, against the bars, to demo.json.

    python bench/demo.py

Exits with 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from gossamer import demo

HERE = Path(__file__).parent
SPARSE, DENSE = demo.NAMES[-1], demo.NAMES[0]

# What each run yields, and the least or the most that its mean may be.
FIGURES: dict[str, Callable[[dict[str, Any]], float]] = {
    "accuracy_dense": lambda run: run["accuracy"][DENSE],
    "accuracy_sparse_int8": lambda run: run["accuracy"][SPARSE],
    "points_lost": lambda run: run["accuracy"][DENSE] - run["accuracy"][SPARSE],
    "times_smaller": lambda run: run["bytes"][DENSE] / run["bytes"][SPARSE],
    "times_faster_batch_1": lambda run: _faster(run, "1"),
    "times_faster_batch_64": lambda run: _faster(run, "64"),
    "seconds": lambda run: sum(run["seconds"].values()),
}
AT_MOST = {"points_lost": 1.0, "seconds": 120.0}
AT_LEAST = {"times_smaller": 8.0, "times_faster_batch_64": 2.0}


def _faster(run: dict[str, Any], batch: str) -> float:
    latency = run["latency_ms"][batch]
    return latency[DENSE]["p50"] / latency[SPARSE]["p50"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, default=HERE / "demo.json")
    options = parser.parse_args()
    runs = []
    for seed in range(options.seeds):
        settings = demo.Settings(seed=seed, threads=options.threads)
        runs.append(demo.run(settings, console=Console(stderr=True)))
        print(demo.text(runs[-1]), end="\n\n", flush=True)
    mean = {name: statistics.mean(map(figure, runs)) for name, figure in FIGURES.items()}
    missed = [name for name, bar in AT_MOST.items() if mean[name] > bar]
    missed += [name for name, bar in AT_LEAST.items() if mean[name] < bar]
    figures = {"mean": mean, "missed": missed, "runs": runs}
    options.json.write_text(json.dumps(figures, indent=1) + "\n")
    print(
        f"Mean of {len(runs)} seeds:", *(f"  {name}: {mean[name]:.4g}" for name in mean), sep="\n"
    )
    if missed:
        sys.exit(f"missed: {', '.join(missed)}")


if __name__ == "__main__":
    main()
