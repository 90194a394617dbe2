// im2col: rows[pixel][tap_h, tap_w, channel] = image[the pixel's place under it][channel], or pad.
//
//   image  height x width x channels     elements of 1, 2 or 4 bytes, channels innermost
//   rows   pixels x (kernel_h * kernel_w * channels up to 4); added channels hold pad
//
// A tap is one copy of all channels; taps of one kernel row that touch (dilation 1, channels a
// multiple of 4, no padding under them) are one copy together.
// Tails: none.
// Numerics: moves bytes only. pad is a byte: the zero point of a quantized image, 0 for floats.

#include "epilogue.h"

namespace gossamer {
namespace GOSSAMER_ISA {

void im2col(const void* image, const gossamer_conv& c, int64_t size, uint8_t pad, Range rows,
            void* out) {
  const int64_t tap = round_up(c.channels, 4) * size, filled = c.channels * size,
                line = c.width * filled;
  const bool joined = c.dilation_w == 1 && tap == filled;
  uint8_t* to = static_cast<uint8_t*>(out);
  for (int64_t pixel = rows.begin; pixel < rows.end; ++pixel) {
    const int64_t top = pixel / c.out_w * c.stride_h - c.pad_top;
    const int64_t left = pixel % c.out_w * c.stride_w - c.pad_left;
    const bool inside = left >= 0 && left + (c.kernel_w - 1) * c.dilation_w < c.width;
    for (int64_t i = 0; i < c.kernel_h; ++i) {
      const int64_t y = top + i * c.dilation_h;
      const bool row_inside = y >= 0 && y < c.height;
      const uint8_t* from = static_cast<const uint8_t*>(image) + (row_inside ? y * line : 0);
      if (!row_inside) {
        memset(to, pad, static_cast<size_t>(c.kernel_w * tap));
      } else if (inside && joined) {
        memcpy(to, from + left * filled, static_cast<size_t>(c.kernel_w * tap));
      } else {
        for (int64_t j = 0; j < c.kernel_w; ++j) {
          const int64_t x = left + j * c.dilation_w;
          const int64_t copied = x >= 0 && x < c.width ? filled : 0;
          memcpy(to + j * tap, from + x * copied, static_cast<size_t>(copied));
          memset(to + j * tap + copied, pad, static_cast<size_t>(tap - copied));
        }
      }
      to += c.kernel_w * tap;
    }
  }
}

}  // namespace GOSSAMER_ISA
}  // namespace gossamer
