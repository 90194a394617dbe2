"""What a node of a graph computes, whether a module, a function or a method of a tensor does it."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from gossamer.geometry import pair

_ACTIVATIONS: dict[Any, str] = {
    **{nn.ReLU: "relu", nn.ReLU6: "relu6", nn.SiLU: "silu", nn.Hardswish: "hardswish"},
    **{nn.GELU: "gelu", torch.relu: "relu", torch.relu_: "relu", F.relu: "relu", F.relu6: "relu6"},
    **{F.silu: "silu", F.hardswish: "hardswish", F.gelu: "gelu", "relu": "relu", "relu_": "relu"},
}
_ADDS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_CATS = {torch.cat, torch.concat, torch.concatenate}
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
# torchvision's drops residuals; torch.fx meets it as one function.
_DROPS_RESIDUALS = "stochastic_depth"
_DROPOUT_CALLS = {torch.dropout, F.dropout, F.dropout1d, F.dropout2d, F.dropout3d}
_MAX_POOLS = {F.max_pool2d, torch.max_pool2d}
_AVERAGE_POOLS = {F.avg_pool2d, torch._C._nn.avg_pool2d}
_MEANS = {torch.mean, "mean"}


def module_of(node: fx.Node) -> nn.Module | None:
    """The module that a node calls."""
    root = node.graph.owning_module
    if node.op != "call_module" or root is None:
        return None
    return root.get_submodule(str(node.target))


def _callee(node: fx.Node) -> Any:
    """The type of the module that it calls, its function, or the name of its method."""
    return type(module_of(node)) if node.op == "call_module" else node.target


def label(node: fx.Node) -> str:
    """What a report calls it, such as "Conv2d", "add" or "flatten"."""
    callee = _callee(node)
    return callee if isinstance(callee, str) else callee.__name__


def title(node: fx.Node) -> str:
    """The name of the module that it calls, as the model has it; else the node's own."""
    return str(node.target) if node.op == "call_module" else node.name


def titles(nodes: Iterable[fx.Node]) -> str:
    """Their titles, in a row."""
    return ", ".join(map(title, nodes))


def arguments(node: fx.Node, *names: str) -> dict[str, Any]:
    """The arguments behind the first, by name; empty where there are more than names."""
    return {**dict(zip(names, node.args[1:], strict=False)), **node.kwargs}


def source(node: fx.Node) -> fx.Node | None:
    """The node that it reads as its first argument."""
    first = node.args[0] if node.args else node.kwargs.get("input")
    return first if isinstance(first, fx.Node) else None


def only_reader(node: fx.Node) -> fx.Node | None:
    """The node that alone reads it, and only once."""
    readers = list(node.users)
    if len(readers) != 1 or readers[0].op == "output":
        return None
    read: list[fx.Node] = []
    fx.map_arg((readers[0].args, readers[0].kwargs), read.append)
    return readers[0] if read.count(node) == 1 else None


