"""How fast a layer is: every format against torch, checked first, then timed in turns."""

from __future__ import annotations

import copy
import platform
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gossamer

from . import _C, reference
from .formats import Format, Int4, Int8, Sparse, SparseInt8
from .layers import Linear
from .prune import prune_
from .report import in_bytes, render
from .testing import NAMED_LAYERS, assert_close
from .timing import threads

FORMATS: dict[str, Format] = {
    "int8": Int8(),
    "weight-only": Int8(activations="none"),
    "int4": Int4(),
    "sparse": Sparse(),
    "sparse-int8": SparseInt8(),
}

# m rows, k inputs, n outputs: transformers at 128 tokens, one token of a decoder, and convolutions
# as the products that they are (a row is a pixel, an input a channel at a tap).
LAYERS: dict[str, tuple[int, int, int]] = {
    **{name: (128, k, n) for name, (k, n) in NAMED_LAYERS.items()},
    "llama.decode": (1, 4096, 4096),
    "resnet50.layer1.conv2": (56 * 56, 64 * 9, 64),
    "resnet50.layer2.conv2": (28 * 28, 128 * 9, 128),
    "resnet50.layer3.conv2": (14 * 14, 256 * 9, 256),
    "resnet50.layer4.conv2": (7 * 7, 512 * 9, 512),
}

MAX_GIGABYTES = 2  # of operands; the check in float64 needs several times as much
TORCH_FP32 = "torch fp32"
TORCH_INT8 = "torch int8"  # quantize_dynamic


@dataclass(frozen=True)
class Timing:
    """What one way to compute the layer took.

    Args:
        name: `TORCH_FP32`, `TORCH_INT8` or a key of `FORMATS`.
        kernel: the operator that ran.
        p20_ms, p50_ms, p80_ms: milliseconds of one call, percentiles over the rounds.
        gflops: 2 * m * stored weights / p50: work that a zero saves does not count.
        weight_bytes: of the weight as it is stored.
        gb_per_s: weight_bytes / p50; what bounds a product of few rows.
        vs_fp32, vs_int8: p50 of torch's fp32 and dynamic int8 layer over this one's.
    """

    name: str
    kernel: str
    p20_ms: float
    p50_ms: float
    p80_ms: float
    gflops: float
    weight_bytes: int
    gb_per_s: float
    vs_fp32: float
    vs_int8: float | None


