"""How fast a layer is: every format against torch and peers, checked first, then timed in turns."""

from __future__ import annotations

import copy
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gossamer

from . import _C, ceilings, peers, reference
from .ceilings import Ceilings
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
    "llama.decode.attention": (1, 4096, 4096),
    "llama2-7b.decode.ffn.up": (1, 4096, 11008),
    "llama2-7b.decode.ffn.down": (1, 11008, 4096),
    "llama3-8b.decode.ffn.up": (1, 4096, 14336),
    "llama3-8b.decode.ffn.down": (1, 14336, 4096),
    "resnet50.layer1.conv2": (56 * 56, 64 * 9, 64),
    "resnet50.layer2.conv2": (28 * 28, 128 * 9, 128),
    "resnet50.layer3.conv2": (14 * 14, 256 * 9, 256),
    "resnet50.layer4.conv2": (7 * 7, 512 * 9, 512),
}

MAX_GIGABYTES = 2  # of operands; the check in float64 needs several times as much
TORCH_FP32 = "torch fp32"


@dataclass(frozen=True)
class Timing:
    """What one way to compute the layer took.

    Args:
        name: `TORCH_FP32`, a key of `peers.PEERS` or a key of `FORMATS`.
        kernel: the operator that ran; "" for a peer.
        p20_ms, p50_ms, p80_ms: milliseconds of one call, percentiles over the rounds.
        ops: 2 * m * stored weights: work that a zero saves does not count.
        weight_bytes: of the weight as it is stored.
        moved_bytes: weight, input and output, each once.
        gflops: ops / p50.
        gb_per_s: weight_bytes / p50; what bounds a product of few rows.
        bound: the ceiling that it meets first, see `Ceilings.bound`.
        share: the least time that this ceiling allows / p50. Ceilings are those of the Isa in use:
            a peer that uses wider instructions than that can exceed 1.
        vs: name -> p50 of `TORCH_FP32`, and of each peer, over this one's.
    """

    name: str
    kernel: str
    p20_ms: float
    p50_ms: float
    p80_ms: float
    ops: float
    weight_bytes: int
    moved_bytes: int
    gflops: float
    gb_per_s: float
    bound: str
    share: float
    vs: dict[str, float]


@dataclass
class Result:
    """One layer: m rows, k inputs, n outputs, and how long each way to compute it took.

    `notes` says which peers are missing, and why.
    """

    layer: str
    m: int
    k: int
    n: int
    sparsity: float
    threads: int
    isa: str
    rounds: int
    timings: list[Timing] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Result:
        """What `to_json` described."""
        return cls(**{**data, "timings": [Timing(**timing) for timing in data["timings"]]})

    def timing(self, name: str) -> Timing | None:
        """The timing of that name, if there is one."""
        return next((timing for timing in self.timings if timing.name == name), None)

    def ratio(self, name: str, other: str) -> float:
        """How many times faster than `other` the one of that name is, by their medians."""
        medians = {timing.name: timing.p50_ms for timing in self.timings}
        return medians[other] / medians[name]

    def __str__(self) -> str:
        title = f"{self.layer}: {self.m} rows, {self.k} -> {self.n}"
        foot = (
            f"{self.isa}, {self.threads} thread{'s' * (self.threads > 1)}, "
            f"{self.rounds} interleaved rounds, sparse formats at {self.sparsity:.0%} zeros"
        )
        parts = [title, self._times(), self._ratios(), foot, *self.notes]
        return "\n".join(filter(None, parts))

    def _times(self) -> str:
        headers = ["", "kernel", ">ms", ">+-", ">GFLOP/s", ">weight", ">GB/s", ">share of"]
        rows = [
            [
                *(t.name, t.kernel, f"{t.p50_ms:.3g}"),
                f"{(t.p80_ms - t.p20_ms) / 2 / t.p50_ms:.0%}",
                *(f"{t.gflops:.3g}", in_bytes(t.weight_bytes), f"{t.gb_per_s:.3g}"),
                *(f"{t.share:.0%} {t.bound:>4}", f"{t.vs[TORCH_FP32]:.2f}x"),
            ]
            for t in self.timings
        ]
        return render([*headers, ">vs fp32"], rows)

    def _ratios(self) -> str:
        """How many times faster than each peer the formats are."""
        ours = [timing for timing in self.timings if timing.name in FORMATS]
        others = [name for name in ours[0].vs if name != TORCH_FP32] if ours else []
        rows = [[t.name, *(f"{t.vs[name]:.2f}x" for name in others)] for t in ours]
        table = render(["times faster than", *(f">{name}" for name in others)], rows)
        return f"\n{table}\n" if others else ""


