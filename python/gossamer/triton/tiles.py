"""Which tile a product runs with: one of a few a stem, chosen by shape and chip, never tuned."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Tile:
    """A program computes `rows` x `outputs` of the result, `inputs` of the sum at a time."""

    rows: int
    outputs: int
    inputs: int
    warps: int
    stages: int

    def meta(self) -> dict[str, int]:
        """The keyword arguments of a kernel's launch."""
        return {
            "ROWS": self.rows,
            "OUTPUTS": self.outputs,
            "INPUTS": self.inputs,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


@dataclass(frozen=True)
class Chip:
    """What the choice of a tile depends on.

    Attributes:
        backend: "cuda" or "hip".
        capability: of CUDA, 10 * major + minor; of HIP 0.
        shared: bytes of shared memory that a program may have.
        processors: how many multiprocessors.
    """

    backend: str
    capability: int
    shared: int
    processors: int

    @property
    def precision(self) -> str:
        """How float32 is multiplied: by three tf32 products, 22 bits of each operand, if it can."""
        return "tf32x3" if self.backend == "cuda" and self.capability >= 80 else "ieee"


# KB of shared memory a program may have, by capability; what is not listed gets the least.
SHARED = {75: 64, 80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99}
SHARED_HIP = 64  # CDNA 2 and 3


def chip_of(backend: str, capability: int, processors: int = 128) -> Chip:
    """The chip with these numbers, say of a GPU that is not at hand."""
    kilobytes = SHARED_HIP if backend == "hip" else SHARED.get(capability, 64)
    return Chip(backend, capability, kilobytes * 1024, processors)


@functools.cache
def chip(device: torch.device) -> Chip:
    """The chip of a device; without one, for fake tensors or the interpreter, that of an H100."""
    if not torch.cuda.is_available():
        return chip_of("cuda", 90)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return chip_of("hip", 0, properties.multi_processor_count)
    capability = 10 * properties.major + properties.minor
    return chip_of("cuda", capability, properties.multi_processor_count)


def fitted(tile: Tile, on: Chip, item: int, weight_item: float) -> Tile | None:
    """The tile with as many stages as fit into shared memory, or None if not even one does.

    Args:
        tile, on: what is to run where.
        item, weight_item: bytes of an input and of a weight in shared memory.
    """
    stage = int((tile.rows * item + tile.outputs * weight_item) * tile.inputs)
    if on.backend == "hip":
        # One stage lives in registers there; a wave has 64 lanes.
        tile = replace(tile, stages=2, warps=max(1, tile.warps // 2) if tile.warps < 8 else 8)
        return tile if stage <= on.shared else None
    stages = min(tile.stages, on.shared // stage)
    return replace(tile, stages=stages) if stages >= 1 else None


def choose(
    tiles: tuple[Tile, ...], m: int, n: int, on: Chip, item: int, weight_item: float
) -> Tile:
    """The first tile, from the largest on, that gives every processor a program; else the last.

    Tiles that do not fit into shared memory or are twice as high as the m rows do not count.

    >>> tiles = Tile(128, 128, 128, 8, 3), Tile(16, 64, 128, 4, 4)
    >>> choose(tiles, 4096, 4096, chip_of("cuda", 90), 1, 1).rows
    128
    >>> choose(tiles, 1, 4096, chip_of("cuda", 90), 1, 1).rows
    16
    """
    fit = [t for t in (fitted(t, on, item, weight_item) for t in tiles) if t is not None]
    lowest = min(tile.rows for tile in fit)
    fit = [tile for tile in fit if tile.rows < 2 * m or tile.rows == lowest]
    busy = (t for t in fit if -(-m // t.rows) * -(-n // t.outputs) >= on.processors)
    return next(busy, fit[-1])
