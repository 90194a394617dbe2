// gossamer.cpp: the C ABI. Each product checks its operands, cuts the output into tiles of rows x
// units of outputs, spreads them over the caller's threads, and calls the kernels of the active Isa
// on each.

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "isa.h"

namespace gossamer {
namespace {

thread_local char error_text[384] = "";

__attribute__((format(printf, 1, 2))) int fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(error_text, sizeof error_text, format, arguments);
  va_end(arguments);
  return GOSSAMER_INVALID;
}

using Long = long long;  // for %lld

// --- Scratch: one buffer a thread, kept between calls while it is small
// --------------------------------------
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

thread_local Scratch scratch;

// --- Work: tiles of rows x units of outputs
// ------------------------------------------------------------------
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

// A region of work shorter than this is not worth a second thread (a torch region costs about 1 us,
// waking a sleeping thread 5 to 20).
constexpr double kGrainMacs = 20e-6 * 50e9;

template <typename Body>
int run(const Work& work, double macs, gossamer_parallel_for parallel_for, Body body) {
  const int64_t items = work.tiles() * work.units;
  if (items == 0) return GOSSAMER_OK;
  struct Context {
    const Work& work;
    Body& body;
    bool failed;
  } context{work, body, false};
  const gossamer_body each = [](int64_t begin, int64_t end, void* opaque) {
    Context& c = *static_cast<Context*>(opaque);
    const int64_t units = c.work.units, per_image = ceil_div(c.work.rows, c.work.tile);
    int64_t image = -1;
    while (begin < end) {
      const int64_t t = begin / units, first = begin % units,
                    last = std::min(units, first + end - begin);
      const int64_t row = t % per_image * c.work.tile;
      const Range rows{row, std::min(row + c.work.tile, c.work.rows)};
      if (!c.body(Tile{t / per_image, rows, {first, last}, t / per_image != image}))
        c.failed = true;
      image = t / per_image;
      begin += last - first;
    }
    scratch.trim();
  };
  const double grain = std::ceil(kGrainMacs * static_cast<double>(items) / std::max(macs, 1.0));
  if (!parallel_for || grain >= static_cast<double>(items)) {
    each(0, items, &context);
  } else {
    parallel_for(0, items, static_cast<int64_t>(grain), each, &context);
  }
  if (!context.failed) return GOSSAMER_OK;
  fail("out of memory: the scratch buffer of a thread could not be allocated");
  return GOSSAMER_NO_MEMORY;
}

// --- Checks
// --------------------------------------------------------------------------------------------------
int64_t columns_of(const gossamer_conv& c) {
  return c.kernel_h * c.kernel_w * round_up(c.channels, 4);
}

int check_conv(const gossamer_conv& c) {
  if (c.images < 0 || c.height < 1 || c.width < 1 || c.channels < 1 || c.kernel_h < 1 ||
      c.kernel_w < 1 || c.stride_h < 1 || c.stride_w < 1 || c.dilation_h < 1 || c.dilation_w < 1 ||
      c.pad_top < 0 || c.pad_left < 0 || c.out_h < 1 || c.out_w < 1) {
    return fail(
        "a convolution of %lld x %lld x %lld with kernel %lld x %lld gives an output of %lld x "
        "%lld: every "
        "size, stride and dilation must be at least 1",
        Long(c.height), Long(c.width), Long(c.channels), Long(c.kernel_h), Long(c.kernel_w),
        Long(c.out_h), Long(c.out_w));
  }
  return GOSSAMER_OK;
}

int check(const gossamer_input* x, int64_t n, int64_t k, const gossamer_output* y) {
  if (!active_kernels()) return fail("%s", isa_error());
  if (!x || !y) return fail("x and y must not be NULL");
  if (n < 1 || k < 1)
    return fail("n=%lld, k=%lld: a weight needs at least one output and one input", Long(n),
                Long(k));
  if (k > kMaxK) {
    return fail("k=%lld overflows int32 (limit %lld): split the layer", Long(k), Long(kMaxK));
  }
  if (x->dtype < GOSSAMER_FLOAT32 || x->dtype > GOSSAMER_FLOAT16) {
    return fail("dtype %d is unknown: use float32, bfloat16 or float16", int(x->dtype));
  }
  if (y->activation < GOSSAMER_NONE || y->activation > GOSSAMER_SILU) {
    return fail("activation %d is unknown: use 0 (none), 1 (relu), 2 (gelu) or 3 (silu)",
                int(y->activation));
  }
  if (x->conv) {
    if (const int status = check_conv(*x->conv)) return status;
    if (columns_of(*x->conv) != k) {
      return fail("the convolution has %lld columns, the weight k=%lld", Long(columns_of(*x->conv)),
                  Long(k));
    }
  } else if (x->rows < 0 || (x->rows > 1 && x->stride < k) || y->planar) {
    return fail("rows=%lld with stride %lld cannot hold k=%lld elements each", Long(x->rows),
                Long(x->stride), Long(k));
  }
  if (!y->planar && y->stride < n) {
    return fail("y has stride %lld, shorter than its n=%lld outputs", Long(y->stride), Long(n));
  }
  return GOSSAMER_OK;
}

Work work_of(const gossamer_input& x, int64_t tile, int64_t units) {
  const int64_t images = x.conv ? x.conv->images : 1,
                rows = x.conv ? x.conv->out_h * x.conv->out_w : x.rows;
  return {images, rows, std::min(tile, rows), units};
}

double macs_of(const Work& w, double weights) {
  return static_cast<double>(w.images * w.rows) * weights;
}

// --- Operands of one tile
// ------------------------------------------------------------------------------------ Carves a
// thread's buffer into aligned parts.
struct Arena {
  char* next;
  char* take(int64_t bytes) {
    char* part = next;
    next += round_up(bytes, 64);
    return part;
  }
};

const char* image_at(const gossamer_input& x, int64_t image) {
  const gossamer_conv& c = *x.conv;
  return static_cast<const char*>(x.data) +
         image * c.height * c.width * c.channels * element_size(x.dtype);
}

// Rows of a matrix as they lie, or of a convolution gathered into scratch.
int64_t float_tile_bytes(const gossamer_input& x, int64_t k, int64_t rows) {
  return x.conv ? round_up(rows * k * element_size(x.dtype), 64) : 0;
}
FloatTile float_tile(const gossamer_input& x, int64_t k, const Tile& tile, Arena& arena) {
  const int64_t size = element_size(x.dtype);
  if (!x.conv) {
    return {static_cast<const char*>(x.data) + tile.rows.begin * x.stride * size, x.stride, x.dtype,
            tile.count()};
  }
  char* gathered = arena.take(tile.count() * k * size);
  active_kernels()->im2col(image_at(x, tile.image), *x.conv, size, 0, tile.rows, gathered);
  return {gathered, k, x.dtype, tile.count()};
}

// Quantized rows. A matrix has a scale a row. A convolution has one an image: the image is
// quantized once and then gathered as bytes, which is cheaper by the number of taps than quantizing
// what is gathered.
class Quantizer {
 public:
  Quantizer(const gossamer_input& x, int64_t k, const Work& work)
      : x_(x), k_(k), stride_(round_up(k, kStep)), tile_rows_(work.tile) {}

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
      kernels.quantize_rows(float_tile(x_, k_, tile, arena), k_, q, stride_, scale, zero);
      return {q, stride_, scale, zero, tile.count()};
    }
    if (tile.fresh) {
      const FloatTile whole{image_at(x_, tile.image), image_bytes(), x_.dtype, 1};
      kernels.quantize_rows(whole, image_bytes(), image, image_bytes(), scale, zero);
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

// Rows of a dense tile: enough to use a panel (in L2) many times, few enough that their bytes stay
// in L2 too.
constexpr int64_t kDenseTile = 64;
// Panels a unit: 128 outputs. Finer units would only add calls.
constexpr int64_t kUnitPanels = 8;

Range panel_range(Range units, int64_t panels) {
  return {units.begin * kUnitPanels, std::min(units.end * kUnitPanels, panels)};
}

}  // namespace
}  // namespace gossamer

