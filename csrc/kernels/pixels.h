// pixels.h: what the kernels on blocked images share. Output pixels lie in the lanes of a vector: a
// panel is [column][width] 32-bit words, a column four channels under one tap, width the pixels of
// the tile rounded up to kLanes.
#pragma once

#include "lanes.h"
#include "quantize.h"

namespace gossamer {
namespace GOSSAMER_ISA {

constexpr int kSparseVectors = sparse_pixels(kLanes) / kLanes;
// Of a window: those of a dense convolution's tile, or of a sparse one's.
constexpr int64_t kDensePixels = round_up(kMaxPixels + kRestPixels, 16);
constexpr int64_t kWindowPixels = kDensePixels > sparse_pixels(kLanes) ? kDensePixels
                                                                       : sparse_pixels(kLanes);

static inline int64_t width_of(Range pixels) { return round_up(pixels.end - pixels.begin, kLanes); }

// Where the pixels of a tile find their words under a tap, a vector of them at a time.
class Window {
 public:
  Window(const gossamer_conv& conv, Range pixels) : conv_(conv) {
    int32_t top[kWindowPixels], left[kWindowPixels];
    const int64_t count = pixels.end - pixels.begin, width = width_of(pixels);
    const bool same = conv.stride_h == 1 && conv.stride_w == 1 && conv.out_w == conv.width;
    int64_t row = pixels.begin / conv.out_w, column = pixels.begin % conv.out_w;
    for (int64_t i = 0; i < width; ++i) {
      if (i % kLanes == 0) {
        const int64_t last = kLanes < count - i ? kLanes : count - i;
        const bool one_row = column + last <= conv.out_w;
        rows_[i / kLanes] = {row * conv.stride_h - conv.pad_top,
                             column * conv.stride_w - conv.pad_left,
                             one_row && last == kLanes && conv.stride_w <= 2};
        joined_[i / kLanes] = same || (one_row && conv.stride_w == 1);
      }
      // A lane without a pixel is outside of the image.
      top[i] = static_cast<int32_t>(i < count ? row * conv.stride_h - conv.pad_top : INT32_MIN / 2);
      left[i] = static_cast<int32_t>(column * conv.stride_w - conv.pad_left);
      if (++column == conv.out_w) column = 0, ++row;
    }
    for (int64_t v = 0; v * kLanes < width; ++v) {
      top_[v] = load(top + v * kLanes);
      left_[v] = load(left + v * kLanes);
    }
  }

  // What vector v finds under a tap: `blocks` words of each pixel, a plane of the image apart, are
  // handed to take(block, words); `outside` where there is no pixel.
  template <typename Take>
  void each_block(int64_t tap_row, int64_t tap_column, int v, const int32_t* image, int64_t blocks,
                  int32_t outside, Take take) const {
    const int64_t plane = conv_.height * conv_.width;
    const Row& row = rows_[v];
    const int64_t top = row.top + tap_row * conv_.dilation_h,
                  left = row.left + tap_column * conv_.dilation_w,
                  right = left + (kLanes - 1) * conv_.stride_w;
    if (row.whole && top >= 0 && top < conv_.height && left >= 0 && right < conv_.width) {
      image += top * conv_.width + left;
      for (int64_t b = 0; b < blocks; ++b, image += plane)
        take(b, conv_.stride_w == 1 ? load(image) : load_every_other(image, kLanes));
      return;
    }
    const auto number = [](int64_t value) { return set(static_cast<int32_t>(value)); };
    const I32 y = add(top_[v], number(tap_row * conv_.dilation_h)),
              x = add(left_[v], number(tap_column * conv_.dilation_w));
    // Negative outside, then -1 inside and 0 outside.
    const I32 room =
        min(min(y, sub(number(conv_.height - 1), y)), min(x, sub(number(conv_.width - 1), x)));
    const I32 inside = sub(set(-1), max(set(-1), min(room, set(0))));
    const I32 fill = mul(add(inside, set(1)), set(outside));
    const I32 at = add(mul(y, number(conv_.width)), x);
    if (joined_[v]) {
      int32_t place[kLanes];
      store(place, at);
      for (int64_t b = 0; b < blocks; ++b, image += plane)
        take(b, add(load_where(image + place[0], inside), fill));
    } else {
      for (int64_t b = 0; b < blocks; ++b, image += plane)
        take(b, add(load_at(image, at, inside), fill));
    }
  }

