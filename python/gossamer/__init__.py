"""Gossamer: pruned, quantized and distilled PyTorch models that are really faster.

>>> import torch, gossamer as gs
>>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
>>> report = gs.compress_(model, gs.Int8())
>>> model(torch.randn(2, 64)).shape
torch.Size([2, 10])
"""

from gossamer import ops as ops
from gossamer._C import isa as isa
from gossamer.formats import Int8, Sparse, SparseInt8
from gossamer.layers import Conv2d, Linear

__version__ = "0.1.0"
