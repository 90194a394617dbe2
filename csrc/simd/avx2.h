// simd/avx2.h: the contract of simd/base.h on AVX2, FMA and F16C, compiled twice: avxvnni differs in
// the int8 dot, for which it has an instruction.
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "layout.h"
#include "simd/quad.h"

namespace gossamer {
namespace GOSSAMER_ISA {

constexpr int kLanes = 8;
// 3 rows x 2 vectors of sums, 4 of weights, 2 broadcasts, 2 products, ones: 15 of 16 registers.
// avxvnni needs neither products nor ones; whether a fourth row pays there was not measured.
constexpr int kGemmRows = 3;
constexpr int kGemmLastRows = 3;
constexpr int kGemmPanels = 1;
// 4 rows x 2 vectors of integer sums, 4 of weights, 2 broadcasts, 2 products: 16. The float sums stay
// in L1: a sum is needed once in 2 or 4 dots.
constexpr int kInt4Rows = 4;
constexpr int kInt4Panels = 1;
constexpr int kInt4RowPanels = 2;
// 4 outputs x 2 vectors of sums, 4 of pixels, 2 broadcasts, a product, ones: 16 registers. gcc 12
// stores five sums a turn: without that it takes the same time, with one vector 1.3 times as long.
constexpr int kConvVectors = 2;
// 6 tiles x 2 vectors of sums, 2 of weights, a broadcast, a product: 16 registers.
constexpr int kWinogradRows = 6;
// Kernels::winograd_cost.
#ifdef __AVXVNNI__
constexpr WinogradCost kWinogradCost = {0.5, 5};
#else
constexpr WinogradCost kWinogradCost = {0.42, 5};
#endif
// Kernels::wide_k.
constexpr int64_t kWideK = 640;

struct F32 {
  __m256 v;
};
struct I32 {
  __m256i v;
};

// Ones in the first `count` lanes.
static inline __m256i first(int count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

// Memory.
static inline F32 load(const float* p) { return {_mm256_loadu_ps(p)}; }
static inline F32 load(const BFloat16* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
}
static inline F32 load(const Float16* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
static inline F32 load_first(const float* p, int count) {
  return {_mm256_maskload_ps(p, first(count))};
}
// 16-bit elements have no masked load on AVX2: through a buffer.
template <typename T>
static inline F32 load_first(const T* p, int count) {
  T buffer[kLanes] = {};
  memcpy(buffer, p, size_t(count) * sizeof(T));
  return load(buffer);
}
static inline void store(float* p, F32 a) { _mm256_storeu_ps(p, a.v); }
static inline void store(BFloat16* p, F32 a) {
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i nearest = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  const __m256i high =
      _mm256_srli_epi32(_mm256_blendv_epi8(nearest, _mm256_set1_epi32(0x7fc00000), nan), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
static inline void store(Float16* p, F32 a) {
  // A NaN keeps no payload, as in base.h.
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  const __m256i quiet =
      _mm256_or_si256(_mm256_and_si256(_mm256_castps_si256(a.v), _mm256_set1_epi32(INT32_MIN)),
                      _mm256_set1_epi32(0x7fc00000));
  const __m256 clean = _mm256_blendv_ps(a.v, _mm256_castsi256_ps(quiet), _mm256_castsi256_ps(nan));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph(clean, _MM_FROUND_TO_NEAREST_INT));
}
static inline void store_first(float* p, F32 a, int count) {
  _mm256_maskstore_ps(p, first(count), a.v);
}
template <typename T>
static inline void store_first(T* p, F32 a, int count) {
  T buffer[kLanes];
  store(buffer, a);
  memcpy(p, buffer, size_t(count) * sizeof(T));
}
static inline I32 load(const int32_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))};
}
static inline I32 load_first(const int32_t* p, int count) {
  return {_mm256_maskload_epi32(p, first(count))};
}
static inline I32 load_where(const int32_t* p, I32 where) {
  return {_mm256_maskload_epi32(p, where.v)};
}
static inline I32 load_at(const int32_t* p, I32 at, I32 where) {
  return {_mm256_mask_i32gather_epi32(_mm256_setzero_si256(), p, at.v, where.v, 4)};
}
static inline void store_first(int32_t* p, I32 a, int count) {
  _mm256_maskstore_epi32(p, first(count), a.v);
}
static inline void store(int32_t* p, I32 a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.v);
}
static inline void store_bytes(uint8_t* p, I32 a) {
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(a.v, a.v), 0x08);
  const __m128i low = _mm256_castsi256_si128(words);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(low, low));
}
static inline I32 load_words(const void* p) {
  return {_mm256_loadu_si256(static_cast<const __m256i*>(p))};
}
static inline I32 set_word(const void* p) {
  int32_t word;
  memcpy(&word, p, 4);
  return {_mm256_set1_epi32(word)};
}
static inline I32 load_signed(const int8_t* p) {
  return {_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))};
}
static inline void prefetch(const void* p) {
  _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0);
}

