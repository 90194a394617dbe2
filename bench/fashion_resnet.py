"""What int8 costs a small ResNet on Fashion-MNIST: writes fashion_resnet.json and .md.

    apt-get install dataset-fashion-mnist    # Debian: 60,000 + 10,000 images
    python bench/fashion_resnet.py

Three residual blocks with BatchNorm (308,650 parameters) are trained on images that are flipped and
shifted; then all layers are quantized, and the accuracy is measured on the 10,000 test images.
The work folder keeps the trained weights of each seed.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from fashion_rows import STATIC, Recipe, calibrated, train
from linear import HERE, about, add_folder, heading
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from verdict import Bar, as_json, verdicts

import gossamer as gs
from gossamer.digits import shifted
from gossamer.report import render
from gossamer.tasks.fashion import Images, images
from gossamer.tasks.resnet import fashion_resnet
from gossamer.timing import threads

WORK = HERE.parent / "build" / "fashion-resnet"
RECIPE = Recipe(epochs=8)
FP32, FUSED = "fp32", "int8 static, fused"


def used(recipe: Recipe) -> dict[str, Any]:
    """What this training reads of a recipe."""
    return {name: getattr(recipe, name) for name in ("epochs", "batch", "rate")}


def augmented(x: Tensor) -> Tensor:
    """Each image mirrored or not, the batch moved by up to 2 pixels."""
    mirrored = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(3), x)
    return shifted(mirrored).contiguous(memory_format=torch.channels_last)


def trained(folder: Path, seed: int, data: Images, recipe: Recipe) -> tuple[nn.Module, float]:
    """The dense net of a seed in eval mode, and the core seconds of its training, done once."""
    path, metadata = folder / f"{seed}.safetensors", {"recipe": json.dumps(used(recipe))}
    torch.manual_seed(seed)
    model = fashion_resnet()
    if not path.exists():

        def loss(x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(model(augmented(x)), y)

        start = time.process_time()
        train(model, loss, data, recipe)
        metadata["seconds"] = f"{time.process_time() - start:.1f}"
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: weight.contiguous() for name, weight in model.state_dict().items()}
        save_file(weights, path, metadata)
    with safe_open(path, "pt") as file:
        found = file.metadata()
    if found["recipe"] != metadata["recipe"]:
        raise SystemExit(f"{path} is of another recipe, {found['recipe']}: remove it")
    model.load_state_dict(load_file(path))
    return model.eval(), float(found["seconds"])


def dynamic(model: nn.Module, data: Images) -> nn.Module:
    """Each layer int8, inputs quantized by their own range."""
    gs.compress_(model, gs.Int8())
    return model


def static(model: nn.Module, data: Images) -> nn.Module:
    """Each layer int8, by ranges from a thousand training images; floats between the layers."""
    calibrated(model, data)
    gs.compress_(model, STATIC)
    return model


def fused(model: nn.Module, data: Images) -> nn.Module:
    """The same, int8 between the layers."""
    x, _ = data.batch(torch.arange(min(100, len(data.y))))
    return gs.fuse(static(model, data), example_inputs=(x,))


ROWS: dict[str, Callable[[nn.Module, Images], nn.Module]] = {
    FP32: lambda model, data: model,
    "int8 dynamic, layer by layer": dynamic,
    "int8 static, layer by layer": static,
    FUSED: fused,
}


@torch.inference_mode()
def classes(model: nn.Module, data: Images) -> Tensor:
    """Which class the model puts each image in: (images) int64."""
    parts = torch.arange(len(data.y)).split(500)
    return torch.cat([model(data.batch(chosen)[0]).argmax(1) for chosen in parts])


def measured(model: nn.Module, data: tuple[Images, Images]) -> dict[str, dict[str, float]]:
    """Row -> percent of the test images that are right, and that are where fp32 puts them."""
    guesses = {
        name: classes(make(copy.deepcopy(model), data[0]), data[1]) for name, make in ROWS.items()
    }
    return {
        name: {
            "accuracy": 100 * (own == data[1].y).double().mean().item(),
            "agreement": 100 * (own == guesses[FP32]).double().mean().item(),
        }
        for name, own in guesses.items()
    }


def summary(runs: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Means over the seeds, and the bars."""
    rows = {
        name: {
            "accuracy": statistics.mean(run[name]["accuracy"] for run in runs),
            "agreement": statistics.mean(run[name]["agreement"] for run in runs),
            "each": [run[name] for run in runs],
        }
        for name in ROWS
    }
    fp32, int8 = rows[FP32], rows[FUSED]
    lost = fp32["accuracy"] - int8["accuracy"]
    bars = [
        Bar(1, "fp32, accuracy", ">=", 92.0, fp32["accuracy"], " %"),
        Bar(2, f"{FUSED}, points lost", "<=", 0.3, lost, ""),
        Bar(3, f"{FUSED}, same class as fp32", ">=", 98.0, int8["agreement"], " %"),
    ]
    return {"rows": rows, "bars": as_json(bars)}


def markdown(figures: dict[str, Any]) -> str:
    """fashion_resnet.md."""
    fp32 = figures["rows"][FP32]["accuracy"]
    rows = [
        [
            *(name, f"{row['accuracy']:.2f} %", f"{row['accuracy'] - fp32:+.2f}"),
            f"{row['agreement']:.2f} %",
            " ".join(f"{run['accuracy']:.2f}" for run in row["each"]),
        ]
        for name, row in figures["rows"].items()
    ]
    headers = ["", ">accuracy", ">difference", ">same class as fp32", ">each seed"]
    seconds = " ".join(f"{value:.0f}" for value in figures["core_seconds"])
    about_rows = (
        "Mean over the seeds, on the 10,000 test images; a difference is in points.\n"
        f"Training took {seconds} core seconds."
    )
    lines = heading("Fashion-MNIST: a small ResNet in int8", figures["machine"])
    lines += ["", about_rows, "", render(headers, rows), "", "## Bars", ""]
    return "\n".join([*lines, verdicts(figures["bars"]), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of the four idx.gz, if not Debian's")
    parser.add_argument("--work", type=Path, default=WORK, help="where trained weights are kept")
    add_folder(parser)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, help="to train and to test with, to try this script")
    options = parser.parse_args()
    data = tuple(images(part, options.images, options.data) for part in ("train", "test"))
    recipe = replace(RECIPE, epochs=1) if options.images else RECIPE
    with threads(1):
        nets = [trained(options.work, seed, data[0], recipe) for seed in range(options.seeds)]
        runs = [measured(model, (data[0], data[1])) for model, _ in nets]
    figures = {"machine": about(threads=1), "recipe": used(recipe), **summary(runs)}
    figures["core_seconds"] = [seconds for _, seconds in nets]
    options.folder.joinpath("fashion_resnet.json").write_text(json.dumps(figures, indent=1) + "\n")
    options.folder.joinpath("fashion_resnet.md").write_text(markdown(figures))
    print(markdown(figures))


if __name__ == "__main__":
    main()
