// depthwise.h: conv_int8 where each output reads one channel: k is the taps of a window, n the
// channels.
//
//   q       (channels/4, height, width, 4)  u8, one image
//   panels  (n/16, k/4, 16, 4)              s8, as gemm_int8 reads them: four taps of a channel a word
//   rows    [row][phase][column] words      scratch: what the tile's windows see of four channels,
//                                           padding included; a phase is every stride-th column
//   sums    [16][width] int32               scratch
//
// A tile is whole rows of the output. Its pixels fill the lanes: a tap is an offset in `rows`, so that
// each word is copied once, and not once a tap. A pixel's word holds four channels under one tap; what
// dot() multiplies are four taps of one channel: a transpose of four by four bytes in each lane. The
// squares of odd numbers leave one tap, which multiplies by itself.
//
// Copying a row fetches that of the next four channels (MobileNetV2's layers by themselves, images in L3:
// 0.75 of the time on avx2, 0.65 on avx512vnni).
//
// Registers: 4 sums, 8 words of pixels, 2 weights.
// Tails: a row's last vector is stored over by the next row; channels past the last are computed and
// not written; taps past the last are 0.
// Numerics: exact in int32.
#pragma once

#include "blocks.h"

namespace gossamer {
namespace GOSSAMER_ISA {

// Four channels of one image, as the windows of some rows of the output see them.
class Rows {
 public:
  Rows(const ImageTile& x, int32_t* words)
      : conv_(x.conv),
        shape_(depthwise_rows(x.conv, (x.pixels.end - x.pixels.begin) / x.conv.out_w)),
        top_(x.pixels.begin / x.conv.out_w * x.conv.stride_h - x.conv.pad_top),
        outside_(set(outside_of(x))),
        far_(is_far(x.conv.channels, x.conv.height * x.conv.width)),
        words_(words) {}

  void fill(const int32_t* plane) {
    for (int64_t p = 0; p < conv_.stride_w; ++p) {
      // The first column that is inside of the image, and the first behind it.
      const int64_t before = conv_.pad_left - p, after = conv_.width + before;
      const int64_t begin = before > 0 ? up_to(ceil_div(before, conv_.stride_w)) : 0;
      const int64_t end = after > 0 ? up_to(ceil_div(after, conv_.stride_w)) : 0;
      int32_t* to = words_ + p * shape_.columns;
      for (int64_t r = 0, y = top_; r < shape_.rows; ++r, ++y, to += line()) {
        if (y < 0 || y >= conv_.height || end <= begin) {
          pad(to, shape_.columns);
          continue;
        }
        if (p == 0 && far_) fetch(plane + (conv_.height + y) * conv_.width, conv_.width);
        pad(to, begin);
        copy(plane + y * conv_.width + begin * conv_.stride_w - before, end - begin, to + begin);
        pad(to + end, shape_.columns - end);
      }
    }
  }

  const int32_t* row(int64_t y) const { return words_ + y * conv_.stride_h * line(); }
  // Where a tap finds its words, from row() on.
  int64_t offset(int64_t tap) const {
    const int64_t i = tap / conv_.kernel_w * conv_.dilation_h,
                  j = tap % conv_.kernel_w * conv_.dilation_w;
    return i * line() + j % conv_.stride_w * shape_.columns + j / conv_.stride_w;
  }

 private:
  int64_t line() const { return conv_.stride_w * shape_.columns; }
  int64_t up_to(int64_t column) const { return column < shape_.columns ? column : shape_.columns; }
  void pad(int32_t* to, int64_t count) const {
    for (int64_t c = 0; c < count; c += kLanes) store_some(to + c, outside_, lanes_left(count, c));
  }
  void copy(const int32_t* from, int64_t count, int32_t* to) const {
    if (conv_.stride_w > 2) {
      for (int64_t c = 0; c < count; ++c) to[c] = from[c * conv_.stride_w];
      return;
    }
    for (int64_t c = 0; c < count; c += kLanes) {
      const int left = lanes_left(count, c);
      store_some(
          to + c,
          conv_.stride_w == 1 ? load_some(from + c, left) : load_every_other(from + 2 * c, left),
          left);
    }
  }

