// check.h: what is checked of operands before a kernel sees them.
#pragma once

#include "error.h"
#include "include/gossamer.h"

namespace gossamer {

int check_conv(const gossamer_conv& c);

// `bytes`: blocked images too.
int check_dtype(gossamer_dtype dtype, bool bytes);

// The layouts of images that a product takes: floats with innermost channels, floats in any order,
// or blocked bytes too.
enum class Layouts { kInnermost, kFloats, kAny };

// Of a product of an n x k weight; depthwise: k may be the taps of one channel.
int check(const gossamer_input* x, int64_t n, int64_t k, const gossamer_output* y,
          Layouts layouts = Layouts::kInnermost, bool depthwise = false);

// 0 (of its own range), or a scale that can be divided by and a byte.
int check_affine(float scale, int32_t zero, const char* whose);

}  // namespace gossamer
