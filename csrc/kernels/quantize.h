// quantize.h: floats to unsigned bytes, x ~ (q - zero) * scale, as quantize_rows.cpp says: what it
// shares with block and with the epilogue of convolutions.
#pragma once

#include "epilogue.h"

namespace gossamer {
namespace GOSSAMER_ISA {

// The range of k floats; a scale of NaN, and zero 0, where they hold a NaN or an Inf.
template <typename T>
static inline Affine own_range(const T* x, int64_t k) {
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
  if (!(nan == 0)) return {nan, 0};
  float s = top / 255 - bottom / 255;
  s = s > 0x1p-126f ? s : 0x1p-126f;
  // The magic constant rounds half to even as round() does, without leaving float.
  return {s, static_cast<int32_t>((-bottom * (1 / s) + 12582912.0f) - 12582912.0f)};
}

// kLanes floats to numbers of 0..255.
struct Quantize {
  F32 factor, first, last;
  I32 zero;

  explicit Quantize(Affine a)
      : factor(set(1 / a.scale)),
        first(set(static_cast<float>(-a.zero))),
        last(set(static_cast<float>(255 - a.zero))),
        zero(set(a.zero)) {}
  I32 operator()(F32 v) const { return add(round(min(max(mul(v, factor), first), last)), zero); }
  // Before pack_bytes, which adds the zero point and clamps from below: NaN, and what lies far below,
  // become INT32_MIN, the least byte.
  I32 bounded_above(F32 v) const { return round(min(last, mul(v, factor))); }
};

}  // namespace GOSSAMER_ISA
}  // namespace gossamer
