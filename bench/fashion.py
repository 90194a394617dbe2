"""What compression costs on Fashion-MNIST, with what it is held to: writes fashion.json and .md.

    apt-get install dataset-fashion-mnist    # Debian: 60,000 + 10,000 images
    python bench/fashion.py

The textbook CNN (545,098 parameters) is trained for three epochs. Each other row starts from that
model: as it is, or trained for six epochs more while it learns from it (`gossamer.Distiller`, the
teacher packed to int8) and loses its weights (`gossamer.Pruner`, blocks of 1x4, all but the first
and the last layer). The accuracy is that of the packed model, on the 10,000 test images.

A student a tenth as large sees a tenth of the training images, for 20 epochs, and learns from their
labels alone, or also from that yardstick.

Recipes were chosen by `--tune`: with seed 100, which is not among those reported, rows learn from
50,000 of the training images and are scored on the other 10,000. The test images decide nothing,
and neither does the yardstick: a recipe was chosen that is good for what is pruned.

The work folder keeps each row that is done, and a second call goes on from there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from fashion_rows import ALL, CONTROLS, ROWS, STUDENTS, YARDSTICK, Recipe, Row, fit, student
from linear import HERE, about, add_folder, heading
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import gossamer as gs
from gossamer.digits import TextbookCNN
from gossamer.report import render
from gossamer.tasks.fashion import Images, accuracy, images
from gossamer.timing import threads

WORK = HERE.parent / "build" / "fashion"
TUNING_SEED = 100


def held_out(data: Images) -> tuple[Images, Images]:
    """Training images to learn from, and the last sixth of them to choose a recipe by."""
    count = len(data.y) // 6
    return Images(data.x[:-count], data.y[:-count]), Images(data.x[-count:], data.y[-count:])


class Work:
    """A folder of finished rows: figures as json, weights as safetensors.

    Args:
        folder: made if it is not there.
        data: images to train with, and to test with.
        changes: to every recipe.
    """

    def __init__(self, folder: Path, data: tuple[Images, Images], changes: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.data, self.changes = folder, data, changes

    def model(self, name: str, seed: int) -> nn.Module:
        """The weights that a row was left with, before packing."""
        self.figures(name, seed)
        model = student() if ALL[name].start is student else TextbookCNN()
        model.load_state_dict(load_file(self._path(name, seed, "safetensors")))
        return model.eval()

    def figures(self, name: str, seed: int) -> dict[str, Any]:
        """What a row measured; it is trained now if it has not been."""
        recipe = replace(ALL[name].recipe, **self.changes)
        path = self._path(name, seed, "json")
        if not path.exists():
            figures, weights = self._run(ALL[name], seed, recipe)
            save_file(weights, self._path(name, seed, "safetensors"))
            # Renamed when it is whole: a row that is there is done.
            path.with_suffix(".part").write_text(json.dumps({"recipe": asdict(recipe), **figures}))
            path.with_suffix(".part").rename(path)
            print(f"{name}, seed {seed}: {figures}", flush=True)
        found = json.loads(path.read_text())
        if found["recipe"] != asdict(recipe):
            raise SystemExit(f"{path} is of another recipe, {found['recipe']}: remove it")
        return found

    def _path(self, name: str, seed: int, kind: str) -> Path:
        return self.folder / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}.{kind}"

    def _run(self, row: Row, seed: int, recipe: Recipe) -> tuple[dict[str, Any], dict[str, Tensor]]:
        teacher = cache = None
        if row.teacher is not None:
            of = seed if row.teacher_seed is None else row.teacher_seed
            teacher = self.model(row.teacher, of)
            if row.disturb:
                teacher = row.disturb(teacher)
            else:
                cache = self._path(row.teacher, of, "outputs")
        torch.manual_seed(seed)
        model = self.model(row.start, seed) if isinstance(row.start, str) else row.start()
        start = time.process_time()
        if row.prepare:
            row.prepare(model.eval(), self.data[0])
        if row.trained:
            seen = Images(self.data[0].x[: recipe.images], self.data[0].y[: recipe.images])
            fit(model, row, teacher, seen, recipe, cache)
        seconds = time.process_time() - start
        weights = {name: weight.contiguous() for name, weight in model.state_dict().items()}
        figures = {"fp32": accuracy(model, self.data[1])}
        if row.packed:
            gs.compress_(model, row.packed)
        figures |= {"accuracy": accuracy(model, self.data[1]), "seconds": round(seconds, 1)}
        return figures, weights


Found = dict[str, list[dict[str, Any]]]  # name of a row -> what it measured, one a seed


def bars(mean: dict[str, float]) -> list[list[Any]]:
    """What the means are held to: [what, measured, at least or at most, limit]."""
    found: list[list[Any]] = [["accuracy of dense", mean["dense"], ">=", 91.0]]
    for name, row in ROWS.items():
        if row.within is not None:
            below = mean[YARDSTICK] - mean[name]
            found.append([f"{row.title}: points below the yardstick", below, "<=", row.within])
        if name in CONTROLS:
            found.append([f"{row.title}: points below 90 %", mean["90"] - mean[name], ">=", 0.01])
    gain = mean["student, distilled"] - mean["student"]
    return [*found, ["student: points gained by distillation", gain, ">=", 0.5]]


def summary(found: Found) -> dict[str, Any]:
    """Means over the seeds, and the bars."""
    rows = {
        name: {
            "title": ALL[name].title,
            "recipe": runs[0]["recipe"],
            "mean": statistics.mean(run["accuracy"] for run in runs),
            "mean_before_packing": statistics.mean(run["fp32"] for run in runs),
            "accuracy": [run["accuracy"] for run in runs],
            "core_seconds": statistics.median(run["seconds"] for run in runs),
        }
        for name, runs in found.items()
    }
    held = [
        {"what": what, "measured": measured, "sense": sense, "limit": limit}
        | {"passed": measured >= limit if sense == ">=" else measured <= limit}
        for what, measured, sense, limit in bars({name: row["mean"] for name, row in rows.items()})
    ]
    return {"rows": rows, "bars": held}


def table(figures: dict[str, Any], names: Iterable[str]) -> str:
    """One row a model; the difference is to the yardstick, or to the student without a teacher."""
    rows, names = figures["rows"], list(names)
    against = rows[YARDSTICK if YARDSTICK in names else names[0]]["mean"]
    cells = [
        [
            rows[name]["title"],
            f"{rows[name]['mean']:.2f} %",
            f"{rows[name]['mean'] - against:+.2f}",
            f"{rows[name]['mean_before_packing']:.2f} %",
            " ".join(f"{value:.2f}" for value in rows[name]["accuracy"]),
            f"{rows[name]['core_seconds']:.0f}",
        ]
        for name in names
    ]
    headers = ["", ">accuracy", ">difference", ">before packing", ">each seed", ">seconds"]
    return render(headers, cells)


def markdown(figures: dict[str, Any]) -> str:
    """fashion.md."""
    held = [
        [
            bar["what"],
            f"{bar['sense']} {bar['limit']:g}",
            f"{bar['measured']:.2f}",
            "pass" if bar["passed"] else "MISS",
        ]
        for bar in figures["bars"]
    ]
    lines = heading("Fashion-MNIST: what compression costs", figures["machine"])
    about_rows = (
        "Accuracy in percent of the 10,000 test images, of the packed model; mean over the seeds.\n"
        "A difference is in points. Seconds are of one core, for the training of one model."
    )
    return "\n".join(
        [
            *(*lines, "", about_rows, "", "## The textbook CNN, 545,098 parameters", ""),
            *(table(figures, ROWS), "", "## A student of 53,152 parameters, 6,000 images", ""),
            *(table(figures, STUDENTS), "", "## Bars", ""),
            render(["", ">asked for", ">measured", "verdict"], held),
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of the four idx.gz, if not Debian's")
    parser.add_argument("--work", type=Path, default=WORK, help="where finished rows are kept")
    add_folder(parser)
    parser.add_argument("--seeds", type=int, default=3, help="for the students two more")
    parser.add_argument("--images", type=int, help="to train and to test with, to try this script")
    parser.add_argument("--tune", nargs="+", choices=ROWS, metavar="ROW", help="only score recipes")
    options = parser.parse_args()
    data = images("train", options.images, options.data)
    changes = {"epochs": 1} if options.images else {}
    with threads(1):
        if options.tune:
            work = Work(options.work / "tuning", held_out(data), changes)
            for name in options.tune:
                work.figures(name, TUNING_SEED)
            return
        test = images("test", options.images, options.data)
        work = Work(options.work, (data, test), changes)
        found = {
            name: [work.figures(name, seed) for seed in range(options.seeds + extra)]
            for rows, extra in ((ROWS, 0), (STUDENTS, 2))
            for name in rows
        }
    figures = {"machine": about(threads=1), **summary(found)}
    options.folder.joinpath("fashion.json").write_text(json.dumps(figures, indent=1) + "\n")
    options.folder.joinpath("fashion.md").write_text(markdown(figures))
    print(markdown(figures))


if __name__ == "__main__":
    main()
