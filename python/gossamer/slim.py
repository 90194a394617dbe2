"""slim_: channels and neurons removed for good, through the dependency graph of torch-pruning."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from .masks import SCOPES, lowest
from .patterns import select
from .report import Report, Row
from .resize import RESIZABLE, mark, sizes_of
from .scores import energy, gradient_energy, parse
from .timing import eval_mode, forward, unfused

# Whose outputs can be removed, and whose weights are scored.
_ROOTS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def slim_(
    model: nn.Module,
    example_inputs: Any,
    ratio: float,
    *,
    exclude: str | Iterable[str] = (),
    scope: str = "global",
    score: str = "magnitude",
    round_to: int | None = None,
) -> Report:
    """Removes a share of the channels (neurons, filters) of `model`, in place: smaller and dense.

    Layers that must lose the same channels (through additions, norms, grouped convolutions) form a
    group; its channels are scored by the weights that make and that read them, each layer's in
    units of its mean. Parameters fall by about 1 - (1 - ratio)^2 between two layers that both lose
    channels. What makes the model's outputs stays, and so does a group that reaches a module whose
    sizes we cannot set (nn.MultiheadAttention, recurrent layers, own parameters): see the notes.
    Make the optimizer after this: parameters are replaced. The graph comes from the torch-pruning
    library (Fang et al. 2023, "DepGraph", arXiv 2301.12900).

    Args:
        model: dense; on error it stays as it was.
        example_inputs: the model's arguments as a tuple, a dict of keywords, or one tensor.
        ratio: share of channels to remove, in [0, 1); each group keeps its best.
        exclude: names of layers whose outputs stay, see `gossamer.patterns`.
        scope: `"global"` ranks the channels of all groups together, `"layer"` each group's.
        score: of the weights, as for `Pruner`; not "sparsegpt".
        round_to: what is left of each group is rounded up to a multiple of this.

    Returns:
        One row a layer: its shape before and after, or the reason why it kept its outputs.

    Raises:
        ImportError: torch-pruning is not installed.
        ValueError: an argument out of its range, a pattern that matches nothing, a layer whose
            scores cannot be computed, or a model that would not run with fewer channels.

    Example:
        >>> import torch, gossamer as gs
        >>> parts = torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2)
        >>> model = torch.nn.Sequential(*parts)
        >>> report = gs.slim_(model, torch.randn(1, 8), ratio=0.75)
        >>> model[0], model[2].weight.shape
        (Linear(in_features=8, out_features=8, bias=True), torch.Size([2, 8]))
    """
    _check(ratio, scope, score, round_to)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, _ROOTS)}
    if not layers:
        raise ValueError(
            "the model has no nn.Linear or convolution to slim "
            "(layers that compress_ has packed are no longer dense: slim first)"
        )
    excluded = select(layers, exclude)
    notes = dict.fromkeys(excluded, "excluded: keeps its outputs")
    before = {name: (tuple(m.weight.shape), _bytes(m)) for name, m in layers.items()}
    count = sum(parameter.numel() for parameter in model.parameters())
    with _restored_on_error(model), eval_mode(model), torch.enable_grad(), unfused():
        sizes = {m: sizes_of(m) for m in model.modules() if type(m) in RESIZABLE}
        shapes = _shapes(forward(model, example_inputs))
        for name in _output_layers(model, layers, example_inputs):
            notes.setdefault(name, "makes the model's outputs: keeps them")
        groups = _groups(model, layers, example_inputs, score, notes)
        for group, channels in zip(groups, _chosen(groups, ratio, scope, round_to), strict=True):
            group.remove(channels)
        _verify(model, example_inputs, shapes)
    for module, size in sizes.items():
        mark(module, size)
    after = sum(parameter.numel() for parameter in model.parameters())
    title = f"{count:,d} -> {after:,d} parameters (ratio {ratio:g}, scope {scope}, score {score})"
    return Report([_row(n, m, *before[n], notes.get(n, "")) for n, m in layers.items()], title)


def _check(ratio: float, scope: str, score: str, round_to: int | None) -> None:
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio={ratio} is not in [0, 1): give the share of channels to remove")
    if scope not in SCOPES:
        raise ValueError(f"scope={scope!r} is unknown: choose one of {list(SCOPES)}")
    if parse(score)[0] == "sparsegpt":
        raise ValueError("score='sparsegpt' is for single weights: choose another one for slim_")
    if round_to is not None and round_to < 1:
        raise ValueError(f"round_to={round_to} is too small: it must be at least 1")


def _graph(model: nn.Module, example_inputs: Any) -> Any:
    try:
        from torch_pruning import DependencyGraph
    except ImportError as error:
        raise ImportError(
            "slim_ needs torch-pruning, which is not installed: pip install torch-pruning"
        ) from error
    return DependencyGraph().build_dependency(
        model,
        example_inputs,
        forward_fn=lambda model, inputs: forward(model, inputs),
        output_transform=lambda y: [t for t in _tensors(y) if t.grad_fn is not None],
        verbose=False,
    )


@dataclass
class _Group:
    """Channels that are removed together, `repeats` at a time, and how much each set matters."""

    graph: Any
    root: Any
    score: Tensor
    repeats: int

    def remove(self, channels: Tensor) -> None:
        every = [c + r * len(self.score) for r in range(self.repeats) for c in channels.tolist()]
        if every:
            module, function = self.root.target.module, self.root.handler
            self.graph.get_pruning_group(module, function, sorted(every)).prune()


def _groups(
    model: nn.Module,
    layers: dict[str, Any],
    example_inputs: Any,
    score: str,
    notes: dict[str, str],
) -> list[_Group]:
    """The groups that may lose channels; in `notes` the reasons of all others."""
    graph = _graph(model, example_inputs)
    names = {module: name for name, module in layers.items()}
    modules, found = set(model.modules()), []
    for items in graph.get_all_groups(root_module_types=_ROOTS):
        makers, foreign, repeats = [], [], 1
        for dep, _ in items:
            module, out = dep.target.module, graph.is_out_channel_pruning_fn(dep.handler)
            if isinstance(module, nn.Parameter) or (
                module in modules and type(module) not in RESIZABLE
            ):
                foreign.append(type(module).__name__)
            elif module in modules:
                pruner = graph.get_pruner_of_module(module)
                sets = (pruner.get_out_channel_groups if out else pruner.get_in_channel_groups)(
                    module
                )
                depthwise = isinstance(module, _ROOTS) and sets == getattr(
                    module, "out_channels", 0
                )
                repeats = repeats if depthwise else max(repeats, sets)
                if out and module in names:
                    makers.append(names[module])
        kept = next((name for name in makers if name in notes), None)
        reason = ""
        if kept is not None:
            reason = f"loses what {kept} keeps: nothing"
        elif foreign:
            reason = f"left alone: its outputs reach a {foreign[0]}, whose size cannot be set"
        if reason:
            notes.update({name: reason for name in makers if name not in notes})
        else:
            each = _score(items, graph, names, score).view(repeats, -1).mean(0)
            found.append(_Group(graph, items[0].dep, each, repeats))
    return found


def _score(items: Any, graph: Any, names: dict[nn.Module, str], score: str) -> Tensor:
    """How much each channel of a group matters, in units of their mean."""
    total = torch.zeros(len(items[0].idxs))
    for item in items:
        module: Any = item.dep.target.module
        if module not in names or None in item.root_idxs:
            continue
        average = gradient_energy(names[module], module) if parse(score)[0] == "taylor" else None
        each = energy(names[module], module, score, average)
        if graph.is_out_channel_pruning_fn(item.dep.handler):
            each = each.flatten(1).sum(1)
        else:
            each = each.transpose(0, 1).flatten(1).sum(1).repeat(getattr(module, "groups", 1))
        each = each.double().cpu()
        each = (each / each.mean().clamp_min(1e-300)).float()[list(item.idxs)]
        total.index_add_(0, torch.tensor(item.root_idxs), each)
    return total / total.mean().clamp_min(torch.finfo(total.dtype).tiny)


def _chosen(
    groups: list[_Group], ratio: float, scope: str, round_to: int | None
) -> Iterator[Tensor]:
    """The channels that each group loses: the lowest, but never a group's best."""
    for pool in [groups] if scope == "global" else [[group] for group in groups]:
        scores = [group.score.clone() for group in pool]
        for score in scores:
            score[score.argmax()] = torch.inf
        flat = torch.cat(scores) if scores else torch.zeros(0)
        count = min(round(ratio * len(flat)), int(flat.isfinite().sum()))
        drops = lowest(flat, count).split([len(score) for score in scores])
        for group, score, drop in zip(pool, scores, drops, strict=True):
            lost = int(drop.sum())
            if round_to is not None:
                kept = (len(score) - lost) * group.repeats
                lost = max(0, len(score) - -(-kept // round_to) * round_to // group.repeats)
                drop = lowest(score, lost)
            yield drop.nonzero().flatten()


def _output_layers(model: nn.Module, layers: dict[str, Any], example_inputs: Any) -> list[str]:
    """The layers from which a path leads to an output that passes no other layer.

    Every layer's output is cut out of the graph, so that a gradient arrives at the last ones only.
    """
    last: list[tuple[str, Tensor]] = []
    kinds = (*_ROOTS, nn.Embedding, nn.MultiheadAttention, nn.modules.conv._ConvTransposeNd)
    names: dict[nn.Module, str] = {m: n for n, m in model.named_modules() if isinstance(m, kinds)}

    def cut(module: nn.Module, inputs: Any, output: Any) -> Any:
        def leaf(tensor: Tensor) -> Tensor:
            if not tensor.is_floating_point():
                return tensor
            start = tensor.detach().requires_grad_()
            last.append((names[module], start))
            return start.clone()  # an operation in place may follow, which a leaf forbids

        return tree_map_only(Tensor, leaf, output)

    handles = [module.register_forward_hook(cut) for module in names]
    try:
        outputs = [y for y in _tensors(forward(model, example_inputs)) if y.requires_grad]
    finally:
        for handle in handles:
            handle.remove()
    if not outputs:
        return []
    leaves = [leaf for _, leaf in last]
    ones = [torch.ones_like(y) for y in outputs]
    gradients = torch.autograd.grad(outputs, leaves, ones, allow_unused=True)
    reached = {name for (name, _), g in zip(last, gradients, strict=True) if g is not None}
    return [name for name in layers if name in reached]


def _tensors(outputs: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]


def _shapes(outputs: Any) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape) for tensor in _tensors(outputs)]


