// check.cpp: sizes, types and numbers of operands: whatever a caller in torch or C++ can get wrong.

#include "check.h"

#include <algorithm>
#include <cfloat>

#include "tiles.h"

namespace gossamer {
namespace {

int check_blocked(const gossamer_input& x, const gossamer_blocked& y) {
  if (x.dtype != GOSSAMER_UINT8) return fail("a blocked y needs a blocked x: see gossamer_block");
  if (const int status = check_affine(y.scale, y.zero, "y")) return status;
  if (const int status = check_affine(y.residual_scale, y.residual_zero, "residual")) return status;
  if (y.scale == 0 || (y.residual && y.residual_scale == 0)) {
    return fail("y and its residual must have scales of their own");
  }
  return GOSSAMER_OK;
}

}  // namespace

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
  // Places in a plane are int32.
  const int64_t limit = int64_t{1} << 30;
  const int64_t largest = std::max({c.height, c.width, c.kernel_h, c.kernel_w, c.stride_h,
                                    c.stride_w, c.dilation_h, c.dilation_w, c.pad_top, c.pad_left});
  if (largest >= limit) {
    return fail("a size of %lld: every size must be at least 1 and below 2^30", Long(largest));
  }
  if (c.height * c.width >= limit) {
    return fail("an image of %lld x %lld has too many pixels: split it", Long(c.height),
                Long(c.width));
  }
  return GOSSAMER_OK;
}

int check_affine(float scale, int32_t zero, const char* whose) {
  // 2^-126: 1 / scale is finite.
  if (scale != 0 && !(scale >= 0x1p-126f && scale <= FLT_MAX)) {
    return fail("%s has scale %g: it must be 0 (dynamic) or a finite normal number", whose, scale);
  }
  if (zero < 0 || zero > 255) return fail("%s has zero=%d: it must be 0 to 255", whose, int(zero));
  return GOSSAMER_OK;
}

int check_dtype(gossamer_dtype dtype, bool bytes) {
  if (dtype >= GOSSAMER_FLOAT32 && dtype <= (bytes ? GOSSAMER_UINT8 : GOSSAMER_FLOAT16)) {
    return GOSSAMER_OK;
  }
  return fail("dtype %d is unknown: use float32, bfloat16 or float16", int(dtype));
}

int check(const gossamer_input* x, int64_t n, int64_t k, const gossamer_output* y, Layouts layouts,
          bool depthwise) {
  if (!active_kernels()) return fail("%s", isa_error());
  if (!x || !y) return fail("x and y must not be NULL");
  if (n < 1 || k < 1)
    return fail("n=%lld, k=%lld: a weight needs at least one output and one input", Long(n),
                Long(k));
  if (k > kMaxK) {
    return fail("k=%lld overflows int32 (limit %lld): split the layer", Long(k), Long(kMaxK));
  }
  if (const int status = check_dtype(x->dtype, layouts == Layouts::kAny && x->conv)) return status;
  if (const int status = check_affine(x->scale, x->zero, "x")) return status;
  if (x->dtype == GOSSAMER_UINT8 && (x->scale == 0 || x->planar)) {
    return fail("a blocked image is not planar, and has a scale of its own");
  }
  if (x->planar && !(layouts != Layouts::kInnermost && x->conv)) {
    return fail("x is planar, but its channels must be innermost (channels_last) here");
  }
  if (y->residual && layouts != Layouts::kFloats) {
    return fail("a residual of floats is for fp32 sparse weights");
  }
  if (y->blocked && !(layouts == Layouts::kAny && x->conv)) {
    return fail("a blocked y is for convolutions of int8 weights");
  }
  if (y->activation < GOSSAMER_NONE || y->activation > GOSSAMER_HARDSWISH) {
    return fail("activation %d is unknown: use 0 to %d, see gossamer_activation",
                int(y->activation), int(GOSSAMER_HARDSWISH));
  }
  if (x->conv) {
    if (const int status = check_conv(*x->conv)) return status;
    const bool own_channels = depthwise && is_depthwise(*x->conv, n, k) &&
                              (x->dtype == GOSSAMER_UINT8 || x->conv->channels == n);
    if (columns_of(*x->conv) != k && !own_channels) {
      return fail("the convolution has %lld columns, the weight k=%lld", Long(columns_of(*x->conv)),
                  Long(k));
    }
  } else if (x->rows < 0 || (x->rows > 1 && x->stride < k) || y->planar) {
    return fail("rows=%lld with stride %lld cannot hold k=%lld elements each", Long(x->rows),
                Long(x->stride), Long(k));
  }
  if (y->blocked) return check_blocked(*x, *y->blocked);
  if (!y->planar && y->stride < n) {
    return fail("y has stride %lld, shorter than its n=%lld outputs", Long(y->stride), Long(n));
  }
  return GOSSAMER_OK;
}

}  // namespace gossamer
