"""Layers with packed weights: geometry, bias, activation and one `Packed`, of whatever format."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from gossamer import ops
from gossamer.dtypes import KeepsDtypes
from gossamer.formats import Format
from gossamer.geometry import (
    PAD_MODES,
    conv_geometry,
    conv_weight,
    groups_inside,
    is_depthwise,
    least_size,
    pad_outside,
    pair,
    too_small,
)
from gossamer.groups import check_groups, grouped_format, kept_format
from gossamer.observed import pack_dense
from gossamer.packed import Packed, packs_depthwise


def _checked_bias(bias: Tensor | None, n: int) -> Tensor | None:
    if bias is None:
        return None
    if bias.shape != (n,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}, the weight has n={n} outputs")
    if not torch.isfinite(bias).all():
        raise ValueError("the bias holds a NaN or an Inf")
    return bias.detach().float().clone()


class _Layer(KeepsDtypes):
    """What both layers share: a packed weight, a bias and an activation."""

    packed: Packed
    bias: Tensor | None

    def __init__(self, packed: Packed, bias: Tensor | None, activation: str) -> None:
        super().__init__()
        self.packed = packed
        own = _checked_bias(bias, packed.n)
        if packed.trainable and own is not None:
            self.bias = nn.Parameter(own)
        else:
            self.register_buffer("bias", own)
        self.activate_with(activation)

    def activate_with(self, activation: str) -> None:
        """From now on y = activation(x @ w^T + bias)."""
        self._activation = ops.activation_index(activation)
        self.activation = activation

    def unpack(self) -> Tensor:
        """The weight that is really used, float32, in the shape that the dense layer has."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """`unpack()`, for models that read the weight of a layer, with a warning."""
        warnings.warn(
            f"the weight of a packed {type(self).__name__} was read: it is unpacked anew each "
            "time. Where a model multiplies by it instead of calling the layer, packing gains "
            "nothing: leave that layer out of compress_",
            stacklevel=2,
        )
        return self.unpack()

    def _add(self, x: Tensor, bias: Any, conv: Any, residual: Any, reuse: bool) -> Tensor:
        packed: Any = self.packed
        if not packed.adds:
            raise ValueError(f"{packed.format} adds no residual: add it behind the layer")
        return packed.multiply(x, bias, self._activation, conv, residual, reuse)

    @torch.no_grad()
    def scale_(self, factor: Tensor, shift: Tensor) -> None:
        """y becomes y * factor + shift, an output each (n), before the activation.

        Raises:
            ValueError: as `Packed.scaled`.
        """
        self.packed = self.packed.scaled(factor)
        bias = shift if self.bias is None else self.bias.double() * factor + shift
        self.bias = _checked_bias(bias, self.packed.n)


class Linear(_Layer):
    """y = activation(x @ w^T + bias), a drop-in for `nn.Linear` at inference.

    Args:
        packed: the weight, n outputs x k inputs.
        bias: (n) float, or None.
        activation: one of `gossamer.ops.ACTIVATIONS`, fused into the kernel.

    Shapes: x (..., k) float32, bfloat16 or float16 -> (..., n) in the same dtype. `residual`, of
    that shape, is added before the activation by formats whose `packed.adds`; with `reuse` nobody
    reads it later, and the result may have its memory.

    Raises:
        ValueError: if the bias does not fit or the activation is unknown.

    >>> import gossamer as gs
    >>> layer = gs.Linear.from_dense(nn.Linear(8, 4), gs.Int8())
    >>> layer(torch.randn(2, 8)).shape
    torch.Size([2, 4])
    """

    def __init__(
        self, packed: Packed, bias: Tensor | None = None, activation: str = "none"
    ) -> None:
        super().__init__(packed, bias, activation)
        self.in_features, self.out_features = packed.k, packed.n

    @classmethod
    def from_dense(
        cls,
        module: nn.Linear,
        format: Format,
        packed: Packed | None = None,
        activation: str = "none",
    ) -> Linear:
        """Packs a dense layer; `packed` reuses a weight that was packed before (a shared one).

        Raises:
            ValueError: if `packed` has another shape than the layer's weight, or as `pack`.
        """
        packed = packed or pack_dense(module, format)
        if (packed.n, packed.k) != (module.out_features, module.in_features):
            raise ValueError(
                f"the packed weight is {packed.n} x {packed.k}, this layer needs "
                f"{module.out_features} x {module.in_features}"
            )
        return cls(packed, module.bias, activation)

    def forward(self, x: Tensor, residual: Tensor | None = None, reuse: bool = False) -> Tensor:
        if x.dim() == 0 or x.size(-1) != self.in_features:
            raise ValueError(
                f"x has shape {tuple(x.shape)}: its last dimension must be "
                f"in_features={self.in_features}"
            )
        # nn.Module finds what it holds by a slow path: two of them cost a tenth of a small call.
        packed: Any = self._modules["packed"]
        bias = self.bias if packed.trainable else self._buffers["bias"]
        if residual is not None:
            return self._add(x, bias, None, residual, reuse)
        return packed.multiply(x, bias, self._activation, None)

    def unpack(self) -> Tensor:
        """The weight that is really used, (out_features, in_features) float32."""
        return self.packed.unpack()

    def to_dense(self) -> nn.Linear:
        """A dense layer with the weight that is really used. The activation is not part of it."""
        dense = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        _fill(dense, self)
        return dense

    def geometry(self) -> dict[str, Any]:
        """What a file needs to rebuild the layer around its buffers."""
        return {
            "kind": "Linear",
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": self.bias is not None,
            "activation": self.activation,
        }

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, activation={self.activation}"
        )


def _fill(dense: nn.Linear | nn.Conv2d, layer: Linear | Conv2d) -> None:
    with torch.no_grad():
        dense.weight.copy_(layer.unpack())
        if dense.bias is not None and layer.bias is not None:
            dense.bias.copy_(layer.bias)
    dense.train(layer.training)


class Conv2d(_Layer):
    """y = activation(conv2d(x, w) + bias), a drop-in for `nn.Conv2d` at inference.

    The weight is packed as a matrix (out_channels, kernel_h * kernel_w * channels up to 4),
    channels innermost, so that a block of four inputs is four channels at one tap; of a depthwise
    convolution as (channels, kernel_h * kernel_w). That of a grouped one is as wide as if each
    output read all channels: its zeros are not stored.

    Args:
        packed: that matrix.
        bias: (out_channels) float, or None.
        in_channels, out_channels, kernel_size, stride, padding, dilation, padding_mode: as in
            `nn.Conv2d`.
        activation: one of `gossamer.ops.ACTIVATIONS`, fused into the kernel.
        groups: as in `nn.Conv2d`; of a depthwise convolution, groups = in_channels = out_channels,
            static int8 has kernels, and others are kept as `SparseInt8(activations="static")`.

    Shapes: x (images, in_channels, h, w) or (in_channels, h, w), contiguous or channels_last,
    float32, bfloat16 or float16; the result has its dtype and layout. The others: see Linear.

    Raises:
        ValueError: if sizes do not fit each other, or the padded input is smaller than the kernel.
    """

    def __init__(
        self,
        packed: Packed,
        bias: Tensor | None,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, int],
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] | str = (0, 0),
        dilation: tuple[int, int] = (1, 1),
        padding_mode: str = "zeros",
        activation: str = "none",
        groups: int = 1,
    ) -> None:
        super().__init__(packed, bias, activation)
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        check_groups(self, packed.format)
        wide = 1 if is_depthwise(self) else -(-in_channels // 4) * 4
        columns = kernel_size[0] * kernel_size[1] * wide
        if (packed.n, packed.k) != (out_channels, columns):
            raise ValueError(
                f"the packed weight is {packed.n} x {packed.k}, this convolution needs "
                f"{out_channels} x {columns}"
            )
        if padding_mode not in PAD_MODES:
            raise ValueError(
                f"padding_mode={padding_mode!r} is unknown: use one of {', '.join(PAD_MODES)}"
            )
        packed.bind(kernel_size[0] * kernel_size[1], in_channels, groups_inside(self))
        self.kernel_size, self.stride, self.dilation = kernel_size, stride, dilation
        self.padding, self.padding_mode = padding, padding_mode
        self._outside, self._conv = conv_geometry(self)
        self._least = least_size(self._conv)

    @classmethod
    def from_dense(
        cls,
        module: nn.Conv2d,
        format: Format,
        packed: Packed | None = None,
        activation: str = "none",
    ) -> Conv2d:
        """Packs a dense convolution; `packed` reuses a weight packed before (a shared one).

        Raises:
            ValueError: if `unsupported(module, format)` has a reason.
        """
        reason = unsupported(module, format)
        if reason:
            raise ValueError(reason)
        packed = packed or pack_dense(module, kept_format(module, format))
        padding = module.padding if isinstance(module.padding, str) else pair(module.padding)
        return cls(
            packed,
            module.bias,
            module.in_channels,
            module.out_channels,
            pair(module.kernel_size),
            pair(module.stride),
            padding,
            pair(module.dilation),
            module.padding_mode,
            activation,
            module.groups,
        )

    def forward(self, x: Tensor, residual: Tensor | None = None, reuse: bool = False) -> Tensor:
        if x.dim() not in (3, 4) or x.size(-3) != self.in_channels:
            raise ValueError(
                f"x has shape {tuple(x.shape)}: it must be (images, channels, height, width) or "
                f"(channels, height, width) with channels={self.in_channels}"
            )
        batched = x if x.dim() == 4 else x.unsqueeze(0)
        planar = int(batched.is_contiguous() or batched.stride(1) != 1)
        if self._outside is not None:
            batched = pad_outside(batched, self._outside, self.padding_mode)
        if batched.size(2) < self._least[0] or batched.size(3) < self._least[1]:
            raise too_small(batched, self._conv)
        packed: Any = self._modules["packed"]
        bias = self.bias if packed.trainable else self._buffers["bias"]
        conv = [*self._conv, planar]
        if residual is None:
            y = packed.multiply(batched, bias, self._activation, conv)
        else:
            added = residual if x.dim() == 4 else residual[None]
            y = self._add(batched, bias, conv, added, reuse)
        return y if x.dim() == 4 else y.squeeze(0)

    @property
    def takes_images(self) -> bool:
        """Whether `convolve` works: static activations, and no padding but zeros."""
        return self.packed.static and self._outside is None

    def convolve(
        self,
        x: Tensor,
        y_affine: Tensor | None,
        residual: Tensor | None = None,
        residual_affine: Tensor | None = None,
        reuse: bool = False,
    ) -> Tensor:
        """activation(conv2d(x, w) + bias + residual), of 8-bit images and to one.

        Args:
            x: as `ops.block` makes it, quantized by the layer's own range.
            y_affine: (2) float32, scale and zero point of the result; None: float32, contiguous.
            residual, residual_affine: an image of the result's shape, and its scale and zero point.
            reuse: as in `ops.conv_int8`.
        """
        shape, blocks = x.shape, -(-self.in_channels // 4)  # one call into torch, not five
        if len(shape) != 5 or shape[1] != blocks:
            raise ValueError(
                f"x has shape {tuple(shape)}: an 8-bit image of {self.in_channels} channels is "
                f"(images, {blocks}, height, width, 4)"
            )
        if shape[2] < self._least[0] or shape[3] < self._least[1]:
            raise too_small(x, self._conv)
        packed: Any = self._modules["packed"]
        # Nothing static trains.
        tail = (self._activation, [*self._conv, 1], y_affine, residual, residual_affine, reuse)
        return packed.convolve(x, self._buffers["bias"], *tail)

    def unpack(self) -> Tensor:
        """The weight that is really used, (out, in, kernel_h, kernel_w) float32."""
        shape = (self.out_channels, self.in_channels // self.groups, *self.kernel_size)
        return conv_weight(self.packed.unpack(), shape, groups_inside(self))

    def to_dense(self) -> nn.Conv2d:
        """A dense convolution with the weight that is really used, without the activation."""
        dense = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            bias=self.bias is not None,
            padding_mode=self.padding_mode,  # type: ignore[arg-type]
        )
        _fill(dense, self)
        return dense

    def geometry(self) -> dict[str, Any]:
        """What a file needs to rebuild the layer around its buffers."""
        return {
            "kind": "Conv2d",
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "kernel_size": list(self.kernel_size),
            "stride": list(self.stride),
            "padding": self.padding if isinstance(self.padding, str) else list(self.padding),
            "dilation": list(self.dilation),
            "padding_mode": self.padding_mode,
            **({"groups": self.groups} if self.groups > 1 else {}),
            "bias": self.bias is not None,
            "activation": self.activation,
        }

    def extra_repr(self) -> str:
        return ", ".join(f"{n}={value}" for n, value in self.geometry().items() if n != "kind")


LAYERS: dict[type[nn.Module], type[Linear] | type[Conv2d]] = {nn.Linear: Linear, nn.Conv2d: Conv2d}


def unsupported(module: nn.Module, format: Format | None = None) -> str | None:
    """Why a dense module cannot be packed (to that format), or None if it can."""
    if type(module) not in LAYERS:
        return f"{type(module).__name__} is not exactly nn.Linear or nn.Conv2d"
    if not isinstance(module, nn.Conv2d) or module.groups == 1:
        return None
    depthwise = is_depthwise(module)
    if format is None or (packs_depthwise(format) if depthwise else grouped_format(format)):
        return None
    kind = "depthwise" if depthwise else "grouped"
    return f"groups={module.groups}: {kind} convolutions are for Int8(activations='static')"
