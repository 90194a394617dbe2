// winograd_maps.h: F(4x4, 3x3) in integers (the algorithm: Lavin and Gray, "Fast algorithms for
// convolutional neural networks", 2016).
//
// For 6 x 6 pixels d and 3 x 3 weights g, the 4 x 4 pixels of the convolution are
//
//   Y = A (U * V, summed over channels) A'    with V = B d B' and U = G g G'
//
// where B, G and A are maps of a line, of columns first and then of rows: 36 products for 144. G has
// fractions. Here its rows are 6/4, -6, -6, 24, 24 and 6 times as large: whole numbers, for which A gives
// rows of 24, 12, 6 and 6 times Y: both ways 576, 288, .. 36 times, nine times a power of two.
//
// Numerics: V is at most 17340 in size and U 6223: 16 bits hold them, 32 their products. Sums wrap around
// at 2^32. So does the product with the inverse of 9 modulo 2^32, by which a multiple of 9 is divided; the
// power of two is shifted out. What is left is Y, exactly, where 64 Y fits in an int32: kExactBlocks of four
// channels at most, since of any eight weights (two words) that dot() takes the positive ones add to 256 at
// most, and so do the negative ones.
#pragma once

#include "lanes.h"

namespace gossamer {
namespace GOSSAMER_ISA {

// Output pixels of a tile's line, and the pixels that they see.
constexpr int kOut = 4, kIn = 6, kPositions = kIn * kIn;
constexpr int64_t kExactBlocks = 96;
static_assert(255 * 32 * (9 * 4 * kExactBlocks) * 64 <= INT32_MAX, "64 Y fits");

// Two int16 a lane, anywhere among words.
typedef int16_t I16 __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

static inline const I16& halves(const int32_t* p) { return *reinterpret_cast<const I16*>(p); }
static inline I16& halves(int32_t* p) { return *reinterpret_cast<I16*>(p); }

static inline void store_some(int32_t* p, const I16& value, int count) {
  if (count == kLanes) {
    halves(p) = value;
  } else {
    store_first(p, load(reinterpret_cast<const int32_t*>(&value)), count);
  }
}

// B.
static inline void map_pixels(const I16 (&d)[kIn], I16 (&v)[kIn]) {
  const I16 a = d[4] - (d[2] << 2), b = d[3] - (d[1] << 2), c = d[4] - d[2], e = (d[3] - d[1]) << 1;
  v[0] = ((d[0] - d[2]) << 2) + c;
  v[1] = a + b;
  v[2] = a - b;
  v[3] = c + e;
  v[4] = c - e;
  v[5] = d[5] - d[3] - (e << 1);
}

// G.
static inline void map_weights(const I16& g0, const I16& g1, const I16& g2, I16 (&u)[kIn]) {
  const I16 a = g0 + g2, b = g0 + (g2 << 2), e = g1 << 1;
  u[0] = g0 * 6;
  u[1] = a + g1;
  u[2] = a - g1;
  u[3] = b + e;
  u[4] = b - e;
  u[5] = g2 * 6;
}

// A.
static inline void map_sums(const I32 (&m)[kIn], I32 (&y)[kOut]) {
  const auto twice = [](I32 value) { return add(value, value); };
  const I32 a = add(m[1], m[2]), b = sub(m[1], m[2]), c = add(m[3], m[4]), d = sub(m[3], m[4]);
  y[0] = add(m[0], sub(c, twice(twice(a))));
  y[1] = sub(d, twice(b));
  y[2] = sub(c, a);
  y[3] = add(m[5], sub(twice(d), b));
}

// Y, of what A made of row i and column j both ways.
static inline I32 pixel_of(I32 sum, int i, int j) {
  constexpr int32_t kNinth = 0x38e38e39;  // 9 * kNinth = 1 modulo 2^32
  const int twos = 6 - (i < 2 ? i : 2) - (j < 2 ? j : 2);
  return shift_right(mul(sum, set(kNinth)), twos);
}

}  // namespace GOSSAMER_ISA
}  // namespace gossamer
