// gossamer.cpp: the C ABI. Each product checks its operands, cuts the output into tiles of rows x
// units of outputs, spreads them over the caller's threads, and calls the kernels of the active Isa
// on each.

#include <algorithm>
#include <cstdarg>
#include <cstdio>

#include "check.h"
#include "tiles.h"

namespace gossamer {
namespace {

thread_local char error_text[384] = "";

}  // namespace

int fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(error_text, sizeof error_text, format, arguments);
  va_end(arguments);
  return GOSSAMER_INVALID;
}

namespace {

// Rows of a dense tile: enough to use a panel (in L2) many times, few enough that their bytes stay
// in L2 too.
constexpr int64_t kDenseTile = 64;

// The table for a tile of a sparse product. Up to 8 rows would leave half of 16 lanes empty: those of
// avx2 take 0.75 of the time.
const Kernels* kernels_for(int64_t rows) {
#if defined(__x86_64__)
  if (rows > 1 && rows <= 8 && active_kernels() == &avx512vnni::kernels) return &avx2::kernels;
#endif
  return active_kernels();
}

// A dense product of quantized rows, padded to `step` inputs, by one kernel of the table.
template <typename Weight, typename Kernel>
int quantized_gemm(const gossamer_input* x, const Weight& w, const gossamer_output* y, int64_t step,
                   Kernel* Kernels::* kernel, gossamer_parallel_for parallel_for) {
  if (const int status = check(x, w.n, w.k, y)) return status;
  const int64_t panels = ceil_div(w.n, kPanel);
  const Work work = work_of(*x, kDenseTile, ceil_div(panels, kUnitPanels));
  const Quantizer quantize(*x, w.k, work, step);
  const double macs = macs_of(work, double(w.n) * double(w.k));
  return run(work, macs, Even(), parallel_for, [&](const Tile& tile) {
    Sink sink(*x, *y, w.n);
    Arena arena{scratch.reserve(quantize.bytes() + sink.bytes(work.tile))};
    if (!arena.next) return false;
    const QuantizedTile in = quantize(tile, arena);
    const Range range = panel_range(tile.units, panels);
    (active_kernels()->*kernel)(in, w, range, sink.open(tile, arena));
    sink.flush(tile, {range.begin * kPanel, range.end * kPanel});
    return true;
  });
}

}  // namespace
}  // namespace gossamer

using namespace gossamer;

extern "C" int gossamer_gemm_int8(const gossamer_input* x, const gossamer_int8* w,
                                  const gossamer_output* y, gossamer_parallel_for parallel_for) {
  if (!w) return fail("w must not be NULL");
  if (x && x->conv) return gossamer_conv_int8(x, w, y, parallel_for);
  return quantized_gemm(x, *w, y, kStep, &Kernels::gemm_int8, parallel_for);
}

extern "C" int gossamer_gemm_w8(const gossamer_input* x, const gossamer_int8* w,
                                const gossamer_output* y, gossamer_parallel_for parallel_for) {
  if (!w) return fail("w must not be NULL");
  if (const int status = check(x, w->n, w->k, y)) return status;
  const int64_t panels = ceil_div(w->n, kPanel);
  const int64_t rows = tile_rows(kMaxLanes, 4 * w->k, w->n, w->k);
  const Work work = work_of(*x, rows, ceil_div(panels, kUnitPanels));
  const double macs = macs_of(work, double(w->n) * double(w->k));
  return run(work, macs, Even(), parallel_for, [&](const Tile& tile) {
    Sink sink(*x, *y, w->n);
    const int64_t own = gemm_w8_scratch(w->k, work.tile);
    Arena arena{
        scratch.reserve(float_tile_bytes(*x, w->k, work.tile) + own + sink.bytes(work.tile))};
    if (!arena.next) return false;
    char* wide = arena.take(own);
    const FloatTile in = float_tile(*x, w->k, tile, arena);
    const Range range = panel_range(tile.units, panels);
    active_kernels()->gemm_w8(in, *w, range, sink.open(tile, arena), wide);
    sink.flush(tile, {range.begin * kPanel, range.end * kPanel});
    return true;
  });
}

extern "C" int gossamer_gemm_int4(const gossamer_input* x, const gossamer_int4* w,
                                  const gossamer_output* y, gossamer_parallel_for parallel_for) {
  if (!w) return fail("w must not be NULL");
  if (const int status = check(x, w->n, w->k, y)) return status;
  if (w->group != 16 && w->group != 32) return fail("group=%lld: use 16 or 32", Long(w->group));
  return quantized_gemm(x, *w, y, kInt4Step, &Kernels::gemm_int4, parallel_for);
}

