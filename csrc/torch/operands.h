// operands.h: what torch hands over as the C ABI reads it: rows, images, geometry, indices.
#pragma once

#include <string>
#include <vector>

#include "include/gossamer.h"
#include "torch/tensor.h"

namespace gossamer {

inline void require_gossamer(int status) {
  if (status != GOSSAMER_OK) fail(gossamer_error());
}

inline gossamer_dtype float_dtype(const Tensor& x) {
  if (x.dtype == aoti_torch_dtype_float32()) return GOSSAMER_FLOAT32;
  if (x.dtype == aoti_torch_dtype_bfloat16()) return GOSSAMER_BFLOAT16;
  if (x.dtype == aoti_torch_dtype_float16()) return GOSSAMER_FLOAT16;
  fail("x must be float32, bfloat16 or float16");
}

inline gossamer_activation activation_of(int64_t index) {
  if (index < GOSSAMER_NONE || index > GOSSAMER_HARDSWISH) {
    fail("activation " + std::to_string(index) + " is unknown: use 0 to " +
         std::to_string(int(GOSSAMER_HARDSWISH)) + ", see ops.ACTIVATIONS");
  }
  return static_cast<gossamer_activation>(index);
}

inline const float* floats_of(const std::vector<Tensor>& optional) {
  return optional.empty() ? nullptr : static_cast<const float*>(optional[0].data);
}

// What is added to a result, which lies as that does; null for nothing.
inline const void* residual_of(const std::vector<Tensor>& optional, const Layout& y) {
  if (optional.empty()) return nullptr;
  if (!optional[0].is(y)) {
    fail("the residual of shape " + optional[0].shape() + " must have the shape " +
         shape_of(y.sizes.data(), y.sizes.size()) + ", dtype and strides of the result");
  }
  return optional[0].data;
}

// The result must not be written over x, of which other pixels or outputs are still to be read.
inline void require_apart(const Tensor& residual, const Tensor& x) {
  if (x.data && residual.data == x.data) {
    fail("the residual is x itself, which is read while the result is written: give it a copy");
  }
}

// What an operator adds to its result. kInPlace, of those whose names end with _: the result takes
// its memory, and nothing is returned.
template <bool kInPlace>
std::vector<Tensor> residual_of(Arguments& arguments) {
  if (!kInPlace) return arguments.optional_tensor();
  std::vector<Tensor> residual;
  residual.push_back(arguments.tensor());
  return residual;
}

// What a tensor of (scale, zero point) says.
struct Affine {
  float scale;
  int32_t zero;

  Affine(const Tensor& t, const char* name) {
    const float* values = static_cast<const float*>(t.data);
    if (!(values[0] > 0)) {
      fail(std::string(name) + " has scale " + std::to_string(values[0]) + ": not positive");
    }
    if (!(values[1] >= 0 && values[1] <= 255)) {
      fail(std::string(name) + " has zero point " + std::to_string(values[1]) +
           ": it must be 0 to 255");
    }
    scale = values[0];
    zero = static_cast<int32_t>(values[1]);
  }
};

inline bool channels_last(const Tensor& x) {
  const int64_t c = x.sizes[1], h = x.sizes[2], w = x.sizes[3];
  const int64_t expected[4] = {h * w * c, 1, w * c, c};
  for (int i = 0; i < 4; ++i)
    if (x.sizes[i] > 1 && x.strides[i] != expected[i]) return false;
  return true;
}

// The geometry g (see ops.cpp) of images of n x c x h x w.
inline gossamer_conv conv_of(int64_t n, int64_t c, int64_t h, int64_t w,
                             const std::vector<int64_t>& g) {
  if (g.size() != 11) fail("conv needs 11 integers, got " + std::to_string(g.size()));
  const auto out = [](int64_t in, int64_t pad, int64_t kernel, int64_t stride, int64_t dilation) {
    return stride < 1 ? 0 : (in + pad - dilation * (kernel - 1) - 1) / stride + 1;
  };
  return {n,
          c > 0 ? h : 0,
          w,
          c,
          g[0],
          g[1],
          g[2],
          g[3],
          g[4],
          g[5],
          g[6],
          g[8],
          out(h, g[6] + g[7], g[0], g[2], g[4]),
          out(w, g[8] + g[9], g[1], g[3], g[5])};
}

// A result of n channels in floats: contiguous if planar, else channels_last.
inline Layout image_layout(const gossamer_conv& c, int64_t n, bool planar, int32_t dtype) {
  const int64_t h = c.out_h > 0 ? c.out_h : 0, w = c.out_w > 0 ? c.out_w : 0, plane = h * w;
  if (planar) return {{c.images, n, h, w}, {n * plane, plane, w, 1}, dtype};
  return {{c.images, n, h, w}, {n * plane, 1, w * n, n}, dtype};
}

// x as the C ABI reads it: rows, or an image under a convolution.
struct Input {
  gossamer_input view;
  gossamer_conv conv;
  bool planar = false;