def _verify(model: nn.Module, example_inputs: Any, shapes: list[tuple[int, ...]]) -> None:
    try:
        after = _shapes(forward(model, example_inputs))
    except Exception as error:  # whatever the model's own code raises
        raise ValueError(
            "the model does not run with fewer channels, perhaps because its code holds a size "
            "(such as the size of an attention head): exclude the layers in question, for "
            f"example exclude='*attention*'. It raised {type(error).__name__}: {error}"
        ) from error
    if after != shapes:
        raise ValueError(f"the outputs would be {after}, not {shapes}: exclude what makes them")


@contextlib.contextmanager
def _restored_on_error(model: nn.Module) -> Iterator[None]:
    """Within, every parameter takes part in the graph; after, flags and ties are as before."""
    held = [
        (module, dict(vars(module)), dict(module._parameters), dict(module._buffers))
        for module in model.modules()
    ]
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    flags = {parameter: parameter.requires_grad for parameter in names}
    try:
        for parameter in names:
            parameter.requires_grad_(parameter.is_floating_point())
        yield
        for parameter, own in names.items():
            first, *others = (model.get_parameter(name) for name in own)
            first.requires_grad_(flags[parameter])
            for name, other in zip(own[1:], others, strict=True):
                if first.shape != other.shape or not torch.equal(first, other):
                    raise ValueError(
                        f"{own[0]} and {name} share their weight, but would lose other channels: "
                        "exclude one of them"
                    )
                place, _, key = name.rpartition(".")
                setattr(model.get_submodule(place), key, first)
    except BaseException:
        for module, attributes, parameters, buffers in held:
            vars(module).clear()
            vars(module).update(attributes)
            module._parameters, module._buffers = parameters, buffers
        raise
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


def _row(name: str, module: Any, shape: tuple[int, ...], size: int, note: str) -> Row:
    kind, now = type(module).__name__, tuple(module.weight.shape)
    after = "" if now == shape else f"{kind} {' x '.join(map(str, now))}"
    zeros = 1.0 - int(module.weight.count_nonzero()) / max(1, module.weight.numel())
    return Row(name, shape, kind, after, zeros, size, _bytes(module), note=note)


def _bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters(recurse=False))
