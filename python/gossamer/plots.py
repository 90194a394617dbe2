"""Pictures of figures: a roofline, bars of speed-up, quality over sparsity and over minutes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .bench import FORMATS, TORCH_FP32, Result
from .ceilings import Ceilings

# Ours in strong colours, in the order of FORMATS; peers in pale ones.
STRONG = ("#0b5fa5", "#3aa6dd", "#d1495b", "#7a1f6d", "#e08e1b", "#2e8b57")
PALE = ("#555555", "#9aa3ab", "#c3c8cc", "#b7c9a8", "#d9d2b0", "#c9b3d6", "#e3c1c1", "#a9cdd0")


def roofline(figures: dict[str, Any], path: Path) -> None:
    """GOP/s of torch, FBGEMM and each format over operations a byte, under the machine's ceilings.

    Layers below 1e5 operations are left out, if there are others: they measure overheads.

    Args:
        figures: `ceilings` and `results`, as `gossamer bench --json` writes them.
        path: of the PNG to write.

    Raises:
        ImportError: matplotlib is not installed.
    """
    limits, results = Ceilings(**figures["ceilings"]), _results(figures)
    results = [r for r in results if 2 * r.m * r.k * r.n >= 1e5] or results
    points = [
        (number, timing, timing.ops / timing.moved_bytes)
        for number, result in enumerate(results, 1)
        for timing in result.timings
        if timing.name in (TORCH_FP32, "fbgemm", *FORMATS)
    ]
    threads = figures["ceilings"]["threads"]
    title = "Roofline: what each kernel reaches, and what the CPU could"
    figure, axes = _figure(f"{title}\n{_machine(figures['machine'], threads)}")
    axes.set(xscale="log", yscale="log")
    axes.set_xlim(
        0.5 * min(intensity for *_, intensity in points),
        2 * max(*(intensity for *_, intensity in points), limits.int8 / limits.dram),
    )
    axes.set_ylim(0.5 * min(timing.gflops for _, timing, _ in points), 2 * limits.int8)
    _draw_ceilings(axes, limits, *axes.get_xlim())
    colour = _colours(results)
    for name in (name for name in colour if any(t.name == name for _, t, _ in points)):
        own = [(x, t.gflops, number) for number, t, x in points if t.name == name]
        axes.scatter(
            *zip(*((x, y) for x, y, _ in own), strict=True),
            s=70,
            color=colour[name],
            marker="o" if name in FORMATS else "s",
            label=name,
            zorder=3,
        )
        for x, y, number in own:
            axes.annotate(
                str(number), (x, y), ha="center", va="center", fontsize=6, color="white", zorder=4
            )
    axes.set_xlabel("operations / byte of weight, input and output")
    axes.set_ylabel("GOP/s on stored weights")
    axes.grid(True, which="major", linewidth=0.3)
    places = [f"{number}  {_title(result)}" for number, result in enumerate(results, 1)]
    figure.text(0.715, 0.86, "\n".join(places), fontsize=7, va="top", linespacing=1.5)
    axes.legend(loc="lower left", bbox_to_anchor=(1.01, 0.0), fontsize=8, frameon=False)
    figure.subplots_adjust(left=0.07, right=0.7, top=0.9, bottom=0.09)
    figure.savefig(path, dpi=100)


def speedup(figures: dict[str, Any], path: Path) -> None:
    """How many times faster than torch fp32 each format and each peer is, a group a layer.

    Args:
        figures: `results`, as `gossamer bench --json` writes them.
        path: of the PNG to write.

    Raises:
        ImportError: matplotlib is not installed.
    """
    results = _results(figures)
    colour = _colours(results)
    names = [name for name in colour if name != TORCH_FP32]
    threads = figures["ceilings"]["threads"]
    figure, axes = _figure(f"Times faster than torch fp32\n{_machine(figures['machine'], threads)}")
    width = 0.86 / max(1, len(names))
    for index, name in enumerate(names):
        at = [
            (place + (index + 0.5) * width - 0.43, timing.vs[TORCH_FP32])
            for place, result in enumerate(results)
            if (timing := result.timing(name))
        ]
        # From 1 up, or down where it is slower: the axis is logarithmic.
        x, y = zip(*at, strict=True)
        axes.bar(x, [v - 1 for v in y], width, bottom=1, color=colour[name], label=name, zorder=3)
    values = [timing.vs[TORCH_FP32] for result in results for timing in result.timings]
    axes.set(yscale="log", ylim=(min(values) / 1.2, max(values) * 2.5))
    ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50) if min(values) <= t <= max(values)]
    axes.set_yticks(ticks, [f"{tick:g}x" for tick in ticks])
    axes.minorticks_off()
    axes.axhline(1, color="black", linewidth=0.8, zorder=4)
    axes.grid(True, axis="y", linewidth=0.3)
    labels = [_title(result).replace(" (", "\n(") for result in results]
    axes.set_xticks(range(len(results)), labels, fontsize=7, rotation=20, ha="right")
    axes.legend(ncols=6, fontsize=8, frameon=False, loc="upper left")
    axes.margins(x=0.01)
    figure.subplots_adjust(left=0.05, right=0.99, top=0.91, bottom=0.17)
    figure.savefig(path, dpi=100)


def sensitivity(figures: dict[str, Any], path: Path) -> None:
    """Quality over sparsity, a line for each layer, and the dense model's as a dashed line.

    Args:
        figures: `dense`, `sparsities` and `layers`, as `Sensitivity.to_json` gives them.
        path: of the PNG to write.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure, axes = _figure("Quality with one layer pruned")
    marks = ("o", "s", "^", "D", "v")
    for index, layer in enumerate(figures["layers"]):
        colour, mark = STRONG[index % len(STRONG)], marks[index // len(STRONG) % len(marks)]
        label = f"{layer['name'] or '(the model)'} ({layer['weights']:,d})"
        axes.plot(figures["sparsities"], layer["quality"], color=colour, marker=mark, label=label)
    axes.axhline(figures["dense"], color="black", linewidth=0.8, linestyle="--", label="dense")
    axes.set_xlabel("share of the layer's weights pruned")
    axes.set_ylabel("quality")
    axes.grid(True, linewidth=0.3)
    columns = 1 + len(figures["layers"]) // 32
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=7, ncols=columns)
    figure.subplots_adjust(left=0.07, right=0.86 - 0.14 * columns, top=0.9, bottom=0.09)
    figure.savefig(path, dpi=100)


