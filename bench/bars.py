"""The figures that Gossamer is held to, each with its bar: writes bars.json and bars.md.

    python bench/bars.py                  # the best instruction set
    python bench/bars.py --isa avx2       # our AVX2 kernels, and FBGEMM held to AVX2: bars-avx2.*
    python bench/bars.py --items 1,7

One thread unless a bar says two. Layers are timed as users call them: quantizing, packing of
activations, epilogue and allocation included.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
import unittest.mock
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
from linear import about, add_folder, heading
from torch import Tensor, nn
from torch.nn import functional as F
from verdict import Bar, added_bytes, as_json, hold, own_process, verdicts

import gossamer as gs
from gossamer import _C, bench, ops, packed, peers, testing
from gossamer.timing import threads

MIB = 2**20
FP32, FBGEMM = bench.TORCH_FP32, "fbgemm"
GEMM = [
    *((1, 4096, 4096), (8, 4096, 4096), (128, 768, 768), (128, 768, 3072)),
    *((128, 3072, 768), (512, 1024, 4096)),
]
# At 80, 90 and 95 % zeros, times torch fp32; and which part of that is asked for at 32 rows.
SPARSE = {"sparse": ((3.6, 6.2, 10.0), 0.75), "sparse-int8": ((8.0, 14.0, 22.0), 1.0)}
ZEROS = (0.8, 0.9, 0.95)


@dataclass(frozen=True)
class Lab:
    """Where things are measured: for `seconds` each; sizes are divided by `shrink`."""

    seconds: float
    shrink: int

    def size(self, value: int) -> int:
        """A number of inputs or outputs."""
        return max(16, value // self.shrink)

    @cache  # noqa: B019  (one Lab a process)
    def result(
        self, m: int, k: int, n: int, formats: Sequence[str], zeros: float = 0.9
    ) -> bench.Result:
        """All these formats in one run, with torch fp32 and FBGEMM."""
        print(f"{m} rows, {k} -> {n}, {zeros:.0%}", file=sys.stderr, flush=True)
        sizes = self.size(k), self.size(n)
        result = bench.linear(m, *sizes, formats, zeros, seconds=self.seconds, against=[FBGEMM])
        if result.notes:
            sys.exit("\n".join(result.notes))
        return result

    def ratio(self, name: str, other: str, m: int, k: int, n: int, zeros: float = 0.9) -> float:
        """How many times faster than `other` a format is."""
        # One run of all formats serves several items; other sparsities are about sparse formats.
        formats = tuple(bench.FORMATS) if zeros == 0.9 else tuple(SPARSE)
        return self.result(m, k, n, formats, zeros).ratio(name, other)

    def layer(self, k: int, n: int) -> nn.Linear:
        """A dense layer with the same weights in every run."""
        torch.manual_seed(0)
        return nn.Linear(self.size(k), self.size(n))


def _listed(values: Sequence[float]) -> str:
    return " ".join(f"{value:.3g}" for value in values)


def dense_int8(lab: Lab) -> Iterator[Bar]:
    """Item 1."""
    ratios = [lab.ratio("int8", FBGEMM, *shape) for shape in GEMM]
    mean = statistics.geometric_mean(ratios)
    yield Bar(1, "int8 / FBGEMM, geometric mean", ">=", 1.35, mean, detail=_listed(ratios))
    yield Bar(1, "int8 / FBGEMM, slowest shape", ">=", 1.0, min(ratios))
    worst = max((_errors(lab, *shape) for shape in GEMM), key=lambda pair: pair[0] / pair[1])
    detail = f"{worst[0]:.2e} against {worst[1]:.2e} of the norm"
    yield Bar(1, "error to fp32 / FBGEMM's, worst", "<=", 1.0, worst[0] / worst[1], detail=detail)


def _errors(lab: Lab, m: int, k: int, n: int) -> tuple[float, float]:
    """norm(y - exact) / norm(exact), ours and FBGEMM's."""
    dense = lab.layer(k, n)
    x = torch.randn(m, dense.in_features)
    with torch.inference_mode():
        exact = F.linear(x.double(), dense.weight.double(), dense.bias.double())
        ours, theirs = gs.Linear.from_dense(dense, gs.Int8())(x), peers.build(FBGEMM, dense, x)()
    return tuple(float((y - exact).norm() / exact.norm()) for y in (ours, theirs))


