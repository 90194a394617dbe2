"""What a user asks for: frozen descriptions of how a weight is stored and multiplied."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Format:
    """Base of all formats. A format says what to do; `gossamer.packed.pack` does it."""

    @property
    def name(self) -> str:
        """The class name, as files and reports show it."""
        return type(self).__name__

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict that `format_from_json` turns back into an equal format."""
        return {"format": self.name, **dataclasses.asdict(self)}


def _check_activations(value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"activations={value!r} is unknown: use one of {', '.join(allowed)}")


@dataclass(frozen=True)
class Int8(Format):
    """y = x @ w^T with int8 weights, a scale per output channel.

    Args:
        activations: "dynamic" quantizes x to 8 bits a row (a convolution: an image) as it comes
            and multiplies integers; "static" quantizes it by one range a layer, which `calibrate`
            finds beforehand; "none" keeps x in floats ("weight-only"), which is closer to
            fp32 and pays off where the weight, not the arithmetic, is waited for: a few rows.

    Raises:
        ValueError: for any other `activations`.

    >>> Int8().to_json()
    {'format': 'Int8', 'activations': 'dynamic'}
    """

    activations: str = "dynamic"

    def __post_init__(self) -> None:
        _check_activations(self.activations, ("dynamic", "static", "none"))


@dataclass(frozen=True)
class Int4(Format):
    """y = x @ w^T with 4-bit weights: a scale for each `group` of inputs, and one per output.

    A weight is one of 16 values that fit the bell curve of trained weights better than equal steps
    do. x is quantized to 8 bits a row (a convolution: an image) inside the kernel, though what is
    stored is only the weight: with x in floats one row takes four times as long. Pays off where the
    weight is waited for: a few rows, and layers larger than the caches.

    Args:
        group: inputs that share a scale: 16 (4.5 bits a weight) or 32 (4.25 bits, a third more
            squared error).

    Raises:
        ValueError: for any other `group`.

    >>> Int4().to_json()
    {'format': 'Int4', 'group': 16}
    """

    group: int = 16

    def __post_init__(self) -> None:
        if type(self.group) is not int or self.group not in (16, 32):
            raise ValueError(f"group={self.group!r} has no kernel: use 16 or 32")


@dataclass(frozen=True)
class Sparse(Format):
    """y = x @ w^T with fp32 weights of which only the non-zeros are stored, anywhere in the matrix.

    Pays off from about 70 % zeros on; prune with `pattern="unstructured"`.

    Args:
        trainable: the layer learns: its non-zeros and its bias are Parameters, and forward and
            backward run on sparse kernels. What is pruned stays pruned. Train, then `compress_`
            again to what you serve.

    Raises:
        ValueError: `trainable` is not a bool.
    """

    trainable: bool = False

    def __post_init__(self) -> None:
        if type(self.trainable) is not bool:
            raise ValueError(f"trainable={self.trainable!r} must be True or False")


@dataclass(frozen=True)
class SparseInt8(Format):
    """y = x @ w^T with int8 weights stored in blocks of 1 output x 4 inputs, empty blocks left out.

    Prune with `pattern="1x4"`.

    Args:
        activations: "dynamic" or "static", as for `Int8`.

    Raises:
        ValueError: for any other `activations`.
    """

    activations: str = "dynamic"

    def __post_init__(self) -> None:
        _check_activations(self.activations, ("dynamic", "static"))


FORMATS: dict[str, type[Format]] = {f.__name__: f for f in (Int8, Int4, Sparse, SparseInt8)}


def format_from_json(data: dict[str, Any]) -> Format:
    """The format that `Format.to_json` described.

    Raises:
        ValueError: if the name or a field is unknown, or a value is not allowed.

    >>> format_from_json({"format": "Int8", "activations": "none"})
    Int8(activations='none')
    """
    name = data.get("format") if isinstance(data, dict) else data
    if not isinstance(data, dict) or not isinstance(name, str) or name not in FORMATS:
        raise ValueError(f"unknown format {name!r}: this version knows {', '.join(FORMATS)}")
    fields = {key: value for key, value in data.items() if key != "format"}
    cls = FORMATS[name]
    unknown = set(fields) - {f.name for f in dataclasses.fields(cls)}
    if unknown:
        raise ValueError(f"{cls.__name__} has no field {', '.join(sorted(map(str, unknown)))}")
    return cls(**fields)