def curve(figures: dict[str, Any], path: Path) -> None:
    """Quality of a compressed model over minutes of training, and its sparsity then.

    Args:
        figures: `machine` with its `threads`, `title`, `metric`, `curve` (dicts with `minutes`,
            `quality` and `sparsity`) and `levels` (label -> quality), drawn as lines across.
        path: of the PNG to write.

    Raises:
        ImportError: matplotlib is not installed.
    """
    about, points = figures["machine"], figures["curve"]
    figure, axes = _figure(f"{figures['title']}\n{_machine(about, about['threads'])}")
    minutes = [point["minutes"] for point in points]
    zeros = axes.twinx()
    zeros.fill_between(minutes, [p["sparsity"] for p in points], color=PALE[2], alpha=0.5)
    zeros.set(ylim=(0, 1), ylabel="share of zeros (grey)")
    axes.set_zorder(zeros.get_zorder() + 1)
    axes.patch.set_visible(False)
    axes.plot(minutes, [p["quality"] for p in points], marker="o", color=STRONG[0])
    for (label, level), colour in zip(figures["levels"].items(), STRONG[1:], strict=False):
        axes.axhline(level, color=colour, linewidth=1, linestyle="--", label=f"{label} {level:.4f}")
    axes.set_xlabel("minutes of training")
    axes.set_ylabel(figures["metric"])
    axes.grid(True, linewidth=0.3)
    axes.legend(loc="lower right", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def _figure(title: str) -> tuple[Any, Any]:
    """A figure without pyplot: no window, no state that outlives it."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "plots need matplotlib, which is not installed: pip install matplotlib"
        ) from error
    figure = Figure(figsize=(12, 6))
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=10, loc="left")
    return figure, axes


def _machine(about: dict[str, Any], threads: int) -> str:
    what = f"{about['cpu']}, {about['isa']}, {threads} thread{'s' * (threads > 1)}"
    return f"{what}, torch {about['torch']}"


def _draw_ceilings(axes: Any, limits: Ceilings, low: float, high: float) -> None:
    for name, peak in (("fp32 multiply-add", limits.fp32), ("int8 dot", limits.int8)):
        axes.plot([low, high], [peak, peak], color="black", linewidth=1)
        text = f"{name} {peak:.0f} GOP/s"
        axes.annotate(text, (high, peak), (-4, 3), textcoords="offset points", ha="right", size=8)
    # L2 and L3 may be close: one is labelled above its line, the other one below.
    for name, side in (("l2", "bottom"), ("l3", "top"), ("dram", "top")):
        bandwidth = getattr(limits, name)
        end = limits.int8 / bandwidth
        axes.plot([low, end], [bandwidth * low, limits.int8], color="black", linewidth=0.6)
        axes.text(
            *(1.1 * low, 1.1 * low * bandwidth, f"{name.upper()} {bandwidth:.0f} GB/s"),
            size=8,
            va=side,
            rotation=math.degrees(math.atan(bandwidth)),
            rotation_mode="anchor",
            transform_rotates_text=True,
        )


def _results(figures: dict[str, Any]) -> list[Result]:
    return [Result.from_json(data) for data in figures["results"]]


def _title(result: Result) -> str:
    sizes = f"({result.m}, {result.k} -> {result.n})"
    return f"{result.layer} {sizes}"


def _colours(results: Sequence[Result]) -> dict[str, str]:
    """Name -> colour of each way that was timed, peers first."""
    names = dict.fromkeys(timing.name for result in results for timing in result.timings)
    ours = [name for name in FORMATS if name in names]
    others = [name for name in names if name not in FORMATS]
    pairs = [(others, PALE), (ours, STRONG)]
    return {
        name: palette[index % len(palette)]
        for group, palette in pairs
        for index, name in enumerate(group)
    }
