// image_ops.cpp: the operators on blocked images, (images, ceil(channels / 4), height, width, 4) u8,
// each with the (scale, zero point) of all its bytes beside it. Their schemas are in ops.cpp.

#include <string>
#include <vector>

#include "include/gossamer.h"
#include "torch/operands.h"
#include "torch/operators.h"
#include "torch/tensor.h"

namespace gossamer {
namespace {

Layout blocked_layout(int64_t images, int64_t channels, int64_t height, int64_t width) {
  const int64_t blocks = up(channels, 4) / 4, line = 4 * width, plane = height * line;
  return {{images, blocks, height, width, 4},
          {blocks * plane, plane, line, 4, 1},
          aoti_torch_dtype_uint8()};
}

void check_blocked(const Tensor& q, const char* name) {
  if (q.dim == 5 && q.sizes[4] == 4 && q.dtype == aoti_torch_dtype_uint8() && q.contiguous())
    return;
  fail(std::string(name) + " of shape " + q.shape() +
       " must be a blocked image: contiguous uint8 (images, blocks, height, width, 4)");
}

void check_channels(const Tensor& q, int64_t channels) {
  if (up(channels, 4) == 4 * q.sizes[1]) return;
  fail("q of shape " + q.shape() + " does not hold " + std::to_string(channels) + " channels");
}

// A blocked image and its numbers, as the C ABI reads it.
struct Blocked {
  gossamer_input view;
  gossamer_conv conv;

  Blocked(const Tensor& q, float scale, int32_t zero) {
    check_blocked(q, "q");
    view = {q.data, GOSSAMER_UINT8, q.sizes[0], 0, nullptr, scale, zero, 0};
  }
  Blocked(const Blocked&) = delete;

