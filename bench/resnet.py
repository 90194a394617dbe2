"""ResNet-50 as a whole, against torch and int8 peers, with bars: writes resnet.json and resnet.md.

    python bench/resnet.py                # the best instruction set
    python bench/resnet.py --isa avx2     # our AVX2 kernels, torch and OpenVINO held to AVX2, which
                                          # ONNX Runtime cannot be

Weights are random (what they are does not change the speed), BatchNorm has the statistics of its
input. Pruned nets keep all weights of the last layer and, unless they say so, of the stem. Each
net is compared with torch fp32 on the same weights before the clock starts; then all take their
turn in each round, on one thread and ours also on two, each timed for 50 ms after 50 ms of its own.
torch's BatchNorm is folded too.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import engines
import torch
import torch.nn.functional as F
from layer_times import layer_times
from linear import about, add_folder, heading
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse as folded
from verdict import Bar, added_bytes, as_json, hold, own_process, verdicts

import gossamer as gs
from gossamer import _C, testing
from gossamer.report import render
from gossamer.tasks.resnet import resnet50, settle_
from gossamer.timing import interleave, threads

STEM, HEAD = "stem.0", "fc"
STATIC = gs.Int8(activations="static")
TORCH = ("torch fp32", "torch fp32, channels_last")
BATCHES = (1, 16)
M_MMAP_THRESHOLD = -3  # of mallopt, in glibc's malloc.h
# Limits on one thread, against the better layout of torch, for each batch.
SPEED = {
    "int8": (2.9, 3.3),
    "sparse fp32 90 %": (4.5, 5.2),
    "sparse fp32 90 %, stem too": (4.5, 5.2),
    "sparse int8 90 %": (12.0, 13.0),
}
HELD = {
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "ATEN_CPU_CAPABILITY": "avx2",
}


@dataclass(frozen=True)
class Kind:
    """One of our nets.

    Args:
        formats: by pattern of a layer's name.
        sparsity: of all layers but those in `dense`.
        pattern: of the zeros.
        cosine: the least that its logits may have with those of torch fp32 on the same weights.
        dense: what keeps all of its weights.
    """

    formats: dict[str, gs.Format | None]
    sparsity: float = 0.0
    pattern: str = ""
    cosine: float = 0.95
    dense: tuple[str, ...] = (STEM, HEAD)


BLOCKS = {STEM: STATIC, HEAD: gs.Int8(), "*": gs.SparseInt8(activations="static")}
KINDS = {
    "int8": Kind({HEAD: gs.Int8(), "*": STATIC}),
    "sparse fp32 90 %": Kind(
        {STEM: None, HEAD: None, "*": gs.Sparse()}, 0.9, "unstructured", cosine=0.9999
    ),
    "sparse fp32 90 %, stem too": Kind(
        {HEAD: None, "*": gs.Sparse()}, 0.9, "unstructured", cosine=0.9999, dense=(HEAD,)
    ),
    "sparse int8 80 %": Kind(BLOCKS, 0.8, "1x4"),
    "sparse int8 90 %": Kind(BLOCKS, 0.9, "1x4"),
}


@dataclass
class Lab:
    """What is measured, and how long.

    Args:
        width: of the net's first stage.
        size: of the images.
        seconds: for all rounds of a batch.
        peers: whether other engines are measured.
    """

    width: int = 64
    size: int = 224
    seconds: float = 30.0
    peers: bool = True
    cosines: dict[str, float] = field(default_factory=dict)

    def images(self, count: int) -> Tensor:
        """Random blots and noise: (count, 3, size, size)."""
        blots = F.interpolate(torch.randn(count, 3, 7, 7), size=self.size, mode="bilinear")
        return blots + 0.3 * torch.randn(count, 3, self.size, self.size)

    def dense(self) -> nn.Module:
        """The net with its BatchNorm, before anything is done to it."""
        model = resnet50(self.width)
        settle_(model, self.images(8))
        return model

    def check(self, name: str, y: Tensor, exact: Tensor, least: float) -> None:
        """Keeps the cosine of logits, and stops where it is below `least`."""
        cosine = F.cosine_similarity(y, exact).min().item()
        # Fewer channels average less of the rounding away: a small net says nothing of int8.
        least = least if self.width == 64 or least > 0.99 else 0.0
        if not cosine >= least:
            sys.exit(f"{name}: cosine {cosine:.4f} to torch fp32, at least {least} is wanted")
        self.cosines[name] = cosine

    def net(self, name: str, dense: nn.Module) -> nn.Module:
        """A net of KINDS, checked."""
        kind, model = KINDS[name], copy.deepcopy(dense)
        if kind.sparsity:
            gs.prune_(model, kind.sparsity, kind.pattern, exclude=kind.dense)
            settle_(model, self.images(8))
        exact, x = folded(model), self.images(4)
        with gs.calibrate(model):
            model(self.images(4))
        gs.compress_(model, kind.formats)
        fused = gs.fuse(model, example_inputs=(x,))
        y = self.images(2)
        self.check(name, fused(y), exact(y), kind.cosine)
        return fused


def memory(lab: Lab, name: str, isa: str) -> dict[str, int]:
    """Bytes of a net's weights, and of what is alive at once in a forward beside its input.

    For a process of its own. The second is what the forward adds to the peak of its pages, so that
    it does not matter who allocates: torch, oneDNN or our kernels. From the start every tensor has
    pages of its own and gives them back: else holes of the heap count too, here for 30 MiB alive
    67 to 96.
    """
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**16)
    torch.set_num_threads(1)
    with testing.isa(isa), torch.inference_mode():
        torch.manual_seed(0)
        dense, x = lab.dense(), lab.images(max(BATCHES))
        if name == TORCH[1]:
            x = x.contiguous(memory_format=torch.channels_last)
            dense = dense.to(memory_format=torch.channels_last)
        model = folded(dense) if name in TORCH else lab.net(name, dense)
        model(x[:1])  # loads code
        weights = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
        return {"weights": weights, "forward": added_bytes(lambda: model(x))}


def memories(lab: Lab) -> dict[str, dict[str, int]]:
    """The memory of torch's nets and of ours."""
    found = {}
    for name in (*TORCH, *KINDS):
        with own_process("resnet") as pool:
            found[name] = pool.submit(memory, lab, name, _C.isa()).result()
    return found


