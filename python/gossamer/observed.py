"""What calibration, rounding and quantization-aware training leave on a module, and its packing.

They are plain attributes of the module.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .formats import Format
from .geometry import weight_matrix
from .packed import Packed, pack


@dataclass(frozen=True, eq=False)
class Observed:
    """Statistics of the rows x that a layer multiplied while it was calibrated.

    k is the width of the matrix that the layer packs: nn.Linear has in_features, nn.Conv2d the
    columns of `conv_matrix`, (kh * kw * channels up to 4), and a row for each output pixel. Of a
    depthwise convolution each output has inputs of its own: (n, k) in the place of (k).

    Attributes:
        rows: how many there were.
        mean: (k) float32.
        square: (k) float32, the mean of x^2.
        absmax: (k) float32, the largest |x|.
        low, high: low <= 0 <= high, the range for static quantization, of the whole tensor.
        hessian: (k, k) float32, the mean of x x^T; None unless it was asked for, or depthwise.
    """

    rows: int
    mean: Tensor
    square: Tensor
    absmax: Tensor
    low: float
    high: float
    hessian: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Frozen:
    """What quantization-aware training fixes of a layer when it begins.

    Attributes:
        format: what the layer will be packed to.
        scale: (n) float32, of each output's integers.
        x_range: the range of its input, of static activations; else None.
    """

    format: Format
    scale: Tensor
    x_range: tuple[float, float] | None


def frozen(module: nn.Module) -> Frozen | None:
    """What `qat_` fixed of this module, or None."""
    found: Any = getattr(module, "_gossamer_frozen", None)
    return found if isinstance(found, Frozen) else None


def observed(module: nn.Module) -> Observed | None:
    """What `calibrate` saw go into this module; None if it was not calibrated or did not run."""
    found: Any = getattr(module, "_gossamer_observed", None)
    return found if isinstance(found, Observed) else None


def input_range(module: nn.Module, format: Format) -> tuple[float, float] | None:
    """The range of a dense layer's input, where the format quantizes by one; else None.

    Raises:
        ValueError: the layer was not calibrated, or trains for another format.
    """
    trained = frozen(module)
    if trained is not None:
        if trained.format != format:
            raise ValueError(f"it trains for {trained.format} and cannot become {format}")
        return trained.x_range
    if getattr(format, "activations", "") != "static":
        return None
    seen = observed(module)
    if seen is None:
        raise ValueError(
            "static activations need the range of its input, and no calibration reached it: run "
            "`with gs.calibrate(model): model(x)` first, or give it another format"
        )
    return seen.low, seen.high


def keep_rounded(module: nn.Module, packed: Packed) -> None:
    """Keeps a packed weight beside a dense module whose weight equals it, for `from_dense`.

    It is no part of the module's buffers and state_dict; copy.deepcopy takes it along.
    """
    vars(module)["_gossamer_rounded"] = packed


def pack_dense(module: nn.Module, format: Format) -> Packed:
    """The packed weight of a dense layer.

    Of one that `qat_` prepared, with its frozen scales; of one that `gptq_` rounded, what was kept
    beside it, if it still is this weight in this format.

    Raises:
        ValueError: as `input_range` and `pack`.
    """
    matrix = weight_matrix(module)
    kept: Any = vars(module).get("_gossamer_rounded")
    trained, x_range = frozen(module), input_range(module, format)
    mine = isinstance(kept, Packed) and kept.format == format
    if mine and torch.equal(kept.unpack().to(matrix.dtype), matrix.cpu()):
        own = copy.deepcopy(kept)
        return own if x_range is None else own.with_range(*x_range)
    return pack(matrix, format, x_range, None if trained is None else trained.scale)
