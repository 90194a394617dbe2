"""The Triton kernels on a GPU, against torch: python bench/gpu.py [--out folder], under 9 minutes.

First the tests of the kernels run on the GPU, at most 3 minutes. Then layers of Llama and BERT are
timed with 1 to 8192 rows, and training steps (forward, gradients of input and weight) of dense and
sparse ones, by CUDA events: every competitor has its turn in each round, inputs and
weights rotate through more memory than the L2 cache holds, and medians count. Written are gpu.json,
gpu.md and gpu.png: microseconds, TFLOP/s (of the dense product, whatever is skipped), and what
share of this chip's roofline that is, whose ceilings the same run measures first.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.sparse import to_sparse_semi_structured

import gossamer as gs

try:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
except ImportError:
    quantize_ = None

ROOT = Path(__file__).resolve().parents[1]
# Inputs, outputs.
LAYERS = {
    "llama3-8b.attention": (4096, 4096),
    "llama3-8b.ffn.up": (4096, 14336),
    "llama3-8b.ffn.down": (14336, 4096),
    "bert.ffn.up": (768, 3072),
    "bert-large.ffn.up": (1024, 4096),
}
ROWS = (1, 8, 32, 128, 512, 2048, 8192)
TRAINING_ROWS = (512, 8192)
# A format, and the outputs x inputs of the blocks of which a tenth stays.
FORMATS: dict[str, tuple[Any, tuple[int, int] | None]] = {
    "Int8": (gs.Int8(), None),
    "Int8 weights only": (gs.Int8(activations="none"), None),
    "Int4": (gs.Int4(), None),
    "SparseInt8 90 %": (gs.SparseInt8(), (1, 4)),
    "SparseInt8 90 % 32x32": (gs.SparseInt8(), (32, 32)),
    "Sparse 90 %": (gs.Sparse(), (1, 1)),
    "Sparse 90 % 32x32": (gs.Sparse(), (32, 32)),
}
TRAINED: dict[str, tuple[Any, tuple[int, int] | None]] = {
    "Sparse 90 %": (gs.Sparse(trainable=True), (1, 1)),
    "Sparse 90 % 32x32": (gs.Sparse(trainable=True), (32, 32)),
}
SECONDS = 330  # for all timings: what is left then is listed as not measured
TESTS_SECONDS = 180


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What a chip can do at best: bytes a second, and operations a second by kind of number."""

    bandwidth: float
    float16: float
    int8: float
    tf32: float

    def seconds(self, m: int, k: int, n: int, weight_bytes: float, kind: str) -> float:
        """The least time of a product: its operations, or its bytes if those take longer.

        >>> Ceilings(1e12, 1e15, 2e15, 1e14).seconds(1, 4096, 4096, 2 * 4096 * 4096, "float16")
        3.3570816e-05
        """
        operations = 2 * m * k * n
        moved = weight_bytes + 2 * m * (k + n)
        return max(operations / getattr(self, kind), moved / self.bandwidth)


@dataclasses.dataclass(frozen=True)
class Contender:
    """How one library multiplies: the same weight several times, and a call with one of them."""

    name: str
    kind: str  # of its multiplies: a field of Ceilings
    weight_bytes: float
    weights: list[Any]
    call: Callable[[Tensor, Any], Any]
    prepare: Callable[[Tensor], Tensor] = Tensor.half  # what x is made to beforehand
    least_rows: int = 1
    products: int = 1  # of the size of the layer's, in a call


def copies(nbytes: float, cache: float) -> int:
    """How many operands of a size rotate so that each is gone from the cache when its turn comes.

    >>> copies(30e6, 50e6), copies(1e9, 50e6)
    (5, 2)
    """
    return max(2, int(2 * cache / nbytes) + 2)


