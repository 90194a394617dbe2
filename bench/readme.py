"""Writes the tables of README.md anew, from the json files of the other commands.

python bench/readme.py
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from linear import HERE

# Name in results.json -> column.
COLUMNS = {
    "torch fp32": "torch fp32",
    "fbgemm": "torch int8",
    "int8": "`Int8`",
    "int4": "`Int4`",
    "sparse": "`Sparse` 90 %",
    "sparse-int8": "`SparseInt8` 90 %",
}


def layers(figures: dict[str, Any]) -> list[list[str]]:
    """A row a layer, a column a format: milliseconds, and times faster than torch fp32."""
    results = [r for r in figures["results"] if r["layer"] != "call overhead"]
    timed = [{t["name"]: t["p50_ms"] for t in result["timings"]} for result in results]
    columns = {name: title for name, title in COLUMNS.items() if name in timed[0]}
    rows = [["layer (rows, inputs -> outputs)", *columns.values()]]
    for result, ms in zip(results, timed, strict=True):
        name = result["layer"].split(",")[0]
        fp32 = ms["torch fp32"]
        cells = [f"{ms[key]:.3g} ms ({fp32 / ms[key]:.1f}x)" for key in columns]
        sizes = f"({result['m']}, {result['k']} -> {result['n']})"
        rows.append([f"{name} {sizes}", f"{fp32:.3g} ms", *cells[1:]])
    return rows


def minilm(figures: dict[str, Any]) -> list[list[str]]:
    """A row a model: quality on STS-B, and latency."""
    models = figures["models"]
    fp32 = models["torch fp32"]["p50_ms"]
    rows = [["", "Spearman", "mean cosine", "p50"]]
    for name in sorted(models, key=lambda name: not name.startswith("torch")):
        ours, own = name.removeprefix("gossamer "), models[name]
        title = (
            name
            if ours == name
            else f"Gossamer `{ours.capitalize()}`".replace(" static`", "` static")
        )
        title += " (quantize_dynamic)" * (name == "torch int8")
        speed = f"{own['p50_ms']:.0f} ms ({fp32 / own['p50_ms']:.2f}x)"
        rows.append([title, f"{own['spearman']:.4f}", f"{own['mean_cosine']:.4f}", speed])
    return rows


def demo(figures: dict[str, Any]) -> list[list[str]]:
    """What the demo's pruned CNN keeps and gains."""
    mean, dense = figures["mean"], figures["runs"][0]["bytes"]["dense fp32"]
    one, many = mean["times_faster_batch_1"], mean["times_faster_batch_64"]
    accuracy = [f"{mean[name]:.2f} %" for name in ("accuracy_dense", "accuracy_sparse_int8")]
    return [
        ["", "dense fp32", "90 % in 1x4 blocks, sparse int8"],
        ["test accuracy", *accuracy],
        ["file", f"{dense / 1e6:.2f} MB", f"{mean['times_smaller']:.1f}x smaller"],
        ["batch 1 / batch 64", "", f"{one:.1f}x / {many:.1f}x faster"],
    ]


def training(figures: dict[str, Any]) -> list[list[str]]:
    """A row a layer, its step at 90 and 95 % zeros."""
    rows = [["forward + backward (input)", "torch", "`Sparse(trainable=True)` 90 %", "95 %"]]
    layers: dict[str, dict[float, dict[str, Any]]] = {}
    for row in figures["rows"]:
        layers.setdefault(f"{row['layer']} {tuple(row['input'])}", {})[row["sparsity"]] = row
    for name, own in layers.items():
        cells = [f"{own[s]['sparse_ms']:.3g} ms ({own[s]['ratio']:.1f}x)" for s in (0.9, 0.95)]
        rows.append([name, f"{own[0.9]['dense_ms']:.3g} ms", *cells])
    return rows


FASHION = {
    "dense": "dense, 3 epochs",
    "int8": "the same, `Int8`",
    "dense, further": "dense, 6 epochs more, distilled",
    "90": "90 % in 1x4 blocks meanwhile, `SparseInt8`",
    "95": "95 %",
    "98": "98 %",
}


def fashion(figures: dict[str, Any]) -> list[list[str]]:
    """What compression costs the textbook CNN."""
    mean = {name: row["mean"] for name, row in figures["rows"].items()}
    rows = [["Fashion-MNIST", "test accuracy", "against dense, trained as long"]]
    for name, title in FASHION.items():
        against = mean["dense" if name in ("dense", "int8") else "dense, further"]
        rows.append([title, f"{mean[name]:.2f} %", f"{mean[name] - against:+.2f}"])
    return rows


