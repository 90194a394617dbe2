"""compress_: swap a model's dense layers for packed ones, in place, and say what was done."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from .calibrate import correct_bias_
from .formats import Format
from .groups import kept_format
from .layers import LAYERS, Conv2d, Linear, unsupported
from .observed import frozen, input_range
from .packed import Packed
from .patterns import matches, select
from .report import Report, Row
from .resize import carry
from .timing import Call, eval_mode, forward, race, unfused

Layer = Linear | Conv2d
Timer = Callable[[Call, Call], tuple[float, float]]


@dataclasses.dataclass(eq=False)
class Candidate:
    """A module that holds a weight: all its names, and what is to become of it."""

    names: list[str]
    module: nn.Module
    format: Format | None = None
    reason: str = ""
    layer: Layer | None = None
    ms: tuple[float, float] | None = None
    corrected: bool = False

    @property
    def name(self) -> str:
        """The first of its names."""
        return self.names[0]


def compress_(
    model: nn.Module,
    formats: Format | Mapping[str, Format | None],
    *,
    example_inputs: Any = None,
    bias_correction: bool = True,
    timer: Timer = race,
) -> Report:
    """Swaps the nn.Linear and nn.Conv2d layers of `model` for packed ones, in place.

    Modules of exactly these two types are swapped; what is left alone has a row with the reason.
    Packed layers are for inference: no gradient flows through them and they hold no Parameter, but
    for `Sparse(trainable=True)`, whose layers may be compressed again after training.
    All weights are packed before the first layer is swapped, so an error leaves the model as it
    was. A weight that two layers share stays shared, as does a layer that has two names.
    An nn.TransformerEncoderLayer whose layers were swapped no longer takes torch's fused path,
    which would read the dense weights.

    Args:
        model: with its weights on the CPU, in fp32, bf16 or fp16.
        formats: one format for all layers, or a dict of name patterns (see `patterns.matches`) to
            formats. The first pattern that matches one of a layer's names decides; None, or no
            match, leaves the layer alone.
        example_inputs: the model's arguments as a tuple, a dict of keywords, or one tensor. Given
            these, each layer is timed dense and packed on the input it receives in one forward
            (in eval mode, on the current number of threads), and a layer stays dense where
            packed is not faster. A layer that this forward does not reach is packed untimed.
        bias_correction: shift the bias of each layer that was calibrated so that its mean output
            stays (see `calibrate.correct_bias_`).
        timer: (dense call, packed call) -> (ms, ms); replaces the clock.

    Returns:
        A `Report`, one row a layer.

    Raises:
        TypeError: `formats` holds something else than formats.
        ValueError: a pattern matches no layer; a weight is NaN, infinite, not on the CPU or cannot
            be packed (the layer is named); `model` is itself one layer.

    Example:
        >>> import torch, gossamer as gs
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU())
        >>> report = gs.compress_(model, gs.Int8())
        >>> report.rows[0].after
        'Linear Int8'
    """
    candidates = chosen(model, formats)
    if type(model) in LAYERS:
        raise ValueError(
            f"the model itself is a {type(model).__name__}, which cannot be replaced in place: "
            f"wrap it in nn.Sequential, or use gs.{LAYERS[type(model)].__name__}.from_dense"
        )
    _pack(candidates, bias_correction)
    if example_inputs is not None:
        _time(model, candidates, example_inputs, timer)
    rows = _rows(model, candidates, timed=example_inputs is not None)
    swap(model, {c.module: c.layer for c in candidates if c.layer is not None})
    return Report(rows, _title(model, rows))


def chosen(model: nn.Module, formats: Format | Mapping[str, Format | None]) -> list[Candidate]:
    """Every module of the model that holds a weight to pack, and the format it is to have."""
    patterns, candidates = as_patterns(formats), find(model)
    choose(candidates, patterns)
    return candidates


def swap(model: nn.Module, layers: Mapping[nn.Module, nn.Module]) -> None:
    """Puts layers[module] in the place of each module, under all its names; cannot fail."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and child in layers:
                carry(child, layers[child])
                parent._modules[name] = layers[child].train(child.training)
    for module in model.modules():
        # Both read linear1.weight in eval mode, past the layer, to call one fused kernel; these
        # are the flags by which they decide to (seen in torch 2.13).
        if isinstance(module, nn.TransformerEncoderLayer) and _holds_packed(module):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder) and _holds_packed(module):
            module.use_nested_tensor = False


def _holds_packed(module: nn.Module) -> bool:
    return any(isinstance(inner, Layer) for inner in module.modules())


def format_name(format: Format) -> str:
    """The format as a Report shows it: its name, and the fields that differ from the default.

    Example:
        >>> import gossamer as gs
        >>> format_name(gs.Int8()), format_name(gs.Int8(activations="none"))
        ('Int8', 'Int8(activations=none)')
    """
    own = ", ".join(
        f"{field.name}={getattr(format, field.name)}"
        for field in dataclasses.fields(format)
        if getattr(format, field.name) != field.default
    )
    return format.name + (f"({own})" if own else "")


