"""What every packed weight is: a module of plain buffers, checked when they come from outside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gossamer import ops
from gossamer.formats import Format

from .affine import affine_of, check_affine

MAX_K = 65536


def lay_out(panels: Tensor, gpu: bool) -> Tensor:
    """Panels (P, S, 16, b) with another order in memory: on a GPU the rows of the weight follow.

    The tensor is the same but for its strides, so a state_dict is too.

    >>> lay_out(torch.zeros(2, 3, 16, 4), gpu=True).stride()
    (192, 4, 12, 1)
    """
    return panels.transpose(1, 2).contiguous().transpose(1, 2) if gpu else panels.contiguous()


def round_up(value: int, unit: int) -> int:
    """The next multiple of `unit`."""
    return -(-value // unit) * unit


class Packed(nn.Module):
    """A weight of n outputs and k inputs in some format: buffers and the product with them.

    Attributes:
        n, k: the shape of the weight.
        format: the `Format` it was packed with.
        kernel: name of the operator that multiplies it.
        trainable: gradients flow through `multiply`, to x, to the weight and to the bias.
        convolves: blocked images too, where the format is static.
        depthwise: (channels, taps) of a depthwise convolution, where the format is static.
        adds: `multiply` takes a residual.
        BUFFERS: names and dtypes, in the order in which the operator takes them.
    """

    kernel: str
    trainable = False
    convolves = False
    depthwise = False
    adds = False
    BUFFERS: ClassVar[dict[str, torch.dtype]]

    def __init__(self, n: int, k: int, format: Format, buffers: dict[str, Tensor]) -> None:
        super().__init__()
        self.n, self.k, self.format = n, k, format
        for name in self.buffers_of(format):
            self.register_buffer(name, buffers.get(name))

    @classmethod
    def pack(
        cls,
        weight: Tensor,
        format: Format,
        scale: Tensor | None = None,
        hessian: Tensor | None = None,
    ) -> Packed:
        """Checks the weight and packs it; the arguments are those of `gossamer.packed.pack`."""
        return cls._pack(checked_weight(weight, hessian), format, scale, hessian)

    @classmethod
    def _pack(
        cls, weight: Tensor, format: Format, scale: Tensor | None, hessian: Tensor | None
    ) -> Packed:
        """`pack` of a weight that is float32, finite and contiguous."""
        raise NotImplementedError

    @classmethod
    def buffers_of(cls, format: Format) -> dict[str, torch.dtype]:
        """The buffers of such a weight, by name."""
        static = getattr(format, "activations", "") == "static"
        return {**cls.BUFFERS, **({"x_affine": torch.float32} if static else {})}

    def with_range(self, low: float, high: float) -> Packed:
        """The same weight, in the same memory, whose inputs are quantized by the range low .. high.

        Raises:
            ValueError: the range is empty or not finite, or the format has no such range.
        """
        if not self.static:
            raise ValueError(f"{self.format} quantizes no input by a range: it is not static")
        return self.with_affine(affine_of(low, high))

    def with_affine(self, affine: Tensor) -> Packed:
        """`with_range`, of a scale and zero point (2) that `affine_of` made."""
        return self._with(x_affine=affine)

    @property
    def static(self) -> bool:
        """Whether inputs are quantized by one range, that of `x_affine`."""
        return "x_affine" in self.buffers_of(self.format)

    @staticmethod
    def concat(parts: Sequence[Packed]) -> Packed:
        """One weight with the outputs of all the parts, in that order; its bits are theirs.

        Raises:
            ValueError: the parts differ in format, in their inputs, or in the range of those.
        """
        first = parts[0]
        if any(
            type(part) is not type(first) or (part.k, part.format) != (first.k, first.format)
            for part in parts
        ):
            kinds = ", ".join(f"{part.format} of {part.k} inputs" for part in parts)
            raise ValueError(f"only weights of one format and width can be one: got {kinds}")
        buffers = {**first._tensors(), **first._concat(parts)}
        if first.static and any(
            not torch.equal(part.get_buffer("x_affine"), buffers["x_affine"]) for part in parts
        ):
            raise ValueError("weights whose inputs are quantized by other ranges cannot be one")
        for name in ("scale", "wsum"):
            if name in first.BUFFERS:
                buffers[name] = torch.cat([part.get_buffer(name) for part in parts])
        return type(first)(sum(part.n for part in parts), first.k, first.format, buffers)

    @staticmethod
    def _concat(parts: Any) -> dict[str, Tensor]:
        """The buffers of `concat`, but for those that are one number an output."""
        raise NotImplementedError

    def scaled(self, factor: Tensor) -> Packed:
        """diag(factor) @ w: each output's weights times its factor (n), of either sign.

        Integers keep their bits, but for the sign; scales take the factor's size.

        Raises:
            ValueError: a factor is not finite.
        """
        return self._with(**self._scaled(factor))

    def _scaled(self, factor: Tensor) -> dict[str, Tensor]:
        """The buffers that `scaled` changes."""
        raise NotImplementedError

    def _with(self, **changed: Tensor) -> Packed:
        """The same weight but for these buffers; the others are shared."""
        return type(self)(self.n, self.k, self.format, {**self._tensors(), **changed})

    @classmethod
    def from_buffers(cls, n: int, k: int, format: Format, buffers: dict[str, Tensor]) -> Packed:
        """A packed weight from the buffers of another, say out of a file; nothing is trusted.

        Raises:
            ValueError: if a buffer is missing, or has another dtype, shape or content than packing
                makes.
        """
        check_sizes(n, k)
        expected = cls.buffers_of(format)
        if set(buffers) != set(expected):
            raise ValueError(
                f"{format.name} has the buffers {sorted(expected)}, the file has {sorted(buffers)}"
            )
        for name, dtype in expected.items():
            buffer = buffers[name]
            if not isinstance(buffer, Tensor) or buffer.is_meta or buffer.layout != torch.strided:
                raise ValueError(f"buffer {name} is not a dense tensor that holds data")
            if buffer.dtype != dtype:
                raise ValueError(f"buffer {name} is {buffer.dtype}, {format.name} has {dtype}")
        clean = {name: b.detach().cpu().contiguous() for name, b in buffers.items()}
        packed = cls(n, k, format, clean)
        packed._validate()
        if "x_affine" in expected:
            check_affine(clean["x_affine"])
        return packed

    def _validate(self) -> None:
        raise NotImplementedError

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        device = next(iter(self._tensors().values())).device
        if device.type != "meta":
            self._arrange(device.type == "cuda")
        return self

    def _arrange(self, gpu: bool) -> None:
        """Lays out what a GPU reads in another order than a CPU, when the buffers have moved."""

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """For `load_state_dict`: all buffers or none, as little trusted as those of a file.

        They may hold another number of non-zeros than those they replace.
        """
        names = {prefix + name: name for name in self.buffers_of(self.format)}
        missing = [key for key in names if key not in state_dict]
        missing_keys += missing
        if strict:
            unexpected_keys += [k for k in state_dict if k.startswith(prefix) and k not in names]
        if missing:
            return
        buffers = {name: state_dict[key] for key, name in names.items()}
        try:
            loaded = self.from_buffers(self.n, self.k, self.format, buffers)
            if self._grouped:
                loaded.bind(*self._grouped)
        except ValueError as error:
            error_msgs.append(f"{prefix.removesuffix('.')}: {error}")
            return
        self._adopt(loaded)

    def _adopt(self, loaded: Packed) -> None:
        """Takes over what `loaded`, of the same class, n and k, holds, to where this one is."""
        device = next(iter(self._tensors().values())).device
        self._take(loaded)
        self._apply(lambda tensor: tensor.to(device))

    def _take(self, loaded: Any) -> None:
        """`_adopt` on the CPU."""
        for name in self.buffers_of(self.format):
            setattr(self, name, getattr(loaded, name).clone())

    # What a convolution of several groups said to `bind`.
    _grouped: tuple[int, int, int] | None = None

    def bind(self, taps: int, channels: int, groups: int) -> None:
        """Said by a convolution: the columns are (taps, channels up to 4), in so many groups.

        Raises:
            ValueError: an output has weights outside of its group.
        """

    def _tensors(self) -> dict[str, Tensor]:
        # nn.Module finds a buffer by a slow path: four of them would cost a fifth of a small call.
        return self._buffers  # type: ignore[return-value]

    def matmul(
        self,
        x: Tensor,
        bias: Tensor | None = None,
        activation: str = "none",
        conv: list[int] | None = None,
    ) -> Tensor:
        """y = activation(x @ w^T + bias).

        Args:
            x: (..., k) float32, bfloat16 or float16; with `conv` (images, channels, height, width).
            bias: (n) float32, or None.
            activation: one of `gossamer.ops.ACTIVATIONS`; "gelu" is the exact one, by erf.
            conv: the geometry of a convolution, see `gossamer.ops.gemm_int8`.

        Returns:
            (..., n), or (images, n, out_h, out_w), in the dtype of x.
        """
        return self.multiply(x, bias, ops.activation_index(activation), conv)

    def multiply(
        self, x: Tensor, bias: Tensor | None, activation: int, conv: list[int] | None
    ) -> Tensor:
        """`matmul` with the activation as its index: what layers call."""
        raise NotImplementedError

    def convolve(
        self,
        q: Tensor,
        bias: Tensor | None,
        activation: int,
        conv: list[int],
        y_affine: Tensor | None,
        residual: Tensor | None = None,
        residual_affine: Tensor | None = None,
        reuse: bool = False,
    ) -> Tensor:
        """y = activation(conv(q, w) + bias + residual) of blocked images.

        Of static int8 formats only: the scale and zero point of q are this weight's x_affine.
        Arguments as in `gossamer.ops.conv_int8`.
        """
        if not self.convolves:
            raise NotImplementedError(f"{self.format} does not multiply blocked images")
        affine = self._buffers.get("x_affine")
        if affine is None:
            raise ValueError(f"{self.format} has no range for its input: only static formats have")
        tail = (affine, bias, y_affine, residual, residual_affine, self.k, activation, conv)
        return self._convolve(q, *tail, reuse=reuse)

    def _convolve(self, q: Tensor, *tail: Any, reuse: bool) -> Tensor:
        """`convolve`: its operator, with what follows the weight's buffers."""
        raise NotImplementedError

    def unpack(self) -> Tensor:
        """The weight that is really used, (n, k) float32."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers and parameters."""
        return sum(t.nbytes for t in (*self.parameters(), *self.buffers()))

    @property
    def zeros(self) -> float:
        """Share of weights that are exactly zero, 0 to 1."""
        return 1 - torch.count_nonzero(self.unpack()).item() / (self.n * self.k)

    def extra_repr(self) -> str:
        return f"n={self.n}, k={self.k}, format={self.format}"