  const gossamer_conv& conv_;
  const DepthwiseRows shape_;
  const int64_t top_;
  const I32 outside_;
  const bool far_;
  int32_t* words_;
};

// Four taps of which `left` are there -> for each channel their word.
static inline void load_taps(const int32_t* row, const int64_t* offsets, int64_t left,
                             I32 (&words)[4]) {
#pragma GCC unroll 4
  for (int t = 0; t < 4; ++t)
    words[t] = t < left ? in_words(load(row + offsets[t])) : set(int32_t{0});
  interleave(words);
}

// A row of the output -> sums[4][width], `most` of it. kTaps: their number, or 0 for `taps`.
template <int64_t kTaps>
static inline void depthwise_row(const int32_t* row, const int64_t* offsets, int64_t taps,
                                 const int8_t* weights, int64_t count, int64_t most, int64_t width,
                                 int32_t* sums) {
  if (kTaps > 0) taps = kTaps;
  for (int64_t x = 0; x < count; x += kLanes) {
    I32 sum[4] = {set(0), set(0), set(0), set(0)};
    const int8_t* w = weights;
#pragma GCC unroll 4
    for (int64_t t = 0; t < taps - 1; t += 8, w += 8 * kPanel) {
      I32 first[4], second[4];
      load_taps(row + x, offsets + t, taps - t, first);
      load_taps(row + x, offsets + t + 4, taps - t - 4, second);
#pragma GCC unroll 4
      for (int o = 0; o < 4; ++o) {
        sum[o] =
            dot(sum[o], first[o], set_word(w + 4 * o), second[o], set_word(w + 4 * kPanel + 4 * o));
      }
    }
    if (taps % 8 == 1) {
      const I32 words = load(row + x + offsets[taps - 1]);
#pragma GCC unroll 4
      for (int o = 0; o < 4; ++o)
        sum[o] = add(sum[o], mul(unsigned_byte(words, o), set(int32_t{w[4 * o]})));
    }
    const int left = lanes_left(most, x);
#pragma GCC unroll 4
    for (int o = 0; o < 4; ++o) store_some(sums + o * width + x, sum[o], left);
  }
}

static inline void depthwise(const ImageTile& x, const gossamer_int8& w, Range panels,
                             const ImageDestination& to, void* scratch) {
  const int64_t width = width_of(x.pixels), out_w = x.conv.out_w,
                columns = round_up(ceil_div(w.k, 4), 2);
  auto* offsets = static_cast<int64_t*>(scratch);
  auto* sums = reinterpret_cast<int32_t*>(offsets + 4 * columns);
  Rows rows(x, sums + kPanel * width);
  for (int64_t t = 0; t < w.k; ++t) offsets[t] = rows.offset(t);
  const Epilogue finish{x, w.scale, w.wsum, w.n, to};
  const auto* image = reinterpret_cast<const int32_t*>(x.q);
  const auto row = w.k == 9 ? depthwise_row<9> : w.k == 25 ? depthwise_row<25> : depthwise_row<0>;
  // What is written as floats is written 16 outputs at a time.
  const int64_t group = to.blocked ? 4 : kPanel;
  const int64_t end = panels.end * kPanel < w.n ? panels.end * kPanel : w.n;
  for (int64_t first = panels.begin * kPanel; first < end; first += group) {
    const int64_t last = first + group < end ? first + group : end;
    for (int64_t o = first; o < last; o += 4) {
      rows.fill(image + o / 4 * x.conv.height * x.conv.width);
      const int8_t* weights = w.panels + (o / kPanel * columns * kPanel + o % kPanel) * 4;
      int32_t* own = sums + (o - first) * width;
      for (int64_t at = 0, y = 0; at < x.pixels.end - x.pixels.begin; at += out_w, ++y)
        row(rows.row(y), offsets, w.k, weights, out_w, width - at, width, own + at);
    }
    finish(sums, {first, last});
  }
}

}  // namespace GOSSAMER_ISA
}  // namespace gossamer
