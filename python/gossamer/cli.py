"""The `gossamer` command: info, demo, compress, bench."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

# Plain errors: a sentence in a box is cut where the terminal ends.
app = typer.Typer(
    help="Sparse and int8 kernels for pruned, quantized and distilled PyTorch models.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Json = Annotated[
    str | None, typer.Option("--json", metavar="FILE", help="Write the figures; - for stdout.")
]
Number = TypeVar("Number", int, float)
Threads = Annotated[int, typer.Option(min=1, help="Threads to compute with.")]


def main() -> None:
    """Runs the command; what the user did wrong is a sentence on stderr, and exit code 2."""
    try:
        app()
    except (ValueError, ImportError, OSError, FloatingPointError) as error:
        print(f"gossamer: {error}", file=sys.stderr)
        sys.exit(2)


@app.command()
def info() -> None:
    """Show CPU, instruction sets, threads, versions, kernels."""
    import torch

    from . import _C
    from .bench import machine
    from .report import render
    from .testing import FORMATS

    about = machine()
    isas = ", ".join(f"{name} (in use)" if name == about["isa"] else name for name in _C.isas())
    rows = [
        *([name, about[name]] for name in ("gossamer", "torch", "python", "cpu")),
        ["cpu features", " ".join(_C.cpu_features())],
        ["instruction sets", isas],
        ["threads", str(torch.get_num_threads())],
        *([f"kernel {stem}", f"runs {format}"] for stem, format in FORMATS.items()),
    ]
    print(render(["", ""], rows))


@app.command()
def demo(
    seed: Annotated[int, typer.Option(help="Of the weights and the order of the images.")] = 0,
    threads: Threads = 1,
    folder: Annotated[
        Path | None, typer.Option(help="Where to leave the packed model; default nowhere.")
    ] = None,
    target: Json = None,
) -> None:
    """Train, prune, pack and compare a small CNN.

    It is pruned to 90 % in 1x4 blocks while it learns from the dense one, packed to sparse int8,
    saved, loaded into a new model, fused and measured: accuracy, size, latency. Takes less than a
    minute.
    """
    from rich.console import Console

    from .demo import FILE, Settings, run, text

    _check_target(target)
    figures = run(Settings(seed=seed, threads=threads), folder, Console(stderr=True))
    if target != "-":
        print(text(figures))
    if folder:
        print(f"The packed model: {folder / FILE}", file=sys.stderr)
    _write(figures, target)


@app.command()
def compress(
    recipe: Annotated[Path, typer.Argument(help="A YAML file, or the name of one that ships.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run; default the recipe's name.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the recipe against its task, and stop.")
    ] = False,
) -> None:
    """Train, prune, distil, quantize and pack a model as a recipe says.

    What is wrong in the recipe is named with its line, before anything is trained. A run that was
    killed goes on with --resume. docs/recipes.md describes the keys.
    """
    from . import road
    from .recipe import load

    document = load(recipe)
    if dry_run:
        print(road.plan(document))
        return
    outcome = road.run(document, out or Path(recipe.stem), resume)
    print(outcome)
    print(f"Model and report: {outcome.folder}", file=sys.stderr)


@app.command()
def bench(
    layer: Annotated[
        str | None,
        typer.Option(help="Named layers such as bert.ffn.up, separated by commas; or 'all'."),
    ] = None,
    rows: Annotated[
        str | None,
        typer.Option("--rows", "--m", help="Rows, as 1,8,32; default those of the named layer."),
    ] = None,
    k: Annotated[int | None, typer.Option(help="Inputs.")] = None,
    n: Annotated[int | None, typer.Option(help="Outputs.")] = None,
    format: Annotated[
        str | None, typer.Option(help="Formats, separated by commas; default all.")
    ] = None,
    sparsity: Annotated[
        str, typer.Option(help="Shares of zeros in the sparse formats, as 0.8,0.9,0.95.")
    ] = "0.9",
    peers: Annotated[
        str, typer.Option(help="Peers to compare with, separated by commas; 'all' or 'none'.")
    ] = "fbgemm",
    threads: Threads = 1,
    isa: Annotated[
        str | None, typer.Option(help="Instruction set, see info; default the best.")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.0, help="Time to measure each layer.")] = 2.0,
    target: Json = None,
    plot: Annotated[
        Path | None, typer.Option(help="Folder for roofline.png and speedup.png.")
    ] = None,
) -> None:
    """Time a linear layer in every format against torch, and against other libraries.

    What each format returns is compared with the reference first. The ceilings of this CPU are
    measured first too; each timing says which share of the one that bounds it was reached.
    """
    from . import _C, ceilings, testing
    from .bench import FORMATS, linear, machine

    _check_target(target)
    if plot and not plot.is_dir():
        raise ValueError(f"--plot {plot}: there is no such folder")
    formats = list(FORMATS) if format is None else _split(format)
    shapes = _layers(layer, _numbers("--rows", rows, int) if rows else None, k, n)
    sweep = itertools.product(shapes, _numbers("--sparsity", sparsity, float))
    against, results = _peers(peers), []
    with testing.isa(isa or _C.isa()):
        for index, ((name, m, inputs, outputs), zeros) in enumerate(sweep):
            result = linear(
                m, inputs, outputs, formats, zeros, threads, name, seconds, against=against
            )
            results.append(result.to_json())
            if target != "-":
                lead = "" if index else f"{ceilings.of(_C.isa(), threads)}\n\n"
                print(f"{lead}{result}", end="\n\n", flush=True)
        figures = {
            "machine": machine(),
            "ceilings": ceilings.of(_C.isa(), threads).to_json(),
            "results": results,
        }
    _write(figures, target)
    if plot:
        from .plots import roofline, speedup

        roofline(figures, plot / "roofline.png")
        speedup(figures, plot / "speedup.png")


def _layers(
    names: str | None, rows: list[int] | None, k: int | None, n: int | None
) -> list[tuple[str, int, int, int]]:
    """Name, m, k, n of the layers that the options ask for."""
    from .bench import LAYERS

    if k is not None and n is not None and names is None:
        return [("linear", m, k, n) for m in rows or [128]]
    if k is not None or n is not None:
        raise ValueError("give either --layer or both --k and --n")
    chosen = list(LAYERS) if names == "all" else _split(names or "bert.ffn.up")
    for name in chosen:
        if name not in LAYERS:
            raise ValueError(f"unknown layer {name!r}: use {', '.join(LAYERS)}, or --k and --n")
    return [(name, m, *LAYERS[name][1:]) for name in chosen for m in rows or [LAYERS[name][0]]]


def _peers(names: str) -> list[str]:
    from .peers import PEERS

    return {"all": list(PEERS), "none": []}.get(names, _split(names))


def _numbers(option: str, text: str, kind: type[Number]) -> list[Number]:
    try:
        return [kind(part) for part in _split(text)]
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise ValueError(f"{option} {text}: give {what}, separated by commas") from None


def _split(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


def _check_target(target: str | None) -> None:
    """Refuses before the work what could not be written after it."""
    if target not in (None, "-") and not Path(target).absolute().parent.is_dir():
        raise ValueError(f"--json {target}: there is no folder {Path(target).absolute().parent}")


def _write(figures: dict[str, Any], target: str | None) -> None:
    content = json.dumps(figures, indent=2)
    if target == "-":
        print(content)
    elif target is not None:
        Path(target).write_text(content + "\n", encoding="utf-8")
