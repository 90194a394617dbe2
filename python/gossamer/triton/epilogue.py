"""From sums to y: the float operations of csrc/kernels/epilogue.h, in the same order.

No multiply is to be fused with an addition: the launch says so, and what torch.compile launches by
its own rules is within one rounding of it. So is a quotient: PTX's exact division branches for each
element, so that every step keeps a whole tile alive, and 128 x 128 sums spilled 22 registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Adding and subtracting 1.5 * 2^23 rounds to an integer, half to even.
MAGIC = tl.constexpr(12582912.0)


@triton.jit
def divide(a, b):
    """a / b for b >= 1, rounded correctly but for rare last bits: Markstein's two steps.

    `/` is within two units in the last place; what it misses of 1 / b and of a / b is exact in a
    fused multiply-add.
    """
    inverse = 1.0 / b
    inverse = tl.fma(tl.fma(-b, inverse, tl.full(b.shape, 1.0, tl.float32)), inverse, inverse)
    q = a * inverse
    missed = tl.fma(-b, q, a)
    return tl.where(missed == missed, tl.fma(missed, inverse, q), q)  # an infinite a misses NaN


@triton.jit
def exp(x):
    """e^x for x in [-87, 88], clamped to that; NaN stays NaN."""
    x = tl.where(x < -87.0, -87.0, tl.where(x > 88.0, 88.0, x))
    n = (x * 1.44269504 + MAGIC) - MAGIC
    r = (x - n * 0.693359375) - n * -2.12194440e-4
    p = r * (1.0 / 5040) + (1.0 / 720)
    p = p * r + (1.0 / 120)
    p = p * r + (1.0 / 24)
    p = p * r + (1.0 / 6)
    p = p * r + 0.5
    p = p * r + 1.0
    p = p * r + 1.0
    return p * ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def erf(x):
    """Abramowitz and Stegun 7.1.26: absolute error below 1.5e-7."""
    t = divide(tl.full(x.shape, 1.0, tl.float32), 1.0 + 0.3275911 * tl.abs(x))
    p = t * 1.061405429 + -1.453152027
    p = p * t + 1.421413741
    p = p * t + -0.284496736
    p = p * t + 0.254829592
    y = 1.0 - (p * t) * exp(0.0 - x * x)
    return tl.where(x < 0, -y, y)


@triton.jit
def clamp6(y):
    """0 to 6; NaN stays NaN."""
    return tl.where(y < 0, 0.0, tl.where(y > 6, 6.0, y))


@triton.jit
def activate(y, ACTIVATION: tl.constexpr):
    """The activation at that place in `ops.ACTIVATIONS`; NaN stays NaN."""
    if ACTIVATION == 1:
        y = tl.where(y < 0, 0.0, y)
    elif ACTIVATION == 2:
        y = (0.5 * y) * (1.0 + erf(y * 0.707106781))
    elif ACTIVATION == 3:
        y = divide(y, 1.0 + exp(0.0 - y))
    elif ACTIVATION == 4:
        y = clamp6(y)
    elif ACTIVATION == 5:
        y = y * (clamp6(y + 3.0) * (1 / 6))
    return y


@triton.jit
def finish(value, bias, output, n, ACTIVATION: tl.constexpr, BIAS: tl.constexpr):
    """act(value + bias) of a tile (rows, outputs)."""
    if BIAS:
        value = value + tl.load(bias + output, mask=output < n, other=0.0)[None, :]
    if ACTIVATION != 2 and ACTIVATION != 3:
        return activate(value, ACTIVATION)
    # One half of the outputs after the other: the steps of erf and exp hold a number for each sum,
    # 255 registers and 88 to 352 bytes of stack for 128 x 128 at once, 153 to 244 and none so.
    rows: tl.constexpr = value.shape[0]
    half: tl.constexpr = value.shape[1] // 2
    first, second = value.reshape(rows, 2, half).permute(0, 2, 1).split()
    first, second = activate(first, ACTIVATION), activate(second, ACTIVATION)
    return tl.join(first, second).permute(0, 2, 1).reshape(rows, 2 * half)


@triton.jit
def dequantize(sums, x_scale, x_zero, row, m, sharing, scale, wsum, output, n):
    """float(sums - zero * wsum) * (x_scale * scale); sums (rows, outputs) int32.

    `sharing` rows after each other have one scale and zero point. The integers that were summed are
    128 less than x's unsigned bytes, and so is x_zero.
    """
    group = tl.minimum(row, m - 1) // sharing
    own_scale, own_zero = tl.load(x_scale + group), tl.load(x_zero + group)
    weight_sum = tl.load(wsum + output, mask=output < n, other=0)
    weight_scale = tl.load(scale + output, mask=output < n, other=0.0)
    exact = sums - own_zero[:, None] * weight_sum[None, :]
    return exact.to(tl.float32) * (own_scale[:, None] * weight_scale[None, :])