using namespace gossamer;

extern "C" int gossamer_gemm_int8(const gossamer_input* x, const gossamer_int8* w,
                                  const gossamer_output* y, gossamer_parallel_for parallel_for) {
  if (const int status = check(x, w->n, w->k, y)) return status;
  const int64_t panels = ceil_div(w->n, kPanel);
  const Work work = work_of(*x, kDenseTile, ceil_div(panels, kUnitPanels));
  const Quantizer quantize(*x, w->k, work);
  return run(work, macs_of(work, double(w->n) * double(w->k)), parallel_for, [&](const Tile& tile) {
    Sink sink(*x, *y, w->n);
    Arena arena{scratch.reserve(quantize.bytes() + sink.bytes(work.tile))};
    if (!arena.next) return false;
    const QuantizedTile rows = quantize(tile, arena);
    const Range range = panel_range(tile.units, panels);
    active_kernels()->gemm_int8(rows, *w, range, sink.open(tile, arena));
    sink.flush(tile, {range.begin * kPanel, range.end * kPanel});
    return true;
  });
}

extern "C" int gossamer_gemm_w8(const gossamer_input* x, const gossamer_int8* w,
                                const gossamer_output* y, gossamer_parallel_for parallel_for) {
  if (const int status = check(x, w->n, w->k, y)) return status;
  const int64_t panels = ceil_div(w->n, kPanel);
  const Work work = work_of(*x, kMaxLanes, ceil_div(panels, kUnitPanels));
  return run(work, macs_of(work, double(w->n) * double(w->k)), parallel_for, [&](const Tile& tile) {
    Sink sink(*x, *y, w->n);
    const int64_t own = gemm_w8_scratch(w->k);
    Arena arena{
        scratch.reserve(float_tile_bytes(*x, w->k, work.tile) + own + sink.bytes(work.tile))};
    if (!arena.next) return false;
    char* panel = arena.take(own);
    const FloatTile rows = float_tile(*x, w->k, tile, arena);
    const Range range = panel_range(tile.units, panels);
    active_kernels()->gemm_w8(rows, *w, range, sink.open(tile, arena), panel);
    sink.flush(tile, {range.begin * kPanel, range.end * kPanel});
    return true;
  });
}

