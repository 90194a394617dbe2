// epilogue.h: from sums in registers to y, one fixed order of float operations for every int8 and
// sparse kernel.
//
//   int8:   y = act(float(sum - zero * wsum) * (x_scale * w_scale) + bias)
//   fp32:   y = act(sum + bias + residual)
//
// Only correctly rounded operations (no fused multiply-add), so that int8 results are bit-equal on
// every Isa.
#pragma once

#include GOSSAMER_SIMD
#include "kernels.h"

namespace gossamer {
namespace GOSSAMER_ISA {

// A number as a type, for what is compiled once a number.
template <int kValue>
struct Int {
  static constexpr int value = kValue;
};

// Calls body(Int<count>()), for a count of 1 to kMost; for 0 nothing.
template <int kMost, typename Body>
static inline void by_count(int64_t count, Body body) {
  if constexpr (kMost > 0) count == kMost ? body(Int<kMost>()) : by_count<kMost - 1>(count, body);
}

// Horner's rule, highest power first.
template <int kCount>
static inline F32 polynomial(F32 x, const float (&coefficients)[kCount]) {
  F32 p = set(coefficients[0]);
  for (int i = 1; i < kCount; ++i) p = add(mul(p, x), set(coefficients[i]));
  return p;
}

// e^x for x in [-87, 88], clamped to that. r = x - n ln2 in two parts, then the Taylor polynomial
// of degree 7 on |r| <= ln2 / 2: relative error below 2e-7.
static inline F32 exp(F32 x) {
  x = min(set(88.0f), max(set(-87.0f), x));
  const I32 n = round(mul(x, set(1.44269504f)));
  const F32 nf = to_f32(n);
  const F32 r = sub(sub(x, mul(nf, set(0.693359375f))), mul(nf, set(-2.12194440e-4f)));
  constexpr float kTaylor[] = {1.0f / 5040, 1.0f / 720, 1.0f / 120, 1.0f / 24,
                               1.0f / 6,    0.5f,       1.0f,       1.0f};
  return mul(polynomial(r, kTaylor), exp2(n));
}

// Abramowitz and Stegun 7.1.26: absolute error below 1.5e-7.
static inline F32 erf(F32 x) {
  const F32 t = div(set(1.0f), add(set(1.0f), mul(set(0.3275911f), abs(x))));
  constexpr float kTail[] = {1.061405429f, -1.453152027f, 1.421413741f, -0.284496736f,
                             0.254829592f};
  const F32 tail = mul(mul(polynomial(t, kTail), t), exp(sub(set(0.0f), mul(x, x))));
  return copysign(sub(set(1.0f), tail), x);
}

static inline F32 activate(F32 y, gossamer_activation activation) {
  switch (activation) {
    case GOSSAMER_NONE:
      return y;
    case GOSSAMER_RELU:
      return max(set(0.0f), y);  // NaN stays NaN: max returns its second operand
    case GOSSAMER_GELU:
      return mul(mul(set(0.5f), y), add(set(1.0f), erf(mul(y, set(0.707106781f)))));
    case GOSSAMER_SILU:
      return div(y, add(set(1.0f), exp(sub(set(0.0f), y))));
    case GOSSAMER_RELU6:
      return min(set(6.0f), max(set(0.0f), y));
    case GOSSAMER_HARDSWISH:  // 6 * (1 / 6.0f) is 1: y itself from 3 on
      return mul(y, mul(min(set(6.0f), max(set(0.0f), add(y, set(3.0f)))), set(1 / 6.0f)));
  }
  return y;
}

static inline int lanes_left(int64_t n, int64_t output) {
  return n - output < kLanes ? static_cast<int>(n - output) : kLanes;
}

// A vector, or the `count` first lanes of one, which is masked: that is slower.
template <typename T>
static inline auto load_some(const T* p, int count) {
  return count == kLanes ? load(p) : load_first(p, count);
}
template <typename T, typename Vector>
static inline void store_some(T* p, Vector a, int count) {
  count == kLanes ? store(p, a) : store_first(p, a, count);
}

static inline F32 every_other(F32 a, F32 b) { return as_f32(every_other(as_i32(a), as_i32(b))); }
// p[0], p[2], p[4], ... in the `count` first lanes, 0 in the others; what lies behind the last of
// them is not read.
template <typename T>
static inline auto load_every_other(const T* p, int count) {
  const int reach = count > 0 ? 2 * count - 1 : 0, more = reach - (kLanes - 1);
  const auto low = load_some(p, reach < kLanes ? reach : kLanes);
  auto high = decltype(load(p)){};
  if (more > 0) high = load_some(p + kLanes - 1, more);
  return every_other(low, high);
}

// p[0], p[stride], p[2 * stride], ... likewise.
template <typename T>
static inline auto load_apart(const T* p, int64_t stride, int64_t count) {
  T line[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) line[i] = p[i * stride];
  return load(line);
}

// kLanes neighbouring outputs (fewer at the end of a row): what is loaded once for all rows of a
// tile.
struct Outputs {
  int64_t first;
  int count;
  F32 bias;

