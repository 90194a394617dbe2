"""Dense int8 weights, in panels of 16 outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gossamer import ops
from gossamer.formats import Format

from .base import Packed, lay_out, round_up
from .lanes import (
    check_lanes,
    check_scale,
    check_wsum,
    gptq_lanes,
    lane_ids,
    lane_scale,
    lanes_of,
    quantize_lanes,
    scale_signs,
    times_sign,
    unlanes,
)

PANEL = 16  # outputs in a panel
STEP = 8  # inputs whose products share 16-bit lanes, two by two


def _panels(q: Tensor) -> Tensor:
    """(n, k up to 8) int8, contiguous, as panels."""
    whole = nn.functional.pad(q, (0, 0, 0, -len(q) % PANEL))
    words = whole.view(torch.int32).view(-1, PANEL, q.shape[1] // 4)
    return words.transpose(1, 2).contiguous().unsqueeze(-1).view(torch.int8)


class _Int8Panels(Packed):
    """Dense int8: panels of 16 outputs, (ceil(n / 16), k up to 8 / 4, 16, 4)."""

    panels: Tensor
    scale: Tensor

    @classmethod
    def _pack(
        cls, weight: Tensor, format: Format, scale: Tensor | None, hessian: Tensor | None
    ) -> Packed:
        (n, k), inputs = weight.shape, round_up(weight.shape[1], STEP)
        lanes = lanes_of(nn.functional.pad(weight, (0, inputs - k)))
        outputs = torch.arange(n).repeat_interleave(inputs // 4)
        if hessian is None:
            lanes, scale = quantize_lanes(lanes, outputs, n, scale)
            q = unlanes(lanes, n, inputs)
        else:
            scale = lane_scale(lanes, outputs, n) if scale is None else scale
            lane = lane_ids(len(lanes), n, inputs)
            q = gptq_lanes(weight, hessian, lane[:, :k], scale)
            q = nn.functional.pad(q, (0, inputs - k))
        buffers = {"panels": _panels(q), "scale": scale, "wsum": q.sum(1, dtype=torch.int32)}
        return cls(n, k, format, {name: buffers[name] for name in cls.BUFFERS})

    @staticmethod
    def _concat(parts: Sequence[_Int8Panels]) -> dict[str, Tensor]:
        return {"panels": _panels(torch.cat([part._integers()[: part.n] for part in parts]))}

    def _integers(self) -> Tensor:
        """(n up to 16, k up to 8) int8."""
        panels = self.panels
        return panels.transpose(1, 2).reshape(panels.shape[0] * PANEL, -1)

    def _arrange(self, gpu: bool) -> None:
        self.panels = lay_out(self.panels, gpu)

    def _validate(self) -> None:
        n, k = self.n, self.k
        shape = (round_up(n, PANEL) // PANEL, round_up(k, STEP) // 4, PANEL, 4)
        if self.panels.shape != shape:
            raise ValueError(
                f"panels have shape {tuple(self.panels.shape)}, n={n}, k={k} need {shape}"
            )
        q = self._integers()
        if q[n:].any() or q[:, k:].any():
            raise ValueError("panels hold weights in their padding: the file is damaged")
        check_lanes(lanes_of(q), "panels")
        check_scale(self.scale, n)

    def unpack(self) -> Tensor:
        return self._integers()[: self.n, : self.k].float() * self.scale[:, None]

    def _scaled(self, factor: Tensor) -> dict[str, Tensor]:
        sign, scale = scale_signs(self.scale, factor)
        whole = nn.functional.pad(sign, (0, -self.n % PANEL), value=1).view(-1, 1, PANEL, 1)
        changed = {"panels": times_sign(self.panels, whole), "scale": scale}
        return changed | (
            {"wsum": self.get_buffer("wsum") * sign} if "wsum" in self.BUFFERS else {}
        )


class PackedInt8(_Int8Panels):
    """`Int8(activations="dynamic")` and `"static"`: integers times integers."""

    wsum: Tensor

    kernel = "gemm_int8"
    convolves = True
    depthwise = True
    BUFFERS: ClassVar = {"panels": torch.int8, "scale": torch.float32, "wsum": torch.int32}

    def _validate(self) -> None:
        super()._validate()
        check_wsum(self.wsum, self._integers()[: self.n])

    def multiply(
        self, x: Tensor, bias: Tensor | None, activation: int, conv: list[int] | None
    ) -> Tensor:
        b = self._tensors()
        affine = b.get("x_affine")
        return ops.gemm_int8(
            x, b["panels"], b["scale"], b["wsum"], affine, bias, self.k, activation, conv
        )

    def _convolve(self, q: Tensor, *tail: Any, reuse: bool) -> Tensor:
        b: Any = self._buffers
        return ops.conv_int8(q, b["panels"], b["scale"], b["wsum"], *tail, reuse=reuse)


class PackedW8(_Int8Panels):
    """`Int8(activations="none")`: integers widened to floats on the way."""

    kernel = "gemm_w8"
    BUFFERS: ClassVar = {"panels": torch.int8, "scale": torch.float32}

    def multiply(
        self, x: Tensor, bias: Tensor | None, activation: int, conv: list[int] | None
    ) -> Tensor:
        b = self._tensors()
        return ops.gemm_w8(x, b["panels"], b["scale"], bias, self.k, activation, conv)
