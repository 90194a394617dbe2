// tiles.h: what one tile reads and writes.
#pragma once

#include <algorithm>
#include <cstring>

#include "work.h"

namespace gossamer {

// Rows of a tile: at most `most`, fewer where a thread's scratch of `row_bytes` each would exceed both
// what it keeps and a quarter of the dense fp32 weight.
inline int64_t tile_rows(int64_t most, int64_t row_bytes, int64_t n, int64_t k) {
  const int64_t limit = std::max(Scratch::kKept, n * k);
  while (most > 8 && most * row_bytes > limit) most /= 2;
  return most;
}

// Panels a unit: 128 outputs. Finer units would only add calls.
constexpr int64_t kUnitPanels = 8;
inline Range panel_range(Range units, int64_t panels) {
  return {units.begin * kUnitPanels, std::min(units.end * kUnitPanels, panels)};
}

inline Work work_of(const gossamer_input& x, int64_t tile, int64_t units) {
  const int64_t images = x.conv ? x.conv->images : 1,
                rows = x.conv ? x.conv->out_h * x.conv->out_w : x.rows;
  return {images, rows, std::min(tile, rows), units};
}

// The same with rows counted over all images: a tile may go on from one image to the next.
inline Work joined_work_of(const gossamer_input& x, int64_t tile, int64_t units) {
  const Work apart = work_of(x, tile, units);
  const int64_t rows = apart.images * apart.rows;
  return {1, rows, std::min(tile, rows), units};
}

inline double macs_of(const Work& w, double weights) {
  return static_cast<double>(w.images * w.rows) * weights;
}
// An entry costs as much for one row as for the lanes that eight fill.
inline double macs_of_lanes(const Work& w, double weights) {
  return static_cast<double>(w.images * std::max<int64_t>(w.rows, 8)) * weights;
}

// Carves a thread's buffer into aligned parts.
struct Arena {
  char* next;
  char* take(int64_t bytes) {
    char* part = next;
    next += round_up(bytes, 64);
    return part;
  }
};

inline int64_t columns_of(const gossamer_conv& c) {
  return c.kernel_h * c.kernel_w * round_up(c.channels, 4);
}
inline int64_t blocked_bytes(int64_t channels, int64_t pixels) {
  return round_up(channels, 4) * pixels;
}

inline const char* image_at(const gossamer_input& x, int64_t image) {
  const gossamer_conv& c = *x.conv;
  return static_cast<const char*>(x.data) +
         image * c.height * c.width * c.channels * element_size(x.dtype);
}

// Rows of a matrix as they lie, or of a convolution gathered into scratch.
inline int64_t float_tile_bytes(const gossamer_input& x, int64_t k, int64_t rows) {
  return x.conv ? round_up(rows * k * element_size(x.dtype), 64) : 0;
}
inline FloatTile float_tile(const gossamer_input& x, int64_t k, const Tile& tile, Arena& arena) {
  const int64_t size = element_size(x.dtype);
  if (!x.conv) {
    return {static_cast<const char*>(x.data) + tile.rows.begin * x.stride * size, x.stride, x.dtype,
            tile.count()};
  }
  char* gathered = arena.take(tile.count() * k * size);
  active_kernels()->im2col(image_at(x, tile.image), *x.conv, size, 0, tile.rows, gathered);
  return {gathered, k, x.dtype, tile.count()};
}

inline Affine given(const gossamer_input& x) { return {x.scale, x.zero}; }

// Quantized rows. A matrix has a scale a row, a convolution one an image, unless the input gives one
// for all. The image is quantized once and then gathered as bytes, which is cheaper by the number of
// taps than quantizing what is gathered.
class Quantizer {
 public:
  // Rows are padded to a multiple of `unit` bytes.
  Quantizer(const gossamer_input& x, int64_t k, const Work& work, int64_t unit = kStep)
      : x_(x), k_(k), stride_(round_up(k, unit)), tile_rows_(work.tile) {}

  int64_t bytes() const {
    return round_up(image_bytes(), 64) + round_up(tile_rows_ * stride_, 64) +
           2 * round_up(tile_rows_ * 4, 64);
  }

