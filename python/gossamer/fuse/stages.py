"""How a fused graph runs: in chains of layers, and a large batch in pieces, stage by stage.

A stage is the part of the graph that takes so many images at once (pieces.py); behind it what the
pieces left is joined for the next one. Deep first: no more is alive than the next stage takes.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree

from .chain import shortened
from .match import alive

_Stage = tuple[Callable[..., Any], int]  # what runs it, and the images that it takes at once


def staged(root: fx.GraphModule, forward: Callable[..., Any]) -> Callable[..., Any]:
    """A graph's forward as it runs where no compiler looks; the stages are in meta["images"].

    They hold for the code of meta["images_of"]: an edited graph gets the batch as it comes. Of
    large batches, each thread has an image of its own at least.
    """
    cls: Any = type(root)
    cls._chains = []
    cls._chain = lambda self, place, *inputs: cls._chains[place](self, *inputs)
    whole = shortened(root, root.graph)
    stages: dict[Any, list[_Stage]] = {}

    @functools.wraps(forward)
    def run(self: fx.GraphModule, *inputs: Any, **named: Any) -> Any:
        if torch.compiler.is_compiling():
            return forward(self, *inputs, **named)
        images = self.meta.get("images") if self.code == self.meta.get("images_of") else None
        batch = _batch([*inputs, *named.values()]) if images else 0
        if not images or batch <= _at_once(_first(images)):
            return whole(self, *inputs, **named)
        key = tuple(images.items())
        if key not in stages:
            stages[key] = _stages(self, images)
        return _run(self, stages[key], inputs, named)

    return run


def _stages(root: fx.GraphModule, images: dict[str, int]) -> list[_Stage]:
    nodes = list(root.graph.nodes)
    starts = {0: _first(images)}
    starts |= {i: images[node.name] for i, node in enumerate(nodes) if node.name in images}
    found = []
    for begin, end in itertools.pairwise([*starts, len(nodes)]):
        graph = fx.Graph(root)
        twins = {node: graph.placeholder(node.name) for node in alive(nodes[:begin])}
        for node in nodes[begin:end]:
            twins[node] = graph.node_copy(node, twins.__getitem__)
        if end < len(nodes):
            graph.output(tuple(twins[node] for node in alive(nodes[:end])))
        found.append((shortened(root, graph), starts[begin]))
    return found


def _run(
    root: fx.GraphModule,
    stages: Sequence[_Stage],
    inputs: Sequence[Tensor],
    named: dict[str, Tensor],
) -> Any:
    """All images through the stages: in pieces through the last one, each through those before."""
    *before, (forward, images) = stages
    values = [*inputs, *named.values()]
    count = math.ceil(values[0].size(0) / _at_once(images))
    results = []
    for piece in zip(*(x.tensor_split(count) for x in values), strict=True):
        own = piece[: len(inputs)]
        by_name = dict(zip(named, piece[len(inputs) :], strict=True))
        if before:
            own, by_name = _run(root, before, own, by_name), {}
        results.append(forward(root, *own, **by_name))
    if len(results) == 1:
        return results[0]
    return _pytree.tree_map(lambda *parts: torch.cat(parts), *results)


def _first(images: dict[str, int]) -> int:
    return next(iter(images.values()))


def _at_once(images: int) -> int:
    return max(images, torch.get_num_threads())


def _batch(values: Sequence[Any]) -> int:
    """How many images each of the values holds; 0 if they are no images, or not as many."""
    if not values or not all(type(x) is Tensor and x.dim() == 4 for x in values):
        return 0
    sizes = {x.size(0) for x in values}
    return sizes.pop() if len(sizes) == 1 else 0
