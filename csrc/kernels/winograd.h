// winograd.h: conv_int8 where a 3x3 kernel goes on by one pixel, by winograd_maps.h: the same sums for a
// quarter of the products, which have 16 bits and not 8.
//
//   q       (channels/4, height, width, 4)     u8, x.images of them
//   panels  (n/16, k/4, 16, 4)                 s8, as gemm_int8 reads them
//   strip   [row][column][channels/4] words    scratch: what the tiles of an image see of it
//   v       [block][36][tile][2 channels]      scratch: pixels, mapped
//   u       [36][2 channels][wide]             scratch: weights of a block of channels, mapped
//   m       [36][tile][wide] int32             scratch: sums of u * v
//   y       [image][pixel][wide] int32         scratch: sums of output pixels
//   sums    [16][width] int32                  scratch: those of a panel
//
// Outputs fill the lanes, two channels each, and pixels are broadcast: two vectors of outputs (`wide` of
// them) x kWinogradRows tiles stay in registers, and tiles need not fill a vector. Mapped weights
// would be eight times as large: they are made anew for each unit, which takes as long as two to four tiles
// do, and a unit has up to 64. Where weights are cold the next block's are fetched meanwhile.
//
// Products for the 64 of dot(): 16 in vpmaddwd, so that 36 are 0.42 of what 144 take (avx2, many
// channels, all of 4 x 4 pixels there); 32 in vpdpwssd, 0.6 (avx512vnni). WinogradCost tells when it pays.
// Tails: pixels past the image are computed and not written; channels past the last are 0.
// Numerics: see winograd_maps.h.
#pragma once

#include "blocks.h"
#include "winograd_maps.h"

namespace gossamer {
namespace GOSSAMER_ISA {

// Panels of outputs that meet: two vectors, or one panel.
constexpr int kPanels = 2 * kLanes > kPanel ? 2 * kLanes / kPanel : 1;
static_assert(kExactBlocks % kWinogradBlocks == 0, "exact sums end with a block of channels");

// m[tile][P vectors] (+)= u * v of R tiles at one position.
template <int R, int P, bool kFirst>
void multiply_tiles(const int32_t* v, const int32_t* u, int64_t pairs, int32_t* m) {
  I32 sum[R][P];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p)
      sum[r][p] = kFirst ? set(int32_t{0}) : load(m + (r * P + p) * kLanes);
  }
  for (int64_t i = 0; i < pairs; ++i, u += P * kLanes) {
    I32 w[P];
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p) w[p] = load(u + p * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const I32 x = set_word(v + r * pairs + i);
#pragma GCC unroll 2
      for (int p = 0; p < P; ++p) sum[r][p] = dot_halves(sum[r][p], x, w[p]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int p = 0; p < P; ++p) store(m + (r * P + p) * kLanes, sum[r][p]);
  }
}

// The tiles of a unit: of some rows of one image, or of all rows of several.
class Winograd {
 public:
  Winograd(const ImageTile& x, void* scratch)
      : x_(x),
        conv_(x.conv),
        top_(x.pixels.begin / conv_.out_w),
        height_((x.pixels.end - x.pixels.begin) / conv_.out_w),
        rows_(ceil_div(height_, kOut)),
        columns_(ceil_div(conv_.out_w, kOut)),
        tiles_(x.images * rows_ * columns_),
        blocks_(ceil_div(conv_.channels, 4)),
        columns_seen_(columns_ * kOut + kIn - kOut),
        line_(round_up(blocks_, kLanes)),
        at_(winograd_scratch(conv_, x.images, height_)),
        words_(static_cast<int32_t*>(scratch)) {}

  // q -> v.
  void pixels() const {
    const int64_t plane = conv_.height * conv_.width;
    for (int64_t i = 0; i < x_.images; ++i) {
      lay_out(reinterpret_cast<const int32_t*>(x_.q) + i * blocks_ * plane);
      for (int64_t r = 0; r < rows_; ++r) {
        for (int64_t b = 0; b < blocks_; b += kLanes)
          map_row<0>(i * rows_ + r, b), map_row<1>(i * rows_ + r, b);
      }
    }
  }

  // v, weights -> y, of P vectors of outputs.
  template <int P>
  void outputs(const int8_t* panels) const {
    constexpr int64_t kWide = P * kLanes;
    for (int64_t b = 0; b < blocks_; b += kWinogradBlocks) {
      const int64_t end = b + count(b);
      for (int64_t i = b; i < end; ++i)
        for (int64_t o = 0; o < kWide; o += kLanes) map_weight(panels, b, i, o, kWide);
      b % kExactBlocks == 0 ? multiply<P, true>(b) : multiply<P, false>(b);
      if (end < blocks_ && end % kExactBlocks != 0) continue;
      for (int64_t t = 0; t < tiles_; ++t)
        for (int64_t o = 0; o < kWide; o += kLanes) map_tile(t, o, kWide, end > kExactBlocks);
    }
  }

