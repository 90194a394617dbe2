// unblock: a blocked image of bytes to planes of floats, y = (q - zero) * scale.
//
//   q  (channels/4, pixels, 4) u8
//   y  (channels, pixels)           float32, bfloat16 or float16
//
// Tails: masked loads and stores.
// Numerics: one product, rounded once to float32 and once more to the dtype of y.

#include "epilogue.h"

namespace gossamer {
namespace GOSSAMER_ISA {

void unblock(const uint8_t* q, Affine affine, int64_t channels, int64_t pixels, Range blocks,
             gossamer_dtype dtype, void* y) {
  const F32 scale = set(affine.scale);
  const I32 zero = set(affine.zero);
  by_dtype(dtype, [&](auto type) {
    for (int64_t b = blocks.begin; b < blocks.end; ++b) {
      const int32_t* words = reinterpret_cast<const int32_t*>(q) + b * pixels;
      auto* to = static_cast<decltype(type)*>(y) + 4 * b * pixels;
      for (int64_t p = 0; p < pixels; p += kLanes) {
        const int left = lanes_left(pixels, p);
        const I32 four = load_some(words + p, left);
        const auto write = [&](int i, I32 byte) {
          if (4 * b + i >= channels) return;
          const F32 value = mul(to_f32(sub(byte, zero)), scale);
          store_some(to + i * pixels + p, value, left);
        };
        write(0, unsigned_byte(four, 0)), write(1, unsigned_byte(four, 1));
        write(2, unsigned_byte(four, 2)), write(3, unsigned_byte(four, 3));
      }
    }
  });
}

}  // namespace GOSSAMER_ISA
}  // namespace gossamer