def pruned(weight: Tensor, block: tuple[int, int]) -> Tensor:
    """A tenth of its blocks of outputs x inputs stay, by size.

    >>> int(pruned(torch.arange(80.0).view(2, 40), (2, 4)).count_nonzero())
    8
    """
    height, width = block
    tiles = weight.abs().unflatten(0, (-1, height)).unflatten(2, (-1, width))
    size = tiles.sum((1, 3))
    least = size.flatten().sort().values[int(0.9 * size.numel())]
    return weight * (size >= least).repeat_interleave(height, 0).repeat_interleave(width, 1)


def packed_layers(
    weight: Tensor, format: Any, block: tuple[int, int] | None, cache: float
) -> tuple[float, list[Any]]:
    """Bytes that a product reads of one, and layers packed on the CPU and moved, all alike."""
    dense = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    with torch.no_grad():
        dense.weight.copy_(pruned(weight, block) if block else weight)
    layer: Any = gs.Linear.from_dense(dense, format).cuda()
    packed = layer.packed
    nbytes = packed.values.nbytes + packed.bitmap.nbytes if block else packed.nbytes
    return nbytes, [layer, *(copy.deepcopy(layer) for _ in range(copies(nbytes, cache) - 1))]


def ours(weight: Tensor, cache: float) -> Iterator[Contender]:
    """Each format; the weight is on the GPU."""
    for name, (format, block) in FORMATS.items():
        nbytes, layers = packed_layers(weight, format, block, cache)
        kind = "tf32" if isinstance(format, gs.Sparse) else "int8"
        kind = "float16" if name == "Int8 weights only" else kind
        yield Contender(name, kind, nbytes, layers, lambda x, w: w(x))


def step(x: Tensor, layer: Any) -> Any:
    """A training step but for the optimizer: y, and the gradients of x and the weight for y."""
    with torch.enable_grad():
        y = layer(x)
        weight = layer.weight if isinstance(layer, nn.Linear) else layer.packed.values
        return torch.autograd.grad(y, (x, weight), y.detach())


def learners(weight: Tensor, cache: float) -> Iterator[Contender]:
    """What trains: torch in fp16, and sparse weights whose zeros stay."""

    def learner(name: str, kind: str, nbytes: float, layers: list[Any]) -> Contender:
        prepare = lambda x: x.half().requires_grad_()  # noqa: E731
        return Contender(name, kind, nbytes, layers, step, prepare, products=3)

    (n, k), item = weight.shape, 2 * weight.numel()
    dense = nn.Linear(k, n, bias=False, device="cuda", dtype=torch.float16)
    layers = [copy.deepcopy(dense) for _ in range(copies(item, cache))]
    yield learner("torch float16", "float16", item, layers)
    for name, (format, block) in TRAINED.items():
        yield learner(name, "tf32", *packed_layers(weight, format, block, cache))


def theirs(weight: Tensor, cache: float) -> Iterator[Contender]:
    """torch in fp16 and bf16, its int8 product of ready bytes, its 2:4, and torchao."""
    (n, k), item = weight.shape, 2 * weight.numel()
    many = copies(item, cache)
    half = [weight.half() for _ in range(many)]
    yield Contender("torch float16", "float16", item, half, F.linear)
    brain = [weight.bfloat16() for _ in range(many)]
    yield Contender("torch bfloat16", "float16", item, brain, F.linear, Tensor.bfloat16)
    q = [torch.randint(-99, 99, (n, k), dtype=torch.int8, device="cuda") for _ in range(2 * many)]
    yield Contender(
        *("torch._int_mm", "int8", n * k, q, lambda x, w: torch._int_mm(x, w.t())),
        prepare=lambda x: (30 * x).to(torch.int8),
        least_rows=17,
    )
    groups = weight.view(n, -1, 4)
    keep = torch.zeros_like(groups).scatter_(-1, groups.abs().topk(2, -1).indices, 1.0)
    sparse = (groups * keep).view_as(weight).half()
    two_of_four = [to_sparse_semi_structured(sparse.clone()) for _ in range(2 * many)]
    yield Contender("torch 2:4 float16", "float16", item * 9 / 16, two_of_four, F.linear)
    if quantize_ is not None:
        dense = nn.Linear(k, n, bias=False, device="cuda").half()
        quantize_(dense, Int8DynamicActivationInt8WeightConfig())
        yield Contender("torchao int8", "int8", n * k, [torch.compile(dense)], lambda x, w: w(x))


