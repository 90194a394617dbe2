// simd/quad.h: the four words of simd/base.h, F4 and I4, as every x86 Isa has them; only their dot
// differs.
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

namespace gossamer {
namespace GOSSAMER_ISA {

struct F4 {
  __m128 v;
};
struct I4 {
  __m128i v;
};
template <int kCount>
static inline I4 load_quad(const void* p) {
  if (kCount == 4) return {_mm_loadu_si128(static_cast<const __m128i*>(p))};
  const __m128i pair = kCount == 1 ? _mm_loadu_si32(p) : _mm_loadu_si64(p);
  int32_t third = 0;
  if (kCount == 3) memcpy(&third, static_cast<const char*>(p) + 8, 4);
  return {kCount == 3 ? _mm_insert_epi32(pair, third, 2) : pair};
}
template <int kCount>
static inline F4 load_quad(const float* p) {
  return {_mm_castsi128_ps(load_quad<kCount>(static_cast<const void*>(p)).v)};
}
static inline void store_quad(float* p, F4 a) { _mm_storeu_ps(p, a.v); }
static inline void store_quad(int32_t* p, I4 a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), a.v);
}
template <int kCount>
static inline F4 pick_quad(const float* x, const uint8_t* at) {
  __m128 r = _mm_load_ss(x + at[0]);
  if (kCount > 1) r = _mm_insert_ps(r, _mm_load_ss(x + at[1]), 0x10);
  if (kCount > 2) r = _mm_insert_ps(r, _mm_load_ss(x + at[2]), 0x20);
  if (kCount > 3) r = _mm_insert_ps(r, _mm_load_ss(x + at[3]), 0x30);
  return {r};
}
template <int kCount>
static inline I4 pick_quad(const void* x, const uint8_t* at) {
  return {_mm_castps_si128(pick_quad<kCount>(static_cast<const float*>(x), at).v)};
}
static inline F4 muladd(F4 a, F4 b, F4 c) { return {_mm_fmadd_ps(a.v, b.v, c.v)}; }
static inline F4 add(F4 a, F4 b) { return {_mm_add_ps(a.v, b.v)}; }

}  // namespace GOSSAMER_ISA
}  // namespace gossamer
