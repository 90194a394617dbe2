// simd/neon.h: the contract of simd/base.h on 64-bit Arm with the dot product instructions (ARMv8.2).
#pragma once

#include <arm_neon.h>
#include <stdint.h>
#include <string.h>

#include "layout.h"

namespace gossamer {
namespace neon {

constexpr int kLanes = 4;
// 4 rows x 4 vectors of sums, 8 of weights, 4 corrections (see dot), 2 broadcasts: 30 of 32
// registers.
constexpr int kGemmRows = 4;
constexpr int kGemmLastRows = 4;
constexpr int kGemmPanels = 1;
// 3 rows x 4 vectors of integer sums, 8 of weights, 4 corrections, 2 broadcasts: 26 of 32. Not
// measured.
constexpr int kInt4Rows = 3;
constexpr int kInt4Panels = 1;
constexpr int kInt4RowPanels = 1;
// 4 outputs x 4 vectors of sums, 8 of pixels, 2 broadcasts, a correction: 27 of 32. Not measured.
constexpr int kConvVectors = 4;
// 4 tiles x 4 vectors of sums, 4 of weights, a broadcast, a product: 26 of 32.
constexpr int kWinogradRows = 4;
// Kernels::winograd_cost. A product of 16 bits takes as long as four of 8: 36 of them are no fewer.
constexpr WinogradCost kWinogradCost = {1, 0};
// Kernels::wide_k.
constexpr int64_t kWideK = 384;

struct F32 {
  float32x4_t v;
};
struct I32 {
  int32x4_t v;
};

static inline uint32x4_t bits_of(F32 a) { return vreinterpretq_u32_f32(a.v); }
static inline uint32x4_t is_nan(F32 a) { return vmvnq_u32(vceqq_f32(a.v, a.v)); }

// Memory.
static inline F32 load(const float* p) { return {vld1q_f32(p)}; }
static inline F32 load(const BFloat16* p) {
  const uint16x4_t bits = vld1_u16(reinterpret_cast<const uint16_t*>(p));
  return {vreinterpretq_f32_u32(vshll_n_u16(bits, 16))};
}
static inline F32 load(const Float16* p) {
  return {vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p))))};
}
static inline void store(float* p, F32 a) { vst1q_f32(p, a.v); }
static inline void store(BFloat16* p, F32 a) {
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits_of(a), 16), vdupq_n_u32(1));
  const uint32x4_t nearest = vaddq_u32(bits_of(a), vaddq_u32(odd, vdupq_n_u32(0x7fff)));
  const uint32x4_t clean = vbslq_u32(is_nan(a), vdupq_n_u32(0x7fc00000), nearest);
  vst1_u16(reinterpret_cast<uint16_t*>(p), vshrn_n_u32(clean, 16));
}
static inline void store(Float16* p, F32 a) {
  // A NaN keeps no payload, as in base.h.
  const uint32x4_t quiet = vbslq_u32(vdupq_n_u32(0x80000000), bits_of(a), vdupq_n_u32(0x7fc00000));
  const uint32x4_t clean = vbslq_u32(is_nan(a), quiet, bits_of(a));
  vst1_u16(reinterpret_cast<uint16_t*>(p),
           vreinterpret_u16_f16(vcvt_f16_f32(vreinterpretq_f32_u32(clean))));
}
static inline I32 load(const int32_t* p) { return {vld1q_s32(p)}; }
static inline void store(int32_t* p, I32 a) { vst1q_s32(p, a.v); }
// There are no masked loads and stores: through a buffer.
static inline I32 load_at(const int32_t* p, I32 at, I32 where) {
  int32_t buffer[kLanes], places[kLanes], wanted[kLanes];
  store(places, at), store(wanted, where);
  for (int i = 0; i < kLanes; ++i) buffer[i] = wanted[i] ? p[places[i]] : 0;
  return load(buffer);
}
static inline I32 load_where(const int32_t* p, I32 where) {
  constexpr int32_t kPlaces[kLanes] = {0, 1, 2, 3};
  return load_at(p, load(kPlaces), where);
}
template <typename T>
static inline auto load_first(const T* p, int count) {
  T buffer[kLanes] = {};
  memcpy(buffer, p, static_cast<size_t>(count) * sizeof(T));
  return load(buffer);
}
template <typename T>
static inline void store_first(T* p, F32 a, int count) {
  T buffer[kLanes];
  store(buffer, a);
  memcpy(p, buffer, static_cast<size_t>(count) * sizeof(T));
}
static inline void store_first(int32_t* p, I32 a, int count) {
  int32_t buffer[kLanes];
  store(buffer, a);
  memcpy(p, buffer, static_cast<size_t>(count) * 4);
}
static inline void store_bytes(uint8_t* p, I32 a) {
  const uint16x4_t words = vmovn_u32(vreinterpretq_u32_s32(a.v));
  const uint8x8_t bytes = vmovn_u16(vcombine_u16(words, words));
  const uint32_t four = vget_lane_u32(vreinterpret_u32_u8(bytes), 0);
  memcpy(p, &four, 4);
}
static inline I32 load_words(const void* p) {
  return {vreinterpretq_s32_u8(vld1q_u8(static_cast<const uint8_t*>(p)))};
}
static inline I32 load_signed(const int8_t* p) {
  int32_t four;
  memcpy(&four, p, 4);
  return {vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four)))))};
}
static inline I32 set_word(const void* p) {
  int32_t word;
  memcpy(&word, p, 4);
  return {vdupq_n_s32(word)};
}
static inline void prefetch(const void* p) { __builtin_prefetch(p); }

