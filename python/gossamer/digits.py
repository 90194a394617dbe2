"""The demo's model and data: the textbook CNN and the digits that scikit-learn ships."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .timing import eval_mode

TEST_IMAGES = 360


def max_pool(x: Tensor) -> Tensor:
    """The maximum of each 2x2 pixels: (b, c, h, w) -> (b, c, h / 2, w / 2).

    F.max_pool2d also keeps track of where each maximum was, and takes twice the time; in training
    that pays: with the gradient of torch.maximum a step takes 156 ms and not 74 (batch 128). The
    mode is asked, not the tensor, so that torch.fx can trace a model that calls this.
    """
    if torch.is_grad_enabled():
        return F.max_pool2d(x, 2)
    rows = torch.maximum(x[:, :, ::2], x[:, :, 1::2])
    return torch.maximum(rows[..., ::2], rows[..., 1::2])


class TextbookCNN(nn.Module):
    """Two 3x3 convolutions and two linear layers, 545,098 parameters: (b, 3, 32, 32) -> (b, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.fc1 = nn.Linear(64 * 8 * 8, 128)
        self.fc2 = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        # torch's layers are faster in channels_last, also the dense ones, and with max_pool: the
        # dense model takes a third of the time it would take by the book.
        x = x.contiguous(memory_format=torch.channels_last)
        # ReLU after the pooling is the same function, on a quarter of the numbers.
        x = F.relu(max_pool(self.conv1(x)))
        x = F.relu(max_pool(self.conv2(x)))
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


@dataclass(frozen=True)
class Digits:
    """Images (b, 3, 32, 32) channels_last or (b, 64), standardized, and their classes (b) int64."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def digits(flat: bool = False) -> Digits:
    """scikit-learn's 1797 handwritten digits; 360 of them, stratified, for tests.

    Args:
        flat: rows of 64 pixels, as they are; else the 8x8 pixels are made 3x32x32.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ImportError(
            "the digits come with scikit-learn, which is missing: pip install scikit-learn"
        ) from error
    data = load_digits()
    x = torch.tensor(data.data, dtype=torch.float32)
    if not flat:
        small = x.view(-1, 1, 8, 8)
        x = F.interpolate(small, size=(32, 32), mode="bilinear").expand(-1, 3, -1, -1)
    y = torch.tensor(data.target, dtype=torch.int64)
    train, test = train_test_split(
        torch.arange(len(y)).tolist(), test_size=TEST_IMAGES, stratify=data.target, random_state=0
    )
    x = (x - x[train].mean()) / x[train].std()
    if not flat:
        x = x.contiguous(memory_format=torch.channels_last)
    return Digits(x[train], y[train], x[test], y[test])


def shifted(x: Tensor) -> Tensor:
    """The images x, moved by up to 2 pixels down and right or up and left, all alike."""
    down, right = torch.randint(0, 5, (2,)).tolist()
    wide = F.pad(x, (2, 2, 2, 2), mode="replicate")
    return wide[:, :, down : down + x.shape[2], right : right + x.shape[3]]


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Percent of the images x that the model puts in their class y."""
    with eval_mode(model):
        return 100 * (model(x).argmax(1) == y).double().mean().item()