def sparse(lab: Lab) -> Iterator[Bar]:
    """Items 2 and 3."""
    for item, (name, (limits, part)) in enumerate(SPARSE.items(), 2):
        for zeros, limit in zip(ZEROS, limits, strict=True):
            for m, k, n in ((128, 768, 3072), (128, 3072, 768), (32, 1024, 4096)):
                what = f"{name} {zeros:.0%} / torch fp32, {m} rows {k} -> {n}"
                bar = limit * (part if m == 32 else 1)
                yield Bar(item, what, ">=", bar, lab.ratio(name, FP32, m, k, n, zeros))


def few_rows(lab: Lab) -> Iterator[Bar]:
    """Item 4."""
    for name in bench.FORMATS:
        for k, n in ((768, 3072), (4096, 4096)):
            ratios = [lab.ratio(name, FP32, m, k, n) for m in (1, 2, 4, 8)]
            what = f"{name} / torch fp32, {k} -> {n}, worst of 1, 2, 4, 8 rows"
            yield Bar(4, what, ">=", 1.0, min(ratios), detail=_listed(ratios))
    for name, other, m, k, n, limit in (
        ("int8", FBGEMM, 1, 4096, 4096, 1.3),
        ("sparse-int8", FBGEMM, 1, 4096, 4096, 3.0),
        ("sparse-int8", FBGEMM, 8, 4096, 4096, 6.0),
        ("sparse", FP32, 1, 768, 3072, 2.5),
    ):
        what = f"{name} / {other}, {m} row{'s' * (m > 1)} {k} -> {n}"
        yield Bar(4, what, ">=", limit, lab.ratio(name, other, m, k, n))


def weight_only(lab: Lab) -> Iterator[Bar]:
    """Item 5."""
    shapes = [*GEMM, *((m, 768, 3072) for m in (1, 2, 4, 8))]
    ratios = [lab.ratio("weight-only", FP32, *shape) for shape in shapes]
    what = "weight-only / torch fp32, worst of all shapes"
    yield Bar(5, what, ">=", 1.0, min(ratios), detail=_listed(ratios))
    for size, limit in ((4096, 1.3), (8192, 1.6)):
        result = lab.result(1, size, size, ("int8", "int4"))
        what = f"int4 / int8, 1 row {size} -> {size}"
        yield Bar(5, what, ">=", limit, result.ratio("int4", "int8"))


def two_threads(lab: Lab) -> Iterator[Bar]:
    """Item 6."""
    for k, n in ((768, 3072), (3072, 768)):
        dense = lab.layer(k, n)
        x = torch.randn(128, dense.in_features)
        calls: dict[str, Callable[[], object]] = {}
        for name in bench.FORMATS:
            layer = bench.pack(name, dense, 0.9)[0]
            calls |= {f"{name} {count}": partial(layer, x) for count in (1, 2)}
        with torch.inference_mode():
            times = bench.measure(calls, {name: int(name[-1]) for name in calls}, lab.seconds)
        medians = {name: statistics.median(own) for name, own in times.items()}
        for name in bench.FORMATS:
            speed = medians[f"{name} 1"] / medians[f"{name} 2"]
            yield Bar(6, f"{name}, two threads / one, 128 rows {k} -> {n}", ">=", 1.7, speed)