def on(count: int, model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """A call that runs the model on so many threads."""

    def call() -> Tensor:
        torch.set_num_threads(count)
        y: Tensor = model(x)
        torch.set_num_threads(1)
        return y

    return call


def times(lab: Lab, calls: dict[str, Callable[[], Tensor]]) -> dict[str, float]:
    """The median milliseconds of each call."""
    once = interleave(list(calls.values()), rounds=1)
    rounds = 5e2 * lab.seconds / sum(first for (first,) in once)
    all_times = interleave(list(calls.values()), min(31, max(5, round(rounds))), warm=0.05)
    return {name: statistics.median(own) for name, own in zip(calls, all_times, strict=True)}


def timed(lab: Lab, dense: nn.Module, nets: dict[str, nn.Module], least: float) -> dict[str, Any]:
    """Milliseconds by batch and name, and cosines: torch, the peers and ours, all in turn.

    least: the least cosine of a peer's int8 logits.
    """
    planar, last = folded(dense), folded(dense).to(memory_format=torch.channels_last)
    x = lab.images(max(BATCHES))
    fp32 = int8 = b""
    if lab.peers:
        fp32 = engines.exported(planar, x[:1])
        int8 = engines.quantized(fp32, [lab.images(4)])
    found: dict[str, Any] = {"ms": {}, "cosine": lab.cosines}
    for batch in BATCHES:
        print(f"batch {batch}", file=sys.stderr, flush=True)
        own = x[:batch].clone()
        channels_last = own.contiguous(memory_format=torch.channels_last)
        others = engines.calls(fp32, int8, own) if lab.peers else {}
        for name, call in others.items():
            lab.check(name, call(), planar(own), 0.9999 if name in engines.FP32 else least)
        calls = {TORCH[0]: on(1, planar, own), TORCH[1]: on(1, last, channels_last), **others}
        for name, net in nets.items():
            calls |= {name: on(1, net, own), f"{name}, two threads": on(2, net, own)}
        found["ms"][str(batch)] = times(lab, calls)
    return found


def measured(lab: Lab) -> dict[str, Any]:
    """Milliseconds by batch and name, memory, cosines, and where the time goes."""
    torch.manual_seed(0)
    dense = lab.dense()
    nets = {name: lab.net(name, dense) for name in KINDS}
    found = timed(lab, dense, nets, 0.95)
    x = lab.images(1)
    found["layers"] = {name: layer_times(net, x) for name, net in nets.items()}
    found["memory"] = memories(lab)
    return found


def bars(found: dict[str, Any], held: bool) -> list[Bar]:
    """What the figures are held to.

    Where all are held to AVX2, ONNX Runtime is no peer: it has no setting for that.
    """
    result = []
    for place, batch in enumerate(BATCHES):
        ms = found["ms"][str(batch)]
        better = min(ms[name] for name in TORCH)
        for name, limits in SPEED.items():
            what = f"{name} / the better of torch's layouts, batch {batch}"
            result.append(Bar(1, what, ">=", limits[place], better / ms[name]))
        peers = {name: ms[name] for name in engines.INT8 if name in ms}
        if held:
            peers.pop("onnxruntime int8", None)
        if peers:
            best = min(peers, key=lambda name: peers[name])
            what = f"int8 / the better int8 peer, batch {batch}"
            result.append(Bar(2, what, ">=", 1.1, peers[best] / ms["int8"], detail=best))
        for name in SPEED:
            speed = ms[name] / ms[f"{name}, two threads"]
            result.append(Bar(3, f"{name}, two threads / one, batch {batch}", ">=", 1.7, speed))
    total = {name: sum(used.values()) for name, used in found["memory"].items()}
    share = total["int8"] / min(total[name] for name in TORCH)
    what = f"int8, memory of weights and forward / torch fp32, batch {max(BATCHES)}"
    detail = ", ".join(f"{name} {bytes_ / 2**20:.0f} MiB" for name, bytes_ in total.items())
    return [*result, Bar(4, what, "<=", 1 / 3, share, detail=detail)]


def markdown(figures: dict[str, Any]) -> str:
    """resnet.md."""
    lines = [*heading("ResNet-50", figures["machine"]), ""]
    lines += ["Milliseconds a batch, and times faster than the better layout of torch fp32.", ""]
    lines += [time_table(figures), "", "## Bars", "", verdicts(figures["bars"])]
    for name, layers in figures["layers"].items():
        lines += ["", f"## Where the time goes: {name}, batch 1", "", layer_table(layers)]
    lines += [
        "",
        "GOP/s: of the layer as it is defined; int8 makes fewer products of 3x3 with stride 1.",
    ]
    return "\n".join(lines) + "\n"


def time_table(figures: dict[str, Any]) -> str:
    """A row a name: milliseconds of each batch, how often as fast as torch, and the cosine."""
    headers = ["", *(f">{text}" for batch in BATCHES for text in (f"batch {batch}", ""))]
    rows = []
    for name in figures["ms"]["1"]:
        cells = []
        for batch in BATCHES:
            ms = figures["ms"][str(batch)]
            cells += [f"{ms[name]:.3g} ms", f"{min(ms[n] for n in TORCH) / ms[name]:.2f}x"]
        cosine = figures["cosine"].get(name.removesuffix(", two threads"))
        rows.append([name, *cells, f"{cosine:.4f}" if cosine else ""])
    return render([*headers, ">cosine of logits"], rows)


def layer_table(layers: list[dict[str, Any]]) -> str:
    """Rows of `layer_times`; GOP/s count the weights that are not zero."""
    total = sum(row["ms"] for row in layers)
    rows = [
        [
            *(row["name"], str(row["calls"]), f"{row['ms']:.3g}", f"{row['ms'] / total:.0%}"),
            f"{row['gops']:.0f}" if row["gops"] else "",
        ]
        for row in layers
    ]
    return render(["", ">calls", ">ms", ">share", ">GOP/s"], rows)


def run(
    doc: str | None,
    name: str,
    kind: type[Lab],
    seconds: float,
    figures_of: Callable[[Any, bool], dict[str, Any]],
    page: Callable[[dict[str, Any]], str],
) -> None:
    """The command of a net: measures it, prints the page and writes both files.

    Args:
        doc: of the script.
        name: of the files.
        kind: of Lab.
        seconds: for each batch, by default.
        figures_of: what is measured in such a lab, where others are held to AVX2 or not.
        page: the page of these figures.
    """
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--isa", choices=_C.isas(), default=_C.isa())
    parser.add_argument("--peers", choices=["all", "none"], default="all")
    parser.add_argument("--seconds", type=float, default=seconds, help="for each batch")
    parser.add_argument("--shrink", type=int, default=1, help="divide sizes, to try this script")
    add_folder(parser)
    options = parser.parse_args()
    held = HELD if options.isa == "avx2" else {}
    hold(held)
    absent = engines.missing() if options.peers == "all" else []
    lab = kind(max(8, 64 // options.shrink), max(32, 224 // options.shrink), options.seconds)
    lab.peers = options.peers == "all" and not absent
    with testing.isa(options.isa), threads(1), torch.inference_mode():
        found = figures_of(lab, bool(held))
        others = " ".join(f"{name}={value}" for name, value in held.items())
        machine = about(others=others or "the best they have", missing=", ".join(absent) or "none")
    figures = {"machine": machine, **found}
    file = f"{name}-{options.isa}" if held else name
    options.folder.joinpath(f"{file}.json").write_text(json.dumps(figures, indent=1) + "\n")
    options.folder.joinpath(f"{file}.md").write_text(page(figures))
    print(page(figures))


def figures_of(lab: Lab, held: bool) -> dict[str, Any]:
    """What is measured, and the bars."""
    found = measured(lab)
    return {**found, "bars": as_json(bars(found, held))}


if __name__ == "__main__":
    run(__doc__, "resnet", Lab, 30.0, figures_of, markdown)