// Arithmetic.
static inline F32 set(float x) { return {_mm256_set1_ps(x)}; }
static inline I32 set(int32_t x) { return {_mm256_set1_epi32(x)}; }
static inline F32 add(F32 a, F32 b) { return {_mm256_add_ps(a.v, b.v)}; }
static inline F32 sub(F32 a, F32 b) { return {_mm256_sub_ps(a.v, b.v)}; }
static inline F32 mul(F32 a, F32 b) { return {_mm256_mul_ps(a.v, b.v)}; }
static inline F32 div(F32 a, F32 b) { return {_mm256_div_ps(a.v, b.v)}; }
static inline F32 muladd(F32 a, F32 b, F32 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
static inline F32 max(F32 a, F32 b) { return {_mm256_max_ps(a.v, b.v)}; }
static inline F32 larger(F32 a, F32 b) { return {_mm256_or_ps(max(a, b).v, max(b, a).v)}; }
static inline F32 min(F32 a, F32 b) { return {_mm256_min_ps(a.v, b.v)}; }
static inline F32 abs(F32 a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
static inline F32 copysign(F32 a, F32 b) {
  return {_mm256_or_ps(abs(a).v, _mm256_and_ps(_mm256_set1_ps(-0.0f), b.v))};
}
static inline I32 add(I32 a, I32 b) { return {_mm256_add_epi32(a.v, b.v)}; }
static inline I32 sub(I32 a, I32 b) { return {_mm256_sub_epi32(a.v, b.v)}; }
static inline I32 mul(I32 a, I32 b) { return {_mm256_mullo_epi32(a.v, b.v)}; }
static inline I32 shift_right(I32 a, int bits) { return {_mm256_srai_epi32(a.v, bits)}; }
static inline I32 max(I32 a, I32 b) { return {_mm256_max_epi32(a.v, b.v)}; }
static inline I32 min(I32 a, I32 b) { return {_mm256_min_epi32(a.v, b.v)}; }
static inline F32 to_f32(I32 a) { return {_mm256_cvtepi32_ps(a.v)}; }
static inline I32 round(F32 a) { return {_mm256_cvtps_epi32(a.v)}; }
static inline F32 exp2(I32 n) {
  return {
      _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n.v, _mm256_set1_epi32(127)), 23))};
}
template <int kByte>
static inline I32 signed_byte(I32 a) {
  return {_mm256_srai_epi32(_mm256_slli_epi32(a.v, 24 - 8 * kByte), 24)};
}
static inline I32 unsigned_byte(I32 a, int byte) {
  // 0x80 takes no byte, but a zero.
  const int32_t first = INT32_MIN + 0x808000 + byte;
  const __m128i words = _mm_setr_epi32(first, first + 4, first + 8, first + 12);
  return {_mm256_shuffle_epi8(a.v, _mm256_broadcastsi128_si256(words))};
}
static inline I32 set_twice(int32_t x) { return {_mm256_set1_epi16(static_cast<int16_t>(x))}; }
static inline I32 pack_bytes(I32 a, I32 b, I32 c, I32 d, I32 zero, I32 least) {
  const auto pair = [&](I32 low, I32 high) {
    return _mm256_max_epi16(_mm256_adds_epi16(_mm256_packs_epi32(low.v, high.v), zero.v), least.v);
  };
  return {_mm256_packus_epi16(pair(a, b), pair(c, d))};
}
static inline I32 pack_bytes(I32 a, I32 b, I32 c, I32 d) {
  return {_mm256_packus_epi16(_mm256_packs_epi32(a.v, b.v), _mm256_packs_epi32(c.v, d.v))};
}
static inline I32 in_words(I32 packed) {
  const __m128i each = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return {_mm256_shuffle_epi8(packed.v, _mm256_broadcastsi128_si256(each))};
}
static inline void interleave(I32 (&l)[4]) {
  const __m256i low01 = _mm256_unpacklo_epi8(l[0].v, l[1].v),
                high01 = _mm256_unpackhi_epi8(l[0].v, l[1].v),
                low23 = _mm256_unpacklo_epi8(l[2].v, l[3].v),
                high23 = _mm256_unpackhi_epi8(l[2].v, l[3].v);
  l[0].v = _mm256_unpacklo_epi16(low01, low23);
  l[1].v = _mm256_unpackhi_epi16(low01, low23);
  l[2].v = _mm256_unpacklo_epi16(high01, high23);
  l[3].v = _mm256_unpackhi_epi16(high01, high23);
}
static inline I32 max_bytes(I32 a, I32 b) { return {_mm256_max_epu8(a.v, b.v)}; }