def overheads(lab: Lab) -> Iterator[Bar]:
    """Item 7."""
    yield from _calls(lab)
    dense = lab.layer(4096, 4096)
    for name, format in bench.FORMATS.items():
        pruned = name.startswith("sparse")
        weight = bench.pack(name, dense, 0.8)[0].unpack() if pruned else dense.weight.detach()
        start = time.perf_counter()
        packed.pack(weight, format)
        took = time.perf_counter() - start
        what = f"{name}, packing of 4096 x 4096, {'80 % zeros' if pruned else 'no zeros'}"
        yield Bar(7, what, "<=", 1, took, " s")
    for name in bench.FORMATS:
        for m, k, n in ((128, 768, 3072), (128, 4096, 4096)):
            sizes = m, lab.size(k), lab.size(n)
            limit = max(lab.size(k) * lab.size(n), 4 * MIB) / MIB
            what = f"{name}, memory of a forward beside its output, {m} rows {k} -> {n}"
            yield Bar(7, what, "<=", limit, _in_own_process(name, *sizes) / MIB, " MiB")


def _calls(lab: Lab) -> Iterator[Bar]:
    """The operators and the modules around them, next to torch's, where there is little to do."""
    torch.manual_seed(0)
    dense, x = nn.Linear(16, 16), torch.randn(1, 16)
    calls: dict[str, Callable[[], object]] = {
        "F.linear": partial(F.linear, x, dense.weight, dense.bias),
        "nn.Linear": partial(dense, x),
    }
    with torch.inference_mode():
        for name in bench.FORMATS:
            layer = bench.pack(name, dense, 0.9)[0]
            calls |= {name: _operator_call(layer, x), f"{name} module": partial(layer, x)}
        times = bench.measure(calls, 1, lab.seconds)
    us = {name: 1e3 * statistics.median(own) for name, own in times.items()}
    for name in bench.FORMATS:
        detail = f"F.linear {us['F.linear']:.3g}; as modules {us[f'{name} module']:.3g}"
        detail += f" and {us['nn.Linear']:.3g}"
        what = f"{name}, call of the operator, 1 row 16 -> 16"
        yield Bar(7, what, "<=", 3, us[name], " us", detail)


def _operator_call(layer: gs.Linear, x: Tensor) -> Callable[[], object]:
    """The operator under a layer, with the arguments that the layer gives it."""
    name = f"_{layer.packed.kernel}"
    with unittest.mock.patch.object(ops, name) as operator:
        layer(x)
    return partial(getattr(ops, name), *operator.call_args.args, **operator.call_args.kwargs)


def _in_own_process(name: str, m: int, k: int, n: int) -> int:
    """`extra_bytes` where nothing else was ever allocated."""
    with own_process("gossamer.bench") as pool:
        return pool.submit(extra_bytes, name, m, k, n, _C.isa()).result()


def extra_bytes(name: str, m: int, k: int, n: int, isa: str) -> int:
    """What the first forward adds to the peak of this process's memory, without its output."""
    torch.set_num_threads(1)
    with testing.isa(isa), torch.inference_mode():
        bench.pack(name, nn.Linear(16, 16), 0.9)[0](torch.randn(1, 16))  # loads code
        layer, x = bench.pack(name, nn.Linear(k, n), 0.9)[0], torch.randn(m, k)
        return max(0, added_bytes(lambda: layer(x)) - 4 * m * n)


def models(lab: Lab) -> dict[str, tuple[nn.Module, Tensor]]:
    """Name -> a model, and its input."""
    torch.manual_seed(0)
    wide, deep = lab.size(768), lab.size(3072)
    mlp = nn.Sequential(nn.Linear(wide, deep), nn.GELU(), nn.Linear(deep, wide))
    encoder = nn.TransformerEncoderLayer(256, 4, 1024, batch_first=True)
    convolutions = [nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 64, 3, 2, 1)]
    convolutions += [nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, 64, 1)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]
    return {
        "mlp, 1 row": (mlp, torch.randn(1, wide)),
        "mlp, 128 rows": (mlp, torch.randn(128, wide)),
        "transformer, 4 x 32 tokens": (nn.TransformerEncoder(encoder, 2), torch.randn(4, 32, 256)),
        "cnn, 4 images": (nn.Sequential(*convolutions, *head), torch.randn(4, 3, 32, 32)),
        "tiny, 1 row": (nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4)), torch.randn(1, 16)),
    }


