// simd/base.h: the contract that every simd/<isa>.h keeps, in plain C++.
//
// F32 and I32 are vectors of kLanes floats and int32. A kernel written against these functions
// gives the same bits on every Isa, because each function is one correctly rounded operation a
// lane; the two exceptions say so.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "layout.h"

namespace gossamer {
namespace base {

constexpr int kLanes = 8;
// Tile of gemm_int8: rows x panels whose sums stay in registers.
constexpr int kGemmRows = 4;
constexpr int kGemmLastRows = 4;
constexpr int kGemmPanels = 1;
// Tile of gemm_int4, and the panels of a tile of one row.
constexpr int kInt4Rows = 4;
constexpr int kInt4Panels = 1;
constexpr int kInt4RowPanels = 1;
// Tile of conv_int8: four outputs x this many vectors of pixels.
constexpr int kConvVectors = 2;
// Tiles of winograd whose sums stay in registers, with two vectors of outputs.
constexpr int kWinogradRows = 2;
// Kernels::winograd_cost: as measured, like those of the other Isas.
constexpr WinogradCost kWinogradCost = {0.2, 5};
// Kernels::wide_k.
constexpr int64_t kWideK = 384;

struct F32 {
  float v[kLanes];
};
struct I32 {
  int32_t v[kLanes];
};

template <typename V, typename Op>
static inline V each(Op op) {
  V r;
  for (int i = 0; i < kLanes; ++i) r.v[i] = op(i);
  return r;
}

template <typename To, typename From>
static inline To cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}
static inline float from_bits(uint32_t bits) { return cast<float>(bits); }
static inline uint32_t to_bits(float f) { return cast<uint32_t>(f); }

static inline float widen(float x) { return x; }
static inline float widen(BFloat16 x) { return from_bits(uint32_t(x.bits) << 16); }
static inline float widen(Float16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
  if (rest >= 0x7c00) return from_bits(sign | 0x7f800000 | (rest & 0x3ff) << 13);  // Inf, NaN
  // Without arithmetic on denormals, which the caller may have told the CPU to flush.
  if (rest < 0x400) return from_bits(sign | to_bits(float(rest) * 0x1p-24f));
  return from_bits(sign | ((rest << 13) + (112u << 23)));
}

// Round to nearest, ties to even; NaN stays a quiet NaN.
static inline void narrow(float x, float* y) { *y = x; }
static inline void narrow(float x, BFloat16* y) {
  const uint32_t b = to_bits(x);
  y->bits = uint16_t((b & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (b + 0x7fff + (b >> 16 & 1)) >> 16);
}
static inline void narrow(float x, Float16* y) {
  const uint32_t b = to_bits(x), sign = b >> 16 & 0x8000, rest = b & 0x7fffffff;
  if (rest > 0x7f800000) {
    y->bits = uint16_t(sign | 0x7e00);
  } else if (rest >= 0x477ff000) {  // 65520 and more round to infinity
    y->bits = uint16_t(sign | 0x7c00);
  } else if (rest < 0x38800000) {  // denormal half: adding 0.5 aligns the last bit to 2^-24
    y->bits = uint16_t(sign | (to_bits(from_bits(rest) + 0.5f) - 0x3f000000));
  } else {
    y->bits = uint16_t(sign | (rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13);
  }
}

// Memory: T is float, BFloat16 or Float16; `count` < kLanes reads or writes only the first lanes.
template <typename T>
static inline F32 load(const T* p) {
  return each<F32>([&](int i) { return widen(p[i]); });
}
template <typename T>
static inline F32 load_first(const T* p, int count) {
  return each<F32>([&](int i) { return i < count ? widen(p[i]) : 0.0f; });
}
template <typename T>
static inline void store(T* p, F32 a) {
  for (int i = 0; i < kLanes; ++i) narrow(a.v[i], p + i);
}
template <typename T>
static inline void store_first(T* p, F32 a, int count) {
  for (int i = 0; i < count; ++i) narrow(a.v[i], p + i);
}
static inline I32 load(const int32_t* p) {
  return each<I32>([&](int i) { return p[i]; });
}
static inline I32 load_first(const int32_t* p, int count) {
  return each<I32>([&](int i) { return i < count ? p[i] : 0; });
}
// The lanes where `where` is -1; the others, where it is 0, are 0 and not read.
static inline I32 load_where(const int32_t* p, I32 where) {
  return each<I32>([&](int i) { return where.v[i] ? p[i] : 0; });
}
// Likewise the words p[at].
static inline I32 load_at(const int32_t* p, I32 at, I32 where) {
  return each<I32>([&](int i) { return where.v[i] ? p[at.v[i]] : 0; });
}
static inline void store(int32_t* p, I32 a) { memcpy(p, a.v, sizeof a); }
static inline void store_first(int32_t* p, I32 a, int count) {
  memcpy(p, a.v, static_cast<size_t>(count) * 4);
}
// Lanes 0..255 as bytes.
static inline void store_bytes(uint8_t* p, I32 a) {
  for (int i = 0; i < kLanes; ++i) p[i] = uint8_t(a.v[i]);
}
// kLanes words of four bytes; one word in all lanes.
static inline I32 load_words(const void* p) {
  I32 r;
  memcpy(&r, p, sizeof r);
  return r;
}
static inline I32 set_word(const void* p) {
  int32_t word;
  memcpy(&word, p, 4);
  return each<I32>([&](int) { return word; });
}
// kLanes bytes.
static inline I32 load_signed(const int8_t* p) {
  return each<I32>([&](int i) { return p[i]; });
}
// Hint: the line at p is read soon.
static inline void prefetch(const void*) {}

// Arithmetic.
static inline F32 set(float x) {
  return each<F32>([&](int) { return x; });
}
static inline I32 set(int32_t x) {
  return each<I32>([&](int) { return x; });
}
static inline F32 add(F32 a, F32 b) {
  return each<F32>([&](int i) { return a.v[i] + b.v[i]; });
}
static inline F32 sub(F32 a, F32 b) {
  return each<F32>([&](int i) { return a.v[i] - b.v[i]; });
}
static inline F32 mul(F32 a, F32 b) {
  return each<F32>([&](int i) { return a.v[i] * b.v[i]; });
}
static inline F32 div(F32 a, F32 b) {
  return each<F32>([&](int i) { return a.v[i] / b.v[i]; });
}
// a * b + c, rounded once or twice, as the Isa does best: the first exception. For fp32 sums only.
static inline F32 muladd(F32 a, F32 b, F32 c) {
  return each<F32>([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}
// The second operand where either is NaN.
static inline F32 max(F32 a, F32 b) {
  return each<F32>([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
// NaN where either is: the bits of max(a, b) and of max(b, a) joined.
static inline F32 larger(F32 a, F32 b) {
  const F32 one = max(a, b), other = max(b, a);
  return each<F32>([&](int i) { return from_bits(to_bits(one.v[i]) | to_bits(other.v[i])); });
}
static inline F32 min(F32 a, F32 b) {
  return each<F32>([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
static inline F32 abs(F32 a) {
  return each<F32>([&](int i) { return fabsf(a.v[i]); });
}
// The magnitude of a with the sign of b.
static inline F32 copysign(F32 a, F32 b) {
  return each<F32>([&](int i) { return copysignf(a.v[i], b.v[i]); });
}
static inline I32 add(I32 a, I32 b) {
  return each<I32>([&](int i) { return int32_t(uint32_t(a.v[i]) + uint32_t(b.v[i])); });
}
static inline I32 sub(I32 a, I32 b) {
  return each<I32>([&](int i) { return int32_t(uint32_t(a.v[i]) - uint32_t(b.v[i])); });
}
static inline I32 mul(I32 a, I32 b) {
  return each<I32>([&](int i) { return int32_t(uint32_t(a.v[i]) * uint32_t(b.v[i])); });
}
// By 0 to 31; the sign stays.
static inline I32 shift_right(I32 a, int bits) {
  return each<I32>([&](int i) { return a.v[i] >> bits; });
}
static inline I32 max(I32 a, I32 b) {
  return each<I32>([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
static inline I32 min(I32 a, I32 b) {
  return each<I32>([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
static inline F32 to_f32(I32 a) {
  return each<F32>([&](int i) { return float(a.v[i]); });
}
// To the nearest integer, ties to even; what is NaN or outside int32 becomes INT32_MIN.
static inline I32 round(F32 a) {
  return each<I32>(
      [&](int i) { return fabsf(a.v[i]) < 0x1p31f ? int32_t(nearbyintf(a.v[i])) : INT32_MIN; });
}
// 2^n for -126 <= n <= 127.
static inline F32 exp2(I32 n) {
  return each<F32>([&](int i) { return from_bits(uint32_t(n.v[i] + 127) << 23); });
}
// Byte kByte of each word, as a signed number.
template <int kByte>
static inline I32 signed_byte(I32 a) {
  return each<I32>([&](int i) { return int32_t(int8_t(uint32_t(a.v[i]) >> 8 * kByte)); });
}
static inline I32 unsigned_byte(I32 a, int byte) {
  return each<I32>([&](int i) { return int32_t(uint8_t(uint32_t(a.v[i]) >> 8 * byte)); });
}
// A number of 16 bits twice in each lane: what pack_bytes adds and compares.
static inline I32 set_twice(int32_t x) { return set((x & 0xffff) | int32_t(uint32_t(x) << 16)); }
// max(x + zero, least) of four vectors, clamped to 0..255; in an order of the Isa's own, which the
// next two know. zero and least, of set_twice, are 0..255.
static inline I32 pack_bytes(I32 a, I32 b, I32 c, I32 d, I32 zero, I32 least) {
  const auto byte = [&](int32_t x, int i) {
    const int64_t sum = int64_t(x) + int16_t(zero.v[i]), low = int16_t(least.v[i]);
    return uint32_t(sum < low ? low : sum > 255 ? 255 : sum);
  };
  return each<I32>([&](int i) {
    return int32_t(byte(a.v[i], i) | byte(b.v[i], i) << 8 | byte(c.v[i], i) << 16 |
                   byte(d.v[i], i) << 24);
  });
}
// The same where zero and least are 0.
static inline I32 pack_bytes(I32 a, I32 b, I32 c, I32 d) {
  return pack_bytes(a, b, c, d, set(0), set(0));
}
// Lane i: bytes i of the four vectors that were packed.
static inline I32 in_words(I32 packed) { return packed; }
// In place, four packed lines of four vectors each -> vector j of all lines, as words: lane i has byte
// i of vector j of lines 0, 1, 2 and 3.
static inline void interleave(I32 (&lines)[4]) {
  I32 words[4];
  for (int j = 0; j < 4; ++j) {
    words[j] = each<I32>([&](int i) {
      uint32_t word = 0;
      for (int o = 0; o < 4; ++o) word |= (uint32_t(lines[o].v[i]) >> 8 * j & 255) << 8 * o;
      return int32_t(word);
    });
  }
  memcpy(lines, words, sizeof words);
}
// The larger of each two unsigned bytes.
static inline I32 max_bytes(I32 a, I32 b) {
  return each<I32>([&](int i) {
    uint32_t word = 0;
    for (int bit = 0; bit < 32; bit += 8) {
      const uint32_t x = uint32_t(a.v[i]) >> bit & 255, y = uint32_t(b.v[i]) >> bit & 255;
      word |= (x > y ? x : y) << bit;
    }
    return int32_t(word);
  });
}

// Across lanes.
static inline float reduce_max(F32 a) {
  float r = a.v[0];
  for (int i = 1; i < kLanes; ++i) r = a.v[i] > r ? a.v[i] : r;
  return r;
}
static inline float reduce_min(F32 a) {
  float r = a.v[0];
  for (int i = 1; i < kLanes; ++i) r = a.v[i] < r ? a.v[i] : r;
  return r;
}
// NaN when a lane is NaN; the order of the sum is the Isa's own: the second exception.
static inline float reduce_add(F32 a) {
  float r = 0;
  for (int i = 0; i < kLanes; ++i) r += a.v[i];
  return r;
}
// In place: row i, lane j <-> row j, lane i.
static inline void transpose(I32 (&rows)[kLanes]) {
  for (int i = 0; i < kLanes; ++i) {
    for (int j = 0; j < i; ++j) {
      const int32_t t = rows[i].v[j];
      rows[i].v[j] = rows[j].v[i];
      rows[j].v[i] = t;
    }
  }
}
static inline F32 as_f32(I32 a) { return cast<F32>(a); }
static inline I32 as_i32(F32 a) { return cast<I32>(a); }
// Lanes 0, 2, ... of a, then lanes 1, 3, ... of b.
static inline I32 every_other(I32 a, I32 b) {
  return each<I32>([&](int i) { return i < kLanes / 2 ? a.v[2 * i] : b.v[2 * i + 1 - kLanes]; });
}

// x . w of four u8 and four s8.
static inline int32_t dot(int32_t x, int32_t w) {
  int32_t sum = 0;
  for (int bit = 0; bit < 32; bit += 8)
    sum += int32_t(uint8_t(uint32_t(x) >> bit)) * int8_t(uint32_t(w) >> bit);
  return sum;
}
// The int8 dot: sum + x0 . w0 + x1 . w1 a lane, x four u8 and w four s8. Packing has made sure that
// the products of bytes (0, 1) of both words together fit in int16, and those of bytes (2, 3): Isas
// without a 4-way dot add them there.
static inline I32 dot(I32 sum, I32 x0, I32 w0, I32 x1, I32 w1) {
  return each<I32>([&](int i) { return sum.v[i] + dot(x0.v[i], w0.v[i]) + dot(x1.v[i], w1.v[i]); });
}
// The same in as few registers as an Isa knows how: for loops that have none to spare.
static inline I32 dot_tight(I32 sum, I32 x0, I32 w0, I32 x1, I32 w1) {
  return dot(sum, x0, w0, x1, w1);
}

// sum + x . w a lane, of two int16 each; sums wrap around.
static inline I32 dot_halves(I32 sum, I32 x, I32 w) {
  return each<I32>([&](int i) {
    const int32_t low = int16_t(x.v[i]) * int16_t(w.v[i]), high = (x.v[i] >> 16) * (w.v[i] >> 16);
    return int32_t(uint32_t(sum.v[i]) + uint32_t(low) + uint32_t(high));
  });
}

// Four words, for a product of one row: it has no rows to fill lanes with. kCount < 4 fills the first
// ones, the others are 0.
struct F4 {
  float v[4];
};
struct I4 {
  int32_t v[4];
};
template <int kCount>
static inline F4 load_quad(const float* p) {
  F4 r = {};
  memcpy(r.v, p, kCount * 4);
  return r;
}
template <int kCount>
static inline I4 load_quad(const void* p) {
  I4 r = {};
  memcpy(r.v, p, kCount * 4);
  return r;
}
static inline void store_quad(float* p, F4 a) { memcpy(p, a.v, sizeof a); }
static inline void store_quad(int32_t* p, I4 a) { memcpy(p, a.v, sizeof a); }
// The words at[0], at[1], .. of x.
template <int kCount>
static inline F4 pick_quad(const float* x, const uint8_t* at) {
  F4 r = {};
  for (int i = 0; i < kCount; ++i) r.v[i] = x[at[i]];
  return r;
}
template <int kCount>
static inline I4 pick_quad(const void* x, const uint8_t* at) {
  I4 r = {};
  for (int i = 0; i < kCount; ++i) memcpy(r.v + i, static_cast<const char*>(x) + 4 * at[i], 4);
  return r;
}
// As muladd, and as dot for one word each; the words of packed weights may sum their products in 16
// bits.
static inline F4 muladd(F4 a, F4 b, F4 c) {
  for (int i = 0; i < 4; ++i) c.v[i] = a.v[i] * b.v[i] + c.v[i];
  return c;
}
static inline I4 dot(I4 sum, I4 x, I4 w) {
  for (int i = 0; i < 4; ++i) sum.v[i] += dot(x.v[i], w.v[i]);
  return sum;
}

static inline F4 add(F4 a, F4 b) {
  for (int i = 0; i < 4; ++i) a.v[i] += b.v[i];
  return a;
}
// The sums of the lanes of a, b, c and d, each as reduce_add.
static inline F4 reduce_quad(F32 a, F32 b, F32 c, F32 d) {
  return {{reduce_add(a), reduce_add(b), reduce_add(c), reduce_add(d)}};
}

// The int4 weights behind the low (0) or high (1) nibble of each byte. They are small enough for
// dot() whatever their order.
template <int kNibble>
static inline I32 decode(I32 a) {
  return each<I32>([&](int i) {
    uint32_t word = 0;
    for (int bit = 0; bit < 32; bit += 8)
      word |= uint32_t(uint8_t(kInt4Values[uint32_t(a.v[i]) >> (bit + 4 * kNibble) & 15])) << bit;
    return int32_t(word);
  });
}

}  // namespace base
}  // namespace gossamer
