"""compare: size, memory, latency and accuracy of models, side by side."""

from __future__ import annotations

import json
import math
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import timing
from .checkpoint import save
from .report import in_bytes, render
from .timing import Call, eval_mode, forward, interleave


@dataclass
class Measured:
    """What was measured of one model.

    Args:
        name: as the caller calls it.
        disk_bytes: size of the file that `save` writes; None if it cannot, see `note`.
        weight_bytes: parameters and buffers in memory, shared ones once; None with `disk_bytes`.
        peak_bytes: the most that torch's CPU allocator holds at once during one forward, beyond
            what it held before: activations and workspaces, not the weights.
        p50_ms, p95_ms: median and 95th percentile of one forward.
        accuracy: evaluate(model), or None.
        note: why `save` cannot store the model: it holds weights that are no tensors of a module.
    """

    name: str
    disk_bytes: int | None
    weight_bytes: int | None
    peak_bytes: int
    p50_ms: float
    p95_ms: float
    accuracy: float | None = None
    note: str = ""


@dataclass
class Comparison:
    """Measurements of several models on the same input; `str()` is a plain-text table.

    A ratio is the first model's figure divided by this one's: 4x is four times smaller, or faster.
    For accuracy it is the difference.

    Args:
        models: one `Measured` a model, the reference first.
        batch: the first dimension of the first tensor of the input; None without a tensor.
        threads: torch.get_num_threads() while measuring.
        rounds: forwards of each model that were timed, interleaved with those of the others.

    Example:
        >>> dense = Measured("dense", 4000, 4000, 800, 1.0, 1.5)
        >>> print(Comparison([dense, Measured("int8", 1000, 1000, 800, 0.5, 0.6)], 8, 1, 50))
        |                   |  dense |   int8 | ratio |
        |-------------------|--------|--------|-------|
        | size on disk      |   4 kB |   1 kB |    4x |
        | weights in memory |   4 kB |   1 kB |    4x |
        | peak of a forward |  800 B |  800 B |    1x |
        | latency p50       |   1 ms | 0.5 ms |    2x |
        | latency p95       | 1.5 ms | 0.6 ms |  2.5x |
        batch 8, 1 thread, 50 interleaved rounds
    """

    models: list[Measured]
    batch: int | None
    threads: int
    rounds: int

    def to_json(self) -> dict[str, Any]:
        """The fields of `Comparison` and of each `Measured` as a JSON-able dict."""
        return asdict(self)

    def __str__(self) -> str:
        reference, *others = self.models
        headers = ["", f">{reference.name}"]
        for model in others:
            headers += [f">{model.name}", ">ratio"]
        rows = []
        for label, metric, text in _METRICS:
            first = getattr(reference, metric)
            row = [label, "" if first is None else text(first)]
            for value in (getattr(model, metric) for model in others):
                row += ["" if value is None else text(value), _ratio(metric, first, value)]
            if any(row[1:]):
                rows.append(row)
        batch = "" if self.batch is None else f"batch {self.batch}, "
        threads = f"{self.threads} thread" + "s" * (self.threads > 1)
        notes = [f"{model.name}: {model.note}" for model in self.models if model.note]
        lines = [render(headers, rows), f"{batch}{threads}, {self.rounds} interleaved rounds"]
        return "\n".join(lines + notes)


_METRICS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("size on disk", "disk_bytes", in_bytes),
    ("weights in memory", "weight_bytes", in_bytes),
    ("peak of a forward", "peak_bytes", in_bytes),
    ("latency p50", "p50_ms", "{:.3g} ms".format),
    ("latency p95", "p95_ms", "{:.3g} ms".format),
    ("accuracy", "accuracy", "{:.4g}".format),
)


def _ratio(metric: str, first: float | None, value: float | None) -> str:
    if first is None or value is None:
        return ""
    if metric == "accuracy":
        return f"{value - first:+.4g}"
    return f"{first / value:.3g}x" if value else ""


