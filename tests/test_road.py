"""The whole road: a student is pruned while an int8 teacher distils it, then packed."""

from __future__ import annotations

import copy

import torch
from torch import nn

from gossamer.compress import compress_
from gossamer.distill import KD, Distiller, SquareHead
from gossamer.formats import Int8, SparseInt8
from gossamer.prune import Pruner, prune_
from gossamer.schedules import Cubic


def test_prune_while_distilling_then_pack() -> None:
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10))
    student, before = copy.deepcopy(teacher), copy.deepcopy(teacher.state_dict())
    pruner = Pruner(student, 0.75, "1x4", Cubic(steps=30))
    losses = [KD(2.0), SquareHead("[02]")]
    distiller = Distiller(student, teacher, losses, teacher_format=Int8())
    (report,) = distiller.teacher_reports
    assert [row.kernel for row in report] == ["gemm_int8"] * 2
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())

    at_once = copy.deepcopy(teacher)
    prune_(at_once, 0.75, "1x4")
    inputs = torch.randn(64, 32)
    untrained = Distiller(at_once, teacher, losses)(inputs).item()
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        distiller(inputs).backward()
        optimizer.step()
        pruner.step()
    trained = distiller(inputs).item()
    assert trained < untrained, f"{trained} after training, {untrained} pruned at once"

    pruner.finish()
    compress_(student, SparseInt8())
    for name, mask in pruner.masks.items():
        packed = student.get_submodule(name).unpack()
        assert not packed[~mask].any(), "a pruned weight is nowhere but zero"
