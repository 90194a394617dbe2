"""Cases by intent for every stem, a switch of the Isa, a comparison that shows the worst element.

Tests run every case on every Isa; `gossamer bench` times the named layers among them.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gossamer import _C
from gossamer.formats import Format, Int4, Int8, Sparse, SparseInt8

# The format that each multiplying stem serves.
FORMATS: dict[str, Format] = {
    "gemm_int8": Int8(),
    "gemm_w8": Int8(activations="none"),
    "gemm_int4": Int4(),
    "spmm": Sparse(),
    "spmm_int8": SparseInt8(),
}

# Layers that people run: k inputs, n outputs.
NAMED_LAYERS: dict[str, tuple[int, int]] = {
    "minilm.attention": (384, 384),
    "minilm.ffn.up": (384, 1536),
    "minilm.ffn.down": (1536, 384),
    "bert.attention": (768, 768),
    "bert.ffn.up": (768, 3072),
    "bert.ffn.down": (3072, 768),
    "bert-large.ffn.up": (1024, 4096),
    "llama.attention": (4096, 4096),
}


@contextlib.contextmanager
def isa(name: str) -> Iterator[None]:
    """Runs its body on the named instruction set; the one in use before comes back afterwards.

    Raises:
        ValueError: if this CPU cannot run it.

    >>> with isa("base"):
    ...     _C.isa()
    'base'
    """
    before = _C.isa()
    _C.use_isa(name)
    try:
        yield
    finally:
        _C.use_isa(before)


def assert_close(actual: Tensor, expected: Tensor, bound: Tensor) -> None:
    """Requires |actual - expected| <= bound, NaN where expected is NaN, and equal infinities.

    Raises:
        AssertionError: with the worst index, both values and the bound there.

    >>> assert_close(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5]), torch.tensor([0.25]))
    Traceback (most recent call last):
    AssertionError: 1 of 2 elements are off; worst at (1,): 2.0 for 2.5, off by 0.5 > bound 0.25
    """
    if actual.shape != expected.shape:
        raise AssertionError(
            f"actual has shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
        )
    a, e, b = actual.double(), expected.double(), bound.double().expand_as(expected)
    same = (a == e) | (a.isnan() & e.isnan())
    # How far outside, as a share of the bound; a NaN or Inf on one side only is infinitely far.
    excess = ((a - e).abs() / b).nan_to_num(nan=torch.inf).masked_fill(same, 0.0)
    wrong = excess > 1
    if not wrong.any():
        return
    index = tuple(int(i) for i in torch.unravel_index(excess.argmax(), excess.shape))
    raise AssertionError(
        f"{int(wrong.sum())} of {wrong.numel()} elements are off; worst at {index}: {a[index]:.9} "
        f"for {e[index]:.9}, off by {(a - e).abs()[index]:.3} > bound {b[index]:.3}"
    )


def _alternating(rows: int, columns: int) -> Tensor:
    sign = (torch.arange(rows)[:, None] + torch.arange(columns)) % 2
    return 1.0 - 2.0 * sign


@dataclass(frozen=True)
class Case:
    """Rows and a weight: m x k times n x k transposed.

    Args:
        name: what the case is there for.
        m, k, n: sizes.
        weights: how the weight is filled, see `weight`.
        inputs: how the rows are filled, see `x`.
        density: share of the weight that stays, in blocks of `block` inputs.
        block: 1, or 4.
    """

    name: str
    m: int
    k: int
    n: int
    weights: str = "normal"
    inputs: str = "normal"
    density: float = 1.0
    block: int = 1

    def __str__(self) -> str:
        return f"{self.name} {self.m}x{self.k}x{self.n}".replace(" ", "-")

    def _generator(self, role: str) -> torch.Generator:
        return torch.Generator().manual_seed(zlib.crc32(f"{role} {self}".encode()))

    def weight(self) -> Tensor:
        """(n, k) float32, the same in every run."""
        n, k, g = self.n, self.k, self._generator("w")
        w = torch.randn(n, k, generator=g) * k**-0.5
        if self.weights == "zeros":
            w = torch.zeros(n, k)
        elif self.weights == "one":
            w = torch.zeros(n, k)
            w[n // 2, k // 3] = -1.5
        elif self.weights == "equal":
            w = torch.full((n, k), 0.127)
        elif self.weights == "alternating":
            w = 0.127 * _alternating(n, k)
        elif self.weights == "negative":
            w = -w.abs()
        elif self.weights == "outlier":
            w[n // 2] *= 1000
        elif self.weights == "denormal":
            w = w * 1e-39
        elif self.weights != "normal":
            raise ValueError(f"weights={self.weights!r} is unknown")
        if self.density < 1:
            blocks = -(-k // self.block)
            keep = torch.rand(n, blocks, generator=g) < self.density
            w = w * keep.repeat_interleave(self.block, 1)[:, :k]
        return w

    def dy(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(m, n), a gradient of the product, the same in every run."""
        return torch.randn(self.m, self.n, generator=self._generator("dy")).to(dtype)

    def bias(self) -> Tensor:
        """(n) float32, the same in every run."""
        return torch.randn(self.n, generator=self._generator("b"))

    def x(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(m, k), the same in every run. Of "nan" and "inf", each third row is ill."""
        m, k = self.m, self.k
        x = torch.randn(m, k, generator=self._generator("x"))
        if self.inputs == "zeros":
            x = torch.zeros(m, k)
        elif self.inputs == "full":  # quantizes to 255 everywhere
            x = torch.full((m, k), 2.0)
        elif self.inputs == "extremes":  # quantizes to 0 and 255 only
            x = _alternating(m, k)
        elif self.inputs == "negative":
            x = -x.abs()
        elif self.inputs == "offset":  # the range still begins at 0
            x = x + 100
        elif self.inputs == "outlier":
            x[:, k // 2] *= 1000
        elif self.inputs == "denormal":
            x = x * 1e-39
        elif self.inputs == "nan":
            x[::3, k // 2] = torch.nan
        elif self.inputs == "inf":
            x[::3, k // 2] = torch.inf
            x[3::6, k // 2] = -torch.inf
        elif self.inputs != "normal":
            raise ValueError(f"inputs={self.inputs!r} is unknown")
        return x.to(dtype)


@dataclass(frozen=True)
class ImageCase:
    """Images under a convolution; `sides` is the padding (top, bottom, left, right)."""

    name: str
    shape: tuple[int, int, int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    sides: tuple[int, int, int, int] = (0, 0, 0, 0)

    def __str__(self) -> str:
        return self.name.replace(" ", "-")

    def conv(self, planar: bool = True) -> list[int]:
        """The geometry as the operators take it."""
        return [*self.kernel, *self.stride, *self.dilation, *self.sides, int(planar)]

    def x(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(images, channels, height, width), the same in every run."""
        g = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))
        return torch.randn(self.shape, generator=g).to(dtype)


