"""Which places of a sparse weight hold something, and where: loaded sparse, multiplied dense.

Of 32 neighbouring columns of an output (a column is one input, or a block of four) the bitmap has
two words: a bit for each that is stored, and the entry of the first; the others follow it. So the
entry of a column is that plus the number of bits below its own, and a tile of the dense weight is
one masked load: a tensor core multiplies the zeros for less than it costs to avoid them.

A step of a product is a tile of outputs x inputs. Of a weight in blocks, where less than half of
the blocks of 32 x 32 hold something, the steps of each 32 outputs that do are listed, and a loop
over the list knows no other. `packed.index` makes bitmap and list when a weight moves to a GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gossamer.packed.index import BLOCK as BLOCK


@triton.jit
def count_bits(v):
    """How many bits of a uint32 are set; the form that LLVM knows as one instruction."""
    v = v - ((v >> 1) & 0x55555555)
    v = (v & 0x33333333) + ((v >> 2) & 0x33333333)
    v = (v + (v >> 4)) & 0x0F0F0F0F
    return ((v * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def find(bits, bit):
    """Whether that bit (0 .. 31) is set in bits (int32), and how many below it are."""
    word = bits.to(tl.uint32, bitcast=True)
    one = (tl.full((1, 1), 1, tl.uint32) << bit.to(tl.uint32)).to(tl.uint32)
    return (word & one) != 0, count_bits(word & (one - 1))


@triton.jit
def span(steps, output, words, OUTPUTS: tl.constexpr, LISTED: tl.constexpr):
    """The first of a tile's steps and the one behind its last: in the list, or of all words."""
    if LISTED:
        group = tl.min(output, 0) // OUTPUTS
        return tl.load(steps + group), tl.load(steps + group + 1)
    else:
        return 0, words


@triton.jit
def step_at(steps, place, LISTED: tl.constexpr):
    """Which inputs a step is about: its first one, over their number."""
    if LISTED:
        return tl.load(steps + place)
    else:
        return place