// Across lanes.
static inline float reduce_max(F32 a) {
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}
static inline float reduce_min(F32 a) {
  __m128 m = _mm_min_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  m = _mm_min_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_min_ss(m, _mm_movehdup_ps(m)));
}
static inline float reduce_add(F32 a) {
  __m128 m = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  m = _mm_add_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_add_ss(m, _mm_movehdup_ps(m)));
}
static inline F32 as_f32(I32 a) { return {_mm256_castsi256_ps(a.v)}; }
static inline I32 as_i32(F32 a) { return {_mm256_castps_si256(a.v)}; }
static inline I32 every_other(I32 a, I32 b) {
  const __m256 quads = _mm256_shuffle_ps(as_f32(a).v, as_f32(b).v, _MM_SHUFFLE(3, 1, 2, 0));
  return {_mm256_permute4x64_epi64(_mm256_castps_si256(quads), _MM_SHUFFLE(3, 1, 2, 0))};
}
static inline void transpose(I32 (&r)[kLanes]) {
  // Pairs of 32-bit lanes, then of 64-bit, then of 128-bit halves.
  __m256i t[8], u[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_epi32(r[i].v, r[i + 1].v);
    t[i + 1] = _mm256_unpackhi_epi32(r[i].v, r[i + 1].v);
  }
  for (int i = 0; i < 8; i += 4) {
    u[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
    u[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
    u[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
    u[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    r[i].v = _mm256_permute2x128_si256(u[i], u[i + 4], 0x20);
    r[i + 4].v = _mm256_permute2x128_si256(u[i], u[i + 4], 0x31);
  }
}

// The int8 dot of 64 products: two vpdpbusd; or vpmaddubsw x2, vpaddw, vpmaddwd, vpaddd.
static inline I32 dot(I32 sum, I32 x0, I32 w0, I32 x1, I32 w1) {
#ifdef __AVXVNNI__
  return {_mm256_dpbusd_avx_epi32(_mm256_dpbusd_avx_epi32(sum.v, x0.v, w0.v), x1.v, w1.v)};
#else
  const __m256i pairs =
      _mm256_add_epi16(_mm256_maddubs_epi16(x0.v, w0.v), _mm256_maddubs_epi16(x1.v, w1.v));
  return {_mm256_add_epi32(sum.v, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))};
#endif
}

// The loop of conv_int8 has 14 registers of sums, pixels and weights: two are left, none for the ones.
// gcc 12 finds no such order by itself, and stores five sums a turn: ResNet-50's layers, 40.8 ms for
// the 35.3 that they take so.
static inline I32 dot_tight(I32 sum, I32 x0, I32 w0, I32 x1, I32 w1) {
#ifdef __AVXVNNI__
  return dot(sum, x0, w0, x1, w1);
#else
  alignas(32) static const int16_t ones[16] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
  __m256i s = sum.v, t, u;
  asm("vpmaddubsw %[w0], %[x0], %[t]\n\t"
      "vpmaddubsw %[w1], %[x1], %[u]\n\t"
      "vpaddw %[u], %[t], %[t]\n\t"
      "vpmaddwd %[ones], %[t], %[t]\n\t"
      "vpaddd %[t], %[s], %[s]"
      : [s] "+x"(s), [t] "=&x"(t), [u] "=&x"(u)
      : [x0] "x"(x0.v), [w0] "x"(w0.v), [x1] "x"(x1.v), [w1] "x"(w1.v), [ones] "m"(ones));
  return {s};
#endif
}

static inline I32 dot_halves(I32 sum, I32 x, I32 w) {
#ifdef __AVXVNNI__
  return {_mm256_dpwssd_avx_epi32(sum.v, x.v, w.v)};
#else
  return {_mm256_add_epi32(sum.v, _mm256_madd_epi16(x.v, w.v))};
#endif
}

static inline I4 dot(I4 sum, I4 x, I4 w) {
#ifdef __AVXVNNI__
  return {_mm_dpbusd_avx_epi32(sum.v, x.v, w.v)};
#else
  return {_mm_add_epi32(sum.v, _mm_madd_epi16(_mm_maddubs_epi16(x.v, w.v), _mm_set1_epi16(1)))};
#endif
}

// Pairs of lanes, of pairs, and of halves.
static inline F4 reduce_quad(F32 a, F32 b, F32 c, F32 d) {
  const __m256 quads = _mm256_hadd_ps(_mm256_hadd_ps(a.v, b.v), _mm256_hadd_ps(c.v, d.v));
  return {_mm_add_ps(_mm256_castps256_ps128(quads), _mm256_extractf128_ps(quads, 1))};
}

// int4: the table is looked up by each byte's low half, in 16 bytes at a time.
template <int kNibble>
static inline I32 decode(I32 a) {
  const __m256i table =
      _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(kInt4Values)));
  return {_mm256_shuffle_epi8(
      table, _mm256_and_si256(_mm256_srli_epi16(a.v, 4 * kNibble), _mm256_set1_epi8(15)))};
}

}  // namespace GOSSAMER_ISA
}  // namespace gossamer