  // y -> sums, of one panel of `wide` outputs.
  const int32_t* sums(int64_t image, int64_t panel, int64_t wide) const {
    const int64_t width = width_of(x_.pixels);
    const int32_t* y = words_ + at_.y + image * width * wide + panel * kPanel;
    int32_t* sums = words_ + at_.sums;
    for (int64_t i = 0; i < width; i += kLanes) {
      for (int64_t o = 0; o < kPanel; o += kLanes) {
        I32 square[kLanes];
        for (int64_t j = 0; j < kLanes; ++j) square[j] = load(y + (i + j) * wide + o);
        transpose(square);
        for (int64_t j = 0; j < kLanes; ++j) store(sums + (o + j) * width + i, square[j]);
      }
    }
    return sums;
  }

 private:
  // Blocks of four channels in the block of them that begins at b.
  int64_t count(int64_t b) const {
    return blocks_ - b < kWinogradBlocks ? blocks_ - b : kWinogradBlocks;
  }
  // From a position to the next: not by a power of two, which would share a set of L1.
  int64_t v_position(int64_t b) const { return tiles_ * 2 * count(b) + 16; }
  int64_t u_position(int64_t b, int64_t wide) const { return 2 * count(b) * wide + 16; }
  int32_t* v(int64_t b) const { return words_ + at_.v + kPositions * (2 * tiles_ + 1) * b; }

  // An image -> strip.
  void lay_out(const int32_t* image) const {
    const I32 outside = set(outside_of(x_));
    int32_t* to = words_ + at_.strip;
    for (int64_t r = 0; r < rows_ * kOut + kIn - kOut; ++r, to += columns_seen_ * line_) {
      for (int64_t i = 0; i < columns_seen_ * line_; i += kLanes) store(to + i, outside);
      const int64_t row = top_ + r - conv_.pad_top;
      if (row >= 0 && row < conv_.height) copy(image + row * conv_.width, to);
    }
  }

  // Of channels that fill up a vector: 0.
  void copy(const int32_t* row, int32_t* to) const {
    const int64_t plane = conv_.height * conv_.width, room = columns_seen_ - conv_.pad_left,
                  columns = conv_.width < room ? conv_.width : room;
    for (int64_t b = 0; b < blocks_; b += kLanes, row += kLanes * plane) {
      const int there = lanes_left(blocks_, b);
      for (int64_t i = 0; i < columns; i += kLanes) {
        const int left = lanes_left(columns, i);
        I32 square[kLanes];
        for (int j = 0; j < kLanes; ++j)
          square[j] = j < there ? load_some(row + j * plane + i, left) : set(int32_t{0});
        transpose(square);
        for (int j = 0; j < left; ++j) store(to + (conv_.pad_left + i + j) * line_ + b, square[j]);
      }
    }
  }

  // Strip -> v, of a row of tiles and kLanes words of channels from b on, whose bytes 0 and 2 (half 0) or
  // 1 and 3 (half 1) are a pair.
  template <int kHalf>
  void map_row(int64_t row, int64_t b) const {
    const int32_t* from = words_ + at_.strip + row % rows_ * kOut * columns_seen_ * line_ + b;
    int32_t* mapped = words_ + at_.mapped;
    I16 d[kIn], to[kIn];
    for (int64_t i = 0; i < columns_seen_; ++i) {
      for (int j = 0; j < kIn; ++j) {
        const I16& bytes = halves(from + (j * columns_seen_ + i) * line_);
        d[j] = (kHalf ? bytes >> 8 : bytes) & 255;
      }
      map_pixels(d, to);
      for (int j = 0; j < kIn; ++j) halves(mapped + (i * kIn + j) * kLanes) = to[j];
    }
    const int64_t start = b / kWinogradBlocks * kWinogradBlocks, blocks = count(start);
    const int left = lanes_left(start + blocks, b);
    const int64_t position = v_position(start);
    int32_t* v = this->v(start) + row * columns_ * 2 * blocks + kHalf * blocks + b - start;
    for (int64_t t = 0; t < columns_; ++t, mapped += kOut * kIn * kLanes, v += 2 * blocks) {
      for (int i = 0; i < kIn; ++i) {
        for (int j = 0; j < kIn; ++j) d[j] = halves(mapped + (j * kIn + i) * kLanes);
        map_pixels(d, to);
        for (int j = 0; j < kIn; ++j) store_some(v + (i * kIn + j) * position, to[j], left);
      }
    }
  }

