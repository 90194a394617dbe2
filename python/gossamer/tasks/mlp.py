"""A small MLP on scikit-learn's handwritten digits: a whole recipe in seconds."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ..digits import accuracy, digits
from . import Rows, Task


class MLP(nn.Module):
    """Three linear layers with a ReLU after the first two: (b, 64) -> (b, 10)."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.fc1 = nn.Linear(64, width)
        self.fc2 = nn.Linear(width, width)
        self.fc3 = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))


def task(batch: int = 64, width: int = 256) -> Task:
    """The MLP and the 1797 digits of 8x8 pixels, 360 of them for tests.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    data = digits(flat=True)
    rows = Rows(len(data.train_y), lambda chosen: (data.train_x[chosen], data.train_y[chosen]))
    return Task(
        model=lambda: MLP(width),
        train=rows.loader(batch),
        evaluate=lambda model: accuracy(model, data.test_x, data.test_y),
        example_inputs=(data.test_x[:64],),
    )
