"""qat_: train with the int8 kernels in the forward, so that packing afterwards changes nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .compress import Candidate, as_patterns, choose, describe, find, format_name
from .formats import Format, Int8, SparseInt8
from .geometry import conv_geometry, conv_weight, groups_inside, pad_outside
from .layers import LAYERS, Conv2d, Linear
from .observed import Frozen, frozen, input_range, pack_dense
from .packed import Packed
from .report import Report


class _Straight(torch.autograd.Function):
    """y of the packed kernel; its gradient, with rounding taken for the identity.

    dx = dy @ w_packed, 0 where a static range cuts x off. dw = dy^T @ x, x cut off likewise, and 0
    where w lies more than one step from what it was packed to: there it was cut off.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        module: Any,
        packed: Packed,
        conv: list[int] | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.module, ctx.packed = module, packed
        own = None if bias is None else bias.detach().float()
        return packed.multiply(x.detach(), own, 0, conv)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dy, kept, module = grads[0].float(), x.float(), ctx.module
        used = ctx.packed.unpack()
        if isinstance(module, nn.Conv2d):
            used = conv_weight(used, weight.shape, groups_inside(module))
        found: Any = frozen(module)
        if found.x_range is not None:
            kept = kept.clamp(*found.x_range)
        dx, dw, db = module.gradients(dy, kept, used, ctx.needs_input_grad)
        if dx is not None:
            dx = (dx if found.x_range is None else dx.masked_fill_(kept != x, 0)).to(x.dtype)
        if dw is not None:
            steps = found.scale.view(-1, *[1] * (weight.dim() - 1))
            dw = dw.masked_fill_((weight - used).abs() > steps, 0).to(weight.dtype)
        return dx, dw, db, None, None, None


class QatLinear(nn.Linear):
    """An nn.Linear that `qat_` prepared: the same parameters, the forward of its packed layer."""

    def gradients(
        self, dy: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, ...]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of x, weight and bias."""
        rows = dy.reshape(-1, self.out_features)
        dx = dy @ weight if wanted[0] else None
        dw = rows.T @ x.reshape(-1, self.in_features) if wanted[1] else None
        return dx, dw, rows.sum(0) if wanted[2] else None

    def forward(self, input: Tensor) -> Tensor:
        """The output of `compress_`'s layer for these weights, bit for bit."""
        return _forward(self, input, None)


class QatConv2d(nn.Conv2d):
    """An nn.Conv2d that `qat_` prepared, see `QatLinear`."""

    def gradients(
        self, dy: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, ...]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of x, weight and bias."""
        _, _, sh, sw, dh, dw, top, bottom, left, right = conv_geometry(self)[1]
        # Torch knows no uneven padding.
        padded = nn.functional.pad(x, (left, right, top, bottom))
        tail = ([sh, sw], [0, 0], [dh, dw], False, [0, 0], self.groups, [*wanted[:2], False])
        wide, dweight, _ = torch.ops.aten.convolution_backward(dy, padded, weight, None, *tail)
        dx = wide[..., top : top + x.shape[2], left : left + x.shape[3]] if wanted[0] else None
        return dx, dweight, dy.sum((0, 2, 3)) if wanted[2] else None

    def forward(self, input: Tensor) -> Tensor:
        """The output of `compress_`'s layer for these weights, bit for bit."""
        batched = input if input.dim() == 4 else input.unsqueeze(0)
        planar = int(batched.is_contiguous() or batched.stride(1) != 1)
        outside, numbers = conv_geometry(self)
        padded = pad_outside(batched, outside, self.padding_mode)
        y = _forward(self, padded, [*numbers, planar])
        return y if input.dim() == 4 else y.squeeze(0)


# What a module becomes, and what compress_ packs it to.
PREPARED: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: QatLinear, nn.Conv2d: QatConv2d}
LAYERS.update({QatLinear: Linear, QatConv2d: Conv2d})


def _forward(module: QatLinear | QatConv2d, x: Tensor, conv: list[int] | None) -> Tensor:
    found: Any = frozen(module)
    packed = pack_dense(module, found.format)
    y: Tensor = _Straight.apply(x, module.weight, module.bias, module, packed, conv)
    return y


def qat_(model: nn.Module, formats: Format | dict[str, Format | None]) -> Report:
    """Prepares `model` for quantization-aware training, in place: its forward is int8 from now on.

    Each layer keeps its Parameters (so an optimizer, a checkpoint and its names stay as they are)
    and computes y on the int8 kernel, from weights that are packed anew in each forward. Rounding
    has the gradient 1; what the integers cut off has none (Jacob 2018, 3). The scales of weights
    and, with static activations, the range of inputs are frozen here. Train as before, with a small
    learning rate, then `compress_` with the same formats: the packed model gives the same bits.

    The frozen scales are no part of the state_dict. To resume, prepare the model from the weights
    and the calibration that it was first prepared from, and load the state_dict then.

    Args:
        model: dense, on the CPU; calibrated, for static activations.
        formats: as for `compress_`, of `Int8` and `SparseInt8` formats.

    Returns:
        A `Report`, one row a layer.

    Raises:
        TypeError: `formats` holds something else than formats.
        ValueError: another format; a pattern that matches no layer; a layer that cannot be packed
            or was not calibrated (it is named). The model is as it was.

    Example:
        >>> import torch, gossamer as gs
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4))
        >>> report = gs.qat_(model, gs.Int8())
        >>> x = torch.randn(2, 8)
        >>> y = model(x)
        >>> y.sum().backward()
        >>> report = gs.compress_(model, gs.Int8())
        >>> torch.equal(model(x), y)
        True
    """
    candidates = find(model)
    for candidate in candidates:
        if frozen(candidate.module) is not None:
            candidate.reason = "is prepared already"
    choose(candidates, as_patterns(formats))
    fixed = {c.module: _freeze(c, c.format) for c in candidates if c.format is not None}
    rows = [describe(candidate, candidate.reason) for candidate in candidates]
    for candidate, row in zip(candidates, rows, strict=True):
        if candidate.format is not None:
            row.after = f"Qat{row.before} {format_name(candidate.format)}"
    for module, found in fixed.items():
        module._gossamer_frozen = found  # type: ignore[assignment]
        module.__class__ = PREPARED[type(module)]
    return Report(rows, "" if fixed else "nothing changed: every layer was left alone")


def _freeze(candidate: Candidate, format: Format) -> Frozen:
    try:
        if not isinstance(format, Int8 | SparseInt8):
            raise ValueError(f"{format} has no training: use Int8 or SparseInt8")
        packed: Any = pack_dense(candidate.module, format)
        return Frozen(format, packed.scale, input_range(candidate.module, format))
    except (TypeError, ValueError) as error:
        raise type(error)(f"layer {candidate.name!r}: {error}") from error
