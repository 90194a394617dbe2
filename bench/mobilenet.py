"""MobileNetV2 as a whole, against torch and int8 peers: writes mobilenet.json and mobilenet.md.

    python bench/mobilenet.py                # the best instruction set
    python bench/mobilenet.py --isa avx2     # all but ONNX Runtime held to AVX2

As bench/resnet.py: random weights, one thread and ours also on two, all in turn in each round.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from pathlib import Path
from typing import Any

import engines
import torch
from layer_times import layer_times
from linear import HERE, about, heading
from resnet import BATCHES, HELD, STATIC, TORCH, Lab, layer_table, on, time_table, times
from torch import nn
from torch.fx.experimental.optimization import fuse as folded
from verdict import hold

import gossamer as gs
from gossamer import _C, testing
from gossamer.tasks.mobilenet import MobileNetV2
from gossamer.tasks.resnet import settle_
from gossamer.timing import threads

# Whether depthwise convolutions are int8, or left to torch, as by other formats.
KINDS = {"int8": True, "int8, depthwise in fp32": False}
COSINE = 0.9  # at least, of int8 logits with those of torch fp32


class MobileLab(Lab):
    """Lab.width is in 64ths of the paper's channels."""

    def dense(self) -> nn.Module:
        """The net with its BatchNorm, before anything is done to it."""
        model = MobileNetV2(self.width / 64)
        settle_(model, self.images(8))
        return model

    def net(self, name: str, dense: nn.Module) -> nn.Module:
        """A net of KINDS, checked."""
        model, y = copy.deepcopy(dense), self.images(2)
        with gs.calibrate(model):
            model(self.images(4))
        depthwise = [
            layer
            for layer, module in model.named_modules()
            if isinstance(module, nn.Conv2d) and module.groups > 1
        ]
        left = {} if KINDS[name] else dict.fromkeys(depthwise)
        gs.compress_(model, {**left, "fc": gs.Int8(), "*": STATIC})
        fused = gs.fuse(model, example_inputs=(self.images(4),))
        self.check(name, fused(y), folded(dense)(y), COSINE)
        return fused


def measured(lab: MobileLab) -> dict[str, Any]:
    """Milliseconds by batch and name, cosines, and where the time goes."""
    torch.manual_seed(0)
    dense = lab.dense()
    planar, last = folded(dense), folded(dense).to(memory_format=torch.channels_last)
    nets = {name: lab.net(name, dense) for name in KINDS}
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
            lab.check(name, call(), planar(own), 0.9999 if name in engines.FP32 else 0.0)
        calls = {TORCH[0]: on(1, planar, own), TORCH[1]: on(1, last, channels_last), **others}
        for name, net in nets.items():
            calls |= {name: on(1, net, own), f"{name}, two threads": on(2, net, own)}
        found["ms"][str(batch)] = times(lab, calls)
    found["layers"] = layer_times(nets["int8"], x[:1].clone())
    return found


def markdown(figures: dict[str, Any]) -> str:
    """mobilenet.md."""
    lines = [*heading("MobileNetV2", figures["machine"]), ""]
    lines += ["Milliseconds a batch, and times faster than the better layout of torch fp32.", ""]
    lines += [time_table(figures), "", "## Where the time goes: int8, batch 1", ""]
    return "\n".join([*lines, layer_table(figures["layers"])]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--isa", choices=_C.isas(), default=_C.isa())
    parser.add_argument("--peers", choices=["all", "none"], default="all")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each batch")
    parser.add_argument("--shrink", type=int, default=1, help="divide sizes, to try this script")
    parser.add_argument("--folder", type=Path, default=HERE, help="where to write the two files")
    options = parser.parse_args()
    held = HELD if options.isa == "avx2" else {}
    hold(held)
    absent = engines.missing() if options.peers == "all" else []
    lab = MobileLab(max(8, 64 // options.shrink), max(32, 224 // options.shrink), options.seconds)
    lab.peers = options.peers == "all" and not absent
    with testing.isa(options.isa), threads(1), torch.inference_mode():
        found = measured(lab)
        others = " ".join(f"{name}={value}" for name, value in held.items())
        machine = about(others=others or "the best they have", missing=", ".join(absent) or "none")
    figures = {"machine": machine, **found}
    name = f"mobilenet-{options.isa}" if held else "mobilenet"
    options.folder.joinpath(f"{name}.json").write_text(json.dumps(figures, indent=1) + "\n")
    options.folder.joinpath(f"{name}.md").write_text(markdown(figures))
    print(markdown(figures))


if __name__ == "__main__":
    main()
