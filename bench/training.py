"""Times forward and backward of one layer, dense and on the sparse kernels.

    python bench/training.py                # one thread, the best instruction set
    python bench/training.py --isa avx2

Writes training.json and training.md (training-ISA for another Isa than the best). A step is the
layer's forward, and the gradients of x, the weight and the bias; packing of activations included.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from typing import Any

import torch
from linear import about, add_folder, heading
from torch import Tensor, nn

import gossamer as gs
from gossamer import _C, testing
from gossamer.report import render
from gossamer.timing import interleave, threads

SPARSITIES = (0.8, 0.9, 0.95, 0.98)
# What the project is held to: times faster than torch, of bert.ffn.up.
BARS = {0.9: 4.0, 0.95: 6.5}
ROWS = 1024
LAYERS: dict[str, Callable[[int], tuple[nn.Module, Tensor]]] = {
    "bert.ffn.up": lambda s: (nn.Linear(768 // s, 3072 // s), torch.randn(ROWS // s, 768 // s)),
    "bert.ffn.down": lambda s: (nn.Linear(3072 // s, 768 // s), torch.randn(ROWS // s, 3072 // s)),
    "minilm.ffn.up": lambda s: (nn.Linear(384 // s, 1536 // s), torch.randn(4096 // s, 384 // s)),
    "resnet50.layer2.conv2, 8 images": lambda s: (
        nn.Conv2d(128 // s, 128 // s, 3, padding=1),
        torch.randn(8, 128 // s, 28, 28),
    ),
}


def pruned(dense: Any, sparsity: float) -> Any:
    """The layer, trainable, with that share of its weights removed at random."""
    with torch.no_grad():
        dense.weight[torch.rand(dense.weight.shape) < sparsity] = 0
    layer = gs.Linear if type(dense) is nn.Linear else gs.Conv2d
    return layer.from_dense(dense, gs.Sparse(trainable=True))


def step(layer: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], None]:
    def run() -> None:
        layer.zero_grad()
        x.grad = None
        layer(x).backward(dy)

    return run


def measure(shrink: int, rounds: int) -> list[dict[str, Any]]:
    """A row a layer and sparsity; all steps of a layer ran in turns."""
    rows = []
    for name, make in LAYERS.items():
        dense, x = make(shrink)
        x.requires_grad_()
        dy = torch.randn_like(dense(x))
        steps = [step(dense, x, dy)]
        for sparsity in SPARSITIES:
            steps.append(step(pruned(make(shrink)[0], sparsity), x, dy))
        ms = [statistics.median(times) for times in interleave(steps, rounds)]
        for sparsity, own in zip(SPARSITIES, ms[1:], strict=True):
            rows.append(
                {
                    "layer": name,
                    "input": list(x.shape),
                    "sparsity": sparsity,
                    "dense_ms": ms[0],
                    "sparse_ms": own,
                    "ratio": ms[0] / own,
                    "bar": BARS.get(sparsity) if name == "bert.ffn.up" else None,
                }
            )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        kept = "" if row["bar"] is None else "pass" if row["ratio"] >= row["bar"] else "MISS"
        bar = "" if row["bar"] is None else f"{row['bar']:.1f}x: {kept}"
        name = f"{row['layer']} {tuple(row['input'])}"
        times = [f"{row['dense_ms']:.1f} ms", f"{row['sparse_ms']:.1f} ms", f"{row['ratio']:.2f}x"]
        lines.append([name, f"{row['sparsity']:.0%}", *times, bar])
    return render(["layer (input)", ">zeros", ">torch", ">Gossamer", ">ratio", "bar"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--isa", choices=_C.isas(), default=_C.isa())
    parser.add_argument("--seconds", type=float, default=1.0, help="0: one round, to try this")
    parser.add_argument("--shrink", type=int, default=1, help="divide sizes, to try this script")
    add_folder(parser)
    options = parser.parse_args()
    torch.manual_seed(0)
    with testing.isa(options.isa), threads(options.threads):
        rows = measure(options.shrink, rounds=9 if options.seconds else 1)
        machine = about(threads=options.threads)
    print(table(rows))
    name = "training" if options.isa == _C.isas()[0] else f"training-{options.isa}"
    figures = {"machine": machine, "rows": rows}
    options.folder.joinpath(f"{name}.json").write_text(json.dumps(figures, indent=1) + "\n")
    page = [*heading("Training on sparse kernels", machine), "", table(rows), ""]
    options.folder.joinpath(f"{name}.md").write_text("\n".join(page))


if __name__ == "__main__":
    main()
