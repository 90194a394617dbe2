// planes.h: the rows of a convolution's product are output pixels. They go from the images into the
// lanes of a panel [column][T] as they lie, and from the sums of a chunk into y.
//
//   images  (images, channels, height, width) if planar, else (images, height, width, channels)
//   column  (tap row, tap column, channel up to 4)
//   T       kLanes, twice that, ... or 64 neighbouring output pixels, counted over all images: a
//           tile goes on from one image to the next, so that 16 images of 7 x 7 fill 12.25 tiles
//           of 64 and not 16
//
// Planar: what a tap sees of T pixels are a few pieces of neighbours, the same ones in the plane of
// each channel; a piece is one load and one store. Each store also writes the zeros behind its
// piece, and the next piece is written over them: no lane is cleared first, and a piece of 7 pixels
// costs as much as one of 16. Channels innermost: squares of pixels x channels are transposed.
//
// Rejected: padded copies of the images, in which a tap is an offset. They are copied once and not
// once a tap, but what the inner loop then reads is not aligned: two lines of L1 a vector.
#pragma once

#include "lanes.h"

namespace gossamer {
namespace GOSSAMER_ISA {

// Neighbouring pixels of one row of the output, and the lanes that they have.
struct Segment {
  int64_t lane, count;
  int64_t image, y, x;
};

// What the taps of a convolution see of a tile.
class Pixels {
 public:
  Pixels(const FloatTile& x, int64_t lanes)
      : conv_(*x.conv), rows_(x.rows), lanes_(lanes), planar_(x.planar) {
    const int64_t plane = conv_.out_h * conv_.out_w;
    Segment s{0, 0, x.first / plane, x.first % plane / conv_.out_w, x.first % conv_.out_w};
    for (; s.lane < x.rows; s.lane += s.count, s.x = 0) {
      s.count = conv_.out_w - s.x < x.rows - s.lane ? conv_.out_w - s.x : x.rows - s.lane;
      segments_[count_++] = s;
      if (++s.y == conv_.out_h) s.y = 0, ++s.image;
    }
  }

  // images -> panel[column][lanes].
  template <typename T>
  void pack(const T* images, float* panel) const {
    const int64_t channels = round_up(conv_.channels, 4);
    for (int64_t i = 0; i < conv_.kernel_h; ++i) {
      for (int64_t j = 0; j < conv_.kernel_w; ++j, panel += channels * lanes_) {
        planar_ ? pack_planes(images, i, j, panel) : pack_channels(images, i, j, panel);
        memset(panel + conv_.channels * lanes_, 0,
               static_cast<size_t>((channels - conv_.channels) * lanes_) * 4);
      }
    }
  }

 private:
  // `count` elements, then zeros, for the lanes from `lane` on.
  struct Piece {
    int64_t lane, offset, count;
  };

  struct Pieces {
    Piece list[kMaxLanes];
    int64_t count = 0, covered = 0;

    void zeros(int64_t end) {
      for (; covered < end; covered += kLanes) list[count++] = {covered, 0, 0};
    }
    // Elements `stride` apart; those that continue the last piece fill it up.
    void add(int64_t lane, int64_t offset, int64_t left, int64_t stride) {
      while (left > 0) {
        Piece* last = list + count - 1;
        if (count == 0 || last->count == 0 || last->count == kLanes ||
            last->lane + last->count != lane || last->offset + last->count * stride != offset) {
          zeros(lane);
          last = list + count++;
          *last = {lane, offset, 0};
          covered = lane + kLanes;
        }
        const int64_t free = kLanes - last->count, taken = left < free ? left : free;
        last->count += taken;
        lane += taken;
        offset += taken * stride;
        left -= taken;
      }
    }
  };

