"""BatchNorm in eval mode, y = (x - mean) / sqrt(var + eps) * g + b, into the layer before it."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from gossamer.layers import Conv2d, Linear

from .graph import absorb, note, own_layer, seen
from .match import module_of, source, title, titles

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)


def fold(graph: fx.Graph) -> None:
    """Folds each BatchNorm that alone reads a layer; the others get a note that says why not.

    A packed layer's integers stay as they are, but for the sign: see `Packed.scaled`.
    """
    for node in list(graph.nodes):
        norm = module_of(node)
        if not isinstance(norm, _NORMS):
            continue
        before = source(node)
        reason = "follows no layer" if before is None else _why_not(before, node, norm)
        if reason or before is None:
            note(node, f"not folded: {reason}")
            continue
        _fold(before, norm)
        absorb(before, node, "BatchNorm")


def _why_not(before: fx.Node, node: fx.Node, norm: Any) -> str:
    """Why a BatchNorm cannot go into what it reads, or ""."""
    layer, shape = module_of(before), seen(node).shape
    rank = 4 if isinstance(layer, nn.Conv2d | Conv2d) else 2
    if not isinstance(layer, nn.Conv2d | nn.Linear | Conv2d | Linear):
        return f"follows {title(before)}, which is no layer"
    if norm.running_mean is None:
        return "has no running statistics"
    if list(before.users) != [node]:
        others = titles(user for user in before.users if user is not node)
        return f"{title(before)} is read by {others} too"
    if len(shape) != rank:
        return f"normalizes dimension 1 of {len(shape)}"
    return own_layer(before)


def _fold(before: fx.Node, norm: Any) -> None:
    layer: Any = module_of(before)
    if isinstance(layer, Conv2d | Linear):
        factor = (norm.running_var.double() + norm.eps).rsqrt()
        shift = torch.zeros_like(factor) if norm.bias is None else norm.bias.double()
        if norm.weight is not None:
            factor = factor * norm.weight.double()
        layer.scale_(factor.detach(), (shift - norm.running_mean.double() * factor).detach())
        return
    fuse = fuse_conv_bn_eval if isinstance(layer, nn.Conv2d) else fuse_linear_bn_eval
    root: Any = before.graph.owning_module
    layer.eval()  # of a layer the mode means nothing, but torch asks for it
    root.set_submodule(str(before.target), fuse(layer, norm))