def check_sizes(n: int, k: int) -> None:
    """ValueError unless an n x k weight can be packed."""
    if not (isinstance(n, int) and isinstance(k, int) and 1 <= n < 2**31 and k >= 1):
        raise ValueError(f"n={n}, k={k}: a weight has 1 .. 2^31 - 1 outputs and at least one input")
    if k > MAX_K:
        raise ValueError(f"k={k} overflows int32 (limit {MAX_K}): split the layer")


def checked_weight(weight: Tensor, hessian: Tensor | None = None) -> Tensor:
    """A weight as float32 (n, k), or the sentence that says why it cannot be packed."""
    if weight.dim() != 2:
        raise ValueError(f"a weight must be (n, k), got shape {tuple(weight.shape)}")
    if not weight.is_floating_point():
        raise TypeError(f"weight has dtype {weight.dtype}: use a float dtype")
    if weight.device.type != "cpu":
        raise ValueError(f"weight is on {weight.device}: move the model with .cpu() to pack it")
    check_sizes(*weight.shape)
    weight = weight.detach().float().contiguous()
    if not torch.isfinite(weight).all():
        raise ValueError(
            "the weight holds a NaN or an Inf: it cannot be quantized or pruned soundly"
        )
    if hessian is not None and hessian.shape != 2 * weight.shape[1:]:
        raise ValueError(
            f"the Hessian is {tuple(hessian.shape)}, a weight of {weight.shape[1]} inputs needs "
            f"({weight.shape[1]}, {weight.shape[1]})"
        )
    return weight