def compare(
    a: nn.Module | Mapping[str, nn.Module],
    b: nn.Module | None = None,
    example_inputs: Any = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    *,
    names: Sequence[str] = ("dense", "compressed"),
    rounds: int | None = None,
    threads: int | None = None,
) -> Comparison:
    """Measures two models on the same input: size on disk, memory, latency and accuracy.

    Both run in eval mode without gradients, their forwards interleaved; their own modes and the
    number of threads are restored. Size on disk is that of a file `save` writes to a temporary
    folder. Peak memory is read from torch.profiler's allocation events, so it misses what a
    library takes from malloc itself; the weights are counted apart.

    Args:
        a: the reference; or a dict of names to models, the reference first, and then no `b`.
        b: the model to hold against it.
        example_inputs: the models' arguments as a tuple, a dict of keywords, or one tensor.
        evaluate: model -> accuracy, or any score where more is better.
        names: what to call `a` and `b`.
        rounds: timed forwards of each model; default as many as take about 5 s, from 20 to 200.
        threads: for torch.set_num_threads; default its current value.

    Raises:
        TypeError: `example_inputs` is missing or of another type.
        ValueError: `rounds` or `threads` below 1, or not one name for each model.

    Example:
        >>> import torch, gossamer as gs
        >>> dense = torch.nn.Sequential(torch.nn.Linear(64, 64))
        >>> x = torch.randn(8, 64)
        >>> comparison = gs.compare(dense, dense, (x,), evaluate=lambda model: 0.9, rounds=3)
        >>> comparison.batch, comparison.models[0].weight_bytes, comparison.models[1].accuracy
        (8, 16640, 0.9)
    """
    models = _named(a, b, names)
    if any(count is not None and count < 1 for count in (rounds, threads)):
        raise ValueError(f"rounds={rounds} and threads={threads} must be at least 1")
    with eval_mode(*models.values()), timing.threads(threads):
        calls = [_call(model, example_inputs) for model in models.values()]
        if rounds is None:
            warm = interleave(calls, rounds=1)
            rounds = min(200, max(20, round(5000 / (sum(map(sum, warm)) + 1e-3))))
        times = interleave(calls, rounds)
        measured = []
        for (name, model), call, own in zip(models.items(), calls, times, strict=True):
            p50, p95 = statistics.median(own), sorted(own)[math.ceil(0.95 * rounds) - 1]
            disk, note = _disk_bytes(model)
            weights = _weight_bytes(model) if disk is not None else None
            accuracy = None if evaluate is None else float(evaluate(model))
            row = Measured(name, disk, weights, _peak_bytes(call), p50, p95, accuracy, note)
            measured.append(row)
        return Comparison(measured, _batch(example_inputs), torch.get_num_threads(), rounds)


def _named(a: object, b: object, names: Sequence[str]) -> dict[str, nn.Module]:
    if isinstance(a, Mapping):
        models = dict(a)
        if b is not None or not models:
            raise ValueError("give either two models or one dict of names to models, not empty")
    else:
        if len(set(names)) != 2:
            raise ValueError(f"names must be two different names, got {tuple(names)}")
        models = dict(zip(names, (a, b), strict=True))
    for name, model in models.items():
        if not isinstance(model, nn.Module):
            raise TypeError(f"{name!r} must be an nn.Module, got {type(model).__name__}")
    return models


def _call(model: nn.Module, example_inputs: Any) -> Call:
    return lambda: forward(model, example_inputs)


def _disk_bytes(model: nn.Module) -> tuple[int | None, str]:
    """Size of the file `save` writes; or None, and why it cannot: other tools' models have one."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.safetensors")
        try:
            save(model, path)
        except ValueError as error:
            return None, f"its size is unknown, {error}"
        return path.stat().st_size, ""


def _weight_bytes(model: nn.Module) -> int:
    tensors = {id(t): t.nbytes for t in (*model.parameters(), *model.buffers())}
    return sum(tensors.values())


def _peak_bytes(call: Call) -> int:
    """The highest sum of the allocations and frees of one call, by torch.profiler."""
    with tempfile.TemporaryDirectory() as folder, _quiet_kineto():
        trace = Path(folder, "trace.json")
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profiler:
            call()
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    memory = [event for event in events if event.get("name") == "[memory]"]
    held = peak = 0
    for event in sorted(memory, key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


@contextmanager
def _quiet_kineto() -> Iterator[None]:
    """Keeps the profiler from writing "USDT: profiler_start" to stderr (seen in torch 2.13)."""
    before = os.environ.get("KINETO_LOG_LEVEL")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    try:
        yield
    finally:
        if before is None:
            del os.environ["KINETO_LOG_LEVEL"]


def _batch(example_inputs: Any) -> int | None:
    if isinstance(example_inputs, Tensor):
        example_inputs = (example_inputs,)
    values = example_inputs.values() if isinstance(example_inputs, Mapping) else example_inputs
    tensors = (value for value in values if isinstance(value, Tensor) and value.dim())
    return next((len(tensor) for tensor in tensors), None)
