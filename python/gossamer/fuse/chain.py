"""Runs of packed layers as one call of an operator: csrc/torch/chain.cpp.

Between two kernels lie 30 to 40 us of module, interpreter and dispatcher, all of it cold: a quarter
of a sparse ResNet-50, whatever the number of threads. The graph stays as it is; what is run in its
place is this, where nothing can see the difference.
"""

from __future__ import annotations

import copy
import itertools
import operator
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as modules

from gossamer import _C, ops
from gossamer.layers import Conv2d, Linear
from gossamer.placement import FLOATS, prepare

from .images import ImageConv2d, ImageMean, ToFloat, ToInt8, gives_floats
from .match import module_of, source
from .pools import ImageMaxPool2d, SeparableMaxPool2d

# As chain.cpp has them.
_STEMS = ("spmm", "conv_int8", "conv_spmm_int8")
_OPERATORS = (*(stem + end for stem in _STEMS for end in ("", "_")), "max_pool", "mean")
_OPERATORS += ("block", "unblock", "gemm_int8", "spmm_int8")
_NOTHING, _NEXT = -1, -2


class _Link(NamedTuple):
    """One layer: its name, and which values it reads, as chain.cpp counts them."""

    target: str
    x: int
    residual: int
    reuse: bool
    over: bool  # reuse, of a residual that the chain was not given
    leaves: bool  # the chain, itself or written over

    def code(self, operator: str) -> int:
        """How the calls name the operator of this link."""
        return 2 * _OPERATORS.index(operator) + self.leaves


@dataclass
class _Plan:
    """What to keep, and what it is made of: modules' dicts, which they have for life."""

    calls: list[int] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    facts: dict[int, tuple[Any, dict[str, Any]]] = field(default_factory=dict)  # by the dict's id
    hooks: list[Any] = field(default_factory=list)

    def state(self, mapping: Any, name: str, value: Any) -> None:
        """The plan is for what stands under that name in a dict, None if nothing does."""
        self.facts.setdefault(id(mapping), (mapping, {}))[1][name] = value


class _Kept:
    """A chain that the operators keep, for as long as this is alive."""

    def __init__(self, plan: _Plan) -> None:
        self.number: int = ops.chain_keep(plan.weights, plan.calls)
        self._hooks = plan.hooks
        self._facts = [
            (mapping, *itertools.chain.from_iterable(found.items()))
            for mapping, found in plan.facts.values()
        ]
        weakref.finalize(self, ops.chain_drop, self.number).atexit = False

    def holds(self) -> bool:
        """Whether all modules and tensors are those that they were, and no module has hooks."""
        return _C.holds(self._facts, self._hooks)


