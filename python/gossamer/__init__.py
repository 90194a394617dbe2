"""Gossamer: pruned, quantized and distilled PyTorch models that are really faster.

>>> import torch, gossamer as gs
>>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
>>> report = gs.compress_(model, gs.Int8())
>>> model(torch.randn(2, 64)).shape
torch.Size([2, 10])
"""

from gossamer import integrations as integrations
from gossamer import ops as ops
from gossamer._C import isa, version
from gossamer.calibrate import calibrate
from gossamer.checkpoint import load_, save
from gossamer.compare import Comparison, compare
from gossamer.compress import compress_
from gossamer.distill import Distiller
from gossamer.formats import Format, Int4, Int8, Sparse, SparseInt8
from gossamer.fuse import fuse
from gossamer.gptq import gptq_
from gossamer.hints import Hint, Relation, SquareHead
from gossamer.layers import Conv2d, Linear
from gossamer.loop import History
from gossamer.losses import DIST, KD, Cosine
from gossamer.prune import Pruner, prune_
from gossamer.qat import qat_
from gossamer.report import Report
from gossamer.schedules import Cubic, OneShot, Polynomial
from gossamer.sensitivity import Sensitivity, sensitivity
from gossamer.slim import slim_
from gossamer.smooth import smooth_
from gossamer.train import fit

__version__ = version()

__all__ = [
    "DIST",
    "KD",
    "Comparison",
    "Conv2d",
    "Cosine",
    "Cubic",
    "Distiller",
    "Format",
    "Hint",
    "History",
    "Int4",
    "Int8",
    "Linear",
    "OneShot",
    "Polynomial",
    "Pruner",
    "Relation",
    "Report",
    "Sensitivity",
    "Sparse",
    "SparseInt8",
    "SquareHead",
    "calibrate",
    "compare",
    "compress_",
    "fit",
    "fuse",
    "gptq_",
    "integrations",
    "isa",
    "load_",
    "prune_",
    "qat_",
    "save",
    "sensitivity",
    "slim_",
    "smooth_",
]