def turns(contender: Contender, x: list[Tensor]) -> list[Callable[[], Any]]:
    """Its calls on inputs and weights that rotate, once each of whichever are more."""
    inputs = [contender.prepare(a) for a in x]
    count = max(len(inputs), len(contender.weights))
    rotating = itertools.cycle(inputs), itertools.cycle(contender.weights)
    pairs = itertools.islice(zip(*rotating, strict=False), count)
    return [lambda a=a, w=w: contender.call(a, w) for a, w in pairs]  # type: ignore[misc]


def runs(contender: Contender, x: list[Tensor]) -> bool:
    """Whether it takes inputs of this size; of ours all must."""
    if x[0].shape[0] < contender.least_rows:
        return False
    try:
        turns(contender, x[:1])[0]()
    except (RuntimeError, NotImplementedError) as error:
        if contender.name in FORMATS:
            raise
        print(f"{contender.name} with {len(x[0])} rows: {str(error).splitlines()[0]}")
        return False
    return True


def measure(calls: dict[str, list[Callable[[], Any]]], rounds: int = 15) -> dict[str, float]:
    """The median seconds of a call, of rounds in which each competitor has its turn."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 2):
        for name, own in calls.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for call in own:
                call()
            end.record()
            end.synchronize()
            if turn >= 2:  # the first two compile and warm up
                times[name].append(begin.elapsed_time(end) / 1e3 / len(own))
    return {name: statistics.median(t) for name, t in times.items()}


def ceilings() -> Ceilings:
    """Measured: a copy of 1 GB, and square products by cuBLAS."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target, size = torch.empty_like(source), 8192
    half = torch.randn(size, size, device="cuda", dtype=torch.float16)
    byte, single = half.to(torch.int8), half.float()
    torch.backends.cuda.matmul.allow_tf32 = True
    found = measure(
        {
            "copy": [lambda: target.copy_(source)],
            "float16": [lambda: half @ half],
            "int8": [lambda: torch._int_mm(byte, byte.t())],
            "tf32": [lambda: single @ single],
        }
    )
    torch.backends.cuda.matmul.allow_tf32 = False
    rate = {name: 2 * size**3 / found[name] for name in ("float16", "int8", "tf32")}
    return Ceilings(2 * source.nbytes / found["copy"], **rate)


def results(best: Ceilings, deadline: float) -> list[dict[str, Any]]:
    """One row for each layer, number of rows and competitor; none is begun after the deadline."""
    cache = float(torch.cuda.get_device_properties(0).L2_cache_size)
    found = []
    kinds = [(name, size, False) for name, size in LAYERS.items()]
    kinds += [(f"{name}, training step", size, True) for name, size in LAYERS.items()]
    for layer, (k, n), trains in kinds:
        if time.monotonic() > deadline:
            print(f"out of time: {layer} is not measured")
            continue
        weight = torch.randn(n, k, device="cuda") * k**-0.5
        sides = [learners] if trains else [theirs, ours]
        contenders = [contender for side in sides for contender in side(weight, cache)]
        for m in TRAINING_ROWS if trains else ROWS:
            many = min(copies(2 * m * k, cache), 64)
            x = [torch.randn(m, k, device="cuda").half() for _ in range(many)]
            running = [c for c in contenders if runs(c, x)]
            times = measure({c.name: turns(c, x) for c in running})
            for c in running:
                seconds, least = times[c.name], best.seconds(m, k, n, c.weight_bytes, c.kind)
                least, operations = c.products * least, c.products * 2 * m * k * n
                found.append(
                    {"layer": layer, "m": m, "k": k, "n": n, "name": c.name, "seconds": seconds}
                    | {"tflops": operations / seconds / 1e12, "roofline": least / seconds}
                    | {"speedup": times["torch float16"] / seconds}
                )
    return found