 private:
  const gossamer_conv& conv_;
  I32 top_[kWindowPixels / kLanes], left_[kWindowPixels / kLanes];
  // The place of a vector's first lane. whole: all lanes are pixels of one row, side by side or with
  // one between; where a tap finds them all inside of the image, they are one or two loads.
  struct Row {
    int64_t top, left;
    bool whole;
  } rows_[kWindowPixels / kLanes];
  // The words of a vector are neighbours: of one row, or where rows follow each other as in y.
  bool joined_[kWindowPixels / kLanes];
};

// What lies outside of an image, as a word: the zero point of four channels.
static inline int32_t outside_of(const ImageTile& x) {
  return static_cast<int32_t>(static_cast<uint32_t>(x.affine.zero) * 0x01010101u);
}

// The image under a tile -> panel[tap][block of channels][width].
static inline void gather(const ImageTile& x, int32_t* panel) {
  if (x.gathered) return;
  const gossamer_conv& c = x.conv;
  const Window window(c, x.pixels);
  const int64_t width = width_of(x.pixels), blocks = ceil_div(c.channels, 4);
  const auto* image = reinterpret_cast<const int32_t*>(x.q);
  const int32_t outside = outside_of(x);
  for (int64_t i = 0; i < c.kernel_h; ++i) {
    for (int64_t j = 0; j < c.kernel_w; ++j, panel += blocks * width) {
      for (int v = 0; v * kLanes < width; ++v) {
        window.each_block(i, j, v, image, blocks, outside, [&](int64_t b, I32 words) {
          store(panel + b * width + v * kLanes, words);
        });
      }
    }
  }
}

// One output: what turns its sums into floats.
struct Output {
  F32 scale, bias;
  I32 correction;

  // None (outputs that fill up the last block): 0.
  Output() : scale(set(0.0f)), bias(set(0.0f)), correction(set(0)) {}
  Output(Affine x, float w_scale, int32_t wsum, float its_bias)
      : scale(set(x.scale * w_scale)),
        bias(set(its_bias)),
        correction(set(
            static_cast<int32_t>(static_cast<uint32_t>(x.zero) * static_cast<uint32_t>(wsum)))) {}
  F32 operator()(I32 sum) const { return corrected(sub(sum, correction)); }
  F32 corrected(I32 sum) const { return add(mul(to_f32(sum), scale), bias); }
};

// What makes bytes of floats: an activation and clamping; clamping only (no activation, or one that
// is a bound or two of it: a scale is positive, and rounding keeps the order); or saturation, see
// ImageDestination.
enum class Clamp { kActivated, kBounds, kSaturation };

static inline Clamp clamp_of(const ImageDestination& image) {
  const gossamer_activation a = image.to.activation;
  if (image.saturates) return Clamp::kSaturation;
  return a == GOSSAMER_NONE || a == GOSSAMER_RELU || a == GOSSAMER_RELU6 ? Clamp::kBounds
                                                                         : Clamp::kActivated;
}

// Floats of one output to integers, of which pack() makes bytes of a blocked image. kResidual: adds
// bytes of another one first.
template <bool kResidual, Clamp kClamp>
struct Requantize {
  Quantize quantize;
  I32 zero, least;  // of set_twice
  F32 residual_scale;
  I32 residual_zero;
  gossamer_activation activation;

  Requantize(const gossamer_blocked& y, gossamer_activation its_activation)
      : quantize({y.scale, y.zero}),
        zero(set_twice(y.zero)),
        least(set_twice(kClamp == Clamp::kBounds && its_activation != GOSSAMER_NONE ? y.zero : 0)),
        residual_scale(set(y.residual_scale)),
        residual_zero(set(y.residual_zero)),
        activation(its_activation) {
    if (kClamp == Clamp::kBounds && activation == GOSSAMER_RELU6)
      quantize.last = min(quantize.last, mul(set(6.0f), quantize.factor));
  }
  I32 operator()(F32 value, I32 residual) const {
    constexpr bool kZeros = kClamp == Clamp::kSaturation;
    if (kResidual) {
      const I32 count = kZeros ? residual : sub(residual, residual_zero);
      value = add(value, mul(to_f32(count), residual_scale));
    }
    if (kZeros) return round(mul(value, quantize.factor));
    return quantize.bounded_above(kClamp == Clamp::kBounds ? value : activate(value, activation));
  }
  I32 pack(I32 a, I32 b, I32 c, I32 d) const {
    return kClamp == Clamp::kSaturation ? pack_bytes(a, b, c, d)
                                        : pack_bytes(a, b, c, d, zero, least);
  }
};

// Calls body(kResidual, kClamp) with what a blocked result asks for, as types.
template <typename Body>
static inline void by_result(const ImageDestination& image, Body body) {
  const auto clamped = [&](auto residual) {
    switch (clamp_of(image)) {
      case Clamp::kActivated:
        return body(residual, Int<int(Clamp::kActivated)>());
      case Clamp::kBounds:
        return body(residual, Int<int(Clamp::kBounds)>());
      case Clamp::kSaturation:
        return body(residual, Int<int(Clamp::kSaturation)>());
    }
  };
  image.blocked->residual ? clamped(Int<1>()) : clamped(Int<0>());
}

// Writes sums[output][width] of a range of outputs, which begins with a multiple of four.
struct Epilogue {
  const ImageTile& x;
  const float* w_scale;
  const int32_t* wsum;
  int64_t n;
  const ImageDestination& image;