def alive(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """Those of a graph's first nodes that later ones read."""
    own = set(nodes)
    return [node for node in nodes if not own.issuperset(node.users)]


def activation(node: fx.Node) -> str | None:
    """The name in `ops.ACTIVATIONS` of what the node does, if it is one."""
    name = _ACTIVATIONS.get(_callee(node)) if node.op.startswith("call_") else None
    if name != "gelu":
        return name
    module = module_of(node)
    form = node.kwargs.get("approximate", "none") if module is None else module.approximate
    return name if form == "none" else None


def addends(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """a and b, of a + b with nothing else to it."""
    if node.op not in ("call_function", "call_method") or node.target not in _ADDS:
        return None
    both: list[Any] = [*node.args, *(v for k, v in node.kwargs.items() if k in ("input", "other"))]
    plain = node.kwargs.get("alpha", 1) == 1 and node.kwargs.keys() <= {"input", "other", "alpha"}
    if not plain or len(both) != 2 or not all(isinstance(x, fx.Node) for x in both):
        return None
    return both[0], both[1]


def passes(node: fx.Node) -> bool:
    """Whether it gives what it gets: nn.Identity, and dropout that is switched off."""
    module = module_of(node)
    if module is not None:
        off = isinstance(module, _DROPOUTS) and not module.training
        return type(module) is nn.Identity or off
    if node.op != "call_function":
        return False
    if getattr(node.target, "__name__", "") == _DROPS_RESIDUALS:
        return arguments(node, "p", "mode", "training").get("training", True) is False
    if node.target not in _DROPOUT_CALLS:
        return False
    default = node.target is not F.dropout
    return not arguments(node, "p", "training").get("training", default)


def flattens(node: fx.Node) -> bool:
    """Whether it is flatten from the first dimension behind the batch on."""
    module = module_of(node)
    if module is not None:
        return type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1)
    if node.target not in (torch.flatten, "flatten"):
        return False
    return arguments(node, "start_dim", "end_dim") in (
        {"start_dim": 1},
        {"start_dim": 1, "end_dim": -1},
    )


def rank_read(node: fx.Node) -> bool:
    """Whether it is x.ndim or x.dim()."""
    if node.op == "call_function":
        return node.target is getattr and node.args[1] == "ndim"
    return node.op == "call_method" and node.target in ("dim", "ndimension")


def shape_read(node: fx.Node) -> tuple[int, ...] | None:
    """The dimensions that x.size(d) asks for; () for all of them: x.shape, x.size()."""
    if node.op == "call_function" and node.target is getattr and node.args[1] == "shape":
        return ()
    if node.op != "call_method" or node.target != "size":
        return None
    dim: Any = arguments(node, "dim").get("dim")
    if dim is None:
        return ()
    return (dim,) if isinstance(dim, int) else None


def in_place(node: fx.Node) -> bool:
    """Whether it writes its result over its first argument."""
    module = module_of(node)
    if module is not None:
        return bool(getattr(module, "inplace", False))
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    name = getattr(node.target, "__name__", "")
    if node.target in (F.relu, F.relu6, F.silu, F.hardswish, F.hardsigmoid, F.selu, F.mish):
        return bool(arguments(node, "inplace").get("inplace", False))
    operators = {operator.iadd, operator.imul, operator.isub, operator.itruediv, operator.setitem}
    named = name.endswith("_") and not name.endswith("__")
    return node.target in operators or named or bool(node.kwargs.get("inplace", False))


@dataclass(frozen=True)
class MaxPool:
    """max_pool2d and its geometry."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    ceil_mode: bool

    def windows(self, size: int, i: int) -> int:
        """How many windows `size` rows (i = 0) or columns (1) have, counted as torch counts."""
        room = size + 2 * self.padding[i] - self.dilation[i] * (self.kernel[i] - 1) - 1
        if not self.ceil_mode:
            return room // self.stride[i] + 1
        last = -(-room // self.stride[i])
        # A window must not begin behind the input.
        return last + int(last * self.stride[i] < size + self.padding[i])

    def geometry(self, height: int, width: int) -> tuple[list[int], ...]:
        """As `ops.max_pool` takes them for such images."""
        top, left = self.padding
        padding = [top, self._end(height, 0), left, self._end(width, 1)]
        return list(self.kernel), list(self.stride), padding, list(self.dilation)

    def _end(self, size: int, i: int) -> int:
        """Padding behind the last row or column; of ceil_mode, what completes the last window."""
        if not self.ceil_mode:
            return self.padding[i]
        reach = self.dilation[i] * (self.kernel[i] - 1) + 1
        return (self.windows(size, i) - 1) * self.stride[i] + reach - size - self.padding[i]


@dataclass(frozen=True)
class AveragePool:
    """avg_pool2d of whole windows, in which what pads them counts as 0."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]


@dataclass(frozen=True)
class Nearest:
    """Upsampling that repeats pixels: to a size, which may be a node's, or by a factor."""

    size: Any
    scale_factor: Any


@dataclass(frozen=True)
class Cat:
    """Concatenation of images along their channels."""

    parts: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Relu:
    """max(x, 0), of what no layer computes."""


@dataclass(frozen=True)
class PixelMean:
    """The mean over all pixels, an average pool to 1 x 1."""

    keepdim: bool


ImageOp = MaxPool | Nearest | Cat | Relu | PixelMean


def image_op(node: fx.Node) -> ImageOp | None:
    """What the node does to images (images, channels, height, width), if it is one of these."""
    if not node.op.startswith("call_"):
        return None
    if activation(node) == "relu":
        return Relu()
    return _max_pool(node) or _nearest(node) or _cat(node) or _pixel_mean(node)


def _max_pool(node: fx.Node) -> MaxPool | None:
    names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
    found = _settings(node, nn.MaxPool2d, _MAX_POOLS, *names)
    if found is None or found.get("return_indices"):
        return None
    kernel = pair(found["kernel_size"])
    return MaxPool(
        kernel,
        pair(found.get("stride") or kernel),
        pair(found.get("padding", 0)),
        pair(found.get("dilation", 1)),
        bool(found.get("ceil_mode", False)),
    )


def average_pool(node: fx.Node) -> AveragePool | None:
    """The pool that a node is, if it is one."""
    names = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")
    found = _settings(node, nn.AvgPool2d, _AVERAGE_POOLS, *names, "divisor_override")
    if found is None:
        return None
    kernel, padding = pair(found["kernel_size"]), pair(found.get("padding", 0))
    padded = padding != (0, 0) and not found.get("count_include_pad", True)
    if padded or found.get("ceil_mode") or found.get("divisor_override"):
        return None
    return AveragePool(kernel, pair(found.get("stride") or kernel), padding)


def _settings(
    node: fx.Node, kind: type[nn.Module], functions: set[Any], *names: str
) -> dict[str, Any] | None:
    """What such a module or a call of such a function has by these names, where all is known."""
    module = module_of(node)
    if type(module) is kind:
        found = {name: getattr(module, name) for name in names}
    elif node.op == "call_function" and node.target in functions:
        found = arguments(node, *names)
    else:
        return None
    return found if all(_plain(value) for value in found.values()) else None


def _plain(value: Any) -> bool:
    """Whether no node hides in it: it is known now."""
    return not any(isinstance(leaf, fx.Node) for leaf in (value if _listed(value) else [value]))


def _listed(value: Any) -> bool:
    return isinstance(value, tuple | list)


def _nearest(node: fx.Node) -> Nearest | None:
    module: Any = module_of(node)
    if type(module) in (nn.Upsample, nn.UpsamplingNearest2d):
        found = {name: getattr(module, name) for name in ("size", "scale_factor", "mode")}
        found["recompute_scale_factor"] = module.recompute_scale_factor
    elif node.op == "call_function" and node.target is F.interpolate:
        found = arguments(node, "size", "scale_factor", "mode")
    else:
        return None
    if found.get("mode", "nearest") != "nearest" or found.get("recompute_scale_factor"):
        return None
    if not _plain(found.get("scale_factor")):
        return None
    return Nearest(found.get("size"), found.get("scale_factor"))


def _cat(node: fx.Node) -> Cat | None:
    if node.op != "call_function" or node.target not in _CATS:
        return None
    parts: Any = node.args[0] if node.args else node.kwargs.get("tensors", ())
    dim = arguments(node, "dim").get("dim", 0)
    if not _listed(parts) or not all(isinstance(part, fx.Node) for part in parts):
        return None
    return Cat(tuple(parts)) if dim in (1, -3) else None


def _pixel_mean(node: fx.Node) -> PixelMean | None:
    module: Any = module_of(node)
    if type(module) is nn.AdaptiveAvgPool2d:
        size = module.output_size
    elif node.op == "call_function" and node.target is F.adaptive_avg_pool2d:
        size = arguments(node, "output_size").get("output_size")
    elif node.target in _MEANS and node.op in ("call_function", "call_method"):
        found = arguments(node, "dim", "keepdim")
        dims: Any = found.get("dim")
        pixels = _listed(dims) and len(dims) == 2 and {d % 4 for d in dims} == {2, 3}
        plain = found.keys() <= {"dim", "keepdim", "input"}
        return PixelMean(bool(found.get("keepdim", False))) if pixels and plain else None
    else:
        return None
    return PixelMean(True) if size in (1, (1, 1), [1, 1]) else None
