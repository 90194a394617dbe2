// planes.h: the rows of a convolution's product are output pixels. They go from the images into the
// lanes of a panel [column][T] as they lie, and (plane_writer.h) from the sums of a chunk into y.
//
//   images  (images, channels, height, width) if planar, else (images, height, width, channels)
//   column  (tap row, tap column, channel up to 4)
//   T       kLanes, twice that, ... or 64 neighbouring output pixels, counted over all images: a
//           tile goes on from one image to the next, so that 16 images of 7 x 7 fill 12.25 tiles
//           of 64 and not 16
//
// Planar: what a tap sees of T pixels are a few pieces, the same ones in the plane of each channel; a
// piece is one masked load and one store. Where rows of y follow each other as those of x do (stride
// 1, padded to the same width), a piece is a vector of lanes, however many rows it spans. Elsewhere a
// store also writes zeros behind its piece, and the next piece is written over them: no lane is
// cleared first, and a piece of 7 pixels costs as much as one of 16. Channels innermost: squares of
// pixels x channels are transposed.
//
// A tile fetches the lines that the next one reads and writes: in planes of 56 x 56 they lie 12 KB apart,
// where the hardware does not follow (ResNet-50 at 90 % zeros: 3 % less time, on AVX2 6). Unless that
// one is another thread's: where two cores do not share an L3, a line that both touch costs 0.2 us,
// and a layer of 256 -> 1024 channels at 14 x 14 took longer on two threads than on one. A plane that
// is a tile fetches the planes behind it. With a stride, a line serves few lanes of a panel: there
// what is read is fetched planes ahead (layers with stride 2, by themselves: 0.75 to 0.9 of the time).
//
// Rejected: padded copies of the images, in which a tap is an offset. They are copied once and not
// once a tap, but what the inner loop then reads is not aligned: two lines of L1 a vector.
#pragma once

#include "lanes.h"

namespace gossamer {
namespace GOSSAMER_ISA {

// Of 4, 12, 24 and 40 the one that is best, or nearly so, on AVX2 and AVX-512.
constexpr int64_t kPlanesAhead = 40;

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
    fetches_ = x.more || x.rows >= plane;
    Segment s{0, 0, x.first / plane, x.first % plane / conv_.out_w, x.first % conv_.out_w};
    for (; s.lane < x.rows; s.lane += s.count, s.x = 0) {
      s.count = conv_.out_w - s.x < x.rows - s.lane ? conv_.out_w - s.x : x.rows - s.lane;
      segments_[count_++] = s;
      if (++s.y == conv_.out_h) s.y = 0, ++s.image;
    }
  }

  // Some columns of images -> panel[columns][lanes]; up to kLanes floats behind it are overwritten.
  template <typename T>
  void pack(const T* images, Range columns, float* panel) const {
    const int64_t channels = round_up(conv_.channels, 4);
    for (int64_t column = columns.begin, next; column < columns.end; column = next) {
      const int64_t tap = column / channels, i = tap / conv_.kernel_w, j = tap % conv_.kernel_w;
      next = (tap + 1) * channels < columns.end ? (tap + 1) * channels : columns.end;
      const int64_t first = column - tap * channels, last = next - tap * channels;
      const Range real{first, last < conv_.channels ? last : conv_.channels};
      if (real.begin < real.end) {
        planar_ ? pack_planes(images, i, j, real, panel) : pack_channels(images, i, j, real, panel);
        panel += (real.end - real.begin) * lanes_;
      }
      const int64_t zeros = last - (real.end > first ? real.end : first);
      memset(panel, 0, static_cast<size_t>(zeros * lanes_) * 4);
      panel += zeros * lanes_;
    }
  }

 private:
  // A vector of lanes, from `lane` on: of side by side elements those that are `inside`, zeros for
  // the others; of elements that lie apart the first `count`, then zeros.
  struct Piece {
    int64_t lane, offset, count;
    int32_t inside[kLanes];

    void take(int64_t first, int64_t more) {
      for (int64_t i = first; i < first + more; ++i) inside[i] = -1;
      count += more;
    }
  };

  struct Pieces {
    Piece list[kMaxLanes];
    int64_t count = 0, covered = 0;