extern "C" int gossamer_spmm(const gossamer_input* x, const gossamer_sparse* w,
                             const gossamer_output* y, gossamer_parallel_for parallel_for) {
  if (!w) return fail("w must not be NULL");
  const gossamer_index& index = w->index;
  if (const int status = check(x, index.n, index.k, y, Layouts::kFloats)) return status;
  const int64_t row_bytes = spmm_scratch(index.n, index.k, kMaxLanes) / kMaxLanes;
  const int64_t rows = tile_rows(kMaxLanes, row_bytes, index.n, index.k);
  const Work work = joined_work_of(*x, rows, chunk_count(index.n));
  // An fp32 multiply-add takes twice an int8 one.
  const double macs = macs_of_lanes(work, 2 * double(index.entries));
  const ByEntries before{index, ceil_div(index.k, kBlockFloats)};
  return run(work, macs, before, parallel_for, [&](const Tile& tile) {
    char* lanes = scratch.reserve(spmm_scratch(index.n, index.k, work.tile));
    if (!lanes) return false;
    const int64_t first = tile.rows.begin, size = element_size(x->dtype);
    const char* data = static_cast<const char*>(x->data) + (x->conv ? 0 : first * x->stride * size);
    const FloatTile in{data,    x->stride, x->dtype,       tile.count(),
                       x->conv, first,     x->planar != 0, tile.more};
    const int64_t plane = y->planar ? x->conv->out_h * x->conv->out_w : 0;
    const int64_t at = plane ? 0 : first * y->stride * size;
    const auto* residual = static_cast<const char*>(y->residual);
    const Destination to{static_cast<char*>(y->data) + at,
                         y->stride,
                         x->dtype,
                         y->bias,
                         y->activation,
                         plane,
                         first,
                         residual ? residual + at : nullptr};
    kernels_for(tile.count())->spmm(in, *w, tile.units, to, lanes);
    return true;
  });
}

extern "C" int gossamer_spmm_int8(const gossamer_input* x, const gossamer_sparse_int8* w,
                                  const gossamer_output* y, gossamer_parallel_for parallel_for) {
  if (!w) return fail("w must not be NULL");
  if (x && x->conv) return gossamer_conv_spmm_int8(x, w, y, parallel_for);
  const gossamer_index& index = w->index;
  if (const int status = check(x, index.n, index.k, y)) return status;
  const int64_t chunk = chunk_rows(index.n);
  const int64_t most = index.k <= active_kernels()->wide_k ? kMaxLanes : kNarrowLanes;
  const int64_t rows = tile_rows(most, 2 * index.k + 4 * chunk, index.n, index.k);
  const Work work = work_of(*x, rows, chunk_count(index.n));
  const Quantizer quantize(*x, index.k, work);
  const double macs = macs_of_lanes(work, 4 * double(index.entries));
  const ByEntries before{index, ceil_div(ceil_div(index.k, 4), kBlockWords)};
  return run(work, macs, before, parallel_for, [&](const Tile& tile) {
    Sink sink(*x, *y, index.n);
    const int64_t own = spmm_int8_scratch(index.n, index.k, work.tile);
    Arena arena{scratch.reserve(quantize.bytes() + own + sink.bytes(work.tile))};
    if (!arena.next) return false;
    const QuantizedTile in = quantize(tile, arena);
    char* lanes = arena.take(own);
    kernels_for(tile.count())->spmm_int8(in, *w, tile.units, sink.open(tile, arena), lanes);
    sink.flush(tile, {tile.units.begin * chunk, tile.units.end * chunk});
    return true;
  });
}