@dataclass(frozen=True)
class _Runner:
    """One way to compute the layer; `weights` are those it multiplies by."""

    name: str
    call: Callable[[], object]
    weights: int
    weight_bytes: int
    integer: bool = False
    kernel: str = ""


def linear(
    m: int,
    k: int,
    n: int,
    formats: Sequence[str] = tuple(FORMATS),
    sparsity: float = 0.9,
    num_threads: int = 1,
    layer: str = "linear",
    seconds: float = 2.0,
    against: Sequence[str] = ("fbgemm",),
) -> Result:
    """Times y = x @ w^T + bias in torch, in peers and in each format, x (m, k) and w (n, k).

    Every packed result is compared with `gossamer.reference` before the clock starts, a peer's with
    torch's. The sparse formats get a pruned weight, in their own pattern, as does a sparse peer;
    the others are not helped by zeros.

    Args:
        m, k, n: rows, inputs, outputs; k <= 65536.
        formats: keys of `FORMATS`.
        sparsity: of the sparse formats' weights, in [0, 1).
        num_threads: for torch, for peers and for us.
        layer: what to call it.
        seconds: about how long to measure.
        against: keys of `peers.PEERS`; one that is not installed is left out, and a note says so.

    Raises:
        ValueError: a size below 1 or too large, an unknown format or peer, a sparsity outside
            [0, 1).
        AssertionError: a kernel's result is wrong.

    Example:
        >>> result = linear(8, 64, 32, ["int8"], seconds=0.01, against=[])
        >>> [timing.name for timing in result.timings]
        ['torch fp32', 'int8']
    """
    _check(m, k, n, formats, num_threads, against)
    torch.manual_seed(0)
    dense, x = nn.Linear(k, n), torch.randn(m, k)
    runners = [_Runner(TORCH_FP32, lambda: dense(x), n * k, dense.weight.nbytes)]
    notes: list[str] = []
    with threads(num_threads), torch.inference_mode():
        limits = ceilings.of(_C.isa(), num_threads)
        for name in against:
            try:
                runners.append(_peer(name, dense, x, sparsity))
            except (ImportError, RuntimeError, AssertionError) as error:
                notes.append(f"without {name}: {error}")
        runners += [_pack(name, dense, x, sparsity) for name in formats]
        times = measure({runner.name: runner.call for runner in runners}, num_threads, seconds)
    rounds = len(times[TORCH_FP32])
    result = Result(layer, m, k, n, sparsity, num_threads, _C.isa(), rounds, notes=notes)
    others = [runner.name for runner in runners if runner.name not in FORMATS]
    medians = {name: statistics.median(times[name]) for name in others}
    for runner in runners:
        moved = runner.weight_bytes + 4 * m * (k + n)
        result.timings.append(_timing(runner, m, moved, times[runner.name], medians, limits))
    return result


