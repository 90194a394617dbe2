// quantize_rows: each row of x to unsigned bytes, with a scale and an exact zero point of its own.
//
//   low = min(x, 0)  high = max(x, 0)  scale = high / 255 - low / 255  zero = round(-low / scale)
//   q = clamp(round(x / scale) + zero, 0, 255)           x ~ (q - zero) * scale
//
//   x      rows x k         float32, bfloat16 or float16; a row is contiguous
//   q      rows x q_stride  u8; bytes k .. q_stride are 0
//   scale  rows             float32; NaN for a row that holds a NaN or an Inf: its results are NaN
//   zero   rows             int32, 0 .. 255
//
// Two passes over a row, which L1 holds for k <= 8192.
// Tails: the end of a row is one masked step.
// Numerics: 1 / scale once, then mul and round-half-even: the same bits on every Isa. A scale under
// 2^-126 (all zeros, or denormals only) is raised to it: 1 / scale stays finite and the error is
// below 2^-127 an element.

#include "epilogue.h"

namespace gossamer {
namespace GOSSAMER_ISA {
namespace {

template <typename T>
void row(const T* x, int64_t k, uint8_t* q, int64_t q_stride, float* scale, int32_t* zero) {
  // x * 0 is NaN just when x is NaN or Inf. Two chains each: min and max have a latency of 4 there.
  F32 low[2] = {set(0.0f), set(0.0f)}, high[2] = {set(0.0f), set(0.0f)},
      bad[2] = {set(0.0f), set(0.0f)};
  const auto see = [&](F32 v, int chain) {
    low[chain] = min(v, low[chain]);
    high[chain] = max(v, high[chain]);
    bad[chain] = add(bad[chain], mul(v, set(0.0f)));
  };
  int64_t i = 0;
  for (; i + 2 * kLanes <= k; i += 2 * kLanes) {
    see(load(x + i), 0);
    see(load(x + i + kLanes), 1);
  }
  for (; i < k; i += kLanes) see(load_first(x + i, lanes_left(k, i)), 0);

  const float bottom = reduce_min(min(low[0], low[1])), top = reduce_max(max(high[0], high[1]));
  const float nan = reduce_add(add(bad[0], bad[1]));
  float s = top / 255 - bottom / 255;
  s = s > 0x1p-126f ? s : 0x1p-126f;
  const bool finite = nan == 0;
  *scale = finite ? s : nan;
  const float inverse = finite ? 1 / s : 0;
  const float z = finite ? -bottom * inverse : 0;
  // The magic constant rounds half to even as round() does, without leaving float.
  *zero = static_cast<int32_t>((z + 12582912.0f) - 12582912.0f);

  const F32 factor = set(inverse);
  const I32 shift = set(*zero), last = set(int32_t{255}), first = set(int32_t{0});
  const auto quantize = [&](F32 v) {
    return min(max(add(round(mul(v, factor)), shift), first), last);
  };
  for (i = 0; i + kLanes <= k; i += kLanes) store_bytes(q + i, quantize(load(x + i)));
  if (i < k) {
    uint8_t tail[kLanes];
    store_bytes(tail, quantize(load_first(x + i, lanes_left(k, i))));
    memcpy(q + i, tail, static_cast<size_t>(k - i));
  }
  memset(q + k, 0, static_cast<size_t>(q_stride - k));
}

}  // namespace

void quantize_rows(const FloatTile& x, int64_t k, uint8_t* q, int64_t q_stride, float* scale,
                   int32_t* zero) {
  by_dtype(x.dtype, [&](auto type) {
    const auto* data = static_cast<const decltype(type)*>(x.x);
    for (int64_t r = 0; r < x.rows; ++r)
      row(data + r * x.stride, k, q + r * q_stride, q_stride, scale + r, zero + r);
  });
}

}  // namespace GOSSAMER_ISA
}  // namespace gossamer