def table(found: list[dict[str, Any]]) -> str:
    """Markdown: a line for each layer and number of rows, a column for each competitor.

    >>> row = {"layer": "a", "m": 1, "k": 2, "n": 3, "name": "torch float16", "seconds": 2e-6}
    >>> print(table([row | {"tflops": 1.5, "roofline": 0.5, "speedup": 1.0}]))
    | layer (rows, inputs -> outputs) | torch float16 |
    |---|---|
    | a (1, 2 -> 3) | 2.0 us (1.00x, 1.5 TFLOP/s, 50 %) |
    """
    names = list(dict.fromkeys(row["name"] for row in found))
    lines = ["| layer (rows, inputs -> outputs) | " + " | ".join(names) + " |"]
    lines.append("|---" * (len(names) + 1) + "|")
    for key, group in itertools.groupby(found, lambda r: (r["layer"], r["m"], r["k"], r["n"])):
        cells = {
            row["name"]: f"{row['seconds'] * 1e6:.1f} us ({row['speedup']:.2f}x, "
            f"{row['tflops']:.1f} TFLOP/s, {row['roofline']:.0%})".replace("%", " %")
            for row in group
        }
        line = " | ".join(cells.get(name, "") for name in names)
        lines.append(f"| {key[0]} ({key[1]}, {key[2]} -> {key[3]}) | {line} |")
    return "\n".join(lines)


def plot(found: list[dict[str, Any]], path: Path) -> None:
    """Times faster than torch float16 over the number of rows, a panel for each layer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    layers = list(dict.fromkeys(row["layer"] for row in found))
    figure, axes = pyplot.subplots(1, len(layers), figsize=(5 * len(layers), 4), squeeze=False)
    for axis, layer in zip(axes[0], layers, strict=True):
        rows = [row for row in found if row["layer"] == layer]
        for name in dict.fromkeys(row["name"] for row in rows):
            points = [(row["m"], row["speedup"]) for row in rows if row["name"] == name]
            axis.plot(*zip(*points, strict=True), marker="o", label=name)
        axis.set(title=layer, xscale="log", yscale="log", xlabel="rows")
    axes[0][0].set_ylabel("times faster than torch float16")
    axes[0][-1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def tests_pass() -> bool:
    """Runs the tests of the kernels on this GPU."""
    # A fused CNN first: the other tests may run out of time.
    fused = "tests/test_triton_images.py::test_a_fused_model_gives_what_it_gives_on_the_cpu"
    command = [sys.executable, "-m", "pytest", "-q", "-x", fused]
    command += ["tests/test_triton_numbers.py", "tests/test_triton_blocks.py"]
    command += ["tests/test_triton_images.py"]
    try:
        return subprocess.run(command, cwd=ROOT, timeout=TESTS_SECONDS).returncode == 0
    except subprocess.TimeoutExpired:
        print(f"the tests did not end within {TESTS_SECONDS} s; none had failed until then")
        return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "bench", help="folder of the results")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench/gpu.py needs a CUDA or ROCm GPU, and torch sees none: nothing was measured")
    arguments.out.mkdir(parents=True, exist_ok=True)  # before the measuring, not missed behind it
    if not tests_pass():
        sys.exit("the kernels are wrong on this GPU: nothing was timed")
    with torch.no_grad():
        best = ceilings()
        found = results(best, time.monotonic() + SECONDS)
    about = {"gpu": torch.cuda.get_device_name(0), "torch": torch.__version__}
    whole = about | {"ceilings": dataclasses.asdict(best), "results": found}
    (arguments.out / "gpu.json").write_text(json.dumps(whole, indent=1) + "\n")
    heading = (
        f"# {about['gpu']}, torch {about['torch']}\n\n`python bench/gpu.py`, inputs float16.\n\n"
    )
    (arguments.out / "gpu.md").write_text(f"{heading}{table(found)}\n")
    plot(found, arguments.out / "gpu.png")


if __name__ == "__main__":
    main()