def never_slower(lab: Lab) -> Iterator[Bar]:
    """Item 10; two per cent are the clock's."""
    plans = {"Int8": (gs.Int8(), ""), "Sparse": (gs.Sparse(), "unstructured")}
    plans["SparseInt8"] = (gs.SparseInt8(), "1x4")
    for name, (dense, x) in models(lab).items():
        for format_name, (format, pattern) in plans.items():
            model = copy.deepcopy(dense).eval()
            if pattern:
                gs.prune_(model, 0.9, pattern=pattern)
            ratios = _after_over_before(lab, model, format, x)
            what = f"compress_ to {format_name}, {name}: slowest layer after / before"
            detail = f"{len(ratios)} swapped: {_listed(ratios)}" if ratios else "none swapped"
            yield Bar(10, what, "<=", 1.02, max(ratios, default=1.0), detail=detail)


def _after_over_before(lab: Lab, model: nn.Module, format: gs.Format, x: Tensor) -> list[float]:
    """Of each layer that compress_ swapped: its time over the dense one's, on its own input."""
    compressed = copy.deepcopy(model)
    report = gs.compress_(compressed, format, example_inputs=x)
    ratios = []
    with torch.inference_mode():
        for name, own in _inputs(model, [row.name for row in report if row.after], x).items():
            layers = {"before": model.get_submodule(name), "after": compressed.get_submodule(name)}
            calls = {key: partial(layer, own) for key, layer in layers.items()}
            times = bench.measure(calls, 1, lab.seconds / 4)
            ratios.append(statistics.median(times["after"]) / statistics.median(times["before"]))
    return ratios


def _inputs(model: nn.Module, names: Sequence[str], x: Tensor) -> dict[str, Tensor]:
    """What each named layer is given when the model is called with x."""
    given: dict[str, Tensor] = {}

    def keep(name: str, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        given[name] = args[0]

    for name in names:
        model.get_submodule(name).register_forward_pre_hook(partial(keep, name))
    fused = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)  # it would call no layer
        with torch.inference_mode():
            model(x)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    for name in names:
        model.get_submodule(name)._forward_pre_hooks.clear()
    return given


ITEMS: dict[int, Callable[[Lab], Iterator[Bar]]] = {
    1: dense_int8,
    2: sparse,  # and 3
    4: few_rows,
    5: weight_only,
    6: two_threads,
    7: overheads,
    10: never_slower,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--isa", choices=_C.isas(), default=_C.isa())
    parser.add_argument("--items", default=",".join(map(str, ITEMS)), help="as 1,4; 2 is 2 and 3")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each measurement")
    parser.add_argument("--shrink", type=int, default=1, help="divide sizes, to try this script")
    add_folder(parser)
    options = parser.parse_args()
    # Like is compared with like. MKL, under torch fp32, keeps what the CPU has.
    held = {"avx2": "AVX2"}.get(options.isa, "")
    if held:
        hold({"FBGEMM_ENABLE_INSTRUCTIONS": held})
    lab, bars, start = Lab(options.seconds, options.shrink), [], time.monotonic()
    with testing.isa(options.isa), threads(1):
        for item in map(int, options.items.split(",")):
            bars += ITEMS[item](lab)
        machine = about(fbgemm=held or "the best it has", seconds=round(time.monotonic() - start))
    figures = {"machine": machine, "bars": as_json(bars)}
    lines = [*heading("Bars", machine), "", verdicts(figures["bars"])]
    print(lines[-1])
    name = f"bars-{options.isa}" if held else "bars"
    options.folder.joinpath(f"{name}.json").write_text(json.dumps(figures, indent=1) + "\n")
    options.folder.joinpath(f"{name}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