_TINY_K = (1, 3, 4, 5, 7, 8, 9, 12, 16, 17, 31, 33)
# Weights and inputs, each pair against the arithmetic's limits.
_VALUES = (
    ("equal", "full"),
    ("equal", "extremes"),
    ("alternating", "full"),
    ("alternating", "extremes"),
    ("negative", "negative"),
    ("negative", "full"),
    ("normal", "offset"),
    ("normal", "zeros"),
    ("outlier", "outlier"),
    ("denormal", "normal"),
    ("normal", "denormal"),
    ("normal", "nan"),
    ("normal", "inf"),
)


def _products(density: float, block: int) -> list[Case]:
    def case(name: str, m: int, k: int, n: int, weights: str = "normal", x: str = "normal") -> Case:
        # What is all there to begin with stays so: "equal" weights are about full lanes.
        share = density if weights == "normal" and k >= 32 else 1.0
        return Case(name, m, k, n, weights, x, share, block)

    return [
        *(case("tiny", m, k, n) for m, k in enumerate(_TINY_K, 1) for n in (1, 16, 33)),
        # Tiles: 64 or 32 rows; 16 outputs a panel, 128 a unit; blocks of 96 or 768 inputs; chunks.
        *(case("rows", m, 40, 24) for m in (31, 32, 33, 63, 64, 65, 129)),
        *(case("outputs", 5, 40, n) for n in (15, 17, 31, 32, 127, 128, 129, 1023, 1025)),
        *(case("inputs", 5, k, 20) for k in (95, 96, 97, 191, 193, 767, 768, 769)),
        case("deep", 3, 16384, 5),
        case("deepest", 1, 65536, 2),
        case("shallow", 70, 4, 200),
        case("narrow", 70, 300, 1),
        case("gemv", 1, 1000, 1000),
        case("few rows", 3, 512, 300),
        case("no rows", 0, 24, 20),
        case("one by one", 1, 1, 1),
        case("all-zero weights", 5, 40, 20, "zeros"),
        case("one non-zero", 5, 40, 20, "one"),
        *(case(f"{w} weights, {x} inputs", 9, 72, 35, w, x) for w, x in _VALUES),
        *(case(name, 8, *NAMED_LAYERS[name]) for name in ("minilm.ffn.up", "bert.ffn.down")),
    ]


