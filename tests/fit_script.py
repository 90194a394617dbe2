"""A run of gs.fit with all that is random in it, for other processes: what test_fit.py starts.

python fit_script.py weights.pt [--checkpoint FOLDER] [--die N] [--batch B] [--plain]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal

import torch
import torch.nn.functional as F
from torch import nn

import gossamer as gs
from gossamer.tasks import Rows

SAMPLES = 48


def data(batch, noisy):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(SAMPLES, 16, generator=generator)
    y = torch.randint(4, (SAMPLES,), generator=generator)

    def rows(chosen):
        noise = torch.rand(len(chosen), 16) * random.random() if noisy else 0
        return x[chosen] + noise, y[chosen]

    return Rows(SAMPLES, rows).loader(batch)


def parts(noisy=True):
    """Model, optimizer, scheduler, pruner."""
    torch.manual_seed(0)
    dropout = nn.Dropout(0.2 if noisy else 0.0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), dropout, nn.Linear(32, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.9)
    return model, optimizer, scheduler, gs.Pruner(model, 0.75, "1x4", gs.Cubic(steps=15))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("target")
    parser.add_argument("--checkpoint")
    parser.add_argument("--die", type=int, default=0)
    parser.add_argument("--batch", type=int, default=5)
    parser.add_argument("--plain", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, optimizer, scheduler, pruner = parts(noisy=not options.plain)
    calls = 0

    def loss(output, labels):
        nonlocal calls
        calls += 1
        if calls == options.die:
            os.kill(os.getpid(), signal.SIGKILL)
        return F.cross_entropy(output, labels)

    history = gs.fit(
        model,
        data(options.batch, noisy=not options.plain),
        epochs=4,
        optimizer=optimizer,
        scheduler=scheduler,
        pruner=pruner,
        loss=loss,
        evaluate=lambda model: float(model[0].weight.detach().norm()),
        accumulate=1 if options.plain else 2,
        clip=1.0,
        checkpoint=options.checkpoint,
        every=3,
        progress=False,
    )
    rank = int(os.environ.get("RANK", 0))
    torch.save((model.state_dict(), pruner.masks), f"{options.target}.{rank}")
    with open(f"{options.target}.{rank}.json", "w") as file:
        json.dump(history.to_json(), file)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