class Chain:
    """Layers that follow each other in a graph, called with what they read from elsewhere."""

    def __init__(self, nodes: Sequence[fx.Node], kind: str) -> None:
        inside = set(nodes)
        read = dict.fromkeys(operand for node in nodes for operand in node.all_input_nodes)
        self.nodes, self.kind = nodes, kind
        self.inputs = [node for node in read if node not in inside]
        self.outputs = [node for node in nodes if not node.users or set(node.users) - inside]
        self.links = list(self._links())
        become_bytes = {source(node) for node in nodes if type(module_of(node)) is ToInt8}
        self._floats = {i for i, node in enumerate(self.inputs) if node in become_bytes}
        self._kept: dict[int, _Kept | None] = {}

    def _links(self) -> Iterator[_Link]:
        places = {node: place for place, node in enumerate([*self.inputs, *self.nodes])}
        unread = {node for node in places if not set(node.users) - set(self.nodes)}
        leaving = set(self.outputs)
        found = []
        for node in reversed(self.nodes):
            x, residual, reuse = (*node.args, None, None)[:3]
            codes = [_NOTHING, _NOTHING]
            for i, value in ((1, residual), (0, x)):
                if isinstance(value, fx.Node):
                    codes[i] = 2 * places[value] + (value in unread)
                    unread.discard(value)
            over = bool(reuse) and codes[1] >= 2 * len(self.inputs)
            if over and isinstance(residual, fx.Node) and node in leaving:
                leaving.add(residual)
            leaves = node in leaving
            found.append(_Link(str(node.target), codes[0], codes[1], bool(reuse), over, leaves))
        return reversed(found)

    def __call__(self, root: nn.Module, *inputs: Any) -> list[Any]:
        """The outputs, in order."""
        kept = self._at_hand(root, inputs)
        if kept is not None:
            try:
                # Floats that become bytes may lie in memory as they like.
                laid_out = [
                    prepare(x, [], True) if i in self._floats else x for i, x in enumerate(inputs)
                ]
                return ops.chain(laid_out, kept.number)
            except RuntimeError:
                pass  # nothing was written to; the layer that cannot run says why
        values = list(inputs)
        for link in self.links:
            read = [value for value in (link.x, link.residual) if value != _NOTHING]
            operands = [values[value // 2] for value in read]
            for value in read:
                if value % 2:
                    values[value // 2] = None
            values.append(root.get_submodule(link.target)(*operands, *[True] * link.reuse))
        return [value for value in values[len(inputs) :] if value is not None]

    def _at_hand(self, root: nn.Module, inputs: Sequence[Any]) -> _Kept | None:
        """What to call; None where the layers must be called one by one."""
        if not all(type(x) is Tensor and x.is_cpu for x in inputs):
            return None
        if modules._global_forward_hooks or modules._global_forward_pre_hooks:
            return None
        planar = 1 if self.kind == "images" else _planar(inputs)
        if planar is None:
            return None
        kept = self._kept.get(planar)
        if kept is None or not kept.holds():
            plan = _planned(root, self.links, planar, self.kind)
            kept = self._kept[planar] = None if plan is None else _Kept(plan)
        return kept


def _planar(inputs: Sequence[Tensor]) -> int | None:
    """1 for contiguous images of one dtype, 0 for channels_last; None for others."""
    dtype = inputs[0].dtype
    if not all(x.dim() == 4 and x.dtype == dtype for x in inputs) or not dtype.is_floating_point:
        return None
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        return None
    if all(x.is_contiguous() for x in inputs):
        return 1
    last = torch.channels_last
    return 0 if all(x.is_contiguous(memory_format=last) for x in inputs) else None


def _planned(root: nn.Module, links: Sequence[_Link], planar: int, kind: str) -> _Plan | None:
    plan = _Plan()
    for link in links:
        module: Any = root
        for name in link.target.split("."):
            parent, module = module._modules, getattr(module, name)
            plan.state(parent, name, module)
        hooks = (module._forward_hooks, module._forward_pre_hooks)
        if _kind(module) != kind or any(hooks) or "forward" in vars(module):
            return None
        plan.hooks.extend(hooks)
        plan.state(vars(module), "forward", None)
        _ADD[type(module)](plan, module, link, planar)
    return plan


def _add_image(plan: _Plan, image: ImageConv2d, link: _Link, planar: int) -> None:
    """`ops.conv_int8`, or `ops.conv_spmm_int8`."""
    layer, packed = image.layer, image.layer.packed
    names = (*packed.BUFFERS, "x_affine")
    plan.state(image._modules, "layer", layer)
    plan.calls += [link.code(_stem(packed) + "_" * link.over), link.x]
    plan.calls += [_NEXT] * len(names)
    _read(plan, packed._buffers, *names)
    bias = _optional(plan, layer._buffers, "bias")
    y_affine = _optional(plan, image._buffers, "y_affine")
    affine = _optional(plan, image._buffers, "residual_affine")
    plan.calls += [bias, y_affine, link.residual, affine]
    _add_tail(plan, layer, *layer._conv, planar)


def _stem(packed: Any) -> str:
    """What multiplies blocked images with such a weight."""
    kernel: str = packed.kernel
    return kernel.replace("gemm", "conv").replace("spmm", "conv_spmm")


def _add_floats(plan: _Plan, layer: Conv2d, link: _Link, planar: int) -> None:
    """`ops.spmm`."""
    packed: Any = layer.packed
    plan.calls += [link.code(packed.kernel + "_" * link.over), link.x]
    plan.calls += [_NEXT] * len(packed.BUFFERS)
    _read(plan, packed._buffers, *packed.BUFFERS)
    plan.calls += [packed.n, link.residual, _optional(plan, layer._buffers, "bias")]
    _add_tail(plan, layer, *layer._conv, planar)


def _add_tail(plan: _Plan, layer: Any, *conv: int) -> None:
    plan.state(layer._modules, "packed", layer.packed)
    plan.state(vars(layer), "_activation", layer._activation)
    plan.calls += [layer.packed.k, layer._activation, len(conv) or _NOTHING, *conv]


def _add_pool(plan: _Plan, module: Any, link: _Link, planar: int) -> None:
    """`ops.max_pool`."""
    pool = module.pool
    plan.state(vars(module), "pool", pool)
    plan.calls += [link.code("max_pool"), link.x]
    for sizes in pool.geometry(0, 0):  # not of ceil_mode, which counts what there is
        plan.calls += [len(sizes), *sizes]


def _add_mean(plan: _Plan, mean: ImageMean, link: _Link, planar: int) -> None:
    """`ops.mean`."""
    for name in ("channels", "keepdim"):
        plan.state(vars(mean), name, getattr(mean, name))
    _read(plan, mean._buffers, "affine")
    plan.calls += [link.code("mean"), link.x, _NEXT, mean.channels, int(mean.keepdim)]


def _add_to_int8(plan: _Plan, module: ToInt8, link: _Link, planar: int) -> None:
    """`ops.block`."""
    _read(plan, module._buffers, "affine")
    plan.calls += [link.code("block"), link.x, _NEXT]


def _add_to_float(plan: _Plan, module: ToFloat, link: _Link, planar: int) -> None:
    """`ops.unblock`."""
    for name in ("channels", "dtype"):
        plan.state(vars(module), name, getattr(module, name))
    _read(plan, module._buffers, "affine")
    plan.calls += [link.code("unblock"), link.x, _NEXT]
    plan.calls += [module.channels, FLOATS.index(module.dtype)]


def _add_linear(plan: _Plan, layer: Linear, link: _Link, planar: int) -> None:
    """`ops.gemm_int8` or `ops.spmm_int8`."""
    packed: Any = layer.packed
    plan.calls += [link.code(packed.kernel), link.x, *[_NEXT] * len(packed.BUFFERS)]
    _read(plan, packed._buffers, *packed.BUFFERS)
    plan.calls.append(_optional(plan, packed._buffers, "x_affine"))
    plan.calls.append(_optional(plan, layer._buffers, "bias"))
    _add_tail(plan, layer)


def _read(plan: _Plan, buffers: Any, *names: str) -> None:
    for name in names:
        plan.state(buffers, name, buffers[name])
        plan.weights.append(buffers[name])


def _optional(plan: _Plan, buffers: Any, name: str) -> int:
    """How the calls say that a buffer is there, or not."""
    if buffers.get(name) is None:
        plan.state(buffers, name, None)
        return _NOTHING
    _read(plan, buffers, name)
    return _NEXT


_ADD: dict[type[nn.Module], Callable[..., None]] = {
    Conv2d: _add_floats,
    ImageConv2d: _add_image,
    ImageMaxPool2d: _add_pool,
    SeparableMaxPool2d: _add_pool,
    ImageMean: _add_mean,
    ToInt8: _add_to_int8,
    ToFloat: _add_to_float,
    Linear: _add_linear,
}


def _kind(module: Any) -> str:
    """What may follow each other in a chain: "images" or "floats"; "" for what may not."""
    if type(module) is Conv2d:
        packed = module.packed
        alone = packed.kernel == "spmm" and not packed.trainable and module._outside is None
        return "floats" if alone else ""
    return "images" if _of_images(module) else ""


def _of_images(module: Any) -> bool:
    if type(module) in (ImageMaxPool2d, SeparableMaxPool2d):
        return not module.pool.ceil_mode
    if type(module) is Linear:
        packed = module.packed
        return packed.kernel in ("gemm_int8", "spmm_int8") and not packed.trainable
    if type(module) is ImageConv2d and _stem(module.layer.packed) not in _STEMS:
        return False
    if type(module) is ImageMean or gives_floats(module):
        return bool(module.dtype == torch.float32)
    return type(module) in (ImageConv2d, ToInt8, ToFloat)


def chains_of(graph: fx.Graph) -> list[Chain]:
    """The longest runs of two and more layers of one kind."""
    runs: list[tuple[str, list[fx.Node]]] = [("", [])]
    for node in graph.nodes:
        kind = "" if node.kwargs or _reads_others(node, runs[-1][1]) else _kind(module_of(node))
        if kind != runs[-1][0]:
            runs.append((kind, []))
        runs[-1][1].append(node)
    return [Chain(run, kind) for kind, run in runs if kind and len(run) > 1]


def _reads_others(node: fx.Node, run: Sequence[fx.Node]) -> bool:
    """Whether a node reads floats that must be of the run, but are not."""
    module, before = module_of(node), source(node)
    made = module_of(before) if before is not None and before in run else None
    if type(module) is SeparableMaxPool2d:
        return not gives_floats(made)
    return type(module) is Linear and (len(node.args) > 1 or type(made) not in (ImageMean, Linear))


def shortened(root: fx.GraphModule, graph: fx.Graph) -> Callable[..., Any]:
    """What runs a graph on the modules of `root`, with chains in the place of their layers."""
    chains = chains_of(graph)
    short = copy.deepcopy(graph)
    twins = dict(zip(graph.nodes, short.nodes, strict=True))
    cls: Any = type(root)
    for chain in chains:
        cls._chains.append(chain)
        layers = [twins[node] for node in chain.nodes]
        with short.inserting_before(layers[0]):
            inputs = [twins[node] for node in chain.inputs]
            call = short.create_node("call_module", "_chain", (len(cls._chains) - 1, *inputs))
            for i, node in enumerate(chain.outputs):
                result = short.call_function(operator.getitem, (call, i))
                twins[node].replace_all_uses_with(result)
                twins[node] = result
        for node in reversed(layers):
            short.erase_node(node)
    run: Any = type(fx.GraphModule(root, short)).forward
    return run
