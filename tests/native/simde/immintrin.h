// immintrin.h: stands before the compiler's own where tests/native emulates a CPU. AVX-512 and
// AVX-VNNI intrinsics become SIMDe's functions, on vectors that AVX2 has; what SIMDe 0.7.4 lacks is
// here, and so is what it gets wrong: its masked loads and stores touch what they mask, its abs of
// -0 is -0.
#pragma once

#include_next <immintrin.h>

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <stdint.h>
#include <string.h>

namespace emulated {

// op(low half), op(high half). Half and To are what it takes and gives.
template <typename To, typename Half, typename Whole, typename Op>
static inline To by_halves(Whole a, Op op) {
  Half half[2];
  static_assert(sizeof half == sizeof a, "two halves are a whole");
  memcpy(half, &a, sizeof a);
  const decltype(op(half[0])) result[2] = {op(half[0]), op(half[1])};
  To whole;
  static_assert(sizeof result == sizeof whole, "two halves are a whole");
  memcpy(&whole, result, sizeof whole);
  return whole;
}

static inline __m512 abs_ps(__m512 a) {
  const auto op = [](__m256 h) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), h); };
  return by_halves<__m512, __m256>(a, op);
}
static inline __m512 cvtepi32_ps(__m512i a) {
  return by_halves<__m512, __m256i>(a, [](__m256i h) { return _mm256_cvtepi32_ps(h); });
}
static inline __m512i cvtps_epi32(__m512 a) {
  return by_halves<__m512i, __m256>(a, [](__m256 h) { return _mm256_cvtps_epi32(h); });
}
static inline __m512i cvtepu16_epi32(__m256i a) {
  return by_halves<__m512i, __m128i>(a, [](__m128i h) { return _mm256_cvtepu16_epi32(h); });
}
static inline __m512i cvtepi8_epi32(__m128i a) {
  return by_halves<__m512i, int64_t>(
      a, [](int64_t h) { return _mm256_cvtepi8_epi32(_mm_cvtsi64_si128(h)); });
}
static inline __m512i cvtepu8_epi32(__m128i a) {
  return by_halves<__m512i, int64_t>(
      a, [](int64_t h) { return _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(h)); });
}
static inline __m512 cvtph_ps(__m256i a) {
  return by_halves<__m512, __m128i>(a, [](__m128i h) { return _mm256_cvtph_ps(h); });
}
template <int kRounding>
static inline __m256i cvtps_ph(__m512 a) {
  return by_halves<__m256i, __m256>(a, [](__m256 h) { return _mm256_cvtps_ph(h, kRounding); });
}
static inline __m512i srai_epi32(__m512i a, int count) {
  return by_halves<__m512i, __m256i>(a, [=](__m256i h) { return _mm256_srai_epi32(h, count); });
}

// 16 lanes cut to smaller ones.
template <typename Lane, typename To>
static inline To truncate(__m512i a) {
  int32_t from[16];
  memcpy(from, &a, sizeof from);
  Lane lanes[16];
  static_assert(sizeof lanes == sizeof(To), "16 lanes");
  for (int i = 0; i < 16; ++i) lanes[i] = static_cast<Lane>(from[i]);
  To to;
  memcpy(&to, lanes, sizeof to);
  return to;
}

// f(f(lane 0, lane 1), lane 2), ...
template <typename F>
static inline float fold(__m512 a, F f) {
  float lanes[16];
  memcpy(lanes, &a, sizeof lanes);
  for (int i = 1; i < 16; ++i) lanes[0] = f(lanes[0], lanes[i]);
  return lanes[0];
}
static inline float reduce_add_ps(__m512 a) {
  return fold(a, [](float x, float y) { return x + y; });
}
static inline float reduce_max_ps(__m512 a) {
  return fold(a, [](float x, float y) { return x > y ? x : y; });
}
static inline float reduce_min_ps(__m512 a) {
  return fold(a, [](float x, float y) { return x < y ? x : y; });
}

// Element by element, those of the mask only.
template <typename Element>
static inline void move(void* to, __mmask16 mask, const void* from) {
  for (int i = 0; i < 16; ++i) {
    const size_t at = static_cast<size_t>(i) * sizeof(Element);
    if (mask >> i & 1)
      memcpy(static_cast<char*>(to) + at, static_cast<const char*>(from) + at, sizeof(Element));
  }
}
template <typename Element, typename Vector>
static inline Vector load(__mmask16 mask, const void* p) {
  Vector a = {};
  static_assert(sizeof a == 16 * sizeof(Element), "16 lanes");
  move<Element>(&a, mask, p);
  return a;
}
template <typename Element, typename Vector>
static inline void store(void* p, __mmask16 mask, Vector a) {
  static_assert(sizeof a == 16 * sizeof(Element), "16 lanes");
  move<Element>(p, mask, &a);
}

// src, or where the mask says so, the element of p at an index.
static inline __m512i gather(__m512i src, __mmask16 mask, __m512i index, const void* p) {
  int32_t lanes[16], at[16];
  memcpy(lanes, &src, sizeof lanes);
  memcpy(at, &index, sizeof at);
  for (int i = 0; i < 16; ++i)
    if (mask >> i & 1) memcpy(lanes + i, static_cast<const char*>(p) + int64_t{at[i]} * 4, 4);
  memcpy(&src, lanes, sizeof lanes);
  return src;
}

}  // namespace emulated

#undef _mm512_abs_ps
#define _mm512_abs_ps emulated::abs_ps
#define _mm512_cvtepi32_ps emulated::cvtepi32_ps
#define _mm512_cvtps_epi32 emulated::cvtps_epi32
#define _mm512_cvtepi8_epi32 emulated::cvtepi8_epi32
#define _mm512_cvtepu8_epi32 emulated::cvtepu8_epi32
#define _mm512_cvtepu16_epi32 emulated::cvtepu16_epi32
#define _mm512_cvtph_ps emulated::cvtph_ps
#undef _mm512_cvtps_ph
#define _mm512_cvtps_ph(a, rounding) emulated::cvtps_ph<rounding>(a)
#define _mm512_srai_epi32 emulated::srai_epi32
#define _mm512_cvtepi32_epi16 emulated::truncate<int16_t, __m256i>
#define _mm512_cvtepi32_epi8 emulated::truncate<int8_t, __m128i>
#define _mm512_reduce_add_ps emulated::reduce_add_ps
#define _mm512_reduce_max_ps emulated::reduce_max_ps
#define _mm512_reduce_min_ps emulated::reduce_min_ps
#define _mm512_maskz_loadu_ps emulated::load<float, __m512>
#define _mm512_maskz_loadu_epi32 emulated::load<int32_t, __m512i>
#define _mm256_maskz_loadu_epi16 emulated::load<int16_t, __m256i>
#define _mm512_mask_storeu_ps emulated::store<float>
#define _mm512_mask_storeu_epi32 emulated::store<int32_t>
#undef _mm512_mask_i32gather_epi32
#define _mm512_mask_i32gather_epi32(src, mask, index, p, scale) \
  emulated::gather(src, mask, index, p)
#define _mm256_mask_storeu_epi16 emulated::store<int16_t>
#define _mm256_dpbusd_avx_epi32 simde_mm256_dpbusd_epi32
#define _mm256_dpwssd_avx_epi32 simde_mm256_dpwssd_epi32
#define _mm_dpbusd_avx_epi32 simde_mm_dpbusd_epi32
