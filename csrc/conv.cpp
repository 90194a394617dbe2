// conv.cpp: convolutions of int8 weights: blocks images of floats, cuts the output into tiles of
// pixels x units of outputs, and calls the kernels of the active Isa on each.

#include "check.h"
#include "tiles.h"

namespace gossamer {
namespace {

// At most `most` pixels a tile, shared evenly in whole vectors: 196 are 4 x 49, not 3 x 64 and 4.
int64_t tile_pixels(const gossamer_conv& c, int64_t most) {
  const int64_t lanes = active_kernels()->lanes, vectors = ceil_div(c.out_h * c.out_w, lanes),
                tiles = ceil_div(vectors, most / lanes);
  return ceil_div(vectors, tiles) * lanes;
}

// The same with pixels that fill no vector, where they are few: 196 are 66, 66 and 64; 49 are one
// tile.
int64_t dense_tile_pixels(const gossamer_conv& c) {
  const int64_t lanes = active_kernels()->lanes, count = c.out_h * c.out_w, rest = count % lanes;
  if (rest == 0 || rest > std::min(kRestPixels, lanes / 2)) return tile_pixels(c, kMaxPixels);
  const int64_t tiles = std::max<int64_t>(1, ceil_div(count / lanes, kMaxPixels / lanes));
  return ceil_div(count / lanes, tiles) * lanes + ceil_div(rest, tiles);
}

// Blocked images: as they lie, or of floats, each made once in a thread's scratch.
class Images {
 public:
  explicit Images(const gossamer_input& x) : x_(x), plane_(x.conv->height * x.conv->width) {}

  int64_t bytes() const {
    if (x_.dtype == GOSSAMER_UINT8) return 0;
    return 64 + round_up(blocked_bytes(x_.conv->channels, plane_), 64);
  }

  // The first parts of the arena, so that an image of one tile serves the next.
  ImageTile operator()(const Tile& tile, Arena& arena) const {
    const gossamer_conv& c = *x_.conv;
    const int64_t image_bytes = blocked_bytes(c.channels, plane_);
    if (x_.dtype == GOSSAMER_UINT8) {
      return {static_cast<const uint8_t*>(x_.data) + tile.image * image_bytes,
              c,
              given(x_),
              tile.rows,
              tile.again,
              tile.cold,
              tile.more};
    }
    auto* range = reinterpret_cast<Affine*>(arena.take(sizeof(Affine)));
    auto* q = reinterpret_cast<uint8_t*>(arena.take(image_bytes));
    if (tile.fresh) {
      const FloatImage image{image_at(x_, tile.image), x_.dtype, x_.planar != 0, c.channels,
                             plane_};
      *range = active_kernels()->block(image, given(x_), {0, plane_}, q);
    }
    return {q, c, *range, tile.rows, tile.again, tile.cold, tile.more};
  }

