// plain.h: what the stems must give, as loops over doubles and integers.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <random>
#include <vector>

#include "weights.h"

// x as numbers, (rows, k); the bytes that a kernel reads come from encode().
struct Matrix {
  int64_t rows, k;
  std::vector<float> x;
  float at(int64_t row, int64_t i) const { return x[static_cast<size_t>(row * k + i)]; }
};

// Multiples of 1/16 below 8: exact in float, bfloat16 and float16.
inline Matrix random_matrix(int64_t rows, int64_t k, std::mt19937& random) {
  std::uniform_int_distribution<int> value(-127, 127);
  Matrix m{rows, k, {}};
  for (int64_t i = 0; i < rows * k; ++i) m.x.push_back(static_cast<float>(value(random)) / 16);
  return m;
}

inline int64_t size_of(gossamer_dtype dtype) { return dtype == GOSSAMER_FLOAT32 ? 4 : 2; }

// Normal numbers of which the target holds every bit, and zero.
inline void encode(float value, gossamer_dtype dtype, void* to) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  uint16_t half = static_cast<uint16_t>(bits >> 16);
  if (dtype == GOSSAMER_FLOAT16) {
    const uint32_t sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
    half = static_cast<uint16_t>(rest ? sign | (rest - 0x38000000) >> 13 : sign);
  }
  dtype == GOSSAMER_FLOAT32 ? memcpy(to, &value, 4) : memcpy(to, &half, 2);
}

inline double decode(const void* from, gossamer_dtype dtype) {
  uint16_t half;
  memcpy(&half, from, 2);
  if (dtype == GOSSAMER_FLOAT16) {
    const int exponent = half >> 10 & 31, fraction = half & 1023;
    const double size = exponent ? ldexp(1024 + fraction, exponent - 25) : ldexp(fraction, -24);
    return half & 0x8000 ? -size : size;
  }
  uint32_t bits = uint32_t{half} << 16;
  if (dtype == GOSSAMER_FLOAT32) memcpy(&bits, from, 4);
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// The scale and zero point of some floats, each step rounded to float: these bits are the contract.
struct Quantized {
  float scale;
  int32_t zero;

  Quantized(const float* x, int64_t count) {
    float low = 0, high = 0;
    for (int64_t i = 0; i < count; ++i) low = std::min(low, x[i]), high = std::max(high, x[i]);
    scale = std::max(high / 255 - low / 255, 0x1p-126f);
    zero = static_cast<int32_t>(nearbyintf(-low * (1 / scale)));
  }
  Quantized(float given_scale, int32_t given_zero) : scale(given_scale), zero(given_zero) {}

  uint8_t operator()(float x) const {
    const float steps = nearbyintf(x * (1 / scale));
    return static_cast<uint8_t>(std::clamp(steps + static_cast<float>(zero), 0.0f, 255.0f));
  }
};

// A row of the product's left operand: one row of x, or what lies under the taps of one output
// pixel.
struct Line {
  std::vector<float> x;
  Quantized quantized;
};

inline std::vector<Line> lines_of(const Matrix& m) {
  std::vector<Line> lines;
  for (int64_t r = 0; r < m.rows; ++r) {
    const float* row = m.x.data() + r * m.k;
    lines.push_back({{row, row + m.k}, Quantized(row, m.k)});
  }
  return lines;
}

// images is (images, height * width * channels).
inline std::vector<Line> lines_of(const Matrix& images, const gossamer_conv& c) {
  std::vector<Line> lines;
  for (int64_t pixel = 0; pixel < c.images * c.out_h * c.out_w; ++pixel) {
    const int64_t image = pixel / (c.out_h * c.out_w), y = pixel / c.out_w % c.out_h,
                  x = pixel % c.out_w;
    Line line{{}, Quantized(images.x.data() + image * images.k, images.k)};
    for (int64_t i = 0; i < c.kernel_h; ++i)
      for (int64_t j = 0; j < c.kernel_w; ++j)
        for (int64_t channel = 0; channel < (c.channels + 3) / 4 * 4; ++channel) {
          const int64_t row = y * c.stride_h - c.pad_top + i * c.dilation_h;
          const int64_t column = x * c.stride_w - c.pad_left + j * c.dilation_w;
          const bool inside =
              row >= 0 && row < c.height && column >= 0 && column < c.width && channel < c.channels;
          line.x.push_back(
              inside ? images.at(image, (row * c.width + column) * c.channels + channel) : 0);
        }
    lines.push_back(line);
  }
  return lines;
}

inline double activated(double y, gossamer_activation activation) {
  switch (activation) {
    case GOSSAMER_RELU:
      return std::max(y, 0.0);
    case GOSSAMER_GELU:
      return y * 0.5 * (1 + erf(y * sqrt(0.5)));
    case GOSSAMER_SILU:
      return y / (1 + exp(-y));
    case GOSSAMER_RELU6:
      return std::min(std::max(y, 0.0), 6.0);
    case GOSSAMER_HARDSWISH:
      return y * std::min(std::max(y + 3, 0.0), 6.0) / 6;
    default:
      return y;
  }
}

enum class Arithmetic { kInt8, kWeightOnly, kInt4, kSparse, kSparseInt8 };

// Sums of integers: the same bits on every Isa.
inline bool integers(Arithmetic arithmetic) {
  return arithmetic != Arithmetic::kWeightOnly && arithmetic != Arithmetic::kSparse;
}

struct Expected {
  double y, bound;
};

// One element of the result and how far off rounding may be.
inline Expected expected(const Line& line, const Weight& w, int64_t o, Arithmetic arithmetic,
                         float bias, gossamer_activation activation) {
  const float scale = w.scale[static_cast<size_t>(o)];
  const Quantized& quantized = line.quantized;
  int64_t sum = 0, bytes = 0;
  double floats = 0, size = 0;
  for (int64_t i = 0; i < w.k; ++i) {
    const float x = line.x[static_cast<size_t>(i)];
    const int weight = arithmetic == Arithmetic::kInt4 ? w.int4(o, i) : w.at(o, i);
    sum += (quantized(x) - quantized.zero) * weight;
    floats += double{x} * weight;
    size += fabs(double{x} * weight);
    bytes += (quantized(x) + quantized.zero) * abs(weight);
  }
  // The sparse floats are the integers themselves, without a scale.
  const double factor = arithmetic == Arithmetic::kSparse ? 1 : double{scale};
  const double both = double{quantized.scale} * scale;
  const double y = integers(arithmetic) ? double(sum) * both : floats * factor;
  // int4 adds the sums of groups, and takes the zero off, in floats.
  const double terms = arithmetic == Arithmetic::kInt4 ? double(bytes) * both * double(w.k / 16 + 2)
                       : integers(arithmetic)          ? fabs(y)
                                                       : size * factor * double(w.k);
  return {activated(y + bias, activation), 1.2e-7 * (terms + 8 * (fabs(y) + fabs(bias) + 1))};
}
