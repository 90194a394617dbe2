// pixels.h: what kernels read of blocked images; what they write is blocks.h. Output pixels lie in the lanes of a vector: a
// panel is [column][width] 32-bit words, a column four channels under one tap, width the pixels of
// the tile rounded up to kLanes.
#pragma once

#include "lanes.h"

namespace gossamer {
namespace GOSSAMER_ISA {

constexpr int kSparseVectors = sparse_pixels(kLanes) / kLanes;
// Of a window: those of a dense convolution's tile, or of a sparse one's.
constexpr int64_t kDensePixels = round_up(kMaxPixels + kRestPixels, 16);
constexpr int64_t kWindowPixels = kDensePixels > sparse_pixels(kLanes) ? kDensePixels
                                                                       : sparse_pixels(kLanes);

// Words from fetching a line of an image to reading it: planes lie KB apart, where the hardware does not
// follow.
constexpr int64_t kWordsAhead = 32;
// Lines are fetched of images larger than this: what a layer has just written lies in L2 if it is small.
// ResNet-50's layers by themselves, their images in L3: 1x4 at 90 % 0.90 of the time on avx2 and 0.83 on
// avx512vnni, dense 0.94. Within the net, where L2 has 1 MB: 0.95 to 1. Where small images were fetched
// too, one image of MobileNetV2 took 1.03 on avx2.
constexpr int64_t kWarmWords = 1 << 16;

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
  // handed to take(block, words); `outside` where there is no pixel. Lines `ahead` words behind them
  // are fetched.
  template <typename Take>
  void each_block(int64_t tap_row, int64_t tap_column, int v, const int32_t* image, int64_t blocks,
                  int32_t outside, int64_t ahead, Take take) const {
    const int64_t plane = conv_.height * conv_.width;
    const Row& row = rows_[v];
    const int64_t top = row.top + tap_row * conv_.dilation_h,
                  left = row.left + tap_column * conv_.dilation_w,
                  right = left + (kLanes - 1) * conv_.stride_w;
    if (row.whole && top >= 0 && top < conv_.height && left >= 0 && right < conv_.width) {
      image += top * conv_.width + left;
      for (int64_t b = 0; b < blocks; ++b, image += plane) {
        if (ahead) prefetch(image + ahead);
        take(b, conv_.stride_w == 1 ? load(image) : load_every_other(image, kLanes));
      }
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
      image += place[0];
      for (int64_t b = 0; b < blocks; ++b, image += plane) {
        if (ahead) prefetch(image + ahead);
        take(b, add(load_where(image, inside), fill));
      }
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

// Whether an image is too large to be in L2 still.
static inline bool is_far(int64_t channels, int64_t plane) {
  return ceil_div(channels, 4) * plane > kWarmWords;
}

// The lines of some words.
static inline void fetch(const int32_t* words, int64_t count) {
  for (int64_t i = 0; i < count; i += 16) prefetch(words + i);
}

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
  // What is another thread's stays in its cache.
  const int64_t reach = x.more ? c.out_h * c.out_w : x.pixels.end,
                end = is_far(c.channels, c.height * c.width) ? reach : 0;
  for (int64_t i = 0; i < c.kernel_h; ++i) {
    for (int64_t j = 0; j < c.kernel_w; ++j, panel += blocks * width) {
      for (int v = 0; v * kLanes < width; ++v) {
        const int64_t soon = x.pixels.begin + v * kLanes + kWordsAhead;
        const int64_t ahead = soon < end ? kWordsAhead : 0;
        window.each_block(i, j, v, image, blocks, outside, ahead, [&](int64_t b, I32 words) {
          store(panel + b * width + v * kLanes, words);
        });
      }
    }
  }
}

}  // namespace GOSSAMER_ISA
}  // namespace gossamer
