"""Gossamer: pruned, quantized and distilled PyTorch models that are really faster.

>>> import torch, gossamer as gs
>>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
>>> report = gs.compress_(model, gs.Int8())
>>> model(torch.randn(2, 64)).shape
torch.Size([2, 10])
"""

from gossamer import ops as ops
from gossamer._C import isa, version
from gossamer.calibrate import calibrate
from gossamer.checkpoint import load_, save
from gossamer.compare import Comparison, compare
from gossamer.compress import compress_
from gossamer.distill import KD, Distiller, SquareHead
from gossamer.formats import Format, Int4, Int8, Sparse, SparseInt8
from gossamer.gptq import gptq_
from gossamer.layers import Conv2d, Linear
from gossamer.prune import Pruner, prune_
from gossamer.report import Report
from gossamer.schedules import Cubic, OneShot, Polynomial
from gossamer.sensitivity import Sensitivity, sensitivity
from gossamer.slim import slim_
from gossamer.smooth import smooth_

__version__ = version()

__all__ = [
    "KD",
    "Comparison",
    "Conv2d",
    "Cubic",
    "Distiller",
    "Format",
    "Int4",
    "Int8",
    "Linear",
    "OneShot",
    "Polynomial",
    "Pruner",
    "Report",
    "Sensitivity",
    "Sparse",
    "SparseInt8",
    "SquareHead",
    "calibrate",
    "compare",
    "compress_",
    "gptq_",
    "isa",
    "load_",
    "prune_",
    "save",
    "sensitivity",
    "slim_",
    "smooth_",
]