// Arithmetic.
static inline F32 set(float x) { return {vdupq_n_f32(x)}; }
static inline I32 set(int32_t x) { return {vdupq_n_s32(x)}; }
static inline F32 add(F32 a, F32 b) { return {vaddq_f32(a.v, b.v)}; }
static inline F32 sub(F32 a, F32 b) { return {vsubq_f32(a.v, b.v)}; }
static inline F32 mul(F32 a, F32 b) { return {vmulq_f32(a.v, b.v)}; }
static inline F32 div(F32 a, F32 b) { return {vdivq_f32(a.v, b.v)}; }
static inline F32 muladd(F32 a, F32 b, F32 c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
// vmaxq and vminq would return NaN where either is.
static inline F32 max(F32 a, F32 b) { return {vbslq_f32(vcgtq_f32(a.v, b.v), a.v, b.v)}; }
static inline F32 larger(F32 a, F32 b) {
  const uint32x4_t one = vreinterpretq_u32_f32(max(a, b).v),
                   other = vreinterpretq_u32_f32(max(b, a).v);
  return {vreinterpretq_f32_u32(vorrq_u32(one, other))};
}
static inline F32 min(F32 a, F32 b) { return {vbslq_f32(vcltq_f32(a.v, b.v), a.v, b.v)}; }
static inline F32 abs(F32 a) { return {vabsq_f32(a.v)}; }
static inline F32 copysign(F32 a, F32 b) { return {vbslq_f32(vdupq_n_u32(0x80000000), b.v, a.v)}; }
static inline I32 add(I32 a, I32 b) { return {vaddq_s32(a.v, b.v)}; }
static inline I32 sub(I32 a, I32 b) { return {vsubq_s32(a.v, b.v)}; }
static inline I32 mul(I32 a, I32 b) { return {vmulq_s32(a.v, b.v)}; }
static inline I32 shift_right(I32 a, int bits) { return {vshlq_s32(a.v, vdupq_n_s32(-bits))}; }
static inline I32 max(I32 a, I32 b) { return {vmaxq_s32(a.v, b.v)}; }
static inline I32 min(I32 a, I32 b) { return {vminq_s32(a.v, b.v)}; }
static inline F32 to_f32(I32 a) { return {vcvtq_f32_s32(a.v)}; }
static inline I32 round(F32 a) {
  // The conversion alone saturates, and makes 0 of NaN.
  const uint32x4_t fits = vcltq_f32(vabsq_f32(a.v), vdupq_n_f32(0x1p31f));
  return {vbslq_s32(fits, vcvtnq_s32_f32(a.v), vdupq_n_s32(INT32_MIN))};
}
static inline F32 exp2(I32 n) {
  return {vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(n.v, vdupq_n_s32(127)), 23))};
}
template <int kByte>
static inline I32 signed_byte(I32 a) {
  return {vshrq_n_s32(vshlq_n_s32(a.v, 24 - 8 * kByte), 24)};
}
static inline I32 unsigned_byte(I32 a, int byte) {
  return {vandq_s32(vshlq_s32(a.v, vdupq_n_s32(-8 * byte)), vdupq_n_s32(255))};
}
static inline I32 set_twice(int32_t x) {
  return {vreinterpretq_s32_s16(vdupq_n_s16(static_cast<int16_t>(x)))};
}
static inline I32 pack_bytes(I32 a, I32 b, I32 c, I32 d, I32 zero, I32 least) {
  const auto words = [](I32 x) { return vreinterpretq_s16_s32(x.v); };
  const auto pair = [&](I32 low, I32 high) {
    const int16x8_t both = vcombine_s16(vqmovn_s32(low.v), vqmovn_s32(high.v));
    return vqmovun_s16(vmaxq_s16(vqaddq_s16(both, words(zero)), words(least)));
  };
  return {vreinterpretq_s32_u8(vcombine_u8(pair(a, b), pair(c, d)))};
}
static inline I32 pack_bytes(I32 a, I32 b, I32 c, I32 d) {
  const auto pair = [](I32 low, I32 high) {
    return vqmovun_s16(vcombine_s16(vqmovn_s32(low.v), vqmovn_s32(high.v)));
  };
  return {vreinterpretq_s32_u8(vcombine_u8(pair(a, b), pair(c, d)))};
}
static inline I32 in_words(I32 packed) {
  constexpr uint8_t kEach[16] = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
  return {vreinterpretq_s32_u8(vqtbl1q_u8(vreinterpretq_u8_s32(packed.v), vld1q_u8(kEach)))};
}
static inline void interleave(I32 (&l)[4]) {
  const auto bytes = [&](int i) { return vreinterpretq_u8_s32(l[i].v); };
  const uint8x16x2_t ab = vzipq_u8(bytes(0), bytes(1)), cd = vzipq_u8(bytes(2), bytes(3));
  for (int half = 0; half < 2; ++half) {
    const uint16x8x2_t words =
        vzipq_u16(vreinterpretq_u16_u8(ab.val[half]), vreinterpretq_u16_u8(cd.val[half]));
    for (int i = 0; i < 2; ++i) l[2 * half + i].v = vreinterpretq_s32_u16(words.val[i]);
  }
}
static inline I32 max_bytes(I32 a, I32 b) {
  return {vreinterpretq_s32_u8(vmaxq_u8(vreinterpretq_u8_s32(a.v), vreinterpretq_u8_s32(b.v)))};
}

