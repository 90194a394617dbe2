// simd/avx512vnni.h: the contract of simd/base.h on AVX-512 (F, BW, DQ, VL) with VNNI.
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "layout.h"
#include "simd/quad.h"

namespace gossamer {
namespace avx512vnni {

constexpr int kLanes = 16;
// 6 rows x 2 panels of sums, 4 of weights, 2 broadcasts: 18 of 32 registers. 8 rows fit too, but
// gcc 12 then spills in the loop: 4.1 ms where this takes 3.6 (1024 rows, 384 -> 1536).
constexpr int kGemmRows = 6;
// 7 or 8 rows at the end go in one tile all the same: they read each panel once, and there memory
// bounds.
constexpr int kGemmLastRows = 8;
constexpr int kGemmPanels = 2;
// 6 rows x 2 panels of integer sums and of float sums, 4 of weights, 2 broadcasts: 30 of 32.
constexpr int kInt4Rows = 6;
constexpr int kInt4Panels = 2;
constexpr int kInt4RowPanels = 4;
// 4 outputs x 4 vectors of sums, 8 of pixels, 2 broadcasts: 26 of 32 registers. Where a core starts two
// vpdpbusd a cycle (Zen 5), 2 vectors are too few sums to hide their latency: ResNet-50's layers
// take 12.1 ms so, and 10.1 with 4.
constexpr int kConvVectors = 4;
// 12 tiles x 2 vectors of sums, 2 of weights: 26 of 32 registers.
constexpr int kWinogradRows = 12;
// Kernels::winograd_cost.
constexpr WinogradCost kWinogradCost = {0.58, 10};
// Kernels::wide_k.
constexpr int64_t kWideK = kMaxK;

struct F32 {
  __m512 v;
};
struct I32 {
  __m512i v;
};

static inline __mmask16 first(int count) { return static_cast<__mmask16>((1u << count) - 1); }

// Memory.
static inline F32 widen(__m256i bits, BFloat16) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}
static inline F32 widen(__m256i bits, Float16) { return {_mm512_cvtph_ps(bits)}; }
static inline __m256i narrow(F32 a, BFloat16) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i nearest = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  const __m512i clean = _mm512_mask_mov_epi32(nearest, nan, _mm512_set1_epi32(0x7fc00000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(clean, 16));
}
static inline __m256i narrow(F32 a, Float16) {
  // A NaN keeps no payload, as in base.h.
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  const __m512i sign = _mm512_and_si512(_mm512_castps_si512(a.v), _mm512_set1_epi32(INT32_MIN));
  const __m512i quiet = _mm512_or_si512(sign, _mm512_set1_epi32(0x7fc00000));
  return _mm512_cvtps_ph(_mm512_mask_mov_ps(a.v, nan, _mm512_castsi512_ps(quiet)),
                         _MM_FROUND_TO_NEAREST_INT);
}

static inline F32 load(const float* p) { return {_mm512_loadu_ps(p)}; }
static inline F32 load_first(const float* p, int count) {
  return {_mm512_maskz_loadu_ps(first(count), p)};
}
static inline void store(float* p, F32 a) { _mm512_storeu_ps(p, a.v); }
static inline void store_first(float* p, F32 a, int count) {
  _mm512_mask_storeu_ps(p, first(count), a.v);
}
template <typename T>
static inline F32 load(const T* p) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), T());
}
template <typename T>
static inline F32 load_first(const T* p, int count) {
  return widen(_mm256_maskz_loadu_epi16(first(count), p), T());
}
template <typename T>
static inline void store(T* p, F32 a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(a, T()));
}
template <typename T>
static inline void store_first(T* p, F32 a, int count) {
  _mm256_mask_storeu_epi16(p, first(count), narrow(a, T()));
}
static inline I32 load(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
static inline I32 load_first(const int32_t* p, int count) {
  return {_mm512_maskz_loadu_epi32(first(count), p)};
}
static inline I32 load_where(const int32_t* p, I32 where) {
  return {_mm512_maskz_loadu_epi32(_mm512_movepi32_mask(where.v), p)};
}
static inline I32 load_at(const int32_t* p, I32 at, I32 where) {
  return {_mm512_mask_i32gather_epi32(_mm512_setzero_si512(), _mm512_movepi32_mask(where.v), at.v,
                                      p, 4)};
}
static inline void store(int32_t* p, I32 a) { _mm512_storeu_si512(p, a.v); }
static inline void store_first(int32_t* p, I32 a, int count) {
  _mm512_mask_storeu_epi32(p, first(count), a.v);
}
static inline void store_bytes(uint8_t* p, I32 a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v));
}
static inline I32 load_words(const void* p) { return {_mm512_loadu_si512(p)}; }
static inline I32 set_word(const void* p) {
  int32_t word;
  memcpy(&word, p, 4);
  return {_mm512_set1_epi32(word)};
}
static inline I32 load_signed(const int8_t* p) {
  return {_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
static inline void prefetch(const void* p) {
  _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0);
}

// Arithmetic.
static inline F32 set(float x) { return {_mm512_set1_ps(x)}; }
static inline I32 set(int32_t x) { return {_mm512_set1_epi32(x)}; }
static inline F32 add(F32 a, F32 b) { return {_mm512_add_ps(a.v, b.v)}; }
static inline F32 sub(F32 a, F32 b) { return {_mm512_sub_ps(a.v, b.v)}; }
static inline F32 mul(F32 a, F32 b) { return {_mm512_mul_ps(a.v, b.v)}; }
static inline F32 div(F32 a, F32 b) { return {_mm512_div_ps(a.v, b.v)}; }
static inline F32 muladd(F32 a, F32 b, F32 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
static inline F32 max(F32 a, F32 b) { return {_mm512_max_ps(a.v, b.v)}; }
static inline F32 larger(F32 a, F32 b) { return {_mm512_or_ps(max(a, b).v, max(b, a).v)}; }
static inline F32 min(F32 a, F32 b) { return {_mm512_min_ps(a.v, b.v)}; }
static inline F32 abs(F32 a) { return {_mm512_abs_ps(a.v)}; }
static inline F32 copysign(F32 a, F32 b) {
  return {_mm512_or_ps(_mm512_abs_ps(a.v), _mm512_and_ps(_mm512_set1_ps(-0.0f), b.v))};
}
static inline I32 add(I32 a, I32 b) { return {_mm512_add_epi32(a.v, b.v)}; }
static inline I32 sub(I32 a, I32 b) { return {_mm512_sub_epi32(a.v, b.v)}; }
static inline I32 mul(I32 a, I32 b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
static inline I32 shift_right(I32 a, int bits) {
  return {_mm512_srai_epi32(a.v, static_cast<unsigned>(bits))};
}
static inline I32 max(I32 a, I32 b) { return {_mm512_max_epi32(a.v, b.v)}; }
static inline I32 min(I32 a, I32 b) { return {_mm512_min_epi32(a.v, b.v)}; }
static inline F32 to_f32(I32 a) { return {_mm512_cvtepi32_ps(a.v)}; }
static inline I32 round(F32 a) { return {_mm512_cvtps_epi32(a.v)}; }
static inline F32 exp2(I32 n) {
  return {
      _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(n.v, _mm512_set1_epi32(127)), 23))};
}
template <int kByte>
static inline I32 signed_byte(I32 a) {
  return {_mm512_srai_epi32(_mm512_slli_epi32(a.v, 24 - 8 * kByte), 24)};
}
static inline I32 unsigned_byte(I32 a, int byte) {
  // 0x80 takes no byte, but a zero.
  const int32_t first = INT32_MIN + 0x808000 + byte;
  const __m128i words = _mm_setr_epi32(first, first + 4, first + 8, first + 12);
  return {_mm512_shuffle_epi8(a.v, _mm512_broadcast_i32x4(words))};
}
static inline I32 set_twice(int32_t x) { return {_mm512_set1_epi16(static_cast<int16_t>(x))}; }
static inline I32 pack_bytes(I32 a, I32 b, I32 c, I32 d, I32 zero, I32 least) {
  const auto pair = [&](I32 low, I32 high) {
    return _mm512_max_epi16(_mm512_adds_epi16(_mm512_packs_epi32(low.v, high.v), zero.v), least.v);
  };
  return {_mm512_packus_epi16(pair(a, b), pair(c, d))};
}
static inline I32 pack_bytes(I32 a, I32 b, I32 c, I32 d) {
  return {_mm512_packus_epi16(_mm512_packs_epi32(a.v, b.v), _mm512_packs_epi32(c.v, d.v))};
}
static inline I32 in_words(I32 packed) {
  const __m128i each = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return {_mm512_shuffle_epi8(packed.v, _mm512_broadcast_i32x4(each))};
}
static inline void interleave(I32 (&l)[4]) {
  const __m512i low01 = _mm512_unpacklo_epi8(l[0].v, l[1].v),
                high01 = _mm512_unpackhi_epi8(l[0].v, l[1].v),
                low23 = _mm512_unpacklo_epi8(l[2].v, l[3].v),
                high23 = _mm512_unpackhi_epi8(l[2].v, l[3].v);
  l[0].v = _mm512_unpacklo_epi16(low01, low23);
  l[1].v = _mm512_unpackhi_epi16(low01, low23);
  l[2].v = _mm512_unpacklo_epi16(high01, high23);
  l[3].v = _mm512_unpackhi_epi16(high01, high23);
}
static inline I32 max_bytes(I32 a, I32 b) { return {_mm512_max_epu8(a.v, b.v)}; }

// Across lanes.
static inline float reduce_max(F32 a) { return _mm512_reduce_max_ps(a.v); }
static inline float reduce_min(F32 a) { return _mm512_reduce_min_ps(a.v); }
static inline float reduce_add(F32 a) { return _mm512_reduce_add_ps(a.v); }
static inline F32 as_f32(I32 a) { return {_mm512_castsi512_ps(a.v)}; }
static inline I32 as_i32(F32 a) { return {_mm512_castps_si512(a.v)}; }
static inline I32 every_other(I32 a, I32 b) {
  const __m512i lanes =
      _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 17, 19, 21, 23, 25, 27, 29, 31);
  return {_mm512_permutex2var_epi32(a.v, lanes, b.v)};
}
static inline void transpose(I32 (&r)[kLanes]) {
  // Pairs of 32-bit lanes, then of 64-bit, then of 128-bit quarters twice.
  __m512i t[16], u[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i].v, r[i + 1].v);
    t[i + 1] = _mm512_unpackhi_epi32(r[i].v, r[i + 1].v);
  }
  for (int i = 0; i < 16; i += 4) {
    u[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    u[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    u[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    u[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    const __m512i low0 = _mm512_shuffle_i32x4(u[i], u[i + 4], 0x88),
                  low1 = _mm512_shuffle_i32x4(u[i + 8], u[i + 12], 0x88);
    const __m512i high0 = _mm512_shuffle_i32x4(u[i], u[i + 4], 0xdd);
    const __m512i high1 = _mm512_shuffle_i32x4(u[i + 8], u[i + 12], 0xdd);
    r[i].v = _mm512_shuffle_i32x4(low0, low1, 0x88);
    r[i + 8].v = _mm512_shuffle_i32x4(low0, low1, 0xdd);
    r[i + 4].v = _mm512_shuffle_i32x4(high0, high1, 0x88);
    r[i + 12].v = _mm512_shuffle_i32x4(high0, high1, 0xdd);
  }
}

// The int8 dot of 128 products: two vpdpbusd.
static inline I32 dot(I32 sum, I32 x0, I32 w0, I32 x1, I32 w1) {
  return {_mm512_dpbusd_epi32(_mm512_dpbusd_epi32(sum.v, x0.v, w0.v), x1.v, w1.v)};
}
static inline I32 dot_tight(I32 sum, I32 x0, I32 w0, I32 x1, I32 w1) {
  return dot(sum, x0, w0, x1, w1);
}

static inline I32 dot_halves(I32 sum, I32 x, I32 w) {
  return {_mm512_dpwssd_epi32(sum.v, x.v, w.v)};
}

static inline I4 dot(I4 sum, I4 x, I4 w) { return {_mm_dpbusd_epi32(sum.v, x.v, w.v)}; }

// Pairs of lanes, of pairs, then halves and quarters.
static inline F4 reduce_quad(F32 a, F32 b, F32 c, F32 d) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a.v, b.v), _mm512_unpackhi_ps(a.v, b.v));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c.v, d.v), _mm512_unpackhi_ps(c.v, d.v));
  const __m512 quads =
      _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  const __m256 upper = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(quads), 1));
  const __m256 pair = _mm256_add_ps(_mm512_castps512_ps256(quads), upper);
  return {_mm_add_ps(_mm256_castps256_ps128(pair), _mm256_extractf128_ps(pair, 1))};
}

// int4: the table is looked up by each byte's low half, in 16 bytes at a time.
template <int kNibble>
static inline I32 decode(I32 a) {
  const __m512i table =
      _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(kInt4Values)));
  return {_mm512_shuffle_epi8(
      table, _mm512_and_si512(_mm512_srli_epi16(a.v, 4 * kNibble), _mm512_set1_epi8(15)))};
}

}  // namespace avx512vnni
}  // namespace gossamer
