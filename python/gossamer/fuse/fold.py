"""BatchNorm in eval mode, y = (x - mean) / sqrt(var + eps) * g + b, into the layer before it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from gossamer.layers import Conv2d, Linear

from .graph import absorb, add_module, note, own_layer, seen
from .match import arguments, module_of, source, title, titles

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)
_OF_RANK: dict[int, Any] = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}
_STATE = ("running_mean", "running_var", "weight", "bias")


def fold(graph: fx.Graph) -> None:
    """Folds each BatchNorm that alone reads a layer; the others get a note that says why not.

    A packed layer's integers stay as they are, but for the sign: see `Packed.scaled`.
    """
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target is F.batch_norm:
            _as_module(node)
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


def _as_module(node: fx.Node) -> None:
    """F.batch_norm of statistics that a module holds, as in timm, becomes one that shares them."""
    image, given = source(node), arguments(node, *_STATE, "training", "momentum", "eps")
    of = [given.get(name) for name in _STATE]
    if image is None or given.get("training") or of[0] is None:
        return
    if not all(x is None or (isinstance(x, fx.Node) and x.op == "get_attr") for x in of):
        return
    root: Any = node.graph.owning_module
    cls = _OF_RANK.get(len(seen(image).shape))
    if cls is None:
        return
    mean, variance, weight, bias = (_held(root, x) for x in of)
    norm = cls(mean.numel(), given.get("eps", 1e-5))
    norm.running_mean, norm.running_var = mean, variance
    norm.weight, norm.bias = _parameter(weight), _parameter(bias)
    owner = str(of[0].target).rpartition(".")[0]
    node.op, node.target = "call_module", add_module(root, f"{owner}.norm".lstrip("."), norm.eval())
    node.args, node.kwargs = (image,), {}
    for read in of:
        if read is not None and not read.users:
            node.graph.erase_node(read)


def _held(root: nn.Module, node: fx.Node | None) -> Any:
    """The tensor that a get_attr node reads."""
    if node is None:
        return None
    owner, _, name = str(node.target).rpartition(".")
    return getattr(root.get_submodule(owner), name)


def _parameter(tensor: Tensor | None) -> nn.Parameter | None:
    return nn.Parameter(tensor.detach(), requires_grad=False) if tensor is not None else None


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