@dataclass
class Result:
    """One layer: m rows, k inputs, n outputs, and how long each way to compute it took."""

    layer: str
    m: int
    k: int
    n: int
    sparsity: float
    threads: int
    isa: str
    rounds: int
    timings: list[Timing] = field(default_factory=list)
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict."""
        return asdict(self)

    def __str__(self) -> str:
        headers = ["", "kernel", ">p20 ms", ">p50 ms", ">p80 ms", ">GFLOP/s", ">weight", ">GB/s"]
        headers += [">vs fp32", ">vs int8"]
        rows = [
            [
                *(t.name, t.kernel, *(f"{ms:.3g}" for ms in (t.p20_ms, t.p50_ms, t.p80_ms))),
                *(f"{t.gflops:.3g}", in_bytes(t.weight_bytes), f"{t.gb_per_s:.3g}"),
                *(f"{t.vs_fp32:.2f}x", "" if t.vs_int8 is None else f"{t.vs_int8:.2f}x"),
            ]
            for t in self.timings
        ]
        title = f"{self.layer}: {self.m} rows, {self.k} -> {self.n}"
        foot = (
            f"{self.isa}, {self.threads} thread{'s' * (self.threads > 1)}, "
            f"{self.rounds} interleaved rounds, sparse formats at {self.sparsity:.0%} zeros"
        )
        return "\n".join(filter(None, [title, render(headers, rows), foot, self.note]))


@dataclass(frozen=True)
class _Runner:
    """One way to compute the layer; `weights` are those it multiplies by."""

    name: str
    module: nn.Module
    kernel: str
    weights: int
    weight_bytes: int


def linear(
    m: int,
    k: int,
    n: int,
    formats: Sequence[str] = tuple(FORMATS),
    sparsity: float = 0.9,
    num_threads: int = 1,
    layer: str = "linear",
    seconds: float = 2.0,
) -> Result:
    """Times y = x @ w^T + bias in torch and in each format, x (m, k) and w (n, k).

    Every packed result is compared with `gossamer.reference` before the clock starts. The sparse
    formats get a pruned weight, in their own pattern; the others are not helped by zeros.

    Args:
        m, k, n: rows, inputs, outputs; k <= 65536.
        formats: keys of `FORMATS`.
        sparsity: of the sparse formats' weights, in [0, 1).
        num_threads: for torch and for us.
        layer: what to call it.
        seconds: about how long to measure.

    Raises:
        ValueError: a size below 1 or too large, an unknown format, a sparsity outside [0, 1).
        AssertionError: a kernel's result is wrong.

    Example:
        >>> result = linear(8, 64, 32, ["int8"], seconds=0.01)
        >>> [timing.name for timing in result.timings if timing.name != TORCH_INT8]
        ['torch fp32', 'int8']
    """
    _check(m, k, n, formats, num_threads)
    torch.manual_seed(0)
    dense, x = nn.Linear(k, n), torch.randn(m, k)
    runners = [_Runner(TORCH_FP32, dense, "F.linear", n * k, dense.weight.nbytes)]
    quantized, note = _quantize_dynamic(dense)
    if quantized is not None:
        runners.append(_Runner(TORCH_INT8, quantized, "quantize_dynamic", n * k, n * k))
    runners += [_pack(name, dense, sparsity) for name in formats]
    with threads(num_threads), torch.inference_mode():
        for runner in runners:
            if isinstance(runner.module, Linear):
                _validate(runner.name, runner.module, x)
        calls = {runner.name: _call(runner.module, x) for runner in runners}
        times = measure(calls, num_threads, seconds)
    rounds = len(times[TORCH_FP32])
    result = Result(layer, m, k, n, sparsity, num_threads, _C.isa(), rounds, note=note)
    median = {name: statistics.median(own) for name, own in times.items()}
    for runner in runners:
        result.timings.append(_timing(runner, m, sorted(times[runner.name]), median))
    return result


def measure(
    calls: Mapping[str, Callable[[], object]], num_threads: int, seconds: float
) -> dict[str, list[float]]:
    """Milliseconds of one call of each, round by round.

    A round gives each its turn, so that a drift of the clock hits all alike. A turn repeats the
    call for about 2 ms, after two calls that bring its weight back into the caches.

    Args:
        calls: name -> what to time.
        num_threads: for torch.
        seconds: about how long all rounds take together.
    """
    from torch.utils.benchmark import Timer

    timers = {
        name: Timer("call()", globals={"call": call}, num_threads=num_threads)
        for name, call in calls.items()
    }
    once = {name: timer.timeit(3).mean for name, timer in timers.items()}
    repeat = {name: max(1, round(0.002 / cost)) for name, cost in once.items()}
    turns = sum((repeat[name] + 2) * cost for name, cost in once.items())
    rounds = min(101, max(5, round(seconds / turns)))
    times: dict[str, list[float]] = {name: [] for name in timers}
    for index in range(rounds):
        # Every other round runs backwards: who comes after a slow neighbour changes.
        for name in list(timers)[:: -1 if index % 2 else 1]:
            times[name].append(1e3 * timers[name].timeit(repeat[name]).mean)
    return times


def machine() -> dict[str, Any]:
    """What figures depend on: CPU, instruction set, versions."""
    return {
        "cpu": _cpu_name(),
        "isa": _C.isa(),
        "torch": torch.__version__,
        "gossamer": gossamer.__version__,
        "python": platform.python_version(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _check(m: int, k: int, n: int, formats: Sequence[str], num_threads: int) -> None:
    for what, value in (("m", m), ("k", k), ("n", n), ("threads", num_threads)):
        if value < 1:
            raise ValueError(f"{what}={value} must be at least 1")
    if (gigabytes := 4e-9 * (m * k + n * k + m * n)) > MAX_GIGABYTES:
        raise ValueError(
            f"m={m}, k={k}, n={n} need {gigabytes:.3g} GB (limit {MAX_GIGABYTES}): "
            "choose a smaller layer"
        )
    unknown = [name for name in formats if name not in FORMATS]
    if unknown:
        raise ValueError(f"unknown format {unknown[0]!r}: use {', '.join(FORMATS)}")


def _call(module: nn.Module, x: Tensor) -> Callable[[], object]:
    return lambda: module(x)


def _quantize_dynamic(dense: nn.Linear) -> tuple[nn.Module | None, str]:
    """torch's own dynamic int8 layer; or None, and why there is none."""
    try:
        from torch.ao.quantization import quantize_dynamic

        with warnings.catch_warnings():  # deprecated since torch 2.10, and still the fastest peer
            warnings.simplefilter("ignore")
            return quantize_dynamic(nn.Sequential(dense), {nn.Linear})[0], ""
    except (ImportError, AttributeError, RuntimeError) as error:
        return None, f"torch {torch.__version__} has no quantize_dynamic here: {error}"


def _pack(name: str, dense: nn.Linear, sparsity: float) -> _Runner:
    """The layer in a format; a sparse one gets a copy of the weight that is pruned for it."""
    patterns: dict[type[Format], str] = {Sparse: "unstructured", SparseInt8: "1x4"}
    format = FORMATS[name]
    if type(format) in patterns:
        dense = copy.deepcopy(dense)
        prune_(dense, sparsity, patterns[type(format)])
    layer = Linear.from_dense(dense, format)
    weights = int(dense.weight.count_nonzero())
    return _Runner(name, layer, layer.packed.kernel, weights, layer.packed.nbytes)


def _validate(name: str, layer: Linear, x: Tensor) -> None:
    """Requires what the layer returns to be the reference's result, within rounding."""
    packed, bias, weight = layer.packed, layer.bias, layer.unpack()
    product = getattr(reference, packed.kernel)
    scale = getattr(packed, "scale", None)
    if scale is None:
        y = product(x, weight, bias)
    else:
        y = product(x, (weight / scale[:, None]).round(), scale, bias)
    # Integer sums are exact; only the steps after them round.
    terms = 0 if packed.kernel in ("gemm_int8", "spmm_int8") else None
    try:
        assert_close(layer(x), y, reference.bound(y, x, weight, bias, terms))
    except AssertionError as error:
        raise AssertionError(f"{name} ({packed.kernel}, {_C.isa()}): {error}") from error


def _timing(runner: _Runner, m: int, times: list[float], median: Mapping[str, float]) -> Timing:
    p50 = median[runner.name]
    return Timing(
        name=runner.name,
        kernel=runner.kernel,
        p20_ms=times[len(times) // 5],
        p50_ms=p50,
        p80_ms=times[len(times) * 4 // 5],
        gflops=2e-6 * m * runner.weights / p50,
        weight_bytes=runner.weight_bytes,
        gb_per_s=1e-6 * runner.weight_bytes / p50,
        vs_fp32=median[TORCH_FP32] / p50,
        vs_int8=median[TORCH_INT8] / p50 if TORCH_INT8 in median else None,
    )