extern "C" int gossamer_sddmm(const gossamer_input* x, const gossamer_input* dy,
                              const gossamer_index* w, float* dw,
                              gossamer_parallel_for parallel_for) {
  if (!dy || !w || (!dw && w->entries > 0)) return fail("dy, w and dw must not be NULL");
  const gossamer_output y{dw, w->n, 0, nullptr, GOSSAMER_NONE, nullptr, nullptr};
  if (const int status = check(x, w->n, w->k, &y)) return status;
  const Work rows = work_of(*x, kMaxLanes, 1);
  if (dy->conv || dy->rows != rows.images * rows.rows || (dy->rows > 1 && dy->stride < w->n)) {
    return fail("dy has %lld rows with stride %lld, x has %lld rows and the weight n=%lld",
                Long(dy->rows), Long(dy->stride), Long(rows.images * rows.rows), Long(w->n));
  }
  if (const int status = check(dy, w->n, std::min(w->n, kMaxK), &y)) return status;
  if (rows.tiles() == 0 || w->entries == 0) {
    std::fill(dw, dw + w->entries, 0.0f);
    return GOSSAMER_OK;
  }
  // A thread has the entries of its chunks to itself, and walks all rows once.
  const int64_t chunks = chunk_count(w->n);
  const Work work{1, 1, 1, chunks, chunks};
  const ByEntries before{*w, ceil_div(w->k, kBlockFloats)};
  const double macs = macs_of_lanes(rows, 2 * double(w->entries));
  return run(work, macs, before, parallel_for, [&](const Tile& mine) {
    const int64_t own = sddmm_scratch(w->n, w->k, rows.tile);
    Arena arena{scratch.reserve(float_tile_bytes(*x, w->k, rows.tile) + own)};
    if (!arena.next) return false;
    char* lanes = arena.take(own);
    for (int64_t t = 0; t < rows.tiles(); ++t) {
      const Tile tile = tile_at(rows, t);
      Arena gathered = arena;
      const FloatTile in = float_tile(*x, w->k, tile, gathered);
      const int64_t row = tile.image * rows.rows + tile.rows.begin;
      const FloatTile out{
          static_cast<const char*>(dy->data) + row * dy->stride * element_size(dy->dtype),
          dy->stride, dy->dtype, tile.count()};
      active_kernels()->sddmm(in, out, *w, mine.units, t == 0, dw, lanes);
    }
    return true;
  });
}

extern "C" int gossamer_quantize_rows(const gossamer_input* x, int64_t k, uint8_t* q,
                                      int64_t q_stride, float* scale, int32_t* zero,
                                      gossamer_parallel_for parallel_for) {
  const gossamer_output y{q, k, 0, nullptr, GOSSAMER_NONE, nullptr, nullptr};
  if (x && x->conv) return fail("quantize_rows takes rows, not a convolution");
  if (const int status = check(x, k, std::min(k, kMaxK), &y)) return status;
  if (x->rows > 1 && x->stride < k) {
    return fail("rows with stride %lld cannot hold k=%lld elements each", Long(x->stride), Long(k));
  }
  if (q_stride < k) return fail("q_stride=%lld is shorter than k=%lld", Long(q_stride), Long(k));
  const Work work = work_of(*x, kDenseTile, 1);
  // About one MAC's time an element and pass.
  return run(work, macs_of(work, 8.0 * double(k)), Even(), parallel_for, [&](const Tile& tile) {
    Arena none{nullptr};
    const int64_t row = tile.rows.begin;
    active_kernels()->quantize_rows(float_tile(*x, k, tile, none), k, given(*x), q + row * q_stride,
                                    q_stride, scale + row, zero + row);
    return true;
  });
}

extern "C" int gossamer_im2col(const gossamer_input* x, void* rows,
                               gossamer_parallel_for parallel_for) {
  if (!x || !x->conv || x->planar) {
    return fail("im2col needs the geometry of a convolution, channels innermost");
  }
  if (!rows && x->conv->images > 0) return fail("rows must not be NULL");
  if (x->dtype < GOSSAMER_FLOAT32 || x->dtype > GOSSAMER_FLOAT16) {
    return fail("dtype %d is unknown: use float32, bfloat16 or float16", int(x->dtype));
  }
  const int64_t k = columns_of(*x->conv), size = element_size(x->dtype);
  if (const int status = check_conv(*x->conv)) return status;
  if (x->planar) return fail("x is planar: im2col gathers images with innermost channels");
  if (!active_kernels()) return fail("%s", isa_error());
  const Work work = work_of(*x, kDenseTile, 1);
  return run(work, macs_of(work, 8.0 * double(k)), Even(), parallel_for, [&](const Tile& tile) {
    char* to = static_cast<char*>(rows) + (tile.image * work.rows + tile.rows.begin) * k * size;
    active_kernels()->im2col(image_at(*x, tile.image), *x->conv, size, 0, tile.rows, to);
    return true;
  });
}

extern "C" int gossamer_ceiling(gossamer_loop loop, const int32_t* data, int64_t bytes,
                                int64_t turns, double* work, float* mean) {
  if (!active_kernels()) return fail("%s", isa_error());
  if (loop < GOSSAMER_LOOP_MULADD || loop > GOSSAMER_LOOP_READ) {
    return fail("loop %d is unknown: use 0 (muladd), 1 (dot) or 2 (read)", int(loop));
  }
  if (bytes < 4096 || bytes % 4096) {
    return fail("bytes=%lld must be a multiple of 4096", Long(bytes));
  }
  if (turns < 0 || turns > 1 << 22) {
    return fail("turns=%lld must be 0 to 4194304", Long(turns));
  }
  if (!data || !work || !mean) return fail("data, work and mean must not be NULL");
  *work = active_kernels()->ceilings(loop, data, bytes, turns, mean);
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
