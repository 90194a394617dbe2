"""A model as a graph, by torch.fx; a submodule that it cannot follow stays one node.

torch.export would follow more models, but what it gives has fixed sizes, and layers that were
taken apart into operators: there would be nothing left to fuse.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree

from gossamer.dtypes import KeepsDtypes
from gossamer.packed import Packed
from gossamer.timing import unfused

from .stages import staged

_M = TypeVar("_M", bound=nn.Module)
_FOREIGN = (str(Path(torch.__file__).parent), str(Path(__file__).parent))


class Fused(fx.GraphModule):
    """What `fuse` returns: the model's graph, and a `Report` of what runs in it."""

    @property
    def report(self) -> Any:
        """One row a node: what runs there, what was fused into it, and why not."""
        return self.meta["report"]

    def recompile(self) -> fx.graph.PythonCode:
        """As fx does; `forward` then takes large batches in pieces."""
        code = super().recompile()
        cls: Any = type(self)
        cls.forward = staged(self, cls.forward)
        return code


def twin(module: _M) -> _M:
    """A copy with modules of its own, in which the tensors are those of `module`."""
    tensors = itertools.chain(module.parameters(), module.buffers())
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})


def trace(model: nn.Module, example_inputs: Any) -> tuple[Fused, list[Any]]:
    """The graph of a twin of `model`, and the example's value for each of its inputs.

    An argument that holds no tensor in the example is fixed to its value there. A submodule that
    cannot be traced stays whole; its nodes have the reason in meta["note"].

    Raises:
        TypeError: the example does not fit the model's arguments.
        ValueError: a BatchNorm is in training mode; the model itself cannot be traced.
    """
    learning = [
        name for name, m in model.named_modules() if isinstance(m, _BatchNorm) and m.training
    ]
    if learning:
        raise ValueError(
            f"{len(learning)} BatchNorm layers are in training mode, such as {learning[0]!r}: "
            "what they do changes with every batch; call model.eval() first"
        )
    arguments = _Arguments(model, example_inputs)
    tracer, root = _Tracer(arguments), twin(model)
    try:
        with unfused():
            graph = tracer.trace(root)
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__} cannot be traced: {_why(error)}. torch.fx follows what is "
            "done to tensors, but no control flow that depends on them: move that part into a "
            "module of its own, which then stays as it is"
        ) from error
    for node in graph.nodes:
        node.type = None  # an annotation, which may be a string that means nothing here
        if node.op == "call_module" and node.target in tracer.opaque:
            node.meta["note"] = f"not traced: {tracer.opaque[node.target]}"
    return Fused(root, graph, type(model).__name__), list(arguments.inputs.values())


class _Arguments:
    """What the example gives to each of forward's arguments, defaults included."""

    def __init__(self, model: nn.Module, example_inputs: Any) -> None:
        signature = inspect.signature(type(model).forward)
        if isinstance(example_inputs, Mapping):
            bound = signature.bind(model, **example_inputs)
        elif isinstance(example_inputs, Tensor):
            bound = signature.bind(model, example_inputs)
        elif isinstance(example_inputs, tuple | list):
            bound = signature.bind(model, *example_inputs)
        else:
            raise TypeError(
                "example_inputs must be a tuple of the model's arguments, a dict of its keywords, "
                f"or one tensor, got {type(example_inputs).__name__}: write example_inputs=(x,)"
            )
        bound.apply_defaults()
        _, *given = bound.args
        names = [p.name for p in signature.parameters.values() if p.kind <= p.POSITIONAL_OR_KEYWORD]
        names = [*names[1:], *(f"args_{i}" for i in range(len(given) + 1 - len(names)))]
        self.positional = len(given)
        self.values = {**dict(zip(names, given, strict=True)), **bound.kwargs}

    @property
    def inputs(self) -> dict[str, Any]:
        """Those that the graph has as inputs."""
        return {
            name: value
            for name, value in self.values.items()
            if any(isinstance(leaf, Tensor) for leaf in _pytree.tree_leaves(value))
        }

    def split(self, inputs: Iterable[Any]) -> tuple[list[Any], dict[str, Any]]:
        """Positional and keyword arguments, with these in place of `inputs`."""
        values = {**self.values, **dict(zip(self.inputs, inputs, strict=True))}
        items = list(values.items())
        return [value for _, value in items[: self.positional]], dict(items[self.positional :])


class _Tracer(fx.Tracer):
    """Packed layers and images are leaves, and so is the innermost module that fx cannot follow."""

    def __init__(self, arguments: _Arguments) -> None:
        super().__init__()
        self.arguments = arguments
        self.opaque: dict[str, str] = {}

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        def call(*inputs: Any) -> Any:
            args, kwargs = self.arguments.split(inputs)
            return root_fn(self.root, *args, **kwargs)

        names = self.arguments.inputs
        return call, [self.create_proxy("placeholder", name, (), {}) for name in names]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        packed = isinstance(m, KeepsDtypes) or any(isinstance(c, Packed) for c in m.children())
        return packed or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: Any, forward: Any, args: Any, kwargs: Any) -> Any:
        last, depth = next(reversed(self.graph.nodes), None), len(self.module_stack)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception as error:
            path = self.path_of_module(m)
            while len(self.module_stack) > depth:
                self.module_stack.popitem()
            for node in reversed(self.graph.nodes):
                if node is last:
                    break
                self.graph.erase_node(node)
            self.opaque[path] = _why(error)
            return self.create_proxy("call_module", path, args, kwargs)


def _why(error: Exception) -> str:
    """The last line of the model's own code, and what happened there."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(_FOREIGN)]
    frame = (own or list(frames))[-1]
    sentence = str(error).strip().split("\n")[0]
    return f"{frame.filename}:{frame.lineno}: `{frame.line}`: {sentence or type(error).__name__}"
