"""The textbook CNN on Fashion-MNIST: 60,000 + 10,000 grey images of 28x28, ten kinds of clothes.

The files are those of Debian's package `dataset-fashion-mnist`, in its folder or in another one.
"""

from __future__ import annotations

import gzip
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..digits import TextbookCNN
from ..timing import eval_mode
from . import Rows, Task

FOLDER = "/usr/share/datasets/fashion-mnist"  # of the Debian package
VARIABLE = "GOSSAMER_FASHION_MNIST"
MEAN, DEVIATION = 72.9, 90.0  # of the training images' pixels
PARTS = {"train": "train", "test": "t10k"}


@dataclass(frozen=True)
class Images:
    """Grey images (b, 32, 32) uint8 and their classes (b) int64."""

    x: Tensor
    y: Tensor

    def batch(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Images (b, 3, 32, 32) float32, channels_last, standardized, and their classes."""
        grey = (self.x[chosen].float() - MEAN) / DEVIATION
        rgb = grey.unsqueeze(1).expand(-1, 3, -1, -1)
        return rgb.contiguous(memory_format=torch.channels_last), self.y[chosen]


def images(part: str, limit: int | None = None, folder: str | Path | None = None) -> Images:
    """The first `limit` images of a part: 28x28, made 32x32 by a border of zeros.

    Args:
        part: `"train"` (60,000) or `"test"` (10,000).
        limit: images; default all.
        folder: of the four idx files; default the environment variable GOSSAMER_FASHION_MNIST,
            then the folder of the Debian package.

    Raises:
        FileNotFoundError: the files are not there.
        ValueError: a file is not what its name says.
    """
    where = Path(folder or os.environ.get(VARIABLE) or FOLDER)
    pixels = _read(where / f"{PARTS[part]}-images-idx3-ubyte.gz", dimensions=3)[:limit]
    classes = _read(where / f"{PARTS[part]}-labels-idx1-ubyte.gz", dimensions=1)[:limit]
    return Images(F.pad(pixels, (2, 2, 2, 2)), classes.long())


def _read(path: Path, dimensions: int) -> Tensor:
    """An idx file of bytes: 0 0 8 dimensions, each size as a big-endian int32, the bytes."""
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no {path}: run `apt-get install dataset-fashion-mnist` (Debian), "
            f"or set {VARIABLE} to the folder that has the four idx files"
        )
    with gzip.open(path) as file:
        content = file.read()
    start = 4 + 4 * dimensions
    sizes = [int.from_bytes(content[at : at + 4], "big") for at in range(4, start, 4)]
    if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) != start + math.prod(sizes):
        raise ValueError(f"{path} is no idx file of bytes in {dimensions} dimensions")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)[start:].view(sizes)


def accuracy(model: nn.Module, data: Images) -> float:
    """Percent of the images that the model puts in their class."""
    right = 0
    with eval_mode(model):
        for chosen in torch.arange(len(data.y)).split(500):
            x, y = data.batch(chosen)
            right += int((model(x).argmax(1) == y).sum())
    return 100 * right / len(data.y)


def task(batch: int = 128, limit: int | None = None, folder: str | None = None) -> Task:
    """The CNN of 545,098 parameters.

    Args:
        batch: images in a training step.
        limit: images for training, and for the test; default all.
        folder: see `images`.

    Raises:
        FileNotFoundError: the data set is not installed.
    """
    train, test = images("train", limit, folder), images("test", limit, folder)
    return Task(
        model=TextbookCNN,
        train=Rows(len(train.y), train.batch).loader(batch),
        evaluate=lambda model: accuracy(model, test),
        example_inputs=(test.batch(torch.arange(min(64, len(test.y))))[0],),
    )
