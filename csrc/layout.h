// layout.h: the constants and small types that packing, kernels and checks share.
#pragma once

#include <stdint.h>

#include "include/gossamer.h"

namespace gossamer {

// Raw bits of the two 16-bit floats; simd/<isa>.h converts them.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
static_assert(sizeof(BFloat16) == 2 && sizeof(Float16) == 2, "views over torch's memory");

// Dense int8 panels hold 16 outputs: one 64-byte line a step of 4 inputs. Inputs are padded to 8,
// so that the two steps whose products share a 16-bit lane (depth 4) are always both there.
constexpr int kPanel = 16;
constexpr int kStep = 8;
// Int4: inputs are padded to this, the largest group that shares a scale.
constexpr int kInt4Step = 32;
// What a nibble stands for: the 16 numbers by which the squared error of groups of normal weights,
// scaled so that the largest becomes -32, is smallest (Lloyd's iteration), rounded; one of them is
// 0. At most 32 in size: the products of four in a 16-bit lane cannot overflow, 255 * 32 * 4 =
// 32640.
constexpr int8_t kInt4Values[16] = {-32, -25, -20, -15, -12, -8, -5, -3,
                                    0,   3,   6,   9,   12,  16, 21, 27};
// 255 * 127 * 65536 < 2^31: an int32 sum cannot overflow.
constexpr int64_t kMaxK = 65536;

// Sparse index. A block's activations, kBlock* columns x 64 (fp32) or 32 (4 x u8) rows, are 24 KB:
// they stay in a 32 KB L1 with room for the entries that stream by. A column fits in a byte.
constexpr int kBlockFloats = 96;
constexpr int kBlockWords = 192;
// A chunk's sums, 512 x 64 fp32 = 128 KB, stay in a 512 KB L2.
constexpr int kMaxChunk = 512;

// What a tile of winograd takes by what conv_int8 does for 16 pixels: tile * (1 + channel * (1 / channels
// + 1 / n)). From 1 on it never pays.
struct WinogradCost {
  double tile, channel;
};

constexpr int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }
static inline int64_t ceil_div(int64_t value, int64_t unit) { return (value + unit - 1) / unit; }

// An even number of chunks of equal size, a multiple of 16: two threads can share one tile of rows.
static inline int64_t chunk_rows(int64_t n) {
  const int64_t pairs = ceil_div(n, 2 * kMaxChunk);
  return round_up(ceil_div(n, 2 * pairs), 16);
}
static inline int64_t chunk_count(int64_t n) { return n == 0 ? 0 : ceil_div(n, chunk_rows(n)); }

static inline int64_t element_size(gossamer_dtype dtype) {
  return dtype == GOSSAMER_FLOAT32 ? 4 : 2;
}

}  // namespace gossamer