  // A panel's word of four channels, block i, -> u of the block of channels that begins at b.
  void map_weight(const int8_t* panels, int64_t b, int64_t i, int64_t output, int64_t wide) const {
    const int64_t tap = blocks_ * kPanel * 4, panel = round_up(9 * blocks_, 2) * kPanel * 4;
    const int64_t next = b + kWinogradBlocks < blocks_
                             ? kWinogradBlocks * kPanel * 4
                             : ceil_div(wide, kPanel) * panel - b * kPanel * 4,
                  ahead = x_.cold ? next : 0;
    const int8_t* from = panels + output / kPanel * panel + (i * kPanel + output % kPanel) * 4;
    I16 g[9];
    for (int t = 0; t < 9; ++t, from += tap) {
      g[t] = halves(reinterpret_cast<const int32_t*>(from));
      prefetch(from + ahead);
    }
    for (int half = 0; half < 2; ++half) {
      I16 of[9], rows[3][kIn], to[kIn];
      for (int t = 0; t < 9; ++t) of[t] = (half ? g[t] : g[t] << 8) >> 8;
      for (int t = 0; t < 3; ++t) map_weights(of[t], of[3 + t], of[6 + t], rows[t]);
      const int64_t position = u_position(b, wide);
      int32_t* u = words_ + at_.u + (half * count(b) + i - b) * wide + output;
      for (int j = 0; j < kIn; ++j) {
        map_weights(rows[0][j], rows[1][j], rows[2][j], to);
        for (int l = 0; l < kIn; ++l) halves(u + (j * kIn + l) * position) = to[l];
      }
    }
  }

  // v, u -> m, or to be added to m.
  template <int P, bool kFirst>
  void multiply(int64_t b) const {
    constexpr int64_t kWide = P * kLanes;
    const int64_t pairs = 2 * count(b);
    const int32_t *v = this->v(b), *u = words_ + at_.u;
    int32_t* m = words_ + at_.m;
    for (int i = 0; i < kPositions; ++i, v += v_position(b), u += u_position(b, kWide)) {
      for (int64_t t = 0, groups = ceil_div(tiles_, kWinogradRows); t < tiles_; --groups) {
        const int64_t some = ceil_div(tiles_ - t, groups);
        by_count<kWinogradRows>(some, [&](auto r) {
          multiply_tiles<decltype(r)::value, P, kFirst>(v + t * pairs, u, pairs, m);
        });
        m += some * kWide;
        t += some;
      }
    }
  }

  // m -> y, or to be added to y, of a tile and kLanes outputs.
  void map_tile(int64_t tile, int64_t output, int64_t wide, bool more) const {
    const int32_t* m = words_ + at_.m + tile * wide + output;
    I32 half[kOut][kIn];
    for (int j = 0; j < kIn; ++j) {
      I32 from[kIn], to[kOut];
      for (int i = 0; i < kIn; ++i) from[i] = load(m + (i * kIn + j) * tiles_ * wide);
      map_sums(from, to);
      for (int i = 0; i < kOut; ++i) half[i][j] = to[i];
    }
    const int64_t image = tile / (rows_ * columns_), row = tile / columns_ % rows_ * kOut,
                  column = tile % columns_ * kOut;
    int32_t* y =
        words_ + at_.y + (image * width_of(x_.pixels) + row * conv_.out_w + column) * wide + output;
#pragma GCC unroll 4
    for (int i = 0; i < kOut; ++i) {
      if (row + i >= height_) break;
      I32 to[kOut];
      map_sums(half[i], to);
#pragma GCC unroll 4
      for (int j = 0; j < kOut; ++j) {
        if (column + j >= conv_.out_w) break;
        const I32 sum = pixel_of(to[j], i, j);
        int32_t* at = y + (i * conv_.out_w + j) * wide;
        store(at, more ? add(load(at), sum) : sum);
      }
    }
  }

  const ImageTile& x_;
  const gossamer_conv& conv_;
  int64_t top_, height_;            // rows of the output
  int64_t rows_, columns_, tiles_;  // rows and columns of an image's tiles; all tiles
  int64_t blocks_;                  // words of four channels
  int64_t columns_seen_, line_;     // of the strip; its words a pixel
  WinogradScratch at_;
  int32_t* words_;
};

void winograd(const ImageTile& x, const gossamer_int8& w, Range panels, const ImageDestination& to,
              void* scratch) {
  const Winograd unit(x, scratch);
  if (!x.gathered) unit.pixels();
  for (int64_t p = panels.begin; p < panels.end;) {
    const int64_t left = panels.end - p, some = left < kPanels ? left : kPanels;
    by_count<kPanels>(some, [&](auto count) {
      constexpr int P = decltype(count)::value * kPanel / kLanes;
      unit.outputs<P>(w.panels + p * round_up(w.k / 4, 2) * kPanel * 4);
    });
    for (int64_t i = 0; i < some; ++i, ++p) {
      const Range outputs{p * kPanel, w.n < (p + 1) * kPanel ? w.n : (p + 1) * kPanel};
      for (int64_t image = 0; image < x.images; ++image) {
        gossamer_blocked blocked{};
        const ImageDestination its = of_image(to, image, blocked);
        Epilogue{x, w.scale, w.wsum, w.n, its}(unit.sums(image, i, some * kPanel), outputs);
      }
    }
  }
}

}  // namespace GOSSAMER_ISA
}  // namespace gossamer
