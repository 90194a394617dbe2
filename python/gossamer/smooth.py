"""smooth_: move the scale of outlier channels from a norm into the weights that read it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .observed import observed
from .report import Report, Row
from .timing import eval_mode, forward, unfused

NORMS = (nn.LayerNorm, nn.RMSNorm)


def smooth_(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    pairs: Mapping[str, Iterable[str]] | None = None,
    alpha: float = 0.5,
) -> Report:
    """y = (x / s) @ (w s)^T: scales s go from a norm's output into the layers that read it.

    int8 activations have one scale a row, so that a few channels of large values leave the others
    few steps. s_j = max|x_j|^alpha / max|w_j|^(1 - alpha) makes input channel j of x and of all the
    layers that read it alike. 1 / s goes into the norm's weight and bias, s into the columns of the
    layers: in floats the model stays the function that it was, up to rounding.

    This needs norms whose output goes to nn.Linear layers and nowhere else, as in pre-norm
    transformers (ViT, GPT, Llama). A post-norm model such as BERT adds the output to the residual:
    its norms are left alone, and have a row that says who else reads them.

    Args:
        model: calibrated: `with gs.calibrate(model): ...`. The statistics of the layers that are
            scaled here no longer hold and are dropped: calibrate again before static activations
            or `gptq_`.
        example_inputs: as for `compress_`. One forward finds the pairs, by watching which operation
            takes which tensor.
        pairs: instead of example_inputs, name of a norm -> names of the layers that read it, all of
            them and nothing else: this is not checked.
        alpha: how much of the outliers goes into the weights, 0 to 1. 0.5 is usual, 0.75 where
            outliers are extreme.

    Returns:
        One row a norm: the layers that it was folded into, or why it was left alone.

    Raises:
        ValueError: neither or both of example_inputs and pairs; alpha out of range; a name in
            `pairs` that is not there, or not of a norm or linear layer that fits; no norm to
            smooth; a pair that was not calibrated.

    Source: Xiao et al. 2022, SmoothQuant, arXiv 2211.10438.

    Example:
        >>> import torch, gossamer as gs
        >>> model = torch.nn.Sequential(torch.nn.LayerNorm(8), torch.nn.Linear(8, 4))
        >>> model[0].weight.data[3] = 50
        >>> x = torch.randn(32, 8)
        >>> with gs.calibrate(model):
        ...     y = model(x)
        >>> print(gs.smooth_(model, (x,)).rows[0].note)
        into 1
        >>> bool(model[0].weight.max() < 10), torch.allclose(model(x), y, atol=1e-4)
        (True, True)
    """
    if (example_inputs is None) == (pairs is None):
        raise ValueError("give example_inputs, or pairs such as {'norm1': ['query', 'key']}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha} is not in [0, 1]: 0.5 is usual")
    norms = _traced(model, example_inputs) if pairs is None else _given(model, pairs)
    if not norms:
        raise ValueError(f"{type(model).__name__} has no nn.LayerNorm or nn.RMSNorm to smooth")
    rows, scales = [], {}
    for name, norm in norms.items():
        reason = norm.why_not()
        if not reason:
            scales[name] = _scale(norm, alpha)
        note = f"left alone: {reason}" if reason else f"into {', '.join(norm.readers)}"
        kind = type(norm.module).__name__
        after = "" if reason else f"{kind} smoothed"
        rows.append(Row(name, tuple(norm.module.normalized_shape), kind, after, 0.0, note=note))
    for name, scale in scales.items():
        _fold(norms[name], scale)
    return Report(rows, f"{len(scales)} of {len(rows)} norms smoothed, alpha={alpha}")


@dataclass(eq=False)
class _Norm:
    """A norm, the linear layers that read its output, and what else does."""

    module: Any
    readers: dict[str, nn.Linear] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)

    def why_not(self) -> str:
        """Why it cannot be folded, or ""."""
        if self.module.weight is None:
            return "it has no weight to fold scales into"
        if self.others:
            return f"its output is also read by {', '.join(dict.fromkeys(self.others))}"
        return "" if self.readers else "no nn.Linear reads its output"


def _given(model: nn.Module, pairs: Mapping[str, Iterable[str]]) -> dict[str, _Norm]:
    modules, norms = dict(model.named_modules()), {}
    for name, readers in pairs.items():
        for wanted in (name, *readers):
            if wanted not in modules:
                raise ValueError(f"pairs name {wanted!r}, but the model has no such module")
        norm = _Norm(modules[name], {reader: modules[reader] for reader in readers})  # type: ignore[misc]
        if type(norm.module) not in NORMS:
            raise ValueError(f"{name!r} is a {type(norm.module).__name__}, not a norm")
        for reader, layer in norm.readers.items():
            width = norm.module.normalized_shape
            if type(layer) is not nn.Linear or tuple(width) != (layer.in_features,):
                raise ValueError(
                    f"{reader!r} is {layer}: it must be an nn.Linear of {tuple(width)} inputs, the "
                    f"width of {name!r}"
                )
        norms[name] = norm
    return norms


def _traced(model: nn.Module, example_inputs: Any) -> dict[str, _Norm]:
    """The model's norms, and who reads them in one forward."""
    watch = _Watch(model)
    with contextlib.ExitStack() as stack:
        for norm in watch.norms.values():
            stack.callback(norm.module.register_forward_hook(watch.hook(norm)).remove)
        stack.enter_context(unfused())
        stack.enter_context(eval_mode(model))
        stack.enter_context(watch)
        result = forward(model, example_inputs)
    for tensor in _tensors(result):
        if id(tensor) in watch.outputs:
            watch.outputs[id(tensor)][1].others.append("the caller of the model")
    for norm in watch.norms.values():
        for name, layer in norm.readers.items():
            if watch.inputs[id(layer.weight)] != {id(norm)}:
                norm.others.append(f"{name}, which has other inputs too")
    return watch.norms


