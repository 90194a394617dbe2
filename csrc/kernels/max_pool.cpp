// max_pool: the largest of each window of a blocked image: bytes are ordered as what they stand for.
//
//   q  (channels/4, height, width, 4) u8
//   y  (channels/4, out_h, out_w, 4) u8    of a range of its pixels, at most 64
//
// Tap by tap, y takes the larger; outside of the image is 0, the smallest.
// Tails: masked loads and stores.
// Numerics: moves bytes only.

#include "pixels.h"

namespace gossamer {
namespace GOSSAMER_ISA {

void max_pool(const uint8_t* q, const gossamer_conv& c, Range pixels, uint8_t* y) {
  const Window window(c, pixels);
  const int64_t blocks = ceil_div(c.channels, 4), plane = c.out_h * c.out_w,
                count = pixels.end - pixels.begin;
  const auto* image = reinterpret_cast<const int32_t*>(q);
  for (int v = 0; v * kLanes < count; ++v) {
    const int left = lanes_left(count, v * kLanes);
    int32_t* to = reinterpret_cast<int32_t*>(y) + pixels.begin + v * kLanes;
    for (int64_t i = 0; i < c.kernel_h; ++i) {
      for (int64_t j = 0; j < c.kernel_w; ++j) {
        window.each_block(i, j, v, image, blocks, 0, [&](int64_t b, I32 words) {
          int32_t* at = to + b * plane;
          if (i + j > 0) words = max_bytes(words, load_some(at, left));
          store_some(at, words, left);
        });
      }
    }
  }
}

}  // namespace GOSSAMER_ISA
}  // namespace gossamer