def pack(name: str, dense: nn.Linear, sparsity: float) -> tuple[Linear, int]:
    """The layer in a format, and how many weights are left.

    Args:
        name: a key of `FORMATS`.
        dense: stays as it is.
        sparsity: a sparse format gets a copy of the weight that is pruned for it, in its pattern.

    Example:
        >>> pack("sparse", nn.Linear(8, 4), 0.75)[1]
        8
    """
    patterns: dict[type[Format], str] = {Sparse: "unstructured", SparseInt8: "1x4"}
    format = FORMATS[name]
    if type(format) in patterns:
        dense = _pruned(dense, sparsity, patterns[type(format)])
    return Linear.from_dense(dense, format), int(dense.weight.count_nonzero())


def measure(
    calls: Mapping[str, Callable[[], object]],
    num_threads: int | Mapping[str, int],
    seconds: float,
) -> dict[str, list[float]]:
    """Milliseconds of one call of each, round by round.

    A round gives each its turn, so that a drift of the clock hits all alike. A turn repeats the
    call for about 2 ms, after two calls that bring its weight back into the caches.

    Args:
        calls: name -> what to time.
        num_threads: for torch; or name -> that call's own.
        seconds: about how long all rounds take together.
    """
    from torch.utils.benchmark import Timer

    own = num_threads if isinstance(num_threads, Mapping) else dict.fromkeys(calls, num_threads)
    timers = {
        name: Timer("call()", globals={"call": call}, num_threads=own[name])
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
        "peers": ", ".join(" ".join(pair) for pair in peers.versions().items()) or "none installed",
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _check(
    m: int, k: int, n: int, formats: Sequence[str], num_threads: int, against: Sequence[str]
) -> None:
    for what, value in (("m", m), ("k", k), ("n", n), ("threads", num_threads)):
        if value < 1:
            raise ValueError(f"{what}={value} must be at least 1")
    if (gigabytes := 4e-9 * (m * k + n * k + m * n)) > MAX_GIGABYTES:
        raise ValueError(
            f"m={m}, k={k}, n={n} need {gigabytes:.3g} GB (limit {MAX_GIGABYTES}): "
            "choose a smaller layer"
        )
    for name in formats:
        if name not in FORMATS:
            raise ValueError(f"unknown format {name!r}: use {', '.join(FORMATS)}")
    for name in against:
        peers.check(name)


def _peer(name: str, dense: nn.Linear, x: Tensor, sparsity: float) -> _Runner:
    peer = peers.PEERS[name]
    layer = _pruned(dense, sparsity, "unstructured") if peer.pruned else dense
    call = peers.build(name, layer, x)
    weights = int(layer.weight.count_nonzero()) if peer.pruned else layer.weight.numel()
    return _Runner(name, call, weights, peer.weight_bytes * weights, peer.integer)


def _pack(name: str, dense: nn.Linear, x: Tensor, sparsity: float) -> _Runner:
    layer, weights = pack(name, dense, sparsity)
    _validate(name, layer, x)
    kernel = layer.packed.kernel
    integer = kernel in ceilings.INTEGER
    return _Runner(name, lambda: layer(x), weights, layer.packed.nbytes, integer, kernel)


def _pruned(dense: nn.Linear, sparsity: float, pattern: str) -> nn.Linear:
    pruned = copy.deepcopy(dense)
    prune_(pruned, sparsity, pattern)
    return pruned


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


def _timing(
    runner: _Runner,
    m: int,
    moved: int,
    times: Sequence[float],
    medians: Mapping[str, float],
    limits: Ceilings,
) -> Timing:
    times, p50, ops = sorted(times), statistics.median(times), 2.0 * m * runner.weights
    bound = limits.bound(ops, moved, runner.integer)
    return Timing(
        name=runner.name,
        kernel=runner.kernel,
        p20_ms=times[len(times) // 5],
        p50_ms=p50,
        p80_ms=times[len(times) * 4 // 5],
        ops=ops,
        weight_bytes=runner.weight_bytes,
        moved_bytes=moved,
        gflops=1e-6 * ops / p50,
        gb_per_s=1e-6 * runner.weight_bytes / p50,
        bound=bound.by,
        share=bound.ms / p50,
        vs={name: median / p50 for name, median in medians.items()},
    )
