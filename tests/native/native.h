// native.h: what the parts of this program share: a product to check, and the comparison.
#pragma once

#include <stdio.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "plain.h"

namespace gossamer {
struct Kernels;
}

constexpr Arithmetic kArithmetics[] = {Arithmetic::kInt8, Arithmetic::kWeightOnly,
                                       Arithmetic::kInt4, Arithmetic::kSparse,
                                       Arithmetic::kSparseInt8};
constexpr Side kSides[] = {Side::kEnd, Side::kBegin};

inline void require(bool condition, const std::string& what) {
  if (!condition) throw std::runtime_error(what);
}
inline void require_ok(int status) { require(status == GOSSAMER_OK, gossamer_error()); }

// A left operand (rows, or images under a convolution), a weight, and how x and y lie in memory.
struct Product {
  Matrix x;  // (rows, k), or (images, height * width * channels)
  const gossamer_conv* conv;
  std::vector<Line> lines;
  Weight weight;
  std::vector<float> bias;
  gossamer_dtype dtype;
  gossamer_activation activation;
  bool planar;
  int64_t gap;            // elements between two rows
  Quantized given{0, 0};  // of all lines; a scale of 0: each has its own

  // The same with one range for all lines, which cuts off about half of random_matrix.
  Product with_a_range() const {
    Product p = *this;
    p.given = {0x1p-6f, 77};
    for (Line& line : p.lines) line.quantized = p.given;
    return p;
  }

  int64_t line_count() const { return static_cast<int64_t>(lines.size()); }
  // Elements from the first to behind the last of rows of `length`.
  int64_t extent(int64_t rows, int64_t length) const {
    return rows ? (rows - 1) * (length + gap) + length : 0;
  }
  int64_t y_extent() const {
    return planar ? line_count() * weight.n : extent(line_count(), weight.n);
  }
  int64_t position(int64_t line, int64_t o) const {
    if (!planar) return line * (weight.n + gap) + o;
    const int64_t plane = conv->out_h * conv->out_w;
    return (line / plane * weight.n + o) * plane + line % plane;
  }
  // With planes: the channels of an image are its planes, instead of innermost.
  std::vector<char> encoded_x(bool planes = false) const {
    const int64_t length = x.k, stride = length + (conv ? 0 : gap);
    const int64_t count = conv ? x.rows * length : extent(x.rows, length);
    const auto place = [&](int64_t i) {
      const int64_t channels = planes ? conv->channels : length;
      return i % channels * (length / channels) + i / channels;
    };
    std::vector<char> bytes(static_cast<size_t>(count * size_of(dtype)), 0x7f);
    for (int64_t r = 0; r < x.rows; ++r)
      for (int64_t i = 0; i < length; ++i)
        encode(x.at(r, i), dtype, &bytes[size_t((r * stride + place(i)) * size_of(dtype))]);
    return bytes;
  }
  std::vector<Expected> reference(Arithmetic arithmetic) const {
    std::vector<Expected> all;
    for (const Line& line : lines)
      for (int64_t o = 0; o < weight.n; ++o)
        all.push_back(
            expected(line, weight, o, arithmetic, bias[static_cast<size_t>(o)], activation));
    return all;
  }
};

// Every element within its bound, and what lies between the rows untouched.
inline void compare(const Product& p, const std::vector<Expected>& reference,
                    const std::vector<char>& y, const std::string& what) {
  const int64_t size = size_of(p.dtype);
  const double eps = p.dtype == GOSSAMER_FLOAT32    ? 1.2e-7
                     : p.dtype == GOSSAMER_BFLOAT16 ? 0x1p-8
                                                    : 0x1p-11;
  for (int64_t line = 0; line < p.line_count(); ++line) {
    for (int64_t o = 0; o < p.weight.n; ++o) {
      const Expected& e = reference[static_cast<size_t>(line * p.weight.n + o)];
      const double got = decode(&y[static_cast<size_t>(p.position(line, o) * size)], p.dtype);
      if (fabs(got - e.y) <= e.bound + eps * fabs(e.y)) continue;
      char text[256];
      snprintf(text, sizeof text, ": y(%lld, %lld) is %.9g, expected %.9g within %.3g",
               (long long)line, (long long)o, got, e.y, e.bound + eps * fabs(e.y));
      throw std::runtime_error(what + text);
    }
    if (p.planar || line + 1 == p.line_count()) continue;
    for (int64_t i = (p.position(line, 0) + p.weight.n) * size; i < p.position(line + 1, 0) * size;
         ++i)
      require(y[static_cast<size_t>(i)] == static_cast<char>(Guarded<char>::kFill),
              what + ": wrote between the rows");
  }
}

// kernels.cpp: the kernels alone, with guarded scratch; the functions that they are made of.
void check_kernels(const Product& product);
// The tables that this CPU can run.
std::vector<const gossamer::Kernels*> tables_here();
void check_contracts();
// gradient.cpp: sddmm, through the C ABI and as a kernel alone.
void check_gradient_kernel(const gossamer::Kernels& table, const Product& product,
                           const Operands& operands, Side side);
void check_gradient(const Product& product, gossamer_parallel_for parallel_for,
                    std::mt19937& random);
// images.cpp: blocked images; the bytes of all results.
std::vector<uint8_t> check_images(const Product& product, gossamer_parallel_for parallel_for);
// depthwise.cpp: convolutions of which each output reads one channel.
void check_depthwise(gossamer_parallel_for parallel_for, std::mt19937& random);
// damage.cpp: an index with random damage is refused, or harmless.
void check_damaged_indices(std::mt19937& random);
// threads.cpp: how threads share a product.
void check_threads(std::mt19937& random);
