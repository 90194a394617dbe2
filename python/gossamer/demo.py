"""The main job, whole: train, prune while distilling, pack, save, load, fuse, measure.

The textbook CNN learns the digits that scikit-learn ships: real handwriting, nothing to download.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .bench import machine
from .calibrate import calibrate
from .checkpoint import load_, save
from .compare import Comparison, compare
from .compress import Layer, compress_, swap
from .digits import TEST_IMAGES, Digits, TextbookCNN, accuracy, digits, shifted
from .distill import KD, Distiller, SquareHead
from .formats import Format, Int8, SparseInt8
from .fuse import fuse
from .layers import LAYERS
from .prune import Pruner
from .report import Report, Row, in_bytes, render
from .schedules import Cubic
from .timing import eval_mode, threads

FILE = "sparse_int8.safetensors"
BATCHES = (1, 64)
NAMES = ("dense fp32", "int8", "sparse int8")
# conv1 has 3 input channels, so a block of four would be all of a tap; fc2 makes the ten classes.
# They hold 0.4 % of the weights: pruning them would save nothing and cost accuracy.
UNPRUNED = ("conv1", "fc2")
# Between convolutions with known ranges `fuse` keeps the values 8 bits.
STATIC = Int8(activations="static")
INT8: dict[str, Format | None] = {"conv*": STATIC, "*": Int8()}
SPARSE_INT8: dict[str, Format | None] = {
    "conv1": STATIC,
    "conv2": SparseInt8(activations="static"),
    "fc2": Int8(),
    "*": SparseInt8(),
}
CALIBRATION_IMAGES = 256
# Packed and unpacked weights are equal, so only the 8 bits of the activations part the logits.
TOLERANCE = 0.05

Tick = Callable[[], None]


@dataclass(frozen=True)
class Settings:
    """What one run does.

    Args:
        seed: of the weights and of the order of the images; the test images are always the same.
        threads: torch's, for all of it. With one, a seed gives the same weights on any number of
            cores, and a core that others use too does not hold up the rest.
        dense_epochs, prune_epochs: passes over the training images, dense and then pruned.
        batch: images in a training step.
        sparsity: share of the weights that go, in blocks of 1x4.
        rounds: timed forwards of each model; None lets `gossamer.compare` choose.
    """

    seed: int = 0
    threads: int = 1
    dense_epochs: int = 10
    prune_epochs: int = 12
    batch: int = 64
    sparsity: float = 0.9
    rounds: int | None = None


class Stages:
    """Times the stages of a run, and shows each as a bar on a rich Progress if there is one."""

    def __init__(self, progress: Any = None) -> None:
        self._progress = progress
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, title: str, steps: int) -> Iterator[Tick]:
        """One stage; yields what to call after each of its steps."""
        start = time.perf_counter()
        if self._progress is None:
            yield lambda: None
        else:
            bar = self._progress.add_task(title, total=steps)
            yield lambda: self._progress.advance(bar)
        self.seconds[title] = time.perf_counter() - start


def run(
    settings: Settings | None = None, folder: Path | None = None, console: Any = None
) -> dict[str, Any]:
    """Does the whole job; every figure of the sparse model is of the one that was loaded.

    Args:
        settings: default `Settings()`.
        folder: where to leave the file; default a temporary one.
        console: a rich Console to show progress on; None shows nothing.

    Returns:
        A JSON-able dict; `text` makes tables of it.

    Raises:
        ImportError: scikit-learn is not installed.
        RuntimeError: the packed model, the loaded or the fused one is not what was trained.
        ValueError, OSError: the file cannot be written or read back.
    """
    settings = settings or Settings()
    if folder is None:
        with tempfile.TemporaryDirectory() as temporary:
            return run(settings, Path(temporary), console)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE
    with _bars(console) as progress, threads(settings.threads):
        stages = Stages(progress)
        data = digits()
        torch.manual_seed(settings.seed)
        dense = train(data, settings, stages)
        pruned = prune(dense, data, settings, stages)
        with stages("pack, verify, save, load, fuse", steps=5) as tick:
            int8, sparse = copy.deepcopy(dense), copy.deepcopy(pruned)
            pack(int8, INT8, data)
            report = pack(sparse, SPARSE_INT8, data)
            tick()
            checks = verify(sparse, data.test_x, settings.sparsity)
            tick()
            save(sparse, path)
            tick()
            loaded = load_(TextbookCNN(), path).eval()
            _require_equal(sparse, loaded, data.test_x, "the loaded model, and the one saved,")
            tick()
            example = (data.train_x[:CALIBRATION_IMAGES],)
            packed = [fuse(model, example_inputs=example) for model in (int8, loaded)]
            _require_equal(loaded, packed[1], data.test_x, "the fused model, and the one loaded,")
            tick()
        models: dict[str, nn.Module] = dict(zip(NAMES, (dense, *packed), strict=True))
        compared = _compare(models, data, settings, stages)
    return {
        "settings": asdict(settings),
        "machine": machine(),
        "parameters": sum(p.numel() for p in dense.parameters()),
        **_figures(compared),
        "pruned_accuracy": accuracy(pruned, data.test_x, data.test_y),
        "checks": checks,
        "layers": report.to_json(),
        "seconds": {title: round(seconds, 1) for title, seconds in stages.seconds.items()},
    }


def train(data: Digits, settings: Settings, stages: Stages) -> TextbookCNN:
    """A dense model, trained on the labels."""
    model = TextbookCNN()

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x), y)

    _fit(model, loss, data, settings.dense_epochs, settings, stages, "train dense", lambda: None)
    return model


def prune(dense: TextbookCNN, data: Digits, settings: Settings, stages: Stages) -> TextbookCNN:
    """A copy of the dense model, pruned in 1x4 blocks while it learns from it."""
    model = copy.deepcopy(dense)
    # The last third of the steps trains what is left, with the masks as they will be.
    steps = max(1, settings.prune_epochs * -(-len(data.train_x) // settings.batch) * 2 // 3)
    pruner = Pruner(model, settings.sparsity, "1x4", Cubic(steps), exclude=UNPRUNED)
    layers = SquareHead("re:conv2|fc1")
    distiller = Distiller(model, dense, losses=[KD(temperature=4.0), layers], hard=0.3)
    title = f"prune to {settings.sparsity:.0%}, distil"
    _fit(model, distiller, data, settings.prune_epochs, settings, stages, title, pruner.step)
    pruner.finish()
    return model.eval()


def _fit(
    model: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    data: Digits,
    epochs: int,
    settings: Settings,
    stages: Stages,
    title: str,
    after_step: Tick,
) -> None:
    """Trains with AdamW and one cycle of the learning rate, on images shifted by up to 2 pixels."""
    steps = epochs * -(-len(data.train_x) // settings.batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    model.train()
    with stages(title, steps) as tick:
        for _ in range(epochs):
            for chosen in torch.randperm(len(data.train_x)).split(settings.batch):
                loss(shifted(data.train_x[chosen]), data.train_y[chosen]).backward()
                optimizer.step()
                rate.step()
                after_step()
                optimizer.zero_grad()
                tick()
    model.eval()


def pack(model: nn.Module, formats: Mapping[str, Format | None], data: Digits) -> Report:
    """Finds the ranges of the layers' inputs on training images, and packs the weights in place."""
    with calibrate(model), eval_mode(model):
        model(data.train_x[:CALIBRATION_IMAGES])
    return compress_(model, formats)


