"""Dense int4 weights: 16 values, a scale for each group of inputs, in panels of 16 outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from gossamer import ops
from gossamer.formats import Format, Int4
from gossamer.obs import inverse_factor, walk

from .base import Packed, lay_out, round_up
from .int8 import PANEL
from .lanes import check_scale, check_wsum, scale_signs, times_sign

STEP = 32  # inputs are padded to it: the largest group
LINE = 8  # inputs in 64 bytes of a panel, four in the low halves and four in the high
ZERO = 8  # the code of 0
VALUES = torch.tensor([-32, -25, -20, -15, -12, -8, -5, -3, 0, 3, 6, 9, 12, 16, 21, 27])
# |scale of a group| * group <= 2048: times the group's sum, 255 * 32 * group, it is exact in float.
SCALE_LIMIT = 2048
# What the scale of a group may make of its largest weight; beyond -32 and 27 it is cut off. With
# these eight, groups of normal weights come to within 0.05 dB of a search over 27.
PEAKS = (-38, -35, -32, -30, 27, 29, 32, 36)
CHUNK = 65536  # weights at a time: all that is made of them stays in L2

# The code nearest to t, at place floor(2 t) + 80: where the nearest changes, 2 t is an integer.
_CODES = torch.bucketize(torch.arange(-80, 80) / 2 + 0.25, (VALUES[1:] + VALUES[:-1]) / 2)


def _places(t: Tensor) -> Tensor:
    return (t * 2).floor_().clamp_(-80, 79).add_(80).int().view(-1)


def quantize_groups(v: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """4-bit codes and an integer scale a group, so that v ~ scale * VALUES[code].

    Each scale is the best of eight in the least-squares sense; a weight of 0 stays 0.

    Args:
        v: (groups, group) float32, finite.
        limit: largest size of a scale.

    Returns:
        codes (groups, group) uint8, scale (groups, 1) int8, never 0.
    """
    values = VALUES.float()[_CODES]
    extreme = v.gather(1, v.abs().argmax(1, keepdim=True))
    gain, best = torch.full_like(extreme, -1), torch.zeros_like(extreme)
    for peak in PEAKS:
        scale = torch.where(extreme == 0, 1.0, extreme / peak)
        nearest = values.index_select(0, _places(v / scale)).view_as(v)
        # The best scale for these values is along / size; then |v|^2 falls by along^2 / size.
        along = (nearest * v).sum(1, keepdim=True)
        size = (nearest * nearest).sum(1, keepdim=True).clamp_(min=1)
        better = along * along / size > gain
        gain = torch.where(better, along * along / size, gain)
        best = torch.where(better, along / size, best)
    scale = best.round().clamp_(-limit, limit)
    scale = torch.where(scale == 0, 1.0, scale)
    codes = _CODES.to(torch.uint8).index_select(0, _places(v / scale)).view(v.shape)
    return codes, scale.to(torch.int8)


def _gptq_groups(
    weight: Tensor, hessian: Tensor, scale: Tensor, group: int, limit: int
) -> tuple[Tensor, Tensor]:
    """Codes (n, k) uint8 and group scales (n, groups) int8 by GPTQ.

    A group's scale is that of `quantize_groups` for the weights that the walk finds there when it
    comes to the group: they hold what the columns before lost.
    """
    (n, k), values = weight.shape, VALUES.float()
    codes = torch.empty(k, n, dtype=torch.uint8)
    scales = torch.empty(round_up(k, group) // group, n, dtype=torch.int8)

    def decide(j: int, ahead: Tensor) -> Tensor:
        if j % group == 0:
            own = (ahead[:group] / scale).t()
            own = nn.functional.pad(own, (0, group - own.shape[1])).contiguous()
            scales[j // group] = quantize_groups(own, limit)[1].squeeze(1)
        step = scales[j // group].float()
        nearest = _CODES.index_select(0, _places(ahead[0] / scale / step))
        codes[j] = nearest
        return values[nearest] * step * scale

    walk(weight, inverse_factor(hessian), decide)
    return codes.t().contiguous(), scales.t().contiguous()


def _panels(codes: Tensor, scales: Tensor) -> dict[str, Tensor]:
    """Codes (n, k up to 32) and the scales of their groups, in panels of outputs."""
    more = -len(codes) % PANEL
    codes = nn.functional.pad(codes, (0, 0, 0, more), value=ZERO)
    lines = codes.view(-1, PANEL, codes.shape[1] // LINE, 2, 4)
    lines = lines[..., 0, :] | lines[..., 1, :] << 4
    scales = nn.functional.pad(scales, (0, 0, 0, more), value=1).view(-1, PANEL, scales.shape[1])
    return {
        "panels": lines.transpose(1, 2).contiguous(),
        "group_scale": scales.transpose(1, 2).contiguous(),
    }


class PackedInt4(Packed):
    """`Int4`: integers times the values behind 4-bit codes."""

    panels: Tensor
    group_scale: Tensor
    scale: Tensor
    wsum: Tensor
    format: Int4

    kernel = "gemm_int4"
    BUFFERS: ClassVar = {
        "panels": torch.uint8,
        "group_scale": torch.int8,
        "scale": torch.float32,
        "wsum": torch.int32,
    }

    @classmethod
    def _pack(
        cls, weight: Tensor, format: Format, scale: Tensor | None, hessian: Tensor | None
    ) -> Packed:
        assert isinstance(format, Int4)
        (n, k), group = weight.shape, format.group
        limit = min(127, SCALE_LIMIT // group)
        # The scale of a group is at most that of the largest weight at the smallest peak.
        scale = weight.abs().amax(1) / (limit * min(map(abs, PEAKS)))
        # An output of zeros, or of denormals that a float cannot divide by: any scale does.
        scale = torch.where(scale < 2.0**-120, torch.ones(()), scale)
        if hessian is None:
            whole = nn.functional.pad(weight / scale[:, None], (0, -k % STEP))
            parts = [quantize_groups(v, limit) for v in whole.view(-1, group).split(CHUNK // group)]
            codes = torch.cat([part[0] for part in parts]).view(whole.shape)
            scales = torch.cat([part[1] for part in parts]).view(len(whole), -1)
        else:
            codes, scales = _gptq_groups(weight, hessian, scale, group, limit)
            codes = nn.functional.pad(codes, (0, -k % STEP), value=ZERO)
            empty = codes.shape[1] // group - scales.shape[1]
            scales = nn.functional.pad(scales, (0, empty), value=1)
        buffers = {
            **_panels(codes, scales),
            "scale": scale,
            "wsum": torch.zeros(n, dtype=torch.int32),
        }
        packed = cls(n, k, format, buffers)
        packed.wsum = packed._integers().sum(1, dtype=torch.int32)
        return packed

    @staticmethod
    def _concat(parts: Sequence[PackedInt4]) -> dict[str, Tensor]:
        codes = [part._codes()[: part.n] for part in parts]
        scales = [part._group_scales()[: part.n] for part in parts]
        return _panels(torch.cat(codes), torch.cat(scales))

    def _arrange(self, gpu: bool) -> None:
        self.panels = lay_out(self.panels, gpu)

    def _codes(self) -> Tensor:
        """(n up to 16, k up to 32) uint8."""
        lines = self.panels.transpose(1, 2)
        both = torch.stack([lines & 15, lines >> 4], -2)
        return both.reshape(lines.shape[0] * PANEL, -1)

    def _group_scales(self) -> Tensor:
        """(n up to 16, k up to 32 / group) int8."""
        scales = self.group_scale.transpose(1, 2)
        return scales.reshape(-1, scales.shape[2])

    def _integers(self) -> Tensor:
        """(n, k) int16: the value of each weight times the scale of its group."""
        values = VALUES.to(self.panels.device, torch.int16)[self._codes().int()]
        scales = self._group_scales()
        groups = values.view(*scales.shape, self.format.group) * scales.unsqueeze(2)
        return groups.view(values.shape)[: self.n, : self.k]

    def _validate(self) -> None:
        n, k, group = self.n, self.k, self.format.group
        panels, inputs = round_up(n, PANEL) // PANEL, round_up(k, STEP)
        for name, shape in (
            ("panels", (panels, inputs // LINE, PANEL, 4)),
            ("group_scale", (panels, inputs // group, PANEL)),
        ):
            got = tuple(self.get_buffer(name).shape)
            if got != shape:
                raise ValueError(
                    f"{name} has shape {got}, n={n}, k={k}, group={group} need {shape}"
                )
        codes = self._codes()
        if (codes[n:] != ZERO).any() or (codes[:, k:] != ZERO).any():
            raise ValueError("panels hold weights in their padding: the file is damaged")
        limit = SCALE_LIMIT // group
        if (self.group_scale.int().abs() > limit).any():
            raise ValueError(f"group_scale has a scale above {limit}: the file is damaged")
        check_scale(self.scale, n)
        check_wsum(self.wsum, self._integers())

    def unpack(self) -> Tensor:
        return self._integers().float() * self.scale[:, None]

    def _scaled(self, factor: Tensor) -> dict[str, Tensor]:
        sign, scale = scale_signs(self.scale, factor)
        # The 16 values are not symmetric, but the scale of a group may have either sign.
        whole = nn.functional.pad(sign, (0, -self.n % PANEL), value=1).view(-1, 1, PANEL)
        groups = times_sign(self.group_scale, whole)
        return {"group_scale": groups, "scale": scale, "wsum": self.wsum * sign}

    def multiply(
        self, x: Tensor, bias: Tensor | None, activation: int, conv: list[int] | None
    ) -> Tensor:
        b = self._tensors()
        return ops.gemm_int4(
            x, b["panels"], b["group_scale"], b["scale"], b["wsum"], bias, self.k, activation, conv
        )
