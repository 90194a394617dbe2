"""Times a whole distillation step, and what the cache of the teacher's outputs saves of one.

    python bench/distil.py

Writes distil.json and distil.md. Six layers of MiniLM's size (384, 1536), 32 x 128 tokens, one
thread: forward of teacher and student, losses, backward, AdamW. Dense is what one has without us,
an fp32 teacher and a student whose weights a pruner masks after each step; sparse is an int8
teacher and a student of `Sparse(trainable=True)` layers. Both start from the same weights, 90 % of
them zero, and their losses are compared step by step.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from linear import about, add_folder, heading
from torch import Tensor, nn

import gossamer as gs
from gossamer.report import render
from gossamer.tasks.minilm import Block
from gossamer.timing import interleave, threads

SPARSITY = 0.9
# What the project is held to: times faster than the dense step, and the losses' difference.
BAR, LOSS_BAR = 2.0, 0.02
DENSE, SPARSE = "fp32 teacher, masked dense student", "int8 teacher, sparse student"
FEATURES = (gs.Cosine(), gs.SquareHead("layers.?"))


class Encoder(nn.Module):
    """The layers of a sentence encoder, without its table of words."""

    def __init__(self, shrink: int) -> None:
        super().__init__()
        width = 384 // shrink
        self.layers = nn.ModuleList(Block(width, 12 // shrink, 4 * width) for _ in range(6))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, mask)
        return x


class Step:
    """One step of training on one batch, again and again; its losses are kept."""

    def __init__(self, inputs: Any, distiller: gs.Distiller, pruner: gs.Pruner | None) -> None:
        self.inputs, self.distiller, self.pruner = inputs, distiller, pruner
        self.optimizer = torch.optim.AdamW(distiller.student.parameters(), lr=1e-4)
        self.losses: list[float] = []

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        loss = self.distiller(self.inputs)
        loss.backward()
        self.optimizer.step()
        if self.pruner is not None:
            self.pruner.step()
        self.losses.append(loss.item())


def timed(steps: dict[str, Step], rounds: int) -> dict[str, dict[str, Any]]:
    """Milliseconds of each, in turns, and the losses."""
    times = interleave(list[Callable[[], object]](steps.values()), rounds)
    return {
        name: {"ms": statistics.median(ms), "rounds_ms": ms, "losses": step.losses}
        for (name, step), ms in zip(steps.items(), times, strict=True)
    }


def pruned(teacher: nn.Module) -> tuple[nn.Module, gs.Pruner]:
    student = copy.deepcopy(teacher)
    pruner = gs.Pruner(student, SPARSITY)
    pruner.step()
    return student, pruner


def sparse(inputs: Any, teacher: nn.Module, losses: Any, **options: Any) -> Step:
    student, _ = pruned(teacher)
    gs.compress_(student, gs.Sparse(trainable=True))
    options["teacher_format"] = gs.Int8()
    return Step(inputs, gs.Distiller(student, teacher, losses, **options), None)


def measure(shrink: int, rounds: int) -> dict[str, Any]:
    teacher = Encoder(shrink)
    tokens = 128 // shrink
    x = torch.randn(max(1, 32 // shrink), tokens, 384 // shrink)
    inputs = x, torch.ones(x.shape[:2], dtype=torch.bool)
    student, pruner = pruned(teacher)
    dense = Step(inputs, gs.Distiller(student, teacher, FEATURES), pruner)
    steps = timed({DENSE: dense, SPARSE: sparse(inputs, teacher, FEATURES)}, rounds)
    with tempfile.TemporaryDirectory() as folder:
        cache = {
            "without the cache": sparse(inputs, teacher, [gs.Cosine()]),
            "with the cache": sparse(inputs, teacher, [gs.Cosine()], cache=folder),
        }
        cached = timed(cache, rounds)
    pairs = zip(steps[DENSE]["losses"], steps[SPARSE]["losses"], strict=True)
    difference = max(abs(ours - theirs) / theirs for theirs, ours in pairs)
    return {
        "input": list(x.shape),
        "steps": steps,
        "cache": cached,
        "ratio": steps[DENSE]["ms"] / steps[SPARSE]["ms"],
        "loss_difference": difference,
    }


def text(figures: dict[str, Any]) -> str:
    first, last = (lambda losses: losses[0]), (lambda losses: losses[-1])
    rows = []
    for group, losses in (("steps", "Cosine, SquareHead"), ("cache", "Cosine")):
        for name, step in figures[group].items():
            shown = (f"{pick(step['losses']):.4f}" for pick in (first, last))
            rows.append([name, losses, f"{step['ms']:.0f} ms", *shown])
    ratio, difference = figures["ratio"], figures["loss_difference"]
    verdicts = ["pass" if ratio >= BAR else "MISS", "pass" if difference <= LOSS_BAR else "MISS"]
    return "\n".join(
        [
            render(["step", "losses", ">median", ">first loss", ">last"], rows),
            "",
            f"The sparse step is {ratio:.2f}x as fast (bar {BAR}x: {verdicts[0]}); its losses are",
            f"within {difference:.2%} of the dense step's (bar {LOSS_BAR:.0%}: {verdicts[1]}).",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1.0, help="0: one round, to try this")
    parser.add_argument("--shrink", type=int, default=1, help="divide sizes, to try this script")
    add_folder(parser)
    options = parser.parse_args()
    torch.manual_seed(0)
    with threads(options.threads):
        figures = measure(min(options.shrink, 12), rounds=3 if options.seconds else 1)
    machine = about(threads=options.threads)
    print(text(figures))
    saved = {"machine": machine, **figures}
    options.folder.joinpath("distil.json").write_text(json.dumps(saved, indent=1) + "\n")
    page = [*heading("A step of distillation", machine), "", text(figures), ""]
    options.folder.joinpath("distil.md").write_text("\n".join(page))


if __name__ == "__main__":
    main()