def verify(packed: nn.Module, x: Tensor, sparsity: float) -> dict[str, Any]:
    """Holds a packed model against its own unpacked weights, run by torch in fp32.

    Args:
        packed: the model.
        x: images.
        sparsity: the share of zeros that its pruned layers must have.

    Returns:
        zeros: of each pruned layer, and of all together; logit_error: the largest difference, as a
        share of the largest logit; agreement: percent of the images put in the same class.

    Raises:
        RuntimeError: there are too few zeros, or the two differ by more than 8-bit activations
            explain.
    """
    unpacked = copy.deepcopy(packed)
    swap(unpacked, {m: m.to_dense() for m in unpacked.modules() if isinstance(m, Layer)})
    weights = {
        name: module.weight
        for name, module in unpacked.named_modules()
        if type(module) in LAYERS and name not in UNPRUNED
    }
    zeros = {name: 1 - w.count_nonzero().item() / w.numel() for name, w in weights.items()}
    total = sum(w.numel() for w in weights.values())
    zeros["together"] = sum(zeros[name] * w.numel() for name, w in weights.items()) / total
    with eval_mode(packed, unpacked):
        ours, theirs = packed(x), unpacked(x)
    error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    agreement = 100 * (ours.argmax(1) == theirs.argmax(1)).double().mean().item()
    if zeros["together"] < sparsity - 4 / total:
        raise RuntimeError(f"only {zeros['together']:.4%} zeros, {sparsity:.2%} asked for")
    if not error <= TOLERANCE:
        raise RuntimeError(f"packed logits are off by {error:.2%} of the unpacked model's range")
    return {"zeros": zeros, "logit_error": error, "agreement": agreement}