    Piece* begin(int64_t lane, int64_t offset) {
      covered = lane + kLanes;
      list[count] = {lane, offset, 0, {}};
      return list + count++;
    }
    void zeros(int64_t end) {
      while (covered < end) begin(covered, 0);
    }
    // Elements `stride` apart. Those that lie in memory as they do in the last piece go into it,
    // side by side also behind a gap: the pixels of two rows, of which a tap misses the ends.
    void add(int64_t lane, int64_t offset, int64_t left, int64_t stride) {
      while (left > 0) {
        Piece* last = count > 0 ? list + count - 1 : nullptr;
        int64_t place = last ? lane - last->lane : kLanes;
        const bool joins = place < kLanes && offset == last->offset + place * stride &&
                           last->count > 0 && (stride == 1 || place == last->count);
        if (!joins) {
          const int64_t whole = lane / kLanes * kLanes;
          const int64_t start = stride > 1 || covered > whole ? lane : whole;
          zeros(start);
          place = lane - start;
          last = begin(start, offset - place * stride);
        }
        const int64_t taken = left < kLanes - place ? left : kLanes - place;
        last->take(place, taken);
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
  void pack_planes(const T* images, int64_t i, int64_t j, Range channels, float* panel) const {
    const int64_t plane = conv_.height * conv_.width, stride = conv_.stride_w;
    Pieces pieces;
    each_inside(i, j, conv_.channels * plane, 1, [&](int64_t lane, int64_t offset, int64_t count) {
      pieces.add(lane, offset, count, stride);
    });
    pieces.zeros(lanes_);
    images += channels.begin * plane;
    const int64_t count = channels.end - channels.begin;
    const bool fetch = fetches_ && i == conv_.kernel_h - 1 && j == conv_.kernel_w - 1;
    if (stride == 1 && pieces.count * kLanes == lanes_)
      return by_vectors(lanes_, [&](auto n) {
        constexpr int N = decltype(n)::value;
        fetch ? copy_vectors<N, true>(images, plane, pieces, count, panel)
              : copy_vectors<N, false>(images, plane, pieces, count, panel);
      });
    // What a store writes behind its line belongs to what is written next.
    const auto each = [&](auto load_piece) {
      for (int64_t c = 0; c < count; ++c, images += plane, panel += lanes_)
        for (int64_t p = 0; p < pieces.count; ++p) {
          const Piece& piece = pieces.list[p];
          store(panel + piece.lane, load_piece(images + piece.offset, piece));
        }
    };
    if (stride == 1)
      return each([](const T* from, const Piece& p) { return load_inside(from, load(p.inside)); });
    const int64_t ahead = j == 0 ? kPlanesAhead * plane : 0;
    if (stride == 2) {
      return each([=](const T* from, const Piece& p) {
        prefetch(from + ahead);
        return load_every_other(from, static_cast<int>(p.count));
      });
    }
    each([=](const T* from, const Piece& p) {
      prefetch(from + ahead);
      return load_apart(from, stride, p.count);
    });
  }

  // One piece a vector: no load or store depends on where a row ends. kFetch: what the next tile reads,
  // under the last tap, which is the first to meet it.
  template <int N, bool kFetch, typename T>
  static void copy_vectors(const T* images, int64_t plane, const Pieces& pieces, int64_t channels,
                           float* panel) {
    const T* from[N];
    I32 inside[N];
    for (int v = 0; v < N; ++v) {
      from[v] = images + pieces.list[v].offset;
      inside[v] = load(pieces.list[v].inside);
    }
    for (int64_t c = 0; c < channels; ++c, panel += N * kLanes)
      for (int v = 0; v < N; ++v) {
        store(panel + v * kLanes, load_inside(from[v] + c * plane, inside[v]));
        if (kFetch && v * kLanes % 16 == 0) prefetch(from[v] + c * plane + N * kLanes);
      }
  }

  static F32 load_inside(const float* from, I32 inside) {
    return as_f32(load_where(reinterpret_cast<const int32_t*>(from), inside));
  }
  // 16-bit elements have no such load.
  template <typename T>
  static F32 load_inside(const T* from, I32 inside) {
    int32_t where[kLanes];
    store(where, inside);
    T line[kLanes] = {};
    for (int i = 0; i < kLanes; ++i)
      if (where[i]) line[i] = from[i];
    return load(line);
  }

  template <typename T>
  void pack_channels(const T* images, int64_t i, int64_t j, Range channels, float* panel) const {
    const T* pixels[kMaxLanes] = {};
    const int64_t pixel = conv_.channels;
    each_inside(i, j, conv_.height * conv_.width * pixel, pixel,
                [&](int64_t lane, int64_t offset, int64_t count) {
                  for (int64_t p = 0; p < count; ++p)
                    pixels[lane + p] =
                        images + offset + p * conv_.stride_w * pixel + channels.begin;
                });
    pack_lanes(rows_, channels.end - channels.begin, lanes_, reinterpret_cast<int32_t*>(panel),
               [&](int64_t lane, int64_t channel, int count) {
                 const T* at = pixels[lane];
                 if (!at) return set(int32_t{0});
                 return as_i32(load_some(at + channel, count));
               });
  }

  const gossamer_conv& conv_;
  int64_t rows_, lanes_, count_ = 0;
  bool planar_, fetches_;
  Segment segments_[kMaxLanes];
};

}  // namespace GOSSAMER_ISA
}  // namespace gossamer