 private:
  const gossamer_input& x_;
  int64_t plane_;
};

// The largest magnitude. As integers, of which a compiler takes many at once; NaN is the largest.
double largest(const float* values, int64_t n) {
  uint32_t most = 0;
  for (int64_t i = 0; values && i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, values + i, sizeof bits);
    most = std::max(most, bits & 0x7fffffff);
  }
  float value;
  std::memcpy(&value, &most, sizeof value);
  return value;
}

// See ImageDestination. A weight's scales and k bound its sums.
bool saturates(const gossamer_input& x, const float* scale, int64_t n, int64_t k,
               const gossamer_output& y) {
  if (!y.blocked || x.zero != 0 || y.blocked->zero != 0 ||
      (y.blocked->residual && y.blocked->residual_zero != 0))
    return false;
  const double step = y.blocked->scale;
  // A bound of 6 is the last byte, or above it.
  const bool bounded = y.activation == GOSSAMER_RELU6 && 6 / step > 254.75;
  if (y.activation != GOSSAMER_NONE && y.activation != GOSSAMER_RELU && !bounded) return false;
  const double sum = 255.0 * 128 * double(k) * x.scale * largest(scale, n);
  const double most = sum + largest(y.bias, n) + 255.0 * y.blocked->residual_scale;
  return most / step < 0x1p30;
}

// Of the first image.
ImageDestination destination(const gossamer_input& x, const gossamer_output& y, int64_t n,
                             bool saturates) {
  const int64_t plane = x.conv->out_h * x.conv->out_w;
  const gossamer_dtype dtype = x.dtype == GOSSAMER_UINT8 ? GOSSAMER_FLOAT32 : x.dtype;
  const bool planes = y.blocked || y.planar;
  const int64_t image =
      y.blocked ? blocked_bytes(n, plane) : plane * (y.planar ? n : y.stride) * element_size(dtype);
  return {{y.data, planes ? plane : y.stride, dtype, y.bias, y.activation},
          !y.blocked && y.planar,
          y.blocked,
          saturates,
          image};
}

// multiply(tile, units, destination, scratch of `own` bytes) for all tiles; `weights` is how many an
// output pixel meets. An image of `work` is `together` of x, fewer at the end.
template <typename Before, typename Multiply>
int convolve(const gossamer_input& x, const gossamer_output& y, int64_t n, int64_t k,
             const float* scale, const Work& work, double weights, Before before, int64_t own,
             gossamer_parallel_for parallel_for, Multiply multiply, int64_t together = 1) {
  const Images images(x);
  const ImageDestination first = destination(x, y, n, saturates(x, scale, n, k, y));
  const double macs = macs_of_lanes(work, weights) * double(together);
  return run(work, macs, before, parallel_for, [&](Tile tile) {
    Arena arena{scratch.reserve(images.bytes() + own)};
    if (!arena.next) return false;
    tile.image *= together;
    ImageTile in = images(tile, arena);
    in.images = std::min(together, x.conv->images - tile.image);
    gossamer_blocked blocked{};
    multiply(in, tile.units, of_image(first, tile.image, blocked), arena.take(own));
    return true;
  });
}

// Tiles of whole rows, and a panel of 16 channels a unit.
int depthwise(const gossamer_input& x, const gossamer_int8& w, const gossamer_output& y,
              gossamer_parallel_for parallel_for) {
  const gossamer_conv& c = *x.conv;
  const int64_t rows = std::min(c.out_h, std::max<int64_t>(1, kDepthwisePixels / c.out_w));
  const DepthwiseRows shape = depthwise_rows(c, rows);
  if (double(shape.rows) * double(shape.columns) * double(c.stride_w) > 0x1p28) {
    return fail("depthwise windows that span %lld x %lld pixels are too large", Long(shape.rows),
                Long(shape.columns * c.stride_w));
  }
  const Work work = work_of(x, rows * c.out_w, ceil_div(w.n, kPanel));
  return convolve(x, y, w.n, w.k, w.scale, work, double(w.n) * double(w.k), Even(),
                  depthwise_scratch(c, w.k, rows * c.out_w), parallel_for,
                  [&](const ImageTile& in, Range panels, const ImageDestination& to, void* own) {
                    active_kernels()->conv_int8(in, w, panels, to, own);
                  });
}

// What winograd.h takes at once: so many images, or rows of an image's tiles.
struct WinogradUnit {
  int64_t images, rows, columns;

  // As many tiles as there may be, in equal units. Images of floats are blocked one by one.
  explicit WinogradUnit(const gossamer_input& x) : columns(ceil_div(x.conv->out_w, 4)) {
    const gossamer_conv& c = *x.conv;
    const auto share = [](int64_t count, int64_t most) {
      count = std::max<int64_t>(count, 1);
      return ceil_div(count, ceil_div(count, std::clamp<int64_t>(most, 1, count)));
    };
    const int64_t all = ceil_div(c.out_h, 4),
                  most = std::min(kWinogradTiles, kWinogradPixels / round_up(c.channels, 4));
    images = x.dtype == GOSSAMER_UINT8 ? share(c.images, most / (all * columns)) : 1;
    rows = share(all, most / columns);
  }

  int64_t out_rows(const gossamer_conv& c) const { return std::min(rows * 4, c.out_h); }
  int64_t bytes(const gossamer_conv& c) const {
    return winograd_scratch(c, images, out_rows(c)).end * 4;
  }