extern "C" int gossamer_spmm(const gossamer_input* x, const gossamer_sparse* w,
                             const gossamer_output* y, gossamer_parallel_for parallel_for) {
  const gossamer_index& index = w->index;
  if (const int status = check(x, index.n, index.k, y)) return status;
  const int64_t chunk = chunk_rows(index.n);
  const Work work = work_of(*x, kMaxLanes, chunk_count(index.n));
  return run(work, macs_of(work, double(index.entries)), parallel_for, [&](const Tile& tile) {
    Sink sink(*x, *y, index.n);
    const int64_t own = spmm_scratch(index.n, index.k);
    Arena arena{
        scratch.reserve(float_tile_bytes(*x, index.k, work.tile) + own + sink.bytes(work.tile))};
    if (!arena.next) return false;
    char* lanes = arena.take(own);
    const FloatTile rows = float_tile(*x, index.k, tile, arena);
    active_kernels()->spmm(rows, *w, tile.units, sink.open(tile, arena), lanes);
    sink.flush(tile, {tile.units.begin * chunk, tile.units.end * chunk});
    return true;
  });
}

extern "C" int gossamer_spmm_int8(const gossamer_input* x, const gossamer_sparse_int8* w,
                                  const gossamer_output* y, gossamer_parallel_for parallel_for) {
  const gossamer_index& index = w->index;
  if (const int status = check(x, index.n, index.k, y)) return status;
  const int64_t chunk = chunk_rows(index.n);
  const Work work = work_of(*x, kSparseInt8Lanes, chunk_count(index.n));
  const Quantizer quantize(*x, index.k, work);
  return run(work, macs_of(work, double(index.entries)), parallel_for, [&](const Tile& tile) {
    Sink sink(*x, *y, index.n);
    const int64_t own = spmm_int8_scratch(index.n, index.k);
    Arena arena{scratch.reserve(quantize.bytes() + own + sink.bytes(work.tile))};
    if (!arena.next) return false;
    const QuantizedTile rows = quantize(tile, arena);
    char* lanes = arena.take(own);
    active_kernels()->spmm_int8(rows, *w, tile.units, sink.open(tile, arena), lanes);
    sink.flush(tile, {tile.units.begin * chunk, tile.units.end * chunk});
    return true;
  });
}

extern "C" int gossamer_quantize_rows(const gossamer_input* x, int64_t k, uint8_t* q,
                                      int64_t q_stride, float* scale, int32_t* zero,
                                      gossamer_parallel_for parallel_for) {
  const gossamer_output y{q, k, 0, nullptr, GOSSAMER_NONE};
  if (x && x->conv) return fail("quantize_rows takes rows, not a convolution");
  if (const int status = check(x, k, std::min(k, kMaxK), &y)) return status;
  if (q_stride < k) return fail("q_stride=%lld is shorter than k=%lld", Long(q_stride), Long(k));
  const Work work = work_of(*x, kDenseTile, 1);
  // About one MAC's time an element and pass.
  return run(work, macs_of(work, 8.0 * double(k)), parallel_for, [&](const Tile& tile) {
    Arena none{nullptr};
    const int64_t row = tile.rows.begin;
    active_kernels()->quantize_rows(float_tile(*x, k, tile, none), k, q + row * q_stride, q_stride,
                                    scale + row, zero + row);
    return true;
  });
}