  void operator()(const int32_t* sums, Range outputs) const {
    if (image.blocked) return blocked(sums, outputs);
    if (!image.planar) return last(sums, outputs);
    by_dtype(image.to.dtype, [&](auto type) { planar<decltype(type)>(sums, outputs); });
  }

  Output output(int64_t o) const {
    if (o >= n) return Output();
    return Output(x.affine, w_scale[o], wsum[o], image.to.bias ? image.to.bias[o] : 0);
  }

 private:
  F32 activated(F32 value) const {
    return image.to.activation == GOSSAMER_NONE ? value : activate(value, image.to.activation);
  }

  void blocked(const int32_t* sums, Range outputs) const {
    by_result(image, [&](auto residual, auto clamp) {
      words<decltype(residual)::value, Clamp(decltype(clamp)::value)>(sums, outputs);
    });
  }

  template <bool kResidual, Clamp kClamp>
  void words(const int32_t* sums, Range outputs) const {
    const Requantize<kResidual, kClamp> bytes(*image.blocked, image.to.activation);
    const int64_t width = width_of(x.pixels), plane = image.to.stride,
                  count = x.pixels.end - x.pixels.begin;
    const auto* residual = reinterpret_cast<const int32_t*>(image.blocked->residual);
    for (int64_t o = outputs.begin; o < outputs.end; o += 4, sums += 4 * width) {
      const int64_t line = o / 4 * plane + x.pixels.begin;
      const Output each[4] = {output(o), output(o + 1), output(o + 2), output(o + 3)};
      for (int64_t p = 0; p < count; p += kLanes) {
        const int left = lanes_left(count, p);
        I32 r = set(0);
        if (kResidual) r = load_some(residual + line + p, left);
        const auto byte = [&](auto lane) {
          constexpr int i = decltype(lane)::value;
          return bytes(each[i](load(sums + i * width + p)), unsigned_byte(r, i));
        };
        const I32 packed =
            bytes.pack(byte(Int<0>()), byte(Int<1>()), byte(Int<2>()), byte(Int<3>()));
        store_some(static_cast<int32_t*>(image.to.y) + line + p, in_words(packed), left);
      }
    }
  }

  template <typename T>
  void planar(const int32_t* sums, Range outputs) const {
    const int64_t width = width_of(x.pixels), count = x.pixels.end - x.pixels.begin;
    for (int64_t o = outputs.begin; o < outputs.end; ++o, sums += width) {
      const Output of = output(o);
      T* y = static_cast<T*>(image.to.y) + o * image.to.stride + x.pixels.begin;
      for (int64_t p = 0; p < count; p += kLanes) {
        store_some(y + p, activated(of(load(sums + p))), lanes_left(count, p));
      }
    }
  }

  // Channels innermost.
  void last(const int32_t* sums, Range outputs) const {
    Destination to = image.to;
    to.y = static_cast<char*>(to.y) + x.pixels.begin * to.stride * element_size(to.dtype);
    write_lanes(sums, width_of(x.pixels), x.pixels.end - x.pixels.begin, n, outputs, to,
                [&](const Outputs& some) {
                  const Dequantize dequantize{some.take(w_scale), some.take(wsum)};
                  return [=](I32 sum, int64_t) {
                    return dequantize(sum, x.affine.scale, x.affine.zero);
                  };
                });
  }
};

}  // namespace GOSSAMER_ISA
}  // namespace gossamer