  // Whether it is faster than the kernel for all convolutions. Long rows need scratch that is not kept
  // and lies in no L2: 1.1 to 1.3 times as long.
  bool pays(const gossamer_conv& c, int64_t n) const {
    const int64_t needed = bytes(c);
    if (needed > 2 * Scratch::kKept) return false;
    const WinogradCost cost = active_kernels()->winograd_cost;
    const double channels = 1 / double(c.channels) + 1 / double(n),
                 tile = 16 * cost.tile * (1 + cost.channel * channels),
                 tiles = double(images * rows * columns + kWinogradSetUp),
                 more = needed > Scratch::kKept ? 1.4 : 1;
    return more * tile * tiles < double(images * out_rows(c) * c.out_w);
  }
};

// A panel is a unit of outputs: no fewer at a time cost more.
int winograd(const gossamer_input& x, const gossamer_int8& w, const gossamer_output& y,
             const WinogradUnit& unit, gossamer_parallel_for parallel_for) {
  const gossamer_conv& c = *x.conv;
  Work work = work_of(x, unit.out_rows(c) * c.out_w, ceil_div(w.n, kPanel));
  work.images = ceil_div(c.images, unit.images);
  return convolve(
      x, y, w.n, w.k, w.scale, work, double(w.n) * double(w.k), Even(), unit.bytes(c), parallel_for,
      [&](const ImageTile& in, Range panels, const ImageDestination& to, void* own) {
        active_kernels()->winograd(in, w, panels, to, own);
      },
      unit.images);
}

}  // namespace
}  // namespace gossamer

using namespace gossamer;

extern "C" int gossamer_conv_int8(const gossamer_input* x, const gossamer_int8* w,
                                  const gossamer_output* y, gossamer_parallel_for parallel_for) {
  if (!w) return fail("w must not be NULL");
  if (x && !x->conv) return fail("conv_int8 needs the geometry of a convolution");
  if (const int status = check(x, w->n, w->k, y, Layouts::kAny, true)) return status;
  if (is_depthwise(*x->conv, w->n, w->k)) return depthwise(*x, *w, *y, parallel_for);
  if (is_winograd(*x->conv)) {
    const WinogradUnit unit(*x);
    if (unit.pays(*x->conv, w->n)) return winograd(*x, *w, *y, unit, parallel_for);
  }
  const int64_t panels = ceil_div(w->n, kPanel), pixels = dense_tile_pixels(*x->conv);
  const Work work = work_of(*x, pixels, ceil_div(panels, kUnitPanels));
  return convolve(*x, *y, w->n, w->k, w->scale, work, double(w->n) * double(w->k), Even(),
                  conv_int8_scratch(w->k, pixels), parallel_for,
                  [&](const ImageTile& in, Range units, const ImageDestination& to, void* own) {
                    active_kernels()->conv_int8(in, *w, panel_range(units, panels), to, own);
                  });
}

extern "C" int gossamer_conv_spmm_int8(const gossamer_input* x, const gossamer_sparse_int8* w,
                                       const gossamer_output* y,
                                       gossamer_parallel_for parallel_for) {
  if (!w) return fail("w must not be NULL");
  if (x && !x->conv) return fail("conv_spmm_int8 needs the geometry of a convolution");
  const gossamer_index& index = w->index;
  if (const int status = check(x, index.n, index.k, y, Layouts::kAny)) return status;
  const Kernels& kernels = *active_kernels();
  const int64_t most = index.k <= kernels.wide_k ? sparse_pixels(kernels.lanes) : kNarrowLanes;
  const int64_t pixels = tile_pixels(*x->conv, most);
  const Work work = work_of(*x, pixels, chunk_count(index.n));
  const ByEntries before{index, ceil_div(ceil_div(index.k, 4), kBlockWords)};
  return convolve(*x, *y, index.n, index.k, w->scale, work, 4 * double(index.entries), before,
                  conv_spmm_int8_scratch(index.n, index.k, pixels), parallel_for,
                  [&](const ImageTile& in, Range chunks, const ImageDestination& to, void* own) {
                    active_kernels()->conv_spmm_int8(in, *w, chunks, to, own);
                  });
}