  // Calls body(lane, offset, count) for the pixels whose tap (i, j) is inside of their image; an
  // element is `channel` elements from its neighbour, an image `image`.
  template <typename Body>
  void each_inside(int64_t i, int64_t j, int64_t image, int64_t channel, Body body) const {
    for (int64_t s = 0; s < count_; ++s) {
      const Segment& at = segments_[s];
      const int64_t y = at.y * conv_.stride_h - conv_.pad_top + i * conv_.dilation_h;
      const int64_t x = at.x * conv_.stride_w - conv_.pad_left + j * conv_.dilation_w;
      if (y < 0 || y >= conv_.height) continue;
      int64_t begin = 0, end = at.count;
      if (x < 0) begin = ceil_div(-x, conv_.stride_w);
      if (x + (end - 1) * conv_.stride_w >= conv_.width)
        end = x < conv_.width ? ceil_div(conv_.width - x, conv_.stride_w) : 0;
      if (begin < end)
        body(at.lane + begin,
             at.image * image + (y * conv_.width + x + begin * conv_.stride_w) * channel,
             end - begin);
    }
  }

  template <typename T>
  void pack_planes(const T* images, int64_t i, int64_t j, float* panel) const {
    const int64_t plane = conv_.height * conv_.width, stride = conv_.stride_w;
    Pieces pieces;
    each_inside(i, j, conv_.channels * plane, 1, [&](int64_t lane, int64_t offset, int64_t count) {
      pieces.add(lane, offset, count, stride);
    });
    pieces.zeros(lanes_);
    // What a store writes behind its line belongs to what is written next: another line, or the sums.
    for (int64_t c = 0; c < conv_.channels; ++c, images += plane, panel += lanes_) {
      for (int64_t p = 0; p < pieces.count; ++p) {
        const Piece& piece = pieces.list[p];
        const T* from = images + piece.offset;
        store(panel + piece.lane, stride == 1 ? load_some(from, static_cast<int>(piece.count))
                                  : stride == 2
                                      ? load_every_other(from, static_cast<int>(piece.count))
                                      : load_apart(from, stride, piece.count));
      }
    }
  }

  template <typename T>
  static F32 load_apart(const T* from, int64_t stride, int64_t count) {
    T line[kLanes] = {};
    for (int64_t i = 0; i < count; ++i) line[i] = from[i * stride];
    return load(line);
  }

  template <typename T>
  void pack_channels(const T* images, int64_t i, int64_t j, float* panel) const {
    const T* pixels[kMaxLanes] = {};
    const int64_t channels = conv_.channels;
    each_inside(i, j, conv_.height * conv_.width * channels, channels,
                [&](int64_t lane, int64_t offset, int64_t count) {
                  for (int64_t p = 0; p < count; ++p)
                    pixels[lane + p] = images + offset + p * conv_.stride_w * channels;
                });
    pack_lanes(rows_, channels, lanes_, reinterpret_cast<int32_t*>(panel),
               [&](int64_t lane, int64_t channel, int count) {
                 const T* at = pixels[lane];
                 if (!at) return set(int32_t{0});
                 return as_i32(load_some(at + channel, count));
               });
  }

  const gossamer_conv& conv_;
  int64_t rows_, lanes_, count_ = 0;
  bool planar_;
  Segment segments_[kMaxLanes];
};

// Writes sums[output][T] of a chunk into the planes of y; value(sums, lane) as in write_lanes.
template <typename Value>
static inline void write_planes(const float* sums, int64_t lanes, int64_t rows, int64_t n,
                                Range range, const Destination& to, Value value) {
  by_dtype(to.dtype, [&](auto type) {
    using T = decltype(type);
    for (int64_t lane = 0, count; lane < rows; lane += count) {
      const int64_t image = (to.first + lane) / to.plane, pixel = (to.first + lane) % to.plane;
      count = to.plane - pixel < rows - lane ? to.plane - pixel : rows - lane;
      T* y = static_cast<T*>(to.y) + (image * n + range.begin) * to.plane + pixel;
      const float* from = sums + lane;
      for (int64_t o = range.begin; o < range.end; ++o, y += to.plane, from += lanes) {
        const F32 bias = set(to.bias ? to.bias[o] : 0.0f);
        for (int64_t i = 0; i < count; i += kLanes) {
          const int left = lanes_left(count, i);
          F32 v = add(value(load_some(from + i, left), lane + i), bias);
          if (to.activation != GOSSAMER_NONE) v = activate(v, to.activation);
          store_some(y + i, v, left);
        }
      }
    }
  });
}

}  // namespace GOSSAMER_ISA
}  // namespace gossamer