  // The first parts of the arena, in this order, so that an image quantized for one tile serves the
  // next.
  QuantizedTile operator()(const Tile& tile, Arena& arena) const {
    const Kernels& kernels = *active_kernels();
    auto* image = reinterpret_cast<uint8_t*>(arena.take(image_bytes()));
    auto* scale = reinterpret_cast<float*>(arena.take(tile_rows_ * 4));
    auto* zero = reinterpret_cast<int32_t*>(arena.take(tile_rows_ * 4));
    auto* q = reinterpret_cast<uint8_t*>(arena.take(tile_rows_ * stride_));
    if (tile.again) return {q, stride_, scale, zero, tile.count()};
    if (!x_.conv) {
      kernels.quantize_rows(float_tile(x_, k_, tile, arena), k_, given(x_), q, stride_, scale,
                            zero);
      return {q, stride_, scale, zero, tile.count()};
    }
    if (tile.fresh) {
      const FloatTile whole{image_at(x_, tile.image), image_bytes(), x_.dtype, 1};
      kernels.quantize_rows(whole, image_bytes(), given(x_), image, image_bytes(), scale, zero);
      std::fill(scale + 1, scale + tile_rows_, scale[0]);
      std::fill(zero + 1, zero + tile_rows_, zero[0]);
    }
    kernels.im2col(image, *x_.conv, 1, static_cast<uint8_t>(zero[0]), tile.rows, q);
    // im2col writes rows of k bytes; spread them, last first, where a row needs its zeros.
    for (int64_t r = tile.count() - 1; stride_ != k_ && r >= 0; --r) {
      std::memmove(q + r * stride_, q + r * k_, static_cast<size_t>(k_));
      std::memset(q + r * stride_ + k_, 0, static_cast<size_t>(stride_ - k_));
    }
    return {q, stride_, scale, zero, tile.count()};
  }

 private:
  int64_t image_bytes() const {
    return x_.conv ? x_.conv->height * x_.conv->width * x_.conv->channels : 0;
  }

  const gossamer_input& x_;
  int64_t k_, stride_, tile_rows_;
};

// The destination of one tile: y itself, or for planar results a tile of rows that flush()
// transposes into y.
class Sink {
 public:
  Sink(const gossamer_input& x, const gossamer_output& y, int64_t n) : x_(x), y_(y), n_(n) {}

  int64_t bytes(int64_t rows) const {
    return y_.planar ? round_up(rows * n_ * element_size(x_.dtype), 64) : 0;
  }

  Destination open(const Tile& tile, Arena& arena) {
    const int64_t size = element_size(x_.dtype),
                  plane = x_.conv ? x_.conv->out_h * x_.conv->out_w : 0;
    tile_ = arena.take(bytes(tile.count()));
    if (y_.planar) return {tile_, n_, x_.dtype, y_.bias, y_.activation};
    char* at =
        static_cast<char*>(y_.data) + (tile.image * plane + tile.rows.begin) * y_.stride * size;
    return {at, y_.stride, x_.dtype, y_.bias, y_.activation};
  }

  void flush(const Tile& tile, Range outputs) const {
    if (!y_.planar) return;
    element_size(x_.dtype) == 4 ? transpose<uint32_t>(tile, outputs)
                                : transpose<uint16_t>(tile, outputs);
  }

 private:
  template <typename T>
  void transpose(const Tile& tile, Range outputs) const {
    const int64_t plane = x_.conv->out_h * x_.conv->out_w;
    const T* from = reinterpret_cast<const T*>(tile_);
    for (int64_t o = outputs.begin; o < std::min(outputs.end, n_); ++o) {
      T* to = static_cast<T*>(y_.data) + (tile.image * n_ + o) * plane + tile.rows.begin;
      for (int64_t r = 0; r < tile.count(); ++r) to[r] = from[r * n_ + o];
    }
  }

  const gossamer_input& x_;
  const gossamer_output& y_;
  int64_t n_;
  char* tile_ = nullptr;
};

}  // namespace gossamer
