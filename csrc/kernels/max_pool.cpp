// max_pool: the largest of each window of an image, of floats or of blocked bytes, which are ordered as
// what they stand for.
//
//   x     (planes, height, width) words  floats, or bytes of four channels; or floats whose channels
//                                        lie innermost, (height, width, planes)
//   lines pool_line(conv) words a row    scratch: the largest of each column of a row of windows
//   y     (planes, out_h, out_w) words   of which some rows
//
// Down the columns into lines, whose ends stay the least there is: what lies outside of the image. Then
// along the lines, where no tap leaves them; of all rows, for what was just stored is not read well.
// ResNet-50's 3 x 3 / 2 of bytes, avx512vnni, one core: 81 us for the 118 of tap by tap, whose vectors
// meet the ends of rows.
//
// Channels innermost: tap by tap, for no vector of channels meets an end; squares of windows x channels
// are transposed into y. Windows of convolutions' results are small, and few.
// Tails: masked loads and stores; behind the last column the line holds what nobody reads.
// Numerics: moves words only; a NaN is the largest.

#include "epilogue.h"

namespace gossamer {
namespace GOSSAMER_ISA {

namespace {

struct Bytes {
  static I32 least() { return set(int32_t{0}); }
  static I32 larger_of(I32 a, I32 b) { return max_bytes(a, b); }
};
struct Floats {
  static I32 least() { return set(static_cast<int32_t>(0xff800000)); }  // -Inf
  static I32 larger_of(I32 a, I32 b) { return as_i32(larger(as_f32(a), as_f32(b))); }
};

// The first `count` of words that are `stride` apart; where that costs nothing, more.
I32 load_strided(const int32_t* words, int64_t stride, int count) {
  if (stride == 1) return load(words);
  return stride == 2 ? load_every_other(words, kLanes) : load_apart(words, stride, count);
}

template <typename Of>
void pool(const int32_t* x, int64_t planes, const gossamer_conv& c, Range rows, int32_t* y,
          int32_t* lines) {
  const int64_t whole = pool_line(c), count = (rows.end - rows.begin) * whole;
  for (int64_t i = 0; i < count; i += kLanes)
    store_some(lines + i, Of::least(), lanes_left(count, i));
  for (int64_t p = 0; p < planes; ++p, x += c.height * c.width, y += c.out_h * c.out_w) {
    int32_t* line = lines;
    for (int64_t row = rows.begin; row < rows.end; ++row, line += whole) {
      const int64_t top = row * c.stride_h - c.pad_top;
      for (int64_t column = 0; column < c.width; column += kLanes) {
        const int left = lanes_left(c.width, column);
        I32 largest = Of::least();
        for (int64_t i = 0; i < c.kernel_h; ++i) {
          const int64_t at = top + i * c.dilation_h;
          if (at >= 0 && at < c.height)
            largest = Of::larger_of(largest, load_some(x + at * c.width + column, left));
        }
        store_some(line + c.pad_left + column, largest, left);
      }
    }
    line = lines;
    for (int64_t row = rows.begin; row < rows.end; ++row, line += whole) {
      for (int64_t column = 0; column < c.out_w; column += kLanes) {
        const int left = lanes_left(c.out_w, column);
        I32 largest = Of::least();
        for (int64_t j = 0; j < c.kernel_w; ++j) {
          const int32_t* at = line + column * c.stride_w + j * c.dilation_w;
          largest = Of::larger_of(largest, load_strided(at, c.stride_w, left));
        }
        store_some(y + row * c.out_w + column, largest, left);
      }
    }
  }
}

// The taps of a window along one axis that are inside of the image: the first one's place, their number.
struct Taps {
  int64_t first, count;

  Taps(int64_t start, int64_t kernel, int64_t dilation, int64_t size) {
    const int64_t before = start < 0 ? ceil_div(-start, dilation) : 0;
    first = start + before * dilation;
    const int64_t places = first < size ? ceil_div(size - first, dilation) : 0;
    count = kernel - before < places ? kernel - before : places;
  }
};

void pool_channels(const float* x, const gossamer_conv& c, Range rows, float* y) {
  struct Window {
    const float* first;
    int64_t rows, columns;
  };
  const int64_t plane = c.out_h * c.out_w, end = rows.end * c.out_w;
  const int64_t down = c.dilation_h * c.width * c.channels, along = c.dilation_w * c.channels,
                next = kLanes * c.stride_w * c.channels;  // what the next windows read
  for (int64_t pixel = rows.begin * c.out_w; pixel < end; pixel += kLanes) {
    const int count = lanes_left(end, pixel);
    Window windows[kLanes];
    for (Window& window : windows) window = {x, 0, 0};
    for (int i = 0; i < count; ++i) {
      const int64_t row = (pixel + i) / c.out_w, column = (pixel + i) % c.out_w;
      const Taps v(row * c.stride_h - c.pad_top, c.kernel_h, c.dilation_h, c.height);
      const Taps h(column * c.stride_w - c.pad_left, c.kernel_w, c.dilation_w, c.width);
      windows[i] = {x + (v.first * c.width + h.first) * c.channels, v.count, h.count};
    }
    for (int64_t channel = 0; channel < c.channels; channel += kLanes) {
      const int left = lanes_left(c.channels, channel);
      I32 square[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const float* row = windows[i].first + channel;
        I32 largest = Floats::least();
        for (int64_t r = 0; r < windows[i].rows; ++r, row += down)
          for (int64_t column = 0; column < windows[i].columns; ++column) {
            const float* tap = row + column * along;
            largest = Floats::larger_of(largest, as_i32(load_some(tap, left)));
            if (column < c.stride_w) prefetch(tap + next);
          }
        square[i] = largest;
      }
      transpose(square);
      for (int i = 0; i < left; ++i)
        store_some(y + (channel + i) * plane + pixel, as_f32(square[i]), count);
    }
  }
}

}  // namespace

void max_pool(const void* x, gossamer_dtype dtype, bool planar, const gossamer_conv& c, Range rows,
              void* y, void* scratch) {
  if (dtype != GOSSAMER_UINT8 && !planar)
    return pool_channels(static_cast<const float*>(x), c, rows, static_cast<float*>(y));
  const auto* from = static_cast<const int32_t*>(x);
  auto* to = static_cast<int32_t*>(y);
  auto* lines = static_cast<int32_t*>(scratch);
  dtype == GOSSAMER_UINT8 ? pool<Bytes>(from, ceil_div(c.channels, 4), c, rows, to, lines)
                          : pool<Floats>(from, c.channels, c, rows, to, lines);
}

}  // namespace GOSSAMER_ISA
}  // namespace gossamer