def _require_equal(first: nn.Module, second: nn.Module, x: Tensor, both: str) -> None:
    with eval_mode(first, second):
        if not torch.equal(first(x), second(x)):
            raise RuntimeError(f"{both} do not return the same bits")


def _compare(
    models: dict[str, nn.Module], data: Digits, settings: Settings, stages: Stages
) -> list[Comparison]:
    """One comparison for each of `BATCHES`."""

    def evaluate(model: nn.Module) -> float:
        return accuracy(model, data.test_x, data.test_y)

    compared = []
    with stages("measure", len(BATCHES)) as tick:
        for batch in BATCHES:
            x = data.test_x[:batch]
            compared.append(
                compare(
                    models,
                    example_inputs=(x,),
                    evaluate=evaluate,
                    rounds=settings.rounds,
                )
            )
            tick()
    return compared


def _figures(compared: list[Comparison]) -> dict[str, Any]:
    largest = compared[-1]
    return {
        "threads": largest.threads,
        "accuracy": {model.name: model.accuracy for model in largest.models},
        "bytes": {model.name: model.disk_bytes for model in largest.models},
        "latency_ms": {
            str(comparison.batch): {
                model.name: {"p50": model.p50_ms, "p95": model.p95_ms}
                for model in comparison.models
            }
            for comparison in compared
        },
    }


def _bars(console: Any) -> AbstractContextManager[Any]:
    if console is None:
        return nullcontext()
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    title = TextColumn("{task.description:<26}")
    return Progress(
        title,
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        console=console,
    )


def text(figures: dict[str, Any]) -> str:
    """The figures of `run` as tables."""
    machine, count, checks = figures["machine"], figures["threads"], figures["checks"]
    layers = " and ".join(name for name in checks["zeros"] if name != "together")
    return f"""\
Textbook CNN, {figures["parameters"]:,} parameters, on digits of 3x32x32; {TEST_IMAGES} test images.

Pruned: {checks["zeros"]["together"]:.2%} zeros in {layers}, in blocks of 1x4.
{" and ".join(UNPRUNED)}, 0.4 % of the weights, are not pruned.
Verified: {checks["agreement"]:.1f} % of the test images get the class that torch gives them
with the unpacked weights; the file, loaded into a new model, returns the same bits, fused too.

{_table(figures)}
Latency on {count} thread{"s" * (count > 1)} of {machine["cpu"]} ({machine["isa"]}), torch \
{machine["torch"]}, in interleaved rounds.

{Report([Row(**row) for row in figures["layers"]], "What runs in the sparse int8 model:")}

Seconds: {", ".join(f"{name} {s:.0f}" for name, s in figures["seconds"].items())}"""


def _table(figures: dict[str, Any]) -> str:
    dense = NAMES[0]

    def row(label: str, values: dict[str, float], show: Callable[[float], str]) -> list[str]:
        ratios = (f" ({values[dense] / values[n]:.1f}x)" if n != dense else "" for n in NAMES)
        return [label, *(show(values[n]) + ratio for n, ratio in zip(NAMES, ratios, strict=True))]

    rows = [["accuracy", *(f"{figures['accuracy'][name]:.2f} %" for name in NAMES)]]
    rows.append(row("file", figures["bytes"], in_bytes))
    for batch, latency in figures["latency_ms"].items():
        for percentile in ("p50", "p95"):
            ms = {name: latency[name][percentile] for name in NAMES}
            rows.append(row(f"batch {batch}, {percentile}", ms, "{:.3g} ms".format))
    return render(["", *(f">{name}" for name in NAMES)], rows)
