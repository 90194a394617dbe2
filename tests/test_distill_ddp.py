"""Two processes distil and prune as one does: DistributedDataParallel over gloo on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import gossamer as gs

STEPS = 4


def road(losses: list[gs.losses.Loss], data: torch.Tensor, parts: int, rank: int | None) -> dict:
    """Trained weights and the losses of each step; of one rank, or of a process with all parts."""
    torch.manual_seed(0)
    teacher, student = (
        nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3)) for width in (8, 5)
    )
    model = student if rank is None else nn.parallel.DistributedDataParallel(student)
    distiller = gs.Distiller(model, teacher, losses, teacher_format=gs.Int8())
    pruner = gs.Pruner(student, 0.5, schedule=gs.Cubic(steps=STEPS))
    optimizer = torch.optim.SGD([*student.parameters(), *distiller.parameters()], 0.1, momentum=0.9)
    values = []
    for batch in data:
        own = batch.chunk(parts) if rank is None else [batch.chunk(parts)[rank]]
        optimizer.zero_grad()
        losses_of_step = [distiller(part) for part in own]
        torch.stack(losses_of_step).mean().backward()
        optimizer.step()
        pruner.step()
        values.append([loss.item() for loss in losses_of_step])
    weights = [p.detach() for p in (*student.parameters(), *distiller.parameters())]
    return {"losses": values, "weights": weights, "masks": list(pruner.masks.values())}


def losses_named(name: str) -> list[gs.losses.Loss]:
    rows = [gs.KD(2.0), gs.Cosine()]
    return rows if name == "rows" else [*rows, gs.DIST(), gs.Hint("0", widths=(5, 8))]


def worker(rank: int, folder: str, name: str, data: torch.Tensor) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    try:
        torch.save(road(losses_named(name), data, 2, rank), f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("name", "parts"), [("rows", 1), ("all", 2)])
def test_two_processes_are_one_that_accumulates(tmp_path: Path, name: str, parts: int) -> None:
    torch.manual_seed(1)
    data = torch.randn(STEPS, 8, 6)
    torch.multiprocessing.spawn(worker, (str(tmp_path), name, data), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    alone = road(losses_named(name), data, parts, None)
    for rank, run in enumerate(ranks):
        assert all(map(torch.equal, run["masks"], alone["masks"]))
        assert all(map(torch.equal, run["weights"], ranks[0]["weights"])), "ranks stay equal"
        for ours, theirs in zip(run["weights"], alone["weights"], strict=True):
            # Some 10 sums of products near 1 in another order: 1e-6 is 16 roundings.
            assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)
        if parts == 2:
            expected = [step[rank] for step in alone["losses"]]
            assert [x for (x,) in run["losses"]] == pytest.approx(expected, rel=1e-5, abs=1e-6)
    if parts == 1:  # means over rows: the whole batch's loss is the mean of the halves'
        means = [(a + b) / 2 for (a,), (b,) in zip(*(r["losses"] for r in ranks), strict=True)]
        assert means == pytest.approx([x for (x,) in alone["losses"]], rel=1e-5, abs=1e-6)