  Outputs(const Destination& to, int64_t n, int64_t output)
      : first(output), count(lanes_left(n, output)) {
    bias = to.bias ? take(to.bias) : set(0.0f);
  }
  // These outputs' part of an array of n.
  F32 take(const float* array) const { return load_some(array + first, count); }
  I32 take(const int32_t* array) const { return load_some(array + first, count); }
};

// The scales and weight sums of kLanes outputs.
struct Dequantize {
  F32 scale;
  I32 wsum;

  F32 operator()(I32 sum, float x_scale, int32_t x_zero) const {
    return mul(to_f32(sub(sum, mul(set(x_zero), wsum))), mul(set(x_scale), scale));
  }
};

// y[row][outputs] = act(value + bias + residual). T is the element type of y: choose it once a tile,
// with by_dtype.
template <typename T>
static inline void write(const Destination& to, int64_t row, const Outputs& outputs, F32 value) {
  const int64_t at = row * to.stride + outputs.first;
  value = add(value, outputs.bias);
  if (to.residual) {
    value = add(value, load_some(static_cast<const T*>(to.residual) + at, outputs.count));
  }
  if (to.activation != GOSSAMER_NONE) value = activate(value, to.activation);
  store_some(static_cast<T*>(to.y) + at, value, outputs.count);
}

// Hint: the lines of y that the end of this tile writes, fetched while it multiplies.
static inline void fetch_lines(const Destination& to, int64_t row, int64_t rows, int64_t output,
                               int64_t outputs) {
  const int64_t size = element_size(to.dtype);
  for (int64_t r = row; r < row + rows; ++r) {
    const char* y = static_cast<const char*>(to.y) + (r * to.stride + output) * size;
    for (int64_t line = 0; line < outputs * size; line += 64) prefetch(y + line);
  }
}

// 0 for a row of numbers, NaN for one that holds a NaN or an Inf (x * 0 is NaN just then). Added to
// all results of its row: a product that skips zeros may never read the ill element, and 0 * Inf
// must not be a quiet 0.
template <typename T>
static inline float illness(const T* x, int64_t k) {
  F32 bad = set(0.0f);
  int64_t i = 0;
  for (; i + kLanes <= k; i += kLanes) bad = add(bad, mul(load(x + i), set(0.0f)));
  if (i < k) bad = add(bad, mul(load_first(x + i, lanes_left(k, i)), set(0.0f)));
  return reduce_add(bad);
}

template <typename T>
static inline void widen_row(const T* x, int64_t k, float* out) {
  int64_t i = 0;
  for (; i + kLanes <= k; i += kLanes) store(out + i, load(x + i));
  if (i < k) store_first(out + i, load_first(x + i, lanes_left(k, i)), lanes_left(k, i));
}

template <typename Body>
static inline void by_dtype(gossamer_dtype dtype, Body body) {
  switch (dtype) {
    case GOSSAMER_FLOAT32:
      return body(float());
    case GOSSAMER_BFLOAT16:
      return body(BFloat16());
    case GOSSAMER_FLOAT16:
      return body(Float16());
    case GOSSAMER_UINT8:  // no floats: a kernel of blocked images reads it
      return;
  }
}

}  // namespace GOSSAMER_ISA
}  // namespace gossamer