def as_patterns(formats: object) -> dict[str, Format | None]:
    """The argument `formats` of `compress_` as a dict; TypeError for anything else."""
    patterns: dict[Any, Any] = dict(formats) if isinstance(formats, Mapping) else {"*": formats}
    for pattern, format in patterns.items():
        if not isinstance(pattern, str):
            raise TypeError(f"a pattern is a string such as 'encoder.*', got {pattern!r}")
        if not isinstance(format, Format | None) or formats is None:
            call = f": write {format.__name__}()" if isinstance(format, type) else ""
            raise TypeError(
                f"expected a format such as gs.Int8(), or a dict of patterns to formats or None, "
                f"got {format!r}{call}"
            )
    return patterns


def find(model: nn.Module) -> list[Candidate]:
    """The modules that hold a weight to pack, in the model's order, each with all its names."""
    found: dict[nn.Module, Candidate] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if module in found:
            found[module].names.append(name)
        elif isinstance(module, nn.Linear | _ConvNd | Layer):
            found[module] = Candidate([name], module, reason=_why_not(module))
    return list(found.values())


def _why_not(module: nn.Module) -> str:
    """Why this module is left alone, or ""."""
    kind = type(module).__name__
    if isinstance(module, Layer):
        return "" if module.packed.trainable else f"already {format_name(module.packed.format)}"
    if any(is_lazy(parameter) for parameter in module.parameters()):
        return "has no weight yet: run the model once first"
    if parametrize.is_parametrized(module):
        return "parametrized: call torch.nn.utils.parametrize.remove_parametrizations first"
    if type(module) not in LAYERS:
        bases = [base for base in LAYERS if isinstance(module, base)]
        if bases:
            return f"a subclass of {bases[0].__name__}, whose owner may read its weight directly"
        return f"{kind} has no packed layer"
    if "weight" not in module._parameters:
        return "weight is computed in a hook: remove weight_norm or torch.nn.utils.prune first"
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        return "has forward hooks, which a swap would lose: remove them first"
    return unsupported(module) or ""


def choose(candidates: list[Candidate], patterns: Mapping[str, Format | None]) -> None:
    """Sets each candidate's format, or the reason why it has none."""
    names = [name for candidate in candidates for name in candidate.names]
    for pattern in patterns if names else ():
        select(names, [pattern])
    for candidate in candidates:
        if candidate.reason:
            continue
        candidate.reason = "no pattern matches its name"
        for pattern, format in patterns.items():
            if any(matches(name, pattern) for name in candidate.names):
                candidate.format = format
                candidate.reason = "" if format else f"left alone by pattern {pattern!r}"
                break
        runs = candidate.module
        reason = None if isinstance(runs, Layer) else unsupported(runs, candidate.format)
        if reason:
            candidate.format, candidate.reason = None, reason
        if candidate.format is not None:
            candidate.format = kept_format(runs, candidate.format)
        if isinstance(runs, Layer) and candidate.format == runs.packed.format:
            candidate.format, candidate.reason = None, f"already {format_name(runs.packed.format)}"


def _pack(candidates: Iterable[Candidate], bias_correction: bool) -> None:
    """Builds each chosen candidate's layer; a weight that several share is packed once."""
    shared: dict[tuple[int, Format], Packed] = {}
    for candidate in candidates:
        if candidate.format is None:
            continue
        module: Any = candidate.module
        weight = _weight(module)
        key = (id(weight), candidate.format)
        packed = shared.get(key)
        try:
            if weight.is_meta:
                raise ValueError("its weight is on meta and has no values: load the weights first")
            x_range = input_range(module, candidate.format)
            if packed is not None and x_range is not None:
                packed = packed.with_range(*x_range)
            activation = module.activation if isinstance(module, Layer) else "none"
            dense: Any = module.to_dense() if isinstance(module, Layer) else module
            layer = LAYERS[type(dense)].from_dense(dense, candidate.format, packed, activation)
        except (TypeError, ValueError) as error:
            raise type(error)(f"layer {candidate.name!r}: {error}") from error
        shared[key] = layer.packed
        if bias_correction and frozen(module) is None:  # else the bias was trained with the weight
            candidate.corrected = correct_bias_(layer, module)
        candidate.layer = layer


def _time(model: nn.Module, candidates: list[Candidate], example_inputs: Any, timer: Timer) -> None:
    """Times each candidate where it stands in one forward, and drops the layers that lose.

    The clock runs inside the hook, on the live input: no input is kept, whatever the model's size.
    Layers that share a packed weight are kept or dropped together, so that it exists once.
    """
    handles = []
    try:
        for candidate in candidates:
            if candidate.layer is not None:
                hook = _stopwatch(candidate, timer)
                handles.append(candidate.module.register_forward_pre_hook(hook, with_kwargs=True))
        with unfused(), eval_mode(model):
            forward(model, example_inputs)
    finally:
        for handle in handles:
            handle.remove()
    groups: dict[int, list[Candidate]] = {}
    for candidate in candidates:
        if candidate.layer is not None:
            groups.setdefault(_weight_id(candidate.layer), []).append(candidate)
    for group in groups.values():
        times = [candidate.ms for candidate in group if candidate.ms is not None]
        dense, packed = sum(ms[0] for ms in times), sum(ms[1] for ms in times)
        if times and packed >= dense:
            for candidate in group:
                candidate.layer = None
                candidate.reason = f"kept: dense is faster ({dense:.3g} ms vs {packed:.3g} ms)"


