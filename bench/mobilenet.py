"""MobileNetV2 as a whole, against torch and int8 peers: writes mobilenet.json and mobilenet.md.

    python bench/mobilenet.py                # the best instruction set
    python bench/mobilenet.py --isa avx2     # all but ONNX Runtime held to AVX2

As bench/resnet.py: random weights, one thread and ours also on two, all in turn in each round.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from layer_times import layer_times
from linear import heading
from resnet import STATIC, Lab, layer_table, run, time_table, timed
from torch import nn
from torch.fx.experimental.optimization import fuse as folded

import gossamer as gs
from gossamer.tasks.mobilenet import MobileNetV2
from gossamer.tasks.resnet import settle_

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


def figures_of(lab: MobileLab, held: bool) -> dict[str, Any]:
    """Milliseconds by batch and name, cosines, and where the time goes."""
    torch.manual_seed(0)
    dense = lab.dense()
    nets = {name: lab.net(name, dense) for name in KINDS}
    found = timed(lab, dense, nets, 0.0)
    found["layers"] = layer_times(nets["int8"], lab.images(1))
    return found


def markdown(figures: dict[str, Any]) -> str:
    """mobilenet.md."""
    lines = [*heading("MobileNetV2", figures["machine"]), ""]
    lines += ["Milliseconds a batch, and times faster than the better layout of torch fp32.", ""]
    lines += [time_table(figures), "", "## Where the time goes: int8, batch 1", ""]
    return "\n".join([*lines, layer_table(figures["layers"])]) + "\n"


if __name__ == "__main__":
    run(__doc__, "mobilenet", MobileLab, 10.0, figures_of, markdown)