  void convolve(const Tensor& q, const std::vector<int64_t>& geometry) {
    conv = conv_of(q.sizes[0], 4 * q.sizes[1], q.sizes[2], q.sizes[3], geometry);
    view.conv = &conv;
  }
  Layout result(int64_t channels) const {
    return blocked_layout(conv.images, channels, conv.out_h > 0 ? conv.out_h : 0,
                          conv.out_w > 0 ? conv.out_w : 0);
  }
};

// What both convolutions share behind their weights: x_affine, bias, y_affine, residual,
// residual_affine, k, activation, conv. Without y_affine the result is float32, laid out as conv
// says. `multiply` gets input, k and output of the C ABI.
template <bool kInPlace, typename Multiply>
void convolution(const Tensor& q, Arguments& arguments, int64_t n, StableIValue* result,
                 Multiply multiply) {
  const int32_t floats = aoti_torch_dtype_float32();
  const Affine x_affine(arguments.weight("x_affine", floats, 2), "x_affine");
  const std::vector<Tensor> bias = arguments.optional_weight("bias", n);
  const std::vector<Tensor> bytes = arguments.optional_weight("y_affine", 2);
  std::vector<Tensor> residual = residual_of<kInPlace>(arguments);
  const std::vector<Tensor> range = arguments.optional_weight("residual_affine", 2);
  const int64_t k = arguments.integer();
  const gossamer_activation activation = activation_of(arguments.integer());
  Blocked input(q, x_affine.scale, x_affine.zero);
  const std::vector<int64_t> geometry = arguments.integers();
  input.convolve(q, geometry);
  const bool planar = bytes.empty() && geometry.back() != 0;
  const Layout layout =
      bytes.empty() ? image_layout(input.conv, n, planar, floats) : input.result(n);
  gossamer_blocked blocked{};
  if (!bytes.empty()) {
    const Affine affine(bytes[0], "y_affine");
    blocked.scale = affine.scale, blocked.zero = affine.zero;
  }
  if (!residual.empty()) {
    if (bytes.empty()) fail("a residual is for results in bytes: it needs y_affine");
    blocked.residual = static_cast<const uint8_t*>(residual_of(residual, layout));
    if (range.empty()) fail("a residual needs its residual_affine");
    const Affine affine(range[0], "residual_affine");
    blocked.residual_scale = affine.scale, blocked.residual_zero = affine.zero;
  }
  if (kInPlace) require_apart(residual[0], q);
  Tensor y = kInPlace ? std::move(residual[0]) : arguments.result(layout);
  const gossamer_output output{
      y.data, n, planar, floats_of(bias), activation, bytes.empty() ? nullptr : &blocked, nullptr};
  require_gossamer(multiply(input.view, k, output));
  if (!kInPlace) *result = y.release();
}

}  // namespace

// (x, affine) -> q
void block(Arguments& arguments, StableIValue* result) {
  const Tensor x = arguments.tensor();
  const Affine affine(arguments.weight("affine", aoti_torch_dtype_float32(), 2), "affine");
  if (x.dim != 4) fail("x of shape " + x.shape() + " must be (images, channels, height, width)");
  const int64_t channels = x.sizes[1], pixels = x.sizes[2] * x.sizes[3];
  const bool planar = x.contiguous();
  if (!planar && !channels_last(x)) {
    fail("x of shape " + x.shape() + " must be contiguous or channels_last");
  }
  const gossamer_input input{x.data,  float_dtype(x), x.sizes[0],  channels * pixels,
                             nullptr, affine.scale,   affine.zero, planar};
  Tensor q = arguments.result(blocked_layout(x.sizes[0], channels, x.sizes[2], x.sizes[3]));
  require_gossamer(
      gossamer_block(&input, channels, pixels, static_cast<uint8_t*>(q.data), parallel_for));
  *result = q.release();
}

// (q, affine, channels, to: a place in gossamer_dtype) -> y
void unblock(Arguments& arguments, StableIValue* result) {
  const Tensor q = arguments.tensor();
  const Affine affine(arguments.weight("affine", aoti_torch_dtype_float32(), 2), "affine");
  const int64_t channels = arguments.integer(), dtype = arguments.integer();
  const Blocked input(q, affine.scale, affine.zero);
  check_channels(q, channels);
  const int32_t dtypes[] = {aoti_torch_dtype_float32(), aoti_torch_dtype_bfloat16(),
                            aoti_torch_dtype_float16()};
  if (dtype < 0 || dtype > 2) fail("y must be float32, bfloat16 or float16");
  const int64_t height = q.sizes[2], width = q.sizes[3], pixels = height * width;
  Tensor y = arguments.result({{q.sizes[0], channels, height, width},
                               {channels * pixels, pixels, width, 1},
                               dtypes[dtype]});
  require_gossamer(gossamer_unblock(&input.view, channels, pixels, y.data,
                                    static_cast<gossamer_dtype>(dtype), parallel_for));
  *result = y.release();
}

// (x, kernel, stride, padding, dilation) -> y
void max_pool(Arguments& arguments, StableIValue* result) {
  const Tensor x = arguments.tensor();
  std::vector<int64_t> kernel = arguments.integers(), stride = arguments.integers(),
                       padding = arguments.integers(), dilation = arguments.integers();
  std::vector<int64_t> geometry(kernel);
  for (const std::vector<int64_t>* more : {&stride, &dilation, &padding})
    geometry.insert(geometry.end(), more->begin(), more->end());
  geometry.push_back(1);
  const auto pool = [&](const gossamer_input& view, const Layout& layout) {
    Tensor y = arguments.result(layout);
    require_gossamer(gossamer_max_pool(&view, y.data, parallel_for));
    *result = y.release();
  };
  const int32_t floats = aoti_torch_dtype_float32();
  if (x.dim == 4 && x.dtype == floats && (x.contiguous() || channels_last(x))) {
    const Input input(x, 0, geometry, true);
    return pool(input.view, image_layout(input.conv, x.sizes[1], true, floats));
  }
  Blocked input(x, 1, 0);
  input.convolve(x, geometry);
  pool(input.view, input.result(4 * x.sizes[1]));
}

// (q, affine, channels, keepdim) -> y
void mean(Arguments& arguments, StableIValue* result) {
  const Tensor q = arguments.tensor();
  const Affine affine(arguments.weight("affine", aoti_torch_dtype_float32(), 2), "affine");
  const int64_t channels = arguments.integer();
  const bool keepdim = arguments.integer() != 0;
  const Blocked input(q, affine.scale, affine.zero);
  check_channels(q, channels);
  Layout layout{{q.sizes[0], channels}, {channels, 1}, aoti_torch_dtype_float32()};
  if (keepdim) layout = {{q.sizes[0], channels, 1, 1}, {channels, 1, 1, 1}, layout.dtype};
  Tensor y = arguments.result(layout);
  require_gossamer(gossamer_mean(&input.view, channels, q.sizes[2] * q.sizes[3],
                                 static_cast<float*>(y.data), parallel_for));
  *result = y.release();
}

// (q, panels, scale, wsum, x_affine, ...)
template <bool kInPlace>
void conv_int8(Arguments& arguments, StableIValue* result) {
  const Tensor q = arguments.tensor();
  const Tensor panels = arguments.weight("panels", aoti_torch_dtype_int8(), -1);
  const Tensor scale = arguments.weight("scale", aoti_torch_dtype_float32(), -1);
  const int64_t n = scale.numel();
  const Tensor wsum = arguments.weight("wsum", aoti_torch_dtype_int32(), n);
  convolution<kInPlace>(q, arguments, n, result,
                        [&](const gossamer_input& x, int64_t k, const gossamer_output& y) {
                          const gossamer_int8 w = dense_int8(panels, scale, &wsum, k);
                          return gossamer_conv_int8(&x, &w, &y, parallel_for);
                        });
}
template void conv_int8<false>(Arguments&, StableIValue*);
template void conv_int8<true>(Arguments&, StableIValue*);

// (q, values, columns, rows, cells, scale, wsum, x_affine, ...)
template <bool kInPlace>
void conv_spmm_int8(Arguments& arguments, StableIValue* result) {
  const Tensor q = arguments.tensor();
  const SparseInt8 weight(arguments);
  convolution<kInPlace>(q, arguments, weight.n, result,
                        [&](const gossamer_input& x, int64_t k, const gossamer_output& y) {
                          const gossamer_sparse_int8 w = weight.view(k);
                          return gossamer_conv_spmm_int8(&x, &w, &y, parallel_for);
                        });
}
template void conv_spmm_int8<false>(Arguments&, StableIValue*);
template void conv_spmm_int8<true>(Arguments&, StableIValue*);

}  // namespace gossamer
