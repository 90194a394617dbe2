// max_pool: the largest of each window of a blocked image: bytes are ordered as what they stand for.
//
//   q     (channels/4, height, width, 4) u8
//   line  pool_line(conv) words             scratch: the largest of each column of a row of windows
//   y     (channels/4, out_h, out_w, 4) u8  of which some rows
//
// Down the columns into a line, whose ends stay 0, the smallest: what lies outside of the image. Then
// along the line, where no tap leaves it. ResNet-50's 3 x 3 / 2, avx512vnni, one core: 81 us for the 118
// of tap by tap, whose vectors meet the ends of rows.
// Tails: masked loads and stores; behind the last column the line holds what nobody reads.
// Numerics: moves bytes only.

#include "epilogue.h"

namespace gossamer {
namespace GOSSAMER_ISA {

namespace {

// The first `count` of words that are `stride` apart; where that costs nothing, more.
I32 load_strided(const int32_t* words, int64_t stride, int count) {
  if (stride == 1) return load(words);
  return stride == 2 ? load_every_other(words, kLanes) : load_apart(words, stride, count);
}

}  // namespace

void max_pool(const uint8_t* q, const gossamer_conv& c, Range rows, uint8_t* y, void* scratch) {
  auto* line = static_cast<int32_t*>(scratch);
  memset(line, 0, static_cast<size_t>(pool_line(c)) * 4);
  for (int64_t b = 0; b < ceil_div(c.channels, 4); ++b) {
    const auto* plane = reinterpret_cast<const int32_t*>(q) + b * c.height * c.width;
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      const int64_t top = row * c.stride_h - c.pad_top;
      for (int64_t column = 0; column < c.width; column += kLanes) {
        const int left = lanes_left(c.width, column);
        I32 largest = set(int32_t{0});
        for (int64_t i = 0; i < c.kernel_h; ++i) {
          const int64_t at = top + i * c.dilation_h;
          if (at >= 0 && at < c.height)
            largest = max_bytes(largest, load_some(plane + at * c.width + column, left));
        }
        store_some(line + c.pad_left + column, largest, left);
      }
      auto* to = reinterpret_cast<int32_t*>(y) + (b * c.out_h + row) * c.out_w;
      for (int64_t column = 0; column < c.out_w; column += kLanes) {
        const int left = lanes_left(c.out_w, column);
        I32 largest = set(int32_t{0});
        for (int64_t j = 0; j < c.kernel_w; ++j) {
          const int32_t* at = line + column * c.stride_w + j * c.dilation_w;
          largest = max_bytes(largest, load_strided(at, c.stride_w, left));
        }
        store_some(to + column, largest, left);
      }
    }
  }
}

}  // namespace GOSSAMER_ISA
}  // namespace gossamer