def _stopwatch(candidate: Candidate, timer: Timer) -> Callable[..., None]:
    """A hook that times dense against packed; a layer called n times costs the sum of its calls."""
    dense, packed = candidate.module, candidate.layer
    assert packed is not None
    known: dict[Any, tuple[float, float]] = {}

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x: Tensor = args[0] if args else kwargs["input"]
        key = (x.shape, x.stride(), x.dtype)
        if key not in known:
            with torch.inference_mode():
                known[key] = timer(lambda: dense.forward(x), lambda: packed.forward(x))
        total = candidate.ms or (0.0, 0.0)
        candidate.ms = (total[0] + known[key][0], total[1] + known[key][1])

    return hook


def _rows(model: nn.Module, candidates: list[Candidate], timed: bool) -> list[Row]:
    """Rows of the Report, made before the swap."""
    swapped = {candidate.module for candidate in candidates if candidate.layer is not None}
    staying: dict[int, str] = {}
    for name, module in model.named_modules():
        if module not in swapped:
            for parameter in module.parameters(recurse=False):
                staying.setdefault(id(parameter), name or "the model")
    counted: set[int] = set()
    first: dict[int, str] = {}
    rows = []
    for candidate in candidates:
        before, after, notes = _tensors(candidate.module), None, [candidate.reason]
        if candidate.layer is not None:
            before = [tensor for tensor in before if id(tensor) not in staying]
            after = _tensors(candidate.layer)
            tied = staying.get(id(_weight(candidate.module)))
            other = first.setdefault(_weight_id(candidate.layer), candidate.name)
            if candidate.corrected:
                notes.append("bias corrected")
            if tied:
                notes.append(f"tied to {tied!r}, which stays dense: no memory is saved")
            if other != candidate.name:
                notes.append(f"shares the weight of {other!r}")
            if timed and candidate.ms is None:
                notes.append("not reached by example_inputs: not timed")
        if len(candidate.names) > 1:
            notes.append("also at " + ", ".join(map(repr, candidate.names[1:])))
        row = describe(candidate, "; ".join(filter(None, notes)))
        row.bytes_before = _bytes(before, counted)
        row.bytes_after = None if after is None else _bytes(after, counted)
        rows.append(row)
    return rows


def _weight_id(layer: Layer) -> int:
    """The same for layers whose packed weights are one in memory."""
    return id(next(layer.packed.buffers()))


def describe(candidate: Candidate, note: str) -> Row:
    """The row of one layer, but for its bytes."""
    runs: Any = candidate.layer or candidate.module
    packed = isinstance(runs, Layer)
    weight: Tensor = runs.unpack() if packed else runs.weight
    known = not (is_lazy(weight) or weight.is_meta)
    ms_before, ms_after = candidate.ms or (None, None)
    return Row(
        name=candidate.name,
        shape=() if is_lazy(weight) else tuple(weight.shape),
        before=_kind(candidate.module),
        after=_kind(candidate.layer) if candidate.layer is not None else "",
        zeros=float((weight == 0).float().mean()) if known and weight.numel() else 0.0,
        ms_before=ms_before,
        ms_after=ms_after,
        kernel=runs.packed.kernel if packed else "",
        note=note,
    )


def _weight(module: Any) -> Tensor:
    """The Parameter that layers which share a weight share."""
    owner, name = (module.packed, "values") if isinstance(module, Layer) else (module, "weight")
    return getattr(owner, name)


def _kind(module: nn.Module) -> str:
    name = type(module).__name__
    return f"{name} {format_name(module.packed.format)}" if isinstance(module, Layer) else name


def _tensors(module: nn.Module) -> list[Tensor]:
    return [t for t in (*module.parameters(), *module.buffers()) if not is_lazy(t)]


def _bytes(tensors: Iterable[Tensor], counted: set[int]) -> int:
    """Bytes of the tensors that are not counted yet: what layers share has its place in one row."""
    fresh = {id(tensor): tensor.nbytes for tensor in tensors if id(tensor) not in counted}
    counted.update(fresh)
    return sum(fresh.values())


def _title(model: nn.Module, rows: list[Row]) -> str:
    if not rows:
        return f"nothing to compress: {type(model).__name__} has no Linear and no Conv2d layer"
    if any(row.after for row in rows):
        return ""
    if all(row.note.startswith("already ") for row in rows):
        return "nothing changed: every layer is already compressed"
    return "nothing changed: every layer was left alone, for the reason in its row"