extern "C" int gossamer_im2col(const gossamer_input* x, void* rows,
                               gossamer_parallel_for parallel_for) {
  if (!x || !x->conv) return fail("im2col needs the geometry of a convolution");
  const int64_t k = columns_of(*x->conv), size = element_size(x->dtype);
  if (const int status = check_conv(*x->conv)) return status;
  if (!active_kernels()) return fail("%s", isa_error());
  const Work work = work_of(*x, kDenseTile, 1);
  return run(work, macs_of(work, 8.0 * double(k)), parallel_for, [&](const Tile& tile) {
    char* to = static_cast<char*>(rows) + (tile.image * work.rows + tile.rows.begin) * k * size;
    active_kernels()->im2col(image_at(*x, tile.image), *x->conv, size, 0, tile.rows, to);
    return true;
  });
}

// --- The index
// -----------------------------------------------------------------------------------------------
extern "C" int64_t gossamer_block_columns(int64_t unit) {
  return unit == 1 ? kBlockFloats : kBlockWords;
}
extern "C" int64_t gossamer_chunk_rows(int64_t n) { return chunk_rows(n); }
extern "C" int64_t gossamer_cell_count(int64_t n, int64_t k, int64_t unit) {
  return ceil_div(ceil_div(k, unit), gossamer_block_columns(unit)) * chunk_count(n);
}

extern "C" int gossamer_check_index(const gossamer_index* w, int64_t cell_count, int64_t unit) {
  if (unit != 1 && unit != 4)
    return fail("unit=%lld: a column stands for 1 or 4 inputs", Long(unit));
  if (w->n < 1 || w->k < 1 || w->k > kMaxK || w->n > INT32_MAX) {
    return fail("n=%lld, k=%lld: an index covers 1 .. 2^31 - 1 outputs and 1 .. 65536 inputs",
                Long(w->n), Long(w->k));
  }
  const int64_t cells = gossamer_cell_count(w->n, w->k, unit), chunks = chunk_count(w->n),
                size = chunk_rows(w->n);
  if (cell_count != cells) {
    return fail("the index has %lld cells, n=%lld and k=%lld need %lld", Long(cell_count),
                Long(w->n), Long(w->k), Long(cells));
  }
  const int64_t columns = ceil_div(w->k, unit), block = gossamer_block_columns(unit);
  int64_t row = 0, entry = 0;
  for (int64_t c = 0; c <= cells; ++c) {
    if (w->cells[2 * c] != row || w->cells[2 * c + 1] != entry) {
      return fail("cell %lld starts at row %d, entry %d; the cells before it end at %lld, %lld",
                  Long(c), w->cells[2 * c], w->cells[2 * c + 1], Long(row), Long(entry));
    }
    if (c == cells) break;
    const int64_t width = std::min(block, columns - c / chunks * block);
    const int64_t height = std::min(size, w->n - c % chunks * size);
    const int64_t end = w->cells[2 * c + 2];
    if (end < row || end > w->row_count || end - row > height) {
      return fail("cell %lld ends at row %lld, it may hold %lld from row %lld of %lld", Long(c),
                  Long(end), Long(height), Long(row), Long(w->row_count));
    }
    for (int64_t last = width + 1; row < end; ++row) {
      const int64_t output = w->rows[2 * row], length = w->rows[2 * row + 1];
      if (output >= height || length < 1 || length > round_up(width, unit == 4 ? 2 : 1) ||
          length > last || (unit == 4 && length % 2) || entry + length > w->entries) {
        return fail(
            "row %lld of the index (output %lld, %lld entries) lies outside its cell of %lld x "
            "%lld",
            Long(row), Long(output), Long(length), Long(height), Long(width));
      }
      for (int64_t i = 0; i < length; ++i, ++entry) {
        if (w->columns[entry] >= width) {
          return fail("entry %lld has column %d in a block of %lld", Long(entry), w->columns[entry],
                      Long(width));
        }
      }
      last = length;
    }
  }
  if (row != w->row_count || entry != w->entries) {
    return fail("the cells end at row %lld, entry %lld of %lld, %lld", Long(row), Long(entry),
                Long(w->row_count), Long(w->entries));
  }
  return GOSSAMER_OK;
}

extern "C" const char* gossamer_isa(void) {
  const Kernels* kernels = active_kernels();
  if (kernels) return kernels->isa;
  fail("%s", isa_error());
  return nullptr;
}
extern "C" const char* gossamer_error(void) { return error_text; }
extern "C" const char* gossamer_version(void) { return GOSSAMER_VERSION; }