_WINDOWS = [
    ImageCase("pointwise", (2, 8, 5, 6), (1, 1)),
    ImageCase("three by three", (2, 8, 7, 9), (3, 3), sides=(1, 1, 1, 1)),
    ImageCase("stem", (1, 3, 23, 21), (7, 7), stride=(2, 2), sides=(3, 3, 3, 3)),
    ImageCase("one channel", (3, 1, 6, 6), (3, 3), sides=(1, 1, 1, 1)),
    ImageCase("odd channels", (1, 7, 6, 5), (2, 3), sides=(0, 1, 1, 1)),
    ImageCase("dilated", (1, 4, 9, 11), (3, 3), dilation=(2, 3), sides=(2, 2, 3, 3)),
    ImageCase("strided and uneven", (2, 5, 9, 8), (3, 2), (2, 3), (1, 2), (1, 0, 2, 1)),
    ImageCase("one pixel", (4, 6, 1, 1), (1, 1)),
    ImageCase("one pixel, padded", (1, 6, 1, 1), (3, 3), sides=(1, 1, 1, 1)),
    ImageCase("padding wider than the kernel", (1, 4, 3, 3), (2, 2), sides=(4, 4, 4, 4)),
    ImageCase("no images", (0, 4, 5, 5), (3, 3)),
    ImageCase("tiles of many images", (11, 5, 7, 7), (3, 3), sides=(1, 1, 1, 1)),
    ImageCase("wide, every second pixel", (1, 3, 9, 141), (3, 3), (2, 2), sides=(1, 1, 1, 1)),
    ImageCase("wide, every third pixel", (2, 1, 5, 100), (2, 3), (1, 3), sides=(0, 0, 5, 5)),
    ImageCase("many pixels", (1, 4, 17, 19), (3, 3), sides=(1, 1, 1, 1)),
    ImageCase("small and deep", (2, 124, 7, 7), (3, 3), sides=(1, 1, 1, 1)),
    ImageCase("every other pixel", (1, 20, 14, 14), (1, 1), stride=(2, 2)),
    ImageCase("halved", (1, 16, 15, 18), (3, 3), stride=(2, 2), sides=(1, 1, 1, 1)),
]

# Of Case, and for what reads images of ImageCase.
CASES: dict[str, list[Any]] = {
    "quantize_rows": [
        *(Case("tiny", m, k, 1) for m, k in enumerate(_TINY_K, 1)),
        *(Case("lengths", 2, k, 1) for k in (15, 18, 32, 47, 48, 49, 63, 65, 100)),
        *(Case("rows", m, 40, 1) for m in (0, 63, 64, 65)),
        Case("long", 3, 70000, 1),
        *(Case(f"{x} inputs", 7, 50, 1, "normal", x) for x in dict.fromkeys(x for _, x in _VALUES)),
    ],
    "gemm_int8": _products(1.0, 1),
    "gemm_w8": _products(1.0, 1),
    "gemm_int4": _products(1.0, 1),
    "spmm": _products(0.1, 1),
    "spmm_int8": _products(0.2, 4),
    "sddmm": _products(0.1, 1),
    "im2col": _WINDOWS,
    "block": _WINDOWS,
    "unblock": _WINDOWS,
    "max_pool": _WINDOWS,
    "mean": _WINDOWS,
    "conv_int8": _WINDOWS,
    "conv_spmm_int8": _WINDOWS,
}
