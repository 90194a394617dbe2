// blocks.h: what becomes of the sums of output pixels, which lie in the lanes of a vector: the bytes of a
// blocked image, or floats.
#pragma once

#include "pixels.h"
#include "quantize.h"

namespace gossamer {
namespace GOSSAMER_ISA {

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

// Blocks of four outputs from fetching the residual, or else y, to writing it; a panel of dense weights has
// as many.
constexpr int64_t kBlocksAhead = 4;

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
    const int32_t* touched = kResidual ? residual : static_cast<int32_t*>(image.to.y);
    const bool far = is_far(n, plane);
    for (int64_t o = outputs.begin; o < outputs.end; o += 4, sums += 4 * width) {
      const int64_t line = o / 4 * plane + x.pixels.begin;
      if (far && o + 4 * kBlocksAhead < n) fetch(touched + line + kBlocksAhead * plane, count);
      const Output each[4] = {output(o), output(o + 1), output(o + 2), output(o + 3)};
      for (int64_t p = 0; p < count; p += kLanes) {
        const int left = lanes_left(count, p);
        I32 r = set(0);
        if (kResidual) r = load_some(residual + line + p, left);
        const auto byte = [&](auto lane) {
          constexpr int i = decltype(lane)::value;
          const I32 sum = load(sums + i * width + p);
          return bytes(kClamp == Clamp::kSaturation ? each[i].corrected(sum) : each[i](sum),
                       unsigned_byte(r, i));
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
