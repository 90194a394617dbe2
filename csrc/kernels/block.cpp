// block: an image of floats to a blocked image of bytes, q = round(x / scale) + zero.
//
//   x  (channels, pixels), planar, or (pixels, channels)   float32, bfloat16 or float16
//   q  (channels/4, pixels, 4) u8                          added channels hold the zero point
//
// Planar: four planes' bytes are joined to words, no transpose. Channels innermost: squares of kLanes
// pixels x kLanes words are transposed.
// Tails: masked loads and stores.
// Numerics: those of quantize_rows, the image being one row.

#include "quantize.h"

namespace gossamer {
namespace GOSSAMER_ISA {
namespace {

// Quantizes, and remembers a NaN or an Inf.
struct Checked {
  Quantize quantize;
  F32 bad = set(0.0f);

  I32 operator()(F32 v) {
    bad = add(bad, mul(v, set(0.0f)));
    return quantize(v);
  }
};

template <typename T>
void planes(const T* x, const FloatImage& image, Range pixels, Checked& bytes, int32_t* q) {
  const int64_t plane = image.pixels;
  for (int64_t c = 0; c < image.channels; c += 4, x += 4 * plane, q += plane) {
    const int64_t some = image.channels - c < 4 ? image.channels - c : 4;
    for (int64_t p = pixels.begin; p < pixels.end; p += kLanes) {
      const int left = lanes_left(pixels.end, p);
      I32 byte[4];
      for (int i = 0; i < 4; ++i) {
        const T* at = x + i * plane + p;
        byte[i] = i >= some ? bytes.quantize.zero : bytes(load_some(at, left));
      }
      const I32 words = in_words(pack_bytes(byte[0], byte[1], byte[2], byte[3]));
      store_some(q + p, words, left);
    }
  }
}

template <typename T>
void squares(const T* x, const FloatImage& image, Range pixels, Checked& bytes, int32_t* q) {
  constexpr int kChannels = 4 * kLanes;
  for (int64_t p = pixels.begin; p < pixels.end; p += kLanes) {
    const int left = lanes_left(pixels.end, p);
    for (int64_t c = 0; c < image.channels; c += kChannels) {
      uint8_t line[kLanes][kChannels];
      for (int r = 0; r < left; ++r) {
        const T* at = x + (p + r) * image.channels + c;
        for (int i = 0; i < kChannels; i += kLanes) {
          const int64_t some = image.channels - c - i;
          store_bytes(line[r] + i, some >= kLanes ? bytes(load(at + i))
                                   : some > 0 ? bytes(load_first(at + i, static_cast<int>(some)))
                                              : bytes.quantize.zero);
        }
      }
      I32 square[kLanes];
      for (int r = 0; r < kLanes; ++r) square[r] = r < left ? load_words(line[r]) : set(0);
      transpose(square);
      const int64_t blocks = ceil_div(image.channels - c, 4);
      for (int64_t i = 0; i < blocks && i < kLanes; ++i) {
        int32_t* to = q + (c / 4 + i) * image.pixels + p;
        store_some(to, square[i], left);
      }
    }
  }
}

}  // namespace

Affine block(const FloatImage& x, Affine given, Range pixels, uint8_t* q) {
  Affine result = given;
  by_dtype(x.dtype, [&](auto type) {
    const auto* data = static_cast<const decltype(type)*>(x.x);
    if (given.scale == 0) result = own_range(data, x.channels * x.pixels);
    // Of an ill image any bytes will do.
    Checked bytes{Quantize(result.scale == result.scale ? result : Affine{1, 0})};
    auto* words = reinterpret_cast<int32_t*>(q);
    x.planar ? planes(data, x, pixels, bytes, words) : squares(data, x, pixels, bytes, words);
    const float nan = reduce_add(bytes.bad);
    if (nan != 0) result = {nan, 0};
  });
  return result;
}

}  // namespace GOSSAMER_ISA
}  // namespace gossamer
