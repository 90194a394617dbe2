"""Editing a graph: what the example showed of each node, and what each node stands for now."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from gossamer.layers import Conv2d, Linear

from .match import in_place, label, module_of, passes, rank_read, source, title
from .trace import Fused, twin


@dataclass(frozen=True)
class Seen:
    """What a node gave in the example."""

    shape: tuple[int, ...] = ()
    dtype: torch.dtype | None = None
    low: float = 0.0
    high: float = 0.0


class _Recorder(fx.Interpreter):
    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            low = high = 0.0
            if value.is_floating_point() and value.numel():
                low, high = (float(end) for end in torch.aminmax(value.detach()))
            n.meta["seen"] = Seen(tuple(value.shape), value.dtype, low, high)
        return value


def record(fused: Fused, inputs: list[Any]) -> None:
    """Runs the example, and keeps shape, dtype and range of what each node gives."""
    with torch.no_grad():
        _Recorder(fused).run(*inputs)


_COMPARES = {operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge}


def settle_ranks(graph: fx.Graph) -> None:
    """How many dimensions tensors have is what it was in the example, and so is what follows.

    An 8-bit image has one more. Assertions about it held.
    """
    for node in list(graph.nodes):
        before = source(node)
        if before is not None and seen(before).dtype is not None and rank_read(node):
            _is(node, len(seen(before).shape))
        elif node.target in _COMPARES and not node.all_input_nodes:
            _is(node, node.target(*node.args))
        elif node.target is torch._assert and node.args[0] is True:
            graph.erase_node(node)


def _is(node: fx.Node, value: int | bool) -> None:
    """Whoever reads the node gets the value."""
    for reader in list(node.users):
        args, kwargs = fx.map_arg(
            (reader.args, reader.kwargs), lambda read: value if read is node else read
        )
        reader.args, reader.kwargs = args, kwargs
    node.graph.erase_node(node)


def seen(node: fx.Node) -> Seen:
    """What the node gave in the example; of no shape, if that was no tensor."""
    return node.meta.get("seen", Seen())


def note(node: fx.Node, text: str) -> None:
    """Adds to what the report says of a node."""
    node.meta["note"] = "; ".join(filter(None, [node.meta.get("note"), text]))


def absorb(node: fx.Node, last: fx.Node, what: str) -> None:
    """`node` now computes what `last` did, which read it, and takes its place."""
    node.meta["fused"] = [*node.meta.get("fused", []), *last.meta.get("fused", []), what]
    if "seen" in last.meta:
        node.meta["seen"] = last.meta["seen"]
    last.replace_all_uses_with(node)
    last.graph.erase_node(last)


def own_layer(node: fx.Node) -> str:
    """Why the layer that a node calls must not be changed, or ""."""
    layer: Any = module_of(node)
    if layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer):
        return f"{title(node)} has forward hooks"
    if isinstance(layer, Conv2d | Linear):
        return f"{title(node)} trains" if layer.packed.trainable else ""
    if type(layer) not in (nn.Conv2d, nn.Linear) or parametrize.is_parametrized(layer):
        return f"{title(node)} is no plain {label(node)}"
    prefix = f"{node.target}."
    read = {str(n.target) for n in node.graph.nodes if n.op == "get_attr"}
    elsewhere = any(name.startswith(prefix) for name in read)
    return f"the weight of {title(node)} is read elsewhere" if elsewhere else ""


def name_apart(graph: fx.Graph) -> None:
    """A layer that runs at several places gets a copy at each, of the same tensors.

    What is fused into it at one place must not be so at another.
    """
    root: Any = graph.owning_module
    taken: set[str] = set()
    for node in graph.nodes:
        if not isinstance(module_of(node), Conv2d | Linear | nn.Conv2d | nn.Linear):
            continue
        target = str(node.target)
        if target in taken:
            node.target = add_module(root, target, twin(root.get_submodule(target)))
        taken.add(str(node.target))


def add_module(root: Fused, name: str, module: nn.Module) -> str:
    """Adds a module under that name, or one with a number behind it if it is taken."""
    names, number, free = {n for n, _ in root.named_modules()}, 1, name
    while free in names:
        free, number = f"{name}_{number}", number + 1
    root.add_submodule(free, module)
    return free


_VIEWS = {"view", "view_as", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "permute"}
_VIEWS |= {"transpose", "t", "chunk", "split", "narrow", "select", "getitem", "expand", "unbind"}


def out_of_place(graph: fx.Graph) -> None:
    """Who reads a tensor after it was written to reads the result of the writing from now on.

    What has views when it is written to, or is one, must stay the floats that they share:
    meta["pinned"].
    """
    nodes = list(graph.nodes)
    for place, node in enumerate(nodes):
        base = source(node)
        if base is None or not node.op.startswith("call_") or not in_place(node):
            continue
        later = set(nodes[place + 1 :])
        base.replace_all_uses_with(node, delete_user_cb=later.__contains__)
        if any(is_view(user) for user in base.users):
            base.meta["pinned"] = True
        while base is not None and is_view(base):
            base = source(base)
            if base is not None:
                base.meta["pinned"] = True


def is_view(node: fx.Node) -> bool:
    """Whether a node may give the memory of what it reads."""
    return node.op.startswith("call_") and label(node).lower() in _VIEWS


def can_wait(layer: fx.Node, until: fx.Node) -> bool:
    """Whether a layer may run as late as another node: nobody writes over what it reads."""
    read, node = _memory_of(source(layer)), layer.next
    while node is not until:
        if node.op.startswith("call_") and in_place(node) and _memory_of(source(node)) is read:
            return False
        node = node.next
    return True


def _memory_of(node: fx.Node | None) -> fx.Node | None:
    """The node that made the memory which a view, or a result written over its operand, lies in."""
    while node is not None and (is_view(node) or (node.op.startswith("call_") and in_place(node))):
        node = source(node)
    return node


def drop_what_passes(graph: fx.Graph) -> None:
    """Erases nn.Identity and dropout that is switched off."""
    for node in list(graph.nodes):
        before = source(node)
        if before is not None and node.op.startswith("call_") and passes(node):
            node.replace_all_uses_with(before)
            graph.erase_node(node)