def distilled(figures: dict[str, Any]) -> list[list[str]]:
    """What MiniLM keeps at a high sparsity."""
    test, recipe = figures["test"], figures["recipe"]
    title = f"{recipe['sparsity']:.0%} in 1x4 blocks, `SparseInt8`"
    minutes = f"after {figures['minutes']:.0f} minutes of distilling on sentences without labels"
    return [
        ["all-MiniLM-L6-v2", "Spearman, STS-B test"],
        ["original, fp32", f"{test['fp32']:.4f}"],
        [f"{title}, {minutes}", f"{test['sparse int8']:.4f}"],
    ]


RESNET = {
    "torch fp32": "torch fp32",
    "torch fp32, channels_last": "torch fp32, channels_last",
    "onnxruntime int8": "ONNX Runtime int8",
    "openvino int8": "OpenVINO int8",
    "int8": "`Int8` static, fused",
    "sparse fp32 90 %": "`Sparse` 90 %, fused",
    "sparse fp32 90 %, stem too": "`Sparse` 90 %, the first layer too, fused",
    "sparse int8 80 %": "`SparseInt8` 80 %, static, fused",
    "sparse int8 90 %": "`SparseInt8` 90 %, static, fused",
}


MOBILENET = {
    **{name: RESNET[name] for name in RESNET if name.startswith(("torch", "onnx", "openvino"))},
    "int8": RESNET["int8"],
    "int8, depthwise in fp32": "the same, depthwise convolutions left to torch",
}


def net(head: str, titles: dict[str, str], figures: dict[str, Any]) -> list[list[str]]:
    """A row a net: its time at each batch, and its memory where that was measured."""
    memory = figures.get("memory", {})
    batches = [f"batch {batch}" for batch in figures["ms"]]
    rows = [[head, *batches, *([f"memory, {batches[-1]}"] if memory else [])]]
    for name, title in titles.items():
        cells = []
        for ms in figures["ms"].values():
            better = min(ms[layout] for layout in titles if layout.startswith("torch"))
            if name in ms:
                cells.append(f"{ms[name]:.3g} ms ({better / ms[name]:.1f}x)")
        if memory and cells:
            used = memory.get(name)
            cells.append(f"{sum(used.values()) / 2**20:.0f} MiB" if used else "")
        rows += [[title, *cells]] if cells else []
    return rows


def resnet(figures: dict[str, Any]) -> list[list[str]]:
    """ResNet-50."""
    return net("ResNet-50, 224 x 224", RESNET, figures)


def mobilenet(figures: dict[str, Any]) -> list[list[str]]:
    """MobileNetV2."""
    return net("MobileNetV2, 224 x 224", MOBILENET, figures)


def fashion_resnet(figures: dict[str, Any]) -> list[list[str]]:
    """What int8 costs a small ResNet."""
    fp32 = figures["rows"]["fp32"]["accuracy"]
    rows = [["small ResNet", "test accuracy", "against fp32", "same class as fp32"]]
    for name, row in figures["rows"].items():
        accuracy = row["accuracy"]
        agreement = f"{row['agreement']:.2f} %"
        rows.append([name, f"{accuracy:.2f} %", f"{accuracy - fp32:+.2f}", agreement])
    return rows


TABLES = {
    "fashion.json": fashion,
    "minilm_distil.json": distilled,
    "fashion_resnet.json": fashion_resnet,
    "resnet.json": resnet,
    "mobilenet.json": mobilenet,
    "results.json": layers,
    "training.json": training,
    "minilm.json": minilm,
    "demo.json": demo,
}


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def replace(page: str, rows: list[list[str]]) -> str:
    """The page with these rows in place of the table whose first two headers are the same."""
    lines = page.split("\n")
    head = _line(rows[0][:2]).replace("|  |", "| |")
    first = next(i for i, line in enumerate(lines) if line.startswith(head))
    last = next(i for i in range(first, len(lines)) if not lines[i].startswith("|"))
    table = [_line(rows[0]), "|" + "---|" * len(rows[0]), *map(_line, rows[1:])]
    lines[first:last] = [line.replace("|  |", "| |") for line in table]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=HERE, help="of the json files")
    parser.add_argument("--readme", type=Path, default=HERE.parent / "README.md")
    options = parser.parse_args()
    page = options.readme.read_text()
    for name, rows in TABLES.items():
        page = replace(page, rows(json.loads((options.folder / name).read_text())))
    options.readme.write_text(page)


if __name__ == "__main__":
    main()
