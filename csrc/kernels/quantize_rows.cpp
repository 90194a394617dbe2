// quantize_rows: each row of x to unsigned bytes, with a scale and an exact zero point: its own, or
// one that is given for all rows.
//
//   low = min(x, 0)  high = max(x, 0)  scale = high / 255 - low / 255  zero = round(-low / scale)
//   q = round(clamp(x / scale, -zero, 255 - zero)) + zero               x ~ (q - zero) * scale
//
//   x      rows x k         float32, bfloat16 or float16; a row is contiguous
//   q      rows x q_stride  u8; bytes k .. q_stride are 0
//   scale  rows             float32; NaN for a row that holds a NaN or an Inf: its results are NaN
//   zero   rows             int32, 0 .. 255; 0 for such a row, as is its q
//
// Two passes over a row, which L1 holds for k <= 8192; one where scale and zero point are given.
// Tails: the end of a row is one masked step.
// Numerics: 1 / scale once, then mul, clamp and round-half-even: the same bits on every Isa. A scale
// under 2^-126 (all zeros, or denormals only) is raised to it: 1 / scale stays finite and the error
// is below 2^-127 an element. Clamped as floats: what lies far outside of a given range would
// overflow an int32.

#include "quantize.h"

namespace gossamer {
namespace GOSSAMER_ISA {
namespace {

// Writes q; -> 0, or where kCheck NaN if the row holds a NaN or an Inf.
template <bool kCheck, typename T>
float quantize(const T* x, int64_t k, Affine a, uint8_t* q) {
  const Quantize quantized(a);
  F32 bad = set(0.0f);
  const auto bytes = [&](F32 v) {
    if (kCheck) bad = add(bad, mul(v, set(0.0f)));
    return quantized(v);
  };
  int64_t i = 0;
  for (; i + kLanes <= k; i += kLanes) store_bytes(q + i, bytes(load(x + i)));
  if (i < k) {
    uint8_t tail[kLanes];
    store_bytes(tail, bytes(load_first(x + i, lanes_left(k, i))));
    memcpy(q + i, tail, static_cast<size_t>(k - i));
  }
  return kCheck ? reduce_add(bad) : 0;
}

template <typename T>
Affine row(const T* x, int64_t k, Affine given, uint8_t* q) {
  Affine a = given;
  if (given.scale == 0) {
    a = own_range(x, k);
    if (a.scale == a.scale) quantize<false>(x, k, a, q);
  } else if (const float nan = quantize<true>(x, k, a, q); nan != 0) {
    a = {nan, 0};
  }
  if (a.scale != a.scale) memset(q, 0, static_cast<size_t>(k));
  return a;
}

}  // namespace

void quantize_rows(const FloatTile& x, int64_t k, Affine given, uint8_t* q, int64_t q_stride,
                   float* scale, int32_t* zero) {
  by_dtype(x.dtype, [&](auto type) {
    const auto* data = static_cast<const decltype(type)*>(x.x);
    for (int64_t r = 0; r < x.rows; ++r) {
      uint8_t* to = q + r * q_stride;
      const Affine a = row(data + r * x.stride, k, given, to);
      memset(to + k, 0, static_cast<size_t>(q_stride - k));
      scale[r] = a.scale;
      zero[r] = a.zero;
    }
  });
}

}  // namespace GOSSAMER_ISA
}  // namespace gossamer
