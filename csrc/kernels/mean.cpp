// mean: of all pixels of each channel of a blocked image, y = (sum - pixels * zero) * (scale / pixels).
//
//   q  (channels/4, pixels, 4) u8
//   y  (channels) float
//
// Four sums of kLanes pixels each; those of kAtOnce pixels are added up as floats, which is exact.
// Tails: a masked load; lanes past the last pixel add 0.
// Numerics: the sum is exact, and rounded once, from double.

#include "epilogue.h"

namespace gossamer {
namespace GOSSAMER_ISA {

// 255 times as many are less than 2^24.
constexpr int64_t kAtOnce = 65536;

void mean(const uint8_t* q, Affine affine, int64_t channels, int64_t pixels, Range blocks,
          float* y) {
  const double step = static_cast<double>(affine.scale) / static_cast<double>(pixels);
  for (int64_t b = blocks.begin; b < blocks.end; ++b) {
    const int32_t* words = reinterpret_cast<const int32_t*>(q) + b * pixels;
    int64_t sums[4] = {};
    for (int64_t begin = 0; begin < pixels; begin += kAtOnce) {
      const int64_t end = begin + kAtOnce < pixels ? begin + kAtOnce : pixels;
      I32 sum[4];
      for (I32& s : sum) s = set(int32_t{0});
      for (int64_t p = begin; p < end; p += kLanes) {
        const I32 four = load_some(words + p, lanes_left(end, p));
        for (int i = 0; i < 4; ++i) sum[i] = add(sum[i], unsigned_byte(four, i));
      }
      for (int i = 0; i < 4; ++i) sums[i] += static_cast<int64_t>(reduce_add(to_f32(sum[i])));
    }
    for (int i = 0; i < 4 && 4 * b + i < channels; ++i)
      y[4 * b + i] = static_cast<float>(static_cast<double>(sums[i] - pixels * affine.zero) * step);
  }
}

}  // namespace GOSSAMER_ISA
}  // namespace gossamer
