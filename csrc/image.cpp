// image.cpp: what becomes of blocked images beside convolutions: block, unblock, max_pool, mean.

#include <atomic>

#include "check.h"
#include "tiles.h"

namespace gossamer {
namespace {

// Pixels a tile of block: any number of lanes.
constexpr int64_t kBlockPixels = 1024;
// Rows a tile of max_pool; blocks of channels one of mean.
constexpr int64_t kPoolRows = 4, kMeanBlocks = 16;

int check_images(const gossamer_input* x, int64_t channels, int64_t pixels, const void* y) {
  if (!active_kernels()) return fail("%s", isa_error());
  if (!x || (!y && x->rows > 0)) return fail("x and y must not be NULL");
  if (x->rows < 0 || channels < 1 || pixels < 1) {
    return fail("%lld images of %lld channels and %lld pixels: nothing to do", Long(x->rows),
                Long(channels), Long(pixels));
  }
  if (x->scale == 0) return fail("a blocked image has a scale of its own");
  return check_affine(x->scale, x->zero, "x");
}

// An element takes about as long as eight multiply-adds.
double macs_of_elements(const Work& work, int64_t elements) {
  return macs_of(work, 8.0 * static_cast<double>(elements));
}

}  // namespace
}  // namespace gossamer

using namespace gossamer;

extern "C" int gossamer_block(const gossamer_input* x, int64_t channels, int64_t pixels, uint8_t* q,
                              gossamer_parallel_for parallel_for) {
  if (const int status = check_images(x, channels, pixels, q)) return status;
  if (const int status = check_dtype(x->dtype, false)) return status;
  if (x->rows > 1 && x->stride < channels * pixels) {
    return fail("images with stride %lld cannot hold %lld x %lld elements each", Long(x->stride),
                Long(channels), Long(pixels));
  }
  std::atomic<int64_t> ill{-1};
  const Work work{x->rows, pixels, std::min(pixels, kBlockPixels), 1};
  const int status =
      run(work, macs_of_elements(work, channels), Even(), parallel_for, [&](const Tile& tile) {
        const char* at =
            static_cast<const char*>(x->data) + tile.image * x->stride * element_size(x->dtype);
        const FloatImage image{at, x->dtype, x->planar != 0, channels, pixels};
        const Affine got = active_kernels()->block(
            image, given(*x), tile.rows, q + tile.image * blocked_bytes(channels, pixels));
        if (got.scale != got.scale) ill = tile.image;
        return true;
      });
  if (ill < 0) return status;
  return fail("image %lld holds a NaN or an Inf, which no byte can stand for", Long(ill));
}

extern "C" int gossamer_unblock(const gossamer_input* q, int64_t channels, int64_t pixels, void* y,
                                gossamer_dtype dtype, gossamer_parallel_for parallel_for) {
  if (const int status = check_images(q, channels, pixels, y)) return status;
  if (const int status = check_dtype(dtype, false)) return status;
  const Work work{q->rows, ceil_div(channels, 4), 1, 1};
  return run(work, macs_of_elements(work, 4 * pixels), Even(), parallel_for, [&](const Tile& tile) {
    active_kernels()->unblock(
        static_cast<const uint8_t*>(q->data) + tile.image * blocked_bytes(channels, pixels),
        given(*q), channels, pixels, tile.rows, dtype,
        static_cast<char*>(y) + tile.image * channels * pixels * element_size(dtype));
    return true;
  });
}

extern "C" int gossamer_max_pool(const gossamer_input* x, void* y,
                                 gossamer_parallel_for parallel_for) {
  if (!active_kernels()) return fail("%s", isa_error());
  if (!x || !x->conv) return fail("max_pool needs the geometry of its windows");
  const gossamer_conv& c = *x->conv;
  if (const int status = check_conv(c)) return status;
  if (!y && c.images > 0) return fail("y must not be NULL");
  const bool bytes = x->dtype == GOSSAMER_UINT8;
  if (!bytes && x->dtype != GOSSAMER_FLOAT32) {
    return fail("max_pool is for blocked bytes and for float32");
  }
  const Work work{c.images, c.out_h, std::min(c.out_h, kPoolRows), 1};
  const int64_t taps = c.kernel_h * c.kernel_w, lines = 4 * work.tile * pool_line(c);
  const int64_t pixel = bytes ? blocked_bytes(c.channels, 1) : 4 * c.channels;
  const double macs = macs_of_elements(work, pixel * c.out_w * taps);
  return run(work, macs, Even(), parallel_for, [&](const Tile& tile) {
    char* own = scratch.reserve(lines);
    if (!own) return false;
    active_kernels()->max_pool(
        static_cast<const char*>(x->data) + tile.image * pixel * c.height * c.width, x->dtype,
        x->planar != 0, c, tile.rows,
        static_cast<char*>(y) + tile.image * pixel * c.out_h * c.out_w, own);
    return true;
  });
}

extern "C" int gossamer_mean(const gossamer_input* q, int64_t channels, int64_t pixels, float* y,
                             gossamer_parallel_for parallel_for) {
  if (const int status = check_images(q, channels, pixels, y)) return status;
  const int64_t blocks = ceil_div(channels, 4);
  const Work work{q->rows, blocks, std::min(blocks, kMeanBlocks), 1};
  return run(work, macs_of_elements(work, 4 * pixels), Even(), parallel_for, [&](const Tile& tile) {
    active_kernels()->mean(
        static_cast<const uint8_t*>(q->data) + tile.image * blocked_bytes(channels, pixels),
        given(*q), channels, pixels, tile.rows, y + tile.image * channels);
    return true;
  });
}
