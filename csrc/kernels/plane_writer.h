// plane_writer.h: sums of output pixels -> the planes of y.
#pragma once

#include <math.h>

#include "lanes.h"

namespace gossamer {
namespace GOSSAMER_ISA {

// The planes of y under a tile whose pixels are of one image: what an output's sums become, straight
// from registers. ReLU is a bound; -Inf is none.
template <int V>
struct PlaneWriter {
  float* y;
  const float *residual, *bias, *touched;
  int64_t plane;
  int last;      // pixels in the last vector
  bool fetches;  // what the next tile writes
  F32 lower;
  F32 ill[V];

  PlaneWriter(const FloatTile& x, const Destination& to, int64_t n)
      : bias(to.bias), plane(to.plane) {
    const int64_t first = plane ? to.first / plane * n * plane + to.first % plane : 0;
    y = static_cast<float*>(to.y) + first;
    residual = to.residual ? static_cast<const float*>(to.residual) + first : nullptr;
    touched = residual ? residual : y;
    last = lanes_left(x.rows, (V - 1) * kLanes);
    fetches = plane && (x.rows == plane || (x.more && to.first % plane + x.rows < plane));
    lower = set(to.activation == GOSSAMER_RELU ? 0.0f : -HUGE_VALF);
    for (F32& lane : ill) lane = set(0.0f);
  }
  // Whether it can write this tile.
  static bool takes(const Destination& to, int64_t rows) {
    return to.plane && to.dtype == GOSSAMER_FLOAT32 && to.first % to.plane + rows <= to.plane &&
           rows > (V - 1) * kLanes &&
           (to.activation == GOSSAMER_NONE || to.activation == GOSSAMER_RELU);
  }
  void operator()(int64_t output, const F32 (&sum)[V]) const {
    const int64_t at = output * plane;
    const F32 b = set(bias ? bias[output] : 0.0f);
    for (int v = 0; v < V; ++v) {
      const int64_t lane = at + v * kLanes;
      const int count = v < V - 1 ? kLanes : last;
      F32 value = add(add(sum[v], ill[v]), b);
      if (residual) value = add(value, load_some(residual + lane, count));
      store_some(y + lane, max(lower, value), count);
      if (fetches) prefetch(touched + lane + V * kLanes);
    }
  }
};

// Writes sums[output][T] of a chunk into the planes of y; value(sums, lane) as in write_lanes.
template <typename Value>
static inline void write_planes(const float* sums, int64_t lanes, int64_t rows, int64_t n,
                                Range range, const Destination& to, Value value) {
  by_dtype(to.dtype, [&](auto type) {
    using T = decltype(type);
    for (int64_t lane = 0, count; lane < rows; lane += count) {
      const int64_t image = (to.first + lane) / to.plane, pixel = (to.first + lane) % to.plane;
      count = to.plane - pixel < rows - lane ? to.plane - pixel : rows - lane;
      int64_t at = (image * n + range.begin) * to.plane + pixel;
      const float* from = sums + lane;
      for (int64_t o = range.begin; o < range.end; ++o, at += to.plane, from += lanes) {
        const F32 bias = set(to.bias ? to.bias[o] : 0.0f);
        for (int64_t i = 0; i < count; i += kLanes) {
          const int left = lanes_left(count, i);
          F32 v = add(value(load_some(from + i, left), lane + i), bias);
          if (to.residual) {
            v = add(v, load_some(static_cast<const T*>(to.residual) + at + i, left));
          }
          if (to.activation != GOSSAMER_NONE) v = activate(v, to.activation);
          store_some(static_cast<T*>(to.y) + at + i, v, left);
        }
      }
    }
  });
}

}  // namespace GOSSAMER_ISA
}  // namespace gossamer