// Across lanes.
static inline float reduce_max(F32 a) { return vmaxvq_f32(a.v); }
static inline float reduce_min(F32 a) { return vminvq_f32(a.v); }
static inline float reduce_add(F32 a) { return vaddvq_f32(a.v); }
static inline F32 as_f32(I32 a) { return {vreinterpretq_f32_s32(a.v)}; }
static inline I32 as_i32(F32 a) { return {vreinterpretq_s32_f32(a.v)}; }
static inline I32 every_other(I32 a, I32 b) {
  return {vcombine_s32(vget_low_s32(vuzp1q_s32(a.v, a.v)), vget_low_s32(vuzp2q_s32(b.v, b.v)))};
}
static inline void transpose(I32 (&r)[kLanes]) {
  // Pairs of 32-bit lanes, then of 64-bit.
  const int32x4x2_t low = vtrnq_s32(r[0].v, r[1].v), high = vtrnq_s32(r[2].v, r[3].v);
  for (int i = 0; i < 2; ++i) {
    r[i].v = vcombine_s32(vget_low_s32(low.val[i]), vget_low_s32(high.val[i]));
    r[i + 2].v = vcombine_s32(vget_high_s32(low.val[i]), vget_high_s32(high.val[i]));
  }
}

// The int8 dot of 32 products. sdot is s8 x s8, so x - 128 (its top bit flipped) stands for x, and
// x . w = (x - 128) . w - (-128) . w, exact because int32 sums wrap. The second term is w's alone:
// the compiler takes it out of a loop over rows.
static inline I32 dot(I32 sum, I32 x0, I32 w0, I32 x1, I32 w1) {
  const int8x16_t flip = vdupq_n_s8(-128);
  const auto bytes = [](I32 a) { return vreinterpretq_s8_s32(a.v); };
  const auto shifted = [&](I32 x) { return veorq_s8(bytes(x), flip); };
  sum.v = vdotq_s32(vdotq_s32(sum.v, shifted(x0), bytes(w0)), shifted(x1), bytes(w1));
  const int32x4_t w_term = vdotq_s32(vdotq_s32(vdupq_n_s32(0), flip, bytes(w0)), flip, bytes(w1));
  return {vsubq_s32(sum.v, w_term)};
}
static inline I32 dot_tight(I32 sum, I32 x0, I32 w0, I32 x1, I32 w1) {
  return dot(sum, x0, w0, x1, w1);
}

