"""Times an encoder whole, and says where its time goes.

    python bench/encoder.py

Writes encoder.json and encoder.md. The encoder is all-MiniLM-L6-v2 with random weights, which take
the time of any others; each fused model is compared with the one that it was made of first.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from typing import Any

import torch
import torch.nn.functional as F
from linear import about, add_folder, heading
from torch import Tensor, nn

import gossamer as gs
from gossamer import _C, peers, testing
from gossamer.report import render
from gossamer.tasks.minilm import MiniLM
from gossamer.timing import interleave, threads

# Sentences x tokens. The first has bars: times faster than torch fp32, on one thread.
SIZES = ((8, 128), (1, 128), (1, 16))
SPARSE = "SparseInt8 90 %, fused"
BARS = {"Int8, fused": 2.0, SPARSE: 4.0}
# The operators of a profile, by what they are for.
PARTS = {"gossamer::": "linear layers", "addmm": "linear layers", "aten::add": "additions"}
PARTS |= {"scaled_dot": "attention", "layer_norm": "LayerNorm", "gelu": "GELU"}


def tokens(sentences: int, length: int) -> tuple[Tensor, Tensor]:
    """Random words, all of which count."""
    ids = torch.randint(1000, 30000, (sentences, length))
    return ids, torch.ones_like(ids).bool()


def models(shrink: int) -> dict[str, nn.Module]:
    """The encoder in each form."""
    dense = MiniLM(384 // shrink, 12, 1536 // shrink).eval()
    inputs = tokens(2, 16)
    pruned = copy.deepcopy(dense)
    gs.prune_(pruned, sparsity=0.9, pattern="1x4")
    static = copy.deepcopy(dense)
    with gs.calibrate(static), torch.no_grad():
        static(*inputs)
    found: dict[str, nn.Module] = {"torch fp32": dense}
    try:
        found["torch int8 (FBGEMM)"] = peers.quantize_dynamic(dense)
    except ImportError as error:
        print(error)
    for name, model, format in (
        ("Int8", dense, gs.Int8()),
        ("Int8 static", static, gs.Int8(activations="static")),
        ("SparseInt8 90 %", pruned, gs.SparseInt8()),
    ):
        packed = found[name] = copy.deepcopy(model)
        gs.compress_(packed, format)
        fused = found[f"{name}, fused"] = gs.fuse(packed, example_inputs=inputs)
        alike = F.cosine_similarity(fused(*inputs), packed(*inputs)).min()
        assert alike > 0.999, f"{name}: fused has the cosine {alike} to what it was made of"
    return found


def profile(model: nn.Module, inputs: tuple[Tensor, Tensor], rounds: int) -> dict[str, float]:
    """The share of each part in a forward."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        for _ in range(rounds):
            model(*inputs)
    shares = dict.fromkeys([*PARTS.values(), "others"], 0.0)
    for event in seen.key_averages():
        part = next((part for key, part in PARTS.items() if key in event.key), "others")
        shares[part] += event.self_cpu_time_total
    return {part: time / sum(shares.values()) for part, time in shares.items()}


def measure(found: dict[str, nn.Module], rounds: int, count: int) -> list[dict[str, Any]]:
    """A row a model and size; all models ran in turns."""
    rows = []
    with torch.inference_mode(), threads(count):
        for sentences, length in SIZES:
            inputs = tokens(sentences, length)
            calls = [lambda m=model, x=inputs: m(*x) for model in found.values()]
            more = rounds if rounds == 1 else max(rounds, 2048 // (sentences * length))
            times = [statistics.median(own) for own in interleave(calls, more)]
            for name, ms in zip(found, times, strict=True):
                size = {"sentences": sentences, "tokens": length, "threads": count}
                barred = (sentences, length, count) == (*SIZES[0], 1)
                bar = BARS.get(name) if barred else None
                rows.append({"model": name, **size, "ms": ms, "ratio": times[0] / ms, "bar": bar})
    return rows


def page(figures: dict[str, Any]) -> str:
    """encoder.md."""
    lines = heading("An encoder, whole", figures["machine"])
    rows = figures["rows"]
    for count in sorted({row["threads"] for row in rows}):
        table = []
        for name in dict.fromkeys(row["model"] for row in rows):
            own = [row for row in rows if (row["model"], row["threads"]) == (name, count)]
            cells = [f"{row['ms']:.2f} ms ({row['ratio']:.2f}x)" for row in own]
            bars = [row for row in own if row["bar"]]
            kept = [
                f"{r['bar']:.1f}x: {'pass' if r['ratio'] >= r['bar'] else 'MISS'}" for r in bars
            ]
            table.append([name, *cells, *(kept or [""])])
        sizes = [f">{sentences} x {length} tokens" for sentences, length in SIZES]
        lines += ["", f"## {count} thread(s)", "", render(["", *sizes, "bar"], table)]
    lines += ["", f"## Where the time goes: {SIZES[0][0]} x {SIZES[0][1]} tokens, one thread", ""]
    parts = next(iter(figures["shares"].values()))
    shares = [
        [name, *(f"{share:.1%}" for share in own.values())]
        for name, own in figures["shares"].items()
    ]
    lines += [render(["", *(f">{part}" for part in parts)], shares), ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--isa", choices=_C.isas(), default=_C.isa())
    parser.add_argument("--seconds", type=float, default=1.0, help="0: one round, to try this")
    parser.add_argument("--shrink", type=int, default=1, help="divide sizes, to try this script")
    add_folder(parser)
    options = parser.parse_args()
    torch.manual_seed(0)
    rounds = 7 if options.seconds else 1
    with testing.isa(options.isa):
        found = models(min(options.shrink, 8))
        counts = (1, 2) if options.shrink == 1 else (1,)
        rows = [row for count in counts for row in measure(found, rounds, count)]
        with torch.inference_mode(), threads(1):
            names = ("torch fp32", "Int8", "Int8, fused", SPARSE)
            shares = {name: profile(found[name], tokens(*SIZES[0]), rounds) for name in names}
        figures = {"machine": about(), "rows": rows, "shares": shares}
    options.folder.joinpath("encoder.json").write_text(json.dumps(figures, indent=1) + "\n")
    options.folder.joinpath("encoder.md").write_text(page(figures))
    print(page(figures))


if __name__ == "__main__":
    main()