  // any_layout: an image may be contiguous, too.
  Input(const Tensor& x, int64_t k, const std::vector<int64_t>& geometry, bool any_layout = false) {
    view = {x.data, float_dtype(x), 0, k, nullptr, 0, 0, 0};
    geometry.empty() ? read_rows(x, k) : read_image(x, geometry, any_layout);
  }
  Input(const Input&) = delete;

  // (scale, zero point), or nothing.
  void quantize_by(const std::vector<Tensor>& affine) {
    if (affine.empty()) return;
    const Affine given(affine[0], "x_affine");
    view.scale = given.scale, view.zero = given.zero;
  }

 private:
  void read_rows(const Tensor& x, int64_t k) {
    if (x.dim < 1 || x.sizes[x.dim - 1] != k) {
      fail("x of shape " + x.shape() + " must end with k=" + std::to_string(k) + " features");
    }
    const bool strided = x.dim == 2 && (x.strides[1] == 1 || k == 1) && x.strides[0] >= k;
    if (!strided && !x.contiguous())
      fail("x of shape " + x.shape() + " must be contiguous: call x.contiguous()");
    view.rows = k == 0 ? 0 : x.numel() / k;
    if (strided && x.sizes[0] > 1) view.stride = x.strides[0];
  }

  void read_image(const Tensor& x, const std::vector<int64_t>& g, bool any_layout) {
    if (x.dim != 4) fail("x of shape " + x.shape() + " must be (images, channels, height, width)");
    conv = conv_of(x.sizes[0], x.sizes[1], x.sizes[2], x.sizes[3], g);
    view.conv = &conv;
    view.planar = any_layout && x.contiguous();
    if (!view.planar && !channels_last(x))
      fail("x of shape " + x.shape() + " must be channels_last");
    planar = g[10] != 0;
  }
};

inline void parallel_for(int64_t begin, int64_t end, int64_t grain, gossamer_body body,
                         void* context) {
  require(torch_parallel_for(begin, end, grain, body, context), "parallel_for");
}

inline int64_t up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// Panels of int8; of a weight that is not multiplied with integers wsum is null.
inline gossamer_int8 dense_int8(const Tensor& panels, const Tensor& scale, const Tensor* wsum,
                                int64_t k) {
  const int64_t n = scale.numel();
  if (panels.numel() != up(n, 16) * up(k, 8)) {
    fail("panels of shape " + panels.shape() + " do not hold n=" + std::to_string(n) +
         ", k=" + std::to_string(k));
  }
  return {n, k, static_cast<const int8_t*>(panels.data), static_cast<const float*>(scale.data),
          wsum ? static_cast<const int32_t*>(wsum->data) : nullptr};
}

// The three tensors of an index follow each other: columns, rows, cells.
struct Index {
  Tensor columns, rows, cells;

  Index(Arguments& arguments, int64_t entries)
      : columns(arguments.weight("columns", aoti_torch_dtype_uint8(), entries)),
        rows(arguments.weight("rows", aoti_torch_dtype_uint16(), -1)),
        cells(arguments.weight("cells", aoti_torch_dtype_int32(), -1)) {}

  // Only what a wrong n or k could break is checked a call; what came from a file was checked when
  // it was read.
  gossamer_index view(int64_t n, int64_t k, int64_t unit) const {
    if (cells.numel() != 2 * (gossamer_cell_count(n, k, unit) + 1)) {
      fail("cells of shape " + cells.shape() + " do not belong to n=" + std::to_string(n) +
           ", k=" + std::to_string(k));
    }
    return {n,
            k,
            columns.numel(),
            rows.numel() / 2,
            static_cast<const uint8_t*>(columns.data),
            static_cast<const uint16_t*>(rows.data),
            static_cast<const int32_t*>(cells.data)};
  }
};

// 1x4 blocks: values, their index, scale, wsum.
struct SparseInt8 {
  Tensor values;
  Index index;
  Tensor scale;
  int64_t n;
  Tensor wsum;

  explicit SparseInt8(Arguments& arguments)
      : values(arguments.weight("values", aoti_torch_dtype_int8(), -1)),
        index(arguments, values.numel() / 4),
        scale(arguments.weight("scale", aoti_torch_dtype_float32(), -1)),
        n(scale.numel()),
        wsum(arguments.weight("wsum", aoti_torch_dtype_int32(), n)) {}

  gossamer_sparse_int8 view(int64_t k) const {
    return {index.view(n, k, 4), static_cast<const int8_t*>(values.data),
            static_cast<const float*>(scale.data), static_cast<const int32_t*>(wsum.data)};
  }
};

}  // namespace gossamer