# What asks for no values.
METADATA = {"__get__", "__len__", "dim", "numel", "size", "stride", "is_contiguous"}


class _Watch(TorchFunctionMode):
    """Sees every torch function that takes a norm's output, by the identity of the tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        modules = list(model.named_modules())
        holders = Counter(id(p) for _, m in modules for p in m.parameters(recurse=False))
        self.norms = {name: _Norm(module) for name, module in modules if type(module) in NORMS}
        self.linears = {
            id(m.weight): (name, m)
            for name, m in modules
            if type(m) is nn.Linear and holders[id(m.weight)] == 1
        }
        for norm in self.norms.values():
            if holders[id(norm.module.weight)] > 1:
                norm.others.append("another norm, which shares its weight")
        # By id: the tensors are kept, so that no other gets their ids.
        self.outputs: dict[int, tuple[Tensor, _Norm]] = {}
        self.inputs: dict[int, set[int]] = {}  # by weight of a linear: the norms, 0 for others

    def hook(self, norm: _Norm) -> Callable[[nn.Module, Any, Tensor], None]:
        def keep(module: nn.Module, args: Any, output: Tensor) -> None:
            self.outputs[id(output)] = output, norm

        return keep

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", str(func))
        taken = list(_tensors([args, kwargs]))
        if name == "linear" and id(taken[1]) in self.linears:
            _, source = self.outputs.get(id(taken[0]), (None, None))
            self.inputs.setdefault(id(taken[1]), set()).add(id(source) if source else 0)
            if source:
                reader, layer = self.linears[id(taken[1])]
                source.readers[reader] = layer
            return result
        for tensor in taken:
            if id(tensor) in self.linears and name not in METADATA:
                self.inputs.setdefault(id(tensor), set()).add(0)
            if id(tensor) not in self.outputs:
                continue
            source = self.outputs[id(tensor)][1]
            if name == "dropout":  # the identity in eval mode
                self.outputs[id(result)] = result, source
            elif name not in METADATA or any(_tensors(result)):
                source.others.append(name)
        return result


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested lists, tuples, dicts and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from _tensors(item)
    elif dataclasses.is_dataclass(value):
        yield from _tensors(list(vars(value).values()))


@torch.no_grad()
def _scale(norm: _Norm, alpha: float) -> Tensor:
    """(k): what each channel is divided by."""
    found = {name: observed(layer) for name, layer in norm.readers.items()}
    for name, seen in found.items():
        if seen is None:
            raise ValueError(
                f"layer {name!r} was not calibrated: run `with gs.calibrate(model): model(x)` first"
            )
    x = torch.stack([seen.absmax for seen in found.values() if seen]).amax(0)
    w = torch.stack([layer.weight.abs().amax(0).float() for layer in norm.readers.values()]).amax(0)
    # A channel that is always zero, or that nothing reads, may keep its scale.
    scale = (x**alpha / w ** (1 - alpha)).where((x > 0) & (w > 0), 1.0)
    if not torch.isfinite(scale).all():
        raise ValueError(f"a weight of {', '.join(found)} is NaN or infinite")
    return scale


@torch.no_grad()
def _fold(norm: _Norm, scale: Tensor) -> None:
    for parameter in norm.module.parameters():
        parameter.div_(scale)
    for layer in norm.readers.values():
        layer.weight.mul_(scale)
        del layer._gossamer_observed
