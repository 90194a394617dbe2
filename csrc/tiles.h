// tiles.h: how a product is cut into tiles of rows x units of outputs, and what one tile reads and
// writes.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "error.h"
#include "isa.h"

namespace gossamer {

// Scratch: one buffer a thread, kept between calls while it is small.
class Scratch {
 public:
  static constexpr int64_t kKept = int64_t{4} << 20;

  ~Scratch() { std::free(data_); }
  char* reserve(int64_t bytes) {
    if (bytes > size_) {
      release();
      data_ = static_cast<char*>(std::aligned_alloc(64, static_cast<size_t>(round_up(bytes, 64))));
      size_ = data_ ? bytes : 0;
    }
    return data_;
  }
  void trim() {
    if (size_ > kKept) release();
  }

 private:
  void release() {
    std::free(data_);
    data_ = nullptr;
    size_ = 0;
  }
  char* data_ = nullptr;
  int64_t size_ = 0;
};

inline thread_local Scratch scratch;

// Work: tiles of rows x units of outputs.
struct Work {
  int64_t images, rows;  // rows of one image; a matrix is one image
  int64_t tile;          // rows a tile, never more than there are
  int64_t units;         // output units: panels or chunks, or groups of them
  int64_t tiles() const { return rows == 0 ? 0 : images * ceil_div(rows, tile); }
};

struct Tile {
  int64_t image;
  Range rows, units;
  bool fresh;  // the first tile of its image in this thread's range: nothing in scratch is of use
  int64_t count() const { return rows.end - rows.begin; }
};

// A region of work shorter than 20 us is not worth a second thread (a torch region costs about 1 us,
// waking a sleeping thread 5 to 20). At 50 G int8 MACs a second.
constexpr double kGrainMacs = 20e-6 * 50e9;

// Tile number t, all of its units.
inline Tile tile_at(const Work& work, int64_t t) {
  const int64_t per_image = ceil_div(work.rows, work.tile), row = t % per_image * work.tile;
  return {t / per_image, {row, std::min(row + work.tile, work.rows)}, {0, work.units}, false};
}

// What the units before `unit` cost, in any measure: threads share the whole evenly by it.
struct Even {
  int64_t operator()(int64_t unit) const { return unit; }
};
// Chunks by their entries, and by their outputs, which have to be written.
struct ByEntries {
  const gossamer_index& w;
  int64_t blocks;

  int64_t operator()(int64_t unit) const {
    const int64_t chunks = chunk_count(w.n);
    int64_t cost = unit * chunk_rows(w.n);
    for (int64_t b = 0; b < blocks; ++b) {
      const int32_t* cell = w.cells + 2 * b * chunks;
      cost += cell[2 * unit + 1] - cell[1];
    }
    return cost;
  }
};

// Items (a unit of a tile each) by what they cost: a unit what lies between before(unit) and
// before(unit + 1) for each of the tile's rows, of 196 pixels the last of four tiles has 4.
template <typename Before>
class Shares {
 public:
  Shares(const Work& work, const Before& before)
      : work_(work),
        before_(before),
        whole_((work.rows - 1) / work.tile),
        last_(weight(work.rows - whole_ * work.tile)),
        image_(before(work.units) * (whole_ * weight(work.tile) + last_)) {}

  int64_t cost() const { return work_.images * image_; }
  // The first item whose middle lies at `at` or behind it: of two that are nearly equal, each half
  // has one.
  int64_t item(int64_t at) const {
    const int64_t each = before_(work_.units) * weight(work_.tile);
    const int64_t t = std::min(at % image_ / each, whole_), place = at % image_ - t * each;
    const int64_t rows = t < whole_ ? weight(work_.tile) : last_;
    int64_t low = 0, high = work_.units;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      const int64_t twice = before_(middle) + before_(middle + 1);
      rows* twice < 2 * place ? low = middle + 1 : high = middle;
    }
    return (at / image_ * (whole_ + 1) + t) * work_.units + low;
  }

 private:
  static int64_t weight(int64_t rows) { return round_up(rows, 8); }

  const Work& work_;
  const Before& before_;
  int64_t whole_, last_, image_;
};

// Calls body(tile) for ranges of units that cover all tiles. `macs` is what all of it costs.
template <typename Before, typename Body>
int run(const Work& work, double macs, Before before, gossamer_parallel_for parallel_for,
        Body body) {
  if (work.tiles() * work.units == 0) return GOSSAMER_OK;
  const Shares<Before> shares(work, before);
  struct Context {
    const Work& work;
    const Shares<Before>& shares;
    Body& body;
    std::atomic<bool> failed;
  } context{work, shares, body, {false}};
  const gossamer_body each = [](int64_t from, int64_t to, void* opaque) {
    Context& c = *static_cast<Context*>(opaque);
    const int64_t units = c.work.units;
    int64_t image = -1;
    for (int64_t begin = c.shares.item(from), end = c.shares.item(to); begin < end;) {
      const int64_t t = begin / units, first = begin % units,
                    last = std::min(units, first + end - begin);
      Tile tile = tile_at(c.work, t);
      tile.units = {first, last};
      tile.fresh = tile.image != image;
      if (!c.body(tile)) c.failed = true;
      image = tile.image;
      begin += last - first;
    }
    scratch.trim();
  };
  const int64_t cost = shares.cost();
  const double grain = std::ceil(kGrainMacs * static_cast<double>(cost) / std::max(macs, 1.0));
  if (!parallel_for || grain >= static_cast<double>(cost)) {
    each(0, cost, &context);
  } else {
    parallel_for(0, cost, static_cast<int64_t>(grain), each, &context);
  }
  if (!context.failed) return GOSSAMER_OK;
  fail("out of memory: the scratch buffer of a thread could not be allocated");
  return GOSSAMER_NO_MEMORY;
}

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
