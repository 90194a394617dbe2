"""Grouped convolutions that are not depthwise: one weight over all channels, of mostly zeros."""

from __future__ import annotations

from typing import Any

from torch import nn

from .formats import Format, Int8, SparseInt8
from .geometry import groups_inside


def grouped_format(format: Format) -> Format | None:
    """What a grouped convolution is kept in when it is to have that format; None: in no format.

    In blocks of four inputs, of which those outside of a group take neither time nor room.
    """
    static = isinstance(format, Int8 | SparseInt8) and format.activations == "static"
    return SparseInt8(activations="static") if static else None


def kept_format(module: nn.Module, format: Format) -> Format:
    """What a dense module is packed to that is to have that format, and can have it."""
    grouped = isinstance(module, nn.Conv2d) and groups_inside(module) > 1
    return (grouped_format(format) or format) if grouped else format


def check_groups(conv: Any, format: Format) -> None:
    """ValueError unless a convolution of such channels can have its weight in that format."""
    inputs, outputs, groups = conv.in_channels, conv.out_channels, conv.groups
    if groups < 1 or inputs % groups or outputs % groups:
        raise ValueError(f"groups={groups} must divide {inputs} inputs and {outputs} outputs")
    if groups_inside(conv) > 1 and grouped_format(format) != format:
        raise ValueError(
            f"groups={groups}: the weight must be SparseInt8(activations='static'), it is {format}"
        )
