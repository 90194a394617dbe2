"""gptq_: round weights so that the layers' outputs change least, not the weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .calibrate import set_weight_, weight_matrix
from .compress import chosen, describe, format_name
from .formats import Format, Sparse
from .layers import LAYERS
from .obs import output_error
from .observed import input_range, keep_rounded, observed
from .packed import Packed, pack
from .report import Report, Row


def gptq_(model: nn.Module, formats: Format | Mapping[str, Format | None]) -> Report:
    """Rounds calibrated weights to a format's grid by GPTQ, in place.

    Column by column, the weights that are still to be rounded make up for the error of those that
    are (`gossamer.obs`). The weights stay dense and in floats, now exactly on the grid: run, fit
    biases or evaluate the model, then give `compress_` the same formats, which packs these very
    integers and scales. Until then a copy of them lies beside each weight; a weight that is changed
    in between is rounded to nearest again, as if gptq_ had not been called, and so is one that a
    state_dict carried to another model.

    A layer keeps the plainly rounded weight where that one has the smaller output error, which is
    rare. Zeros of a pruned weight stay zeros only in `SparseInt8`, whose empty blocks stay empty.

    Args:
        model: calibrated: `with gs.calibrate(model, hessian=True): ...` on a few hundred
            sequences, images or rows; more than a layer has inputs.
        formats: as for `compress_`. `Sparse` rounds nothing: it leaves a layer alone.

    Returns:
        One row a layer: the relative error of its output over the calibration data,
        |x (w - w')^T| / |x w^T|, beside that of rounding to nearest.

    Raises:
        ValueError: no layer has a Hessian; a pattern matches no layer; a weight is NaN or infinite
            (the layer is named). The model is then as it was.

    Source: Frantar et al. 2022, GPTQ, arXiv 2210.17323.

    Example:
        >>> import torch, gossamer as gs
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 8))
        >>> with gs.calibrate(model, hessian=True):
        ...     y = model(torch.randn(200, 64) @ torch.randn(64, 64))
        >>> report = gs.gptq_(model, gs.Int4())
        >>> rounded = model[0].weight.clone()
        >>> report = gs.compress_(model, gs.Int4())
        >>> torch.equal(model[0].unpack(), rounded)
        True
    """
    candidates = chosen(model, formats)
    tied = _held_elsewhere(model)
    rounded: dict[int, tuple[str, Packed]] = {}  # by weight, under the first name that holds it
    rows: list[Row] = []
    for candidate in candidates:
        note = candidate.reason or _why_not(candidate.module, candidate.format, tied)
        row = describe(candidate, note)
        rows.append(row)
        if note or candidate.format is None:
            continue
        weight = id(candidate.module.weight)
        if weight in rounded:
            row.note = f"shares the weight of {rounded[weight][0]!r}"
            continue
        try:
            packed, row.note = _round(candidate.module, candidate.format)
        except (TypeError, ValueError) as error:
            raise type(error)(f"layer {candidate.name!r}: {error}") from error
        rounded[weight] = candidate.name, packed
        row.after = f"{row.before} on the grid of {format_name(candidate.format)}"
    if not rounded:
        raise ValueError(
            "no layer to round has a Hessian: run the model inside of "
            "`with gs.calibrate(model, hessian=True)` first, and give formats that round"
        )
    for candidate, row in zip(candidates, rows, strict=True):
        if row.after:
            packed = rounded[id(candidate.module.weight)][1]
            set_weight_(candidate.module, packed.unpack())
            keep_rounded(candidate.module, packed)
            row.zeros = describe(candidate, "").zeros
    return Report(rows, f"{len(rounded)} of {len(rows)} layers rounded by GPTQ")


def _held_elsewhere(model: nn.Module) -> dict[int, str]:
    """Parameters of modules that are no layers to round, such as embeddings, and their names."""
    return {
        id(parameter): name
        for name, module in model.named_modules()
        if type(module) not in LAYERS
        for parameter in module.parameters(recurse=False)
    }


def _why_not(module: Any, format: Format | None, tied: Mapping[int, str]) -> str:
    seen = observed(module)
    if isinstance(format, Sparse):
        return "left alone: Sparse keeps fp32 weights"
    if id(module.weight) in tied:
        return f"left alone: tied to {tied[id(module.weight)]!r}, which would change with it"
    if seen is None:
        return "left alone: the calibration did not reach it"
    if seen.hessian is None:
        grouped = getattr(module, "groups", 1) > 1
        return f"left alone: {'grouped' if grouped else 'calibrated without hessian=True'}"
    return ""


def _round(module: nn.Module, format: Format) -> tuple[Packed, str]:
    """The better of GPTQ and rounding to nearest, and what the report says of it."""
    seen, weight = observed(module), weight_matrix(module).float()
    assert seen is not None and seen.hessian is not None
    hessian: Tensor = seen.hessian
    x_range = input_range(module, format)
    ways = {
        "GPTQ": pack(weight, format, x_range, hessian=hessian),
        "rounded to nearest": pack(weight, format, x_range),
    }
    errors = {way: output_error(weight, packed.unpack(), hessian) for way, packed in ways.items()}
    best = min(errors, key=lambda way: errors[way])
    note = "output error " + ", ".join(f"{way} {error:.2%}" for way, error in errors.items())
    return ways[best], note