static inline I32 dot_halves(I32 sum, I32 x, I32 w) {
  const int16x8_t a = vreinterpretq_s16_s32(x.v), b = vreinterpretq_s16_s32(w.v);
  const int32x4_t low = vmull_s16(vget_low_s16(a), vget_low_s16(b)), high = vmull_high_s16(a, b);
  return {vaddq_s32(sum.v, vpaddq_s32(low, high))};
}

// int4: the table is looked up by each byte.
template <int kNibble>
static inline I32 decode(I32 a) {
  const uint8x16_t bytes = vreinterpretq_u8_s32(a.v);
  const uint8x16_t codes = kNibble ? vshrq_n_u8(bytes, 4) : vandq_u8(bytes, vdupq_n_u8(15));
  return {vreinterpretq_s32_s8(vqtbl1q_s8(vld1q_s8(kInt4Values), codes))};
}

// Four words are a whole vector here.
using F4 = F32;
using I4 = I32;
template <int kCount>
static inline I4 load_quad(const void* p) {
  if (kCount == 4) return load_words(p);
  uint8_t buffer[16] = {};
  memcpy(buffer, p, 4 * kCount);
  return load_words(buffer);
}
template <int kCount>
static inline F4 load_quad(const float* p) {
  return as_f32(load_quad<kCount>(static_cast<const void*>(p)));
}
static inline void store_quad(float* p, F4 a) { store(p, a); }
static inline void store_quad(int32_t* p, I4 a) { store(p, a); }
template <int kCount>
static inline F4 pick_quad(const float* x, const uint8_t* at) {
  float r[4] = {};
  for (int i = 0; i < kCount; ++i) r[i] = x[at[i]];
  return load(r);
}
template <int kCount>
static inline I4 pick_quad(const void* x, const uint8_t* at) {
  return as_i32(pick_quad<kCount>(static_cast<const float*>(x), at));
}
static inline F4 reduce_quad(F32 a, F32 b, F32 c, F32 d) {
  return {vpaddq_f32(vpaddq_f32(a.v, b.v), vpaddq_f32(c.v, d.v))};
}
static inline I4 dot(I4 sum, I4 x, I4 w) { return dot(sum, x, w, set(0), set(0)); }

}  // namespace neon
}  // namespace gossamer
