"""The net that the tests of compress_, save and load_ use, and what must not change in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gossamer as gs

FORMATS = [gs.Int8(), gs.Int8(activations="none"), gs.Int4(), gs.Sparse(), gs.SparseInt8()]
NAMES = ["int8", "w8", "int4", "sparse", "sparse_int8"]


class Net(nn.Module):
    """All that compress_ and a checkpoint meet: layers, state, and a buffer not to be saved."""

    scratch: Tensor
    norm: nn.BatchNorm2d

    def __init__(self, width: int = 8, stride: int = 1, bias: bool = True) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, stride, padding="same" if stride == 1 else 1)
        self.norm = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, width, bias=bias)
        self.head = nn.Linear(width, 4)
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu().mean((2, 3))
        y: Tensor = self.head(self.fc(x).relu())
        return y


def trained(**sizes: Any) -> Net:
    """A net in eval mode with a state of its own, half of its 1x4 blocks zero but in the head."""
    model = Net(**sizes)
    for _ in range(2):
        model(image())
    with torch.no_grad():
        for layer in (model.stem, model.fc):
            blocks = layer.weight.view(-1, 4)
            blocks[torch.rand(len(blocks)) < 0.5] = 0
    return model.eval()


def image() -> Tensor:
    return torch.randn(2, 3, 8, 8)


def snapshot(model: nn.Module) -> list[tuple[object, ...]]:
    """Modules and tensors by identity, modes, hooks and values: equal if nothing changed."""
    modules = [
        (name, id(m), m.training, len(m._forward_pre_hooks), len(m._forward_hooks))
        for name, m in model.named_modules(remove_duplicate=False)
    ]
    tensors = [
        (name, id(t), None if nn.parameter.is_lazy(t) or t.is_meta else str(t.tolist()))
        for name, t in [*model.named_parameters(), *model.named_buffers()]
    ]
    return [*modules, *tensors]


def packed(format: Any = None, **sizes: Any) -> Net:
    """A trained net, packed but for its head."""
    model = trained(**sizes)
    if format is not None:
        gs.compress_(model, {"head": None, "*": format})
    return model


def refuses(model: nn.Module, path: Path, match: str) -> None:
    """load_ raises a ValueError whose sentence fits, and the model is as it was."""
    before = snapshot(model)
    with pytest.raises(ValueError, match=match):
        gs.load_(model, path)
    assert before == snapshot(model)
