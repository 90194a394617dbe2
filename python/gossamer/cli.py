"""The `gossamer` command: info, demo, bench."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

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
Threads = Annotated[int, typer.Option(min=1, help="Threads to compute with.")]


def main() -> None:
    """Runs the command; what the user did wrong is a sentence on stderr, and exit code 2."""
    try:
        app()
    except (ValueError, ImportError, OSError) as error:
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
    saved, loaded into a new model and measured: accuracy, size, latency. Takes under a minute.
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
def bench(
    layer: Annotated[
        str | None,
        typer.Option(help="Named layers such as bert.ffn.up, separated by commas; or 'all'."),
    ] = None,
    m: Annotated[int | None, typer.Option(help="Rows; default those of the named layer.")] = None,
    k: Annotated[int | None, typer.Option(help="Inputs.")] = None,
    n: Annotated[int | None, typer.Option(help="Outputs.")] = None,
    format: Annotated[
        str | None, typer.Option(help="Formats, separated by commas; default all.")
    ] = None,
    sparsity: Annotated[float, typer.Option(help="Share of zeros in the sparse formats.")] = 0.9,
    threads: Threads = 1,
    isa: Annotated[
        str | None, typer.Option(help="Instruction set, see info; default the best.")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.0, help="Time to measure each layer.")] = 2.0,
    target: Json = None,
) -> None:
    """Time a linear layer in every format against torch.

    What each format returns is compared with the reference first.
    """
    from . import _C, testing
    from .bench import FORMATS, linear, machine

    _check_target(target)
    results = []
    formats = list(FORMATS) if format is None else _split(format)
    with testing.isa(isa or _C.isa()):
        for name, (rows, inputs, outputs) in _layers(layer, m, k, n).items():
            result = linear(rows, inputs, outputs, formats, sparsity, threads, name, seconds)
            results.append(result.to_json())
            if target != "-":
                print(result, end="\n\n")
        _write({"machine": machine(), "results": results}, target)


def _layers(
    names: str | None, m: int | None, k: int | None, n: int | None
) -> dict[str, tuple[int, int, int]]:
    """Name -> m, k, n of the layers that the options ask for."""
    from .bench import LAYERS

    if k is not None and n is not None and names is None:
        return {"linear": (128 if m is None else m, k, n)}
    if k is not None or n is not None:
        raise ValueError("give either --layer or both --k and --n")
    chosen = list(LAYERS) if names == "all" else _split(names or "bert.ffn.up")
    for name in chosen:
        if name not in LAYERS:
            raise ValueError(f"unknown layer {name!r}: use {', '.join(LAYERS)}, or --k and --n")
    return {name: (LAYERS[name][0] if m is None else m, *LAYERS[name][1:]) for name in chosen}


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
