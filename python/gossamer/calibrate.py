"""calibrate: run a few batches and keep, on each layer, the statistics of what goes into it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .geometry import conv_rows, conv_weight, groups_inside, is_depthwise, weight_matrix
from .layers import Conv2d, Linear, unsupported
from .observed import Observed, observed
from .timing import unfused

__all__ = [
    "OBSERVERS",
    "Observed",
    "calibrate",
    "correct_bias_",
    "observed",
    "set_weight_",
    "weight_matrix",
]

OBSERVERS = ("minmax", "percentile", "mse")
BINS = 2048
CANDIDATES = 64  # ends of the range that "mse" tries on either side, in equal steps


@contextlib.contextmanager
def calibrate(
    model: nn.Module,
    *,
    hessian: bool = False,
    observer: str = "percentile",
    percentile: float = 99.99,
) -> Iterator[None]:
    """Observes the inputs of the model's layers while the body of the `with` runs it.

    Every nn.Linear and nn.Conv2d that runs gets an `Observed` when the body ends, in the place of
    an earlier one; `observed(module)` reads it. It is a plain attribute: no part of the state_dict,
    kept by copy.deepcopy. An error in the body leaves the modules as they were.

    Args:
        model: dense, in eval mode if it has dropout or batch norm.
        hessian: also keep the mean of x x^T, k x k floats a layer, but for grouped convolutions.
        observer: how the range of static quantization is found, one a tensor. "minmax": the
            smallest and the largest value. "percentile": all but the outermost values. "mse": the
            range whose quantization to 8 bits has the least squared error (Nagel 2021, 3.1), of
            64 x 64 ranges inside of the first.
        percentile: per cent of the values that "percentile" keeps; half of the rest is cut off on
            either side. all-MiniLM-L6-v2 loses 0.0010 Spearman on STS-B at 99.99, 0.0026 with
            "minmax" and 0.0014 with "mse".

    Raises:
        ValueError: an unknown observer; a percentile outside of (0, 100]; nothing to calibrate; no
            layer ran; an input holds a NaN or an Inf (the layer is named).

    Example:
        >>> import torch, gossamer as gs
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2))
        >>> with gs.calibrate(model, observer="minmax"):
        ...     y = model(torch.tensor([[0.0, 1.0, 2.0, -3.0]]))
        >>> observed(model[0]).low, observed(model[0]).high
        (-3.0, 2.0)
    """
    if observer not in OBSERVERS:
        raise ValueError(f"observer={observer!r} is unknown: use one of {', '.join(OBSERVERS)}")
    if not 0 < percentile <= 100:
        raise ValueError(f"percentile={percentile!r} must be above 0 and at most 100")
    layers = {
        name: module
        for name, module in model.named_modules()
        if not unsupported(module) and not any(is_lazy(p) for p in module.parameters())
    }
    if not layers:
        raise ValueError(
            f"nothing to calibrate: {type(model).__name__} has no nn.Linear and no nn.Conv2d "
            "(calibrate before compress_)"
        )
    watches = {name: _Watch(name, module, hessian) for name, module in layers.items()}
    with contextlib.ExitStack() as stack:
        for name, module in layers.items():
            handle = module.register_forward_pre_hook(watches[name], with_kwargs=True)
            stack.callback(handle.remove)
        stack.enter_context(unfused())
        yield
    if not any(watch.rows for watch in watches.values()):
        raise ValueError(
            "no layer ran: call the model on your calibration data inside of `with gs.calibrate`"
        )
    for name, module in layers.items():
        if watches[name].rows:
            module._gossamer_observed = watches[name].result(observer, percentile)  # type: ignore[assignment]


class _Histogram:
    """Counts of values in BINS bins over [-reach, reach]; the reach doubles when it must."""

    def __init__(self) -> None:
        self.low = self.high = 0.0
        self.zeros = 0
        self.reach = 0.0
        self.counts = torch.zeros(BINS, dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        low, high = (float(end) for end in torch.aminmax(x))
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.zeros += x.numel() - int(torch.count_nonzero(x))
        largest = max(-self.low, self.high)
        if not self.reach and largest:
            self.reach = 2.0 ** math.ceil(math.log2(largest))
        while self.reach < largest:
            self.reach *= 2
            quarter = torch.zeros(BINS // 4, dtype=torch.float64)
            self.counts = torch.cat([quarter, self.counts.view(-1, 2).sum(1), quarter])
        if self.reach:
            self.counts += torch.histc(x.view(-1), BINS, -self.reach, self.reach)

    def edges(self) -> Tensor:
        """(BINS + 1) float64."""
        return torch.linspace(-self.reach, self.reach, BINS + 1, dtype=torch.float64)

    def range(self, observer: str, percentile: float) -> tuple[float, float]:
        """The low and high end for static quantization."""
        if observer == "minmax" or not self.reach:
            return self.low, self.high
        low, high = self._percentile(percentile) if observer == "percentile" else self._mse()
        return max(low, self.low), min(high, self.high)

    def _percentile(self, percentile: float) -> tuple[float, float]:
        """Edges of bins, outside of which at most the given share of the values lies."""
        below = nn.functional.pad(self.counts.cumsum(0), (1, 0))
        cut = float(below[-1]) * (1 - percentile / 100) / 2
        edges = self.edges()
        low = float(edges[int((below <= cut).sum()) - 1])
        high = float(edges[BINS + 1 - int((below[-1] - below <= cut).sum())])
        return min(low, 0.0), max(high, 0.0)

    def _mse(self) -> tuple[float, float]:
        counts = self.counts.float()
        counts[BINS // 2] -= self.zeros  # exact, whatever the step is
        centers = ((self.edges()[1:] + self.edges()[:-1]) / 2).float()
        share = torch.arange(1, CANDIDATES + 1) / CANDIDATES
        highs = (self.high * share)[:, None]
        best = (math.inf, 0.0, 0.0)
        for low in (self.low * share).tolist():
            step = ((highs - low) / 255).clamp_(min=1e-30)
            kept = centers.clamp(min=low).minimum(highs)
            error = kept.div_(step).round_().mul_(step).sub_(centers).square_() @ counts
            place = int(error.argmin())
            best = min(best, (float(error[place]), low, float(highs[place])))
        return best[1], best[2]


class _Watch:
    """The pre-hook of one layer: sums over the rows that it has seen."""

    def __init__(self, name: str, module: Any, hessian: bool) -> None:
        self.name, self.rows = name, 0
        depthwise = isinstance(module, nn.Conv2d) and is_depthwise(module)
        self.channels = module.in_channels if depthwise else 0
        self.histogram = _Histogram()
        self.sum, self.square, self.absmax = (torch.zeros((), dtype=torch.float64),) * 3
        self.hessian: Tensor | None = None
        self.wants_hessian = hessian and getattr(module, "groups", 1) == 1

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x: Tensor = (args[0] if args else kwargs["input"]).detach().float()
        if not x.numel():
            return
        if not torch.isfinite(x).all():
            raise ValueError(
                f"the input of layer {self.name!r} holds a NaN or an Inf: calibrate on data that "
                "the model can run"
            )
        self.histogram.add(x.reshape(-1))
        rows = conv_rows(module, x) if isinstance(module, nn.Conv2d) else x.flatten(0, -2)
        rows = rows.reshape(-1, rows.shape[-1])
        self.rows += len(rows)
        self.sum = self.sum + rows.sum(0)
        self.square = self.square + rows.square().sum(0)
        self.absmax = torch.maximum(self.absmax, rows.abs().amax(0))
        if self.wants_hessian:
            if self.hessian is None:
                self.hessian = rows.new_zeros(rows.shape[1], rows.shape[1])
            self.hessian.addmm_(rows.T, rows)

    def result(self, observer: str, percentile: float) -> Observed:
        low, high = self.histogram.range(observer, percentile)
        return Observed(
            rows=self.rows,
            mean=self._inputs(self.sum / self.rows),
            square=self._inputs(self.square / self.rows),
            absmax=self._inputs(self.absmax),
            low=low,
            high=high,
            hessian=None if self.hessian is None else self.hessian / self.rows,
        )

    def _inputs(self, columns: Tensor) -> Tensor:
        """(k) of all outputs; of a depthwise convolution (n, k), each channel's own."""
        if self.channels:
            wide = -(-self.channels // 4) * 4
            columns = columns.view(-1, wide)[:, : self.channels].T.contiguous()
        return columns.float()


def correct_bias_(layer: Linear | Conv2d, module: nn.Module) -> bool:
    """bias += (w - w_packed) @ mean(x): the packed layer's mean output is the dense one's again.

    Nagel 2021, 4.2.1. A layer without a bias gets one.

    Args:
        layer: packed from `module`.
        module: the dense layer.

    Returns:
        Whether there was anything to correct: the module is calibrated, and packing changed it.
    """
    seen = observed(module)
    if seen is None:
        return False
    lost = weight_matrix(module).float() - layer.packed.unpack()
    shift = lost @ seen.mean if seen.mean.dim() == 1 else (lost * seen.mean).sum(1)
    if not shift.any():
        return False
    layer.bias = shift if layer.bias is None else layer.bias + shift
    return True


@torch.no_grad()
def set_weight_(module: nn.Module, matrix: Tensor) -> None:
    """The inverse of `weight_matrix`: writes an (n, k) matrix into the module's weight.

    Raises:
        ValueError: the matrix has another shape than `weight_matrix(module)`.
    """
    weight: Any = module.weight
    shape = weight_matrix(module).shape
    if matrix.shape != shape:
        raise ValueError(f"the matrix is {tuple(matrix.shape)}, this layer's is {tuple(shape)}")
    if isinstance(module, nn.Conv2d):
        matrix = conv_weight(matrix, weight.shape, groups_inside(module))
    weight.copy_(matrix)
