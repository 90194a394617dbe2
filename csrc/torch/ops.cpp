// ops.cpp: torch.ops.gossamer.*: schemas, checks of what torch hands over, and calls of the C ABI
// on torch's threads.
//
// Every operator that multiplies takes either rows (..., k), or with `conv` an image (images,
// channels, height, width) in channels_last memory; spmm and those of int8 weights take a contiguous
// one too. conv lists kernel, stride, dilation (height,
// width each), padding (top, bottom, left, right) and whether the result is planar (contiguous)
// instead of channels_last. x_affine, of products that quantize x, holds the (scale, zero point) to do
// that by; None: each row's own. An operator whose name ends with _ writes its result over the
// residual.

#include <string>
#include <vector>

#include "include/gossamer.h"
#include "torch/operands.h"
#include "torch/operators.h"
#include "torch/tensor.h"

namespace gossamer {
namespace {

Layout result(const Tensor& x, const Input& input, int64_t n) {
  if (!input.view.conv) {
    std::vector<int64_t> sizes(x.sizes, x.sizes + x.dim), strides(sizes.size());
    sizes.back() = n;
    int64_t stride = 1;
    for (size_t i = sizes.size(); i-- > 0;) {
      strides[i] = stride;
      stride *= sizes[i] > 1 ? sizes[i] : 1;
    }
    return {sizes, strides, x.dtype};
  }
  return image_layout(input.conv, n, input.planar, x.dtype);
}

// What all products share: their tail arguments (bias, k, activation, conv), and the result.
// `multiply` gets the input and the output of the C ABI.
template <bool kInPlace = false, typename Multiply>
void product(const Tensor& x, const std::vector<Tensor>& affine, Arguments& arguments, int64_t n,
             StableIValue* stack, Multiply multiply, bool any_layout = false,
             std::vector<Tensor> residual = {}) {
  const std::vector<Tensor> bias = arguments.optional_weight("bias", n);
  const int64_t k = arguments.integer();
  const gossamer_activation activation = activation_of(arguments.integer());
  Input input(x, k, arguments.optional_integers(), any_layout);
  input.quantize_by(affine);
  const Layout layout = result(x, input, n);
  const void* addend = residual_of(residual, layout);
  if (kInPlace) require_apart(residual[0], x);
  Tensor y = kInPlace ? std::move(residual[0]) : arguments.result(layout);
  const gossamer_output output{y.data,     n,       input.planar, floats_of(bias),
                               activation, nullptr, addend};
  require_gossamer(multiply(input.view, k, output));
  if (!kInPlace) stack[0] = y.release();
}

// (x, panels, scale, wsum, x_affine, bias, k, activation, conv); gemm_w8 has no wsum, no x_affine.
template <bool kQuantized>
void gemm(Arguments& arguments, StableIValue* result) {
  const Tensor x = arguments.tensor();
  const Tensor panels = arguments.weight("panels", aoti_torch_dtype_int8(), -1);
  const Tensor scale = arguments.weight("scale", aoti_torch_dtype_float32(), -1);
  const int64_t n = scale.numel();
  std::vector<Tensor> sums, affine;
  if (kQuantized) {
    sums.push_back(arguments.weight("wsum", aoti_torch_dtype_int32(), n));
    affine = arguments.optional_weight("x_affine", 2);
  }
  product(
      x, affine, arguments, n, result,
      [&](const gossamer_input& input, int64_t k, const gossamer_output& y) {
        const gossamer_int8 w = dense_int8(panels, scale, kQuantized ? &sums[0] : nullptr, k);
        return (kQuantized ? gossamer_gemm_int8 : gossamer_gemm_w8)(&input, &w, &y, parallel_for);
      },
      kQuantized);
}

// (x, panels, group_scale, scale, wsum, bias, k, activation, conv)
void gemm_int4(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack, "TWWWWVIIP");
  const Tensor x = arguments.tensor();
  const Tensor panels = arguments.weight("panels", aoti_torch_dtype_uint8(), -1);
  const Tensor group_scale = arguments.weight("group_scale", aoti_torch_dtype_int8(), -1);
  const Tensor scale = arguments.weight("scale", aoti_torch_dtype_float32(), -1);
  const int64_t n = scale.numel();
  const Tensor wsum = arguments.weight("wsum", aoti_torch_dtype_int32(), n);
  product(x, {}, arguments, n, stack,
          [&](const gossamer_input& input, int64_t k, const gossamer_output& y) {
            const int64_t weights = up(n, 16) * up(k, 32);
            // (panels, groups, 16): of its sizes, that of a panel says what a group is.
            const int64_t groups = group_scale.dim == 3 ? group_scale.sizes[1] : 0;
            const int64_t group = groups > 0 ? up(k, 32) / groups : 0;
            if (panels.numel() * 2 != weights || group_scale.numel() * group != weights) {
              fail("panels of shape " + panels.shape() + " and group_scale of shape " +
                   group_scale.shape() + " do not hold n=" + std::to_string(n) +
                   ", k=" + std::to_string(k));
            }
            const gossamer_int4 w{n,
                                  k,
                                  group,
                                  static_cast<const uint8_t*>(panels.data),
                                  static_cast<const int8_t*>(group_scale.data),
                                  static_cast<const float*>(scale.data),
                                  static_cast<const int32_t*>(wsum.data)};
            return gossamer_gemm_int4(&input, &w, &y, parallel_for);
          });
}

// (x, dy, columns, rows, cells, n, k, conv) -> dw
void sddmm(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack, "TTWWWIIP");
  const Tensor x = arguments.tensor(), dy = arguments.tensor();
  const Index index(arguments, -1);
  const int64_t n = arguments.integer(), k = arguments.integer();
  const Input left(x, k, arguments.optional_integers()), right(dy, n, {});
  const gossamer_index w = index.view(n, k, 1);
  Tensor dw = Tensor::empty({{w.entries}, {1}, aoti_torch_dtype_float32()});
  require_gossamer(
      gossamer_sddmm(&left.view, &right.view, &w, static_cast<float*>(dw.data), parallel_for));
  stack[0] = dw.release();
}

// (x, x_affine) -> (q, scale, zero)
void quantize_rows(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack, "TV");
  const Tensor x = arguments.tensor();
  const std::vector<Tensor> affine = arguments.optional_weight("x_affine", 2);
  if (x.dim < 1) fail("x must have at least one dimension");
  const int64_t k = x.sizes[x.dim - 1];
  if (k < 1) fail("x of shape " + x.shape() + " has rows of k=0 elements: nothing to quantize");
  Input input(x, k, {});
  input.quantize_by(affine);
  std::vector<int64_t> sizes(x.sizes, x.sizes + x.dim), strides(sizes.size(), 1);
  for (size_t i = sizes.size() - 1; i-- > 0;)
    strides[i] = strides[i + 1] * (sizes[i + 1] > 1 ? sizes[i + 1] : 1);
  Tensor q = Tensor::empty({sizes, strides, aoti_torch_dtype_uint8()});
  sizes.pop_back();
  strides.assign(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;)
    strides[i - 1] = strides[i] * (sizes[i] > 1 ? sizes[i] : 1);
  Tensor scale = Tensor::empty({sizes, strides, aoti_torch_dtype_float32()});
  Tensor zero = Tensor::empty({sizes, strides, aoti_torch_dtype_int32()});
  if (input.view.rows > 0) {
    require_gossamer(gossamer_quantize_rows(&input.view, k, static_cast<uint8_t*>(q.data), k,
                                            static_cast<float*>(scale.data),
                                            static_cast<int32_t*>(zero.data), parallel_for));
  }
  stack[0] = q.release();
  stack[1] = scale.release();
  stack[2] = zero.release();
}

// (x, conv) -> rows
void im2col(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack, "TL");
  const Tensor x = arguments.tensor();
  const Input input(x, 0, arguments.integers());
  if (!input.view.conv) fail("im2col needs the geometry of a convolution");
  const gossamer_conv& c = input.conv;
  const int64_t h = c.out_h > 0 ? c.out_h : 0, w = c.out_w > 0 ? c.out_w : 0;
  const int64_t rows = c.images * h * w, columns = c.kernel_h * c.kernel_w * up(c.channels, 4);
  Tensor y = Tensor::empty({{rows, columns}, {columns, 1}, x.dtype});
  require_gossamer(gossamer_im2col(&input.view, y.data, parallel_for));
  stack[0] = y.release();
}

}  // namespace

void gemm_int8(Arguments& arguments, StableIValue* result) { gemm<true>(arguments, result); }

// (x, values, columns, rows, cells, scale, wsum, x_affine, bias, k, activation, conv)
void spmm_int8(Arguments& arguments, StableIValue* result) {
  const Tensor x = arguments.tensor();
  const SparseInt8 weight(arguments);
  const std::vector<Tensor> affine = arguments.optional_weight("x_affine", 2);
  product(
      x, affine, arguments, weight.n, result,
      [&](const gossamer_input& input, int64_t k, const gossamer_output& y) {
        const gossamer_sparse_int8 w = weight.view(k);
        return gossamer_spmm_int8(&input, &w, &y, parallel_for);
      },
      true);
}

// (x, values, columns, rows, cells, n, residual, bias, k, activation, conv)
template <bool kInPlace>
void spmm(Arguments& arguments, StableIValue* result) {
  const Tensor x = arguments.tensor();
  const Tensor values = arguments.weight("values", aoti_torch_dtype_float32(), -1);
  const Index index(arguments, values.numel());
  const int64_t n = arguments.integer();
  std::vector<Tensor> residual = residual_of<kInPlace>(arguments);
  product<kInPlace>(
      x, {}, arguments, n, result,
      [&](const gossamer_input& input, int64_t k, const gossamer_output& y) {
        const gossamer_sparse w{index.view(n, k, 1), static_cast<const float*>(values.data)};
        return gossamer_spmm(&input, &w, &y, parallel_for);
      },
      true, std::move(residual));
}
template void spmm<false>(Arguments&, StableIValue*);
template void spmm<true>(Arguments&, StableIValue*);

namespace {

constexpr Operation kGemmW8{"TWWVIIP", gemm<false>};

struct Operator {
  const char *name, *schema;
  void (*run)(StableIValue*, uint64_t, uint64_t);
};

#define AFFINE "Tensor? x_affine"
#define TAIL "Tensor? bias, int k, int activation, int[]? conv)"
#define PRODUCT_TAIL TAIL " -> Tensor"
#define INDEX "Tensor columns, Tensor rows, Tensor cells, "
#define SPMM(residual) "Tensor x, Tensor values, " INDEX "int n, " residual " residual, " TAIL
#define IMAGES(residual)                                       \
  "Tensor x_affine, Tensor? bias, Tensor? y_affine, " residual \
  " residual, Tensor? "                                        \
  "residual_affine, int k, int activation, int[] conv)"
#define CONV_INT8(residual) "Tensor q, Tensor panels, Tensor scale, Tensor wsum, " IMAGES(residual)
#define CONV_SPMM_INT8(residual) \
  "Tensor q, Tensor values, " INDEX "Tensor scale, Tensor wsum, " IMAGES(residual)
#define ANY "Tensor?"
#define OVER "Tensor(a!)"
const Operator kOperators[] = {
    {"quantize_rows", "quantize_rows(Tensor x, " AFFINE ") -> (Tensor, Tensor, Tensor)",
     quantize_rows},
    {"gemm_int8",
     "gemm_int8(Tensor x, Tensor panels, Tensor scale, Tensor wsum, " AFFINE ", " PRODUCT_TAIL,
     called<kGemmInt8>},
    {"gemm_w8", "gemm_w8(Tensor x, Tensor panels, Tensor scale, " PRODUCT_TAIL, called<kGemmW8>},
    {"gemm_int4",
     "gemm_int4(Tensor x, Tensor panels, Tensor group_scale, Tensor scale, Tensor "
     "wsum, " PRODUCT_TAIL,
     gemm_int4},
    {"spmm", "spmm(" SPMM(ANY) " -> Tensor", called<kSpmm<false>>},
    {"spmm_", "spmm_(" SPMM(OVER) " -> ()", called<kSpmm<true>>},
    {"spmm_int8",
     "spmm_int8(Tensor x, Tensor values, " INDEX "Tensor scale, Tensor wsum, " AFFINE
     ", " PRODUCT_TAIL,
     called<kSpmmInt8>},
    {"sddmm", "sddmm(Tensor x, Tensor dy, " INDEX "int n, int k, int[]? conv) -> Tensor", sddmm},
    {"im2col", "im2col(Tensor x, int[] conv) -> Tensor", im2col},
    {"block", "block(Tensor x, Tensor affine) -> Tensor", called<kBlock>},
    {"unblock", "unblock(Tensor q, Tensor affine, int channels, int to) -> Tensor",
     called<kUnblock>},
    {"max_pool",
     "max_pool(Tensor x, int[] kernel, int[] stride, int[] padding, int[] dilation) -> Tensor",
     called<kMaxPool>},
    {"mean", "mean(Tensor q, Tensor affine, int channels, int keepdim) -> Tensor", called<kMean>},
    {"conv_int8", "conv_int8(" CONV_INT8(ANY) " -> Tensor", called<kConvInt8<false>>},
    {"conv_int8_", "conv_int8_(" CONV_INT8(OVER) " -> ()", called<kConvInt8<true>>},
    {"conv_spmm_int8", "conv_spmm_int8(" CONV_SPMM_INT8(ANY) " -> Tensor",
     called<kConvSpmmInt8<false>>},
    {"conv_spmm_int8_", "conv_spmm_int8_(" CONV_SPMM_INT8(OVER) " -> ()",
     called<kConvSpmmInt8<true>>},
    {"chain", "chain(Tensor[] values, int chain) -> Tensor[]", chain},
};
// It may get no tensor, whose device would choose it.
const Operator kOfNoDevice[] = {
    {"chain_keep", "chain_keep(Tensor[] weights, int[] calls) -> int", chain_keep},
};

template <size_t kCount>
void add_operators(const Operator (&operators)[kCount], const char* key) {
  TorchLibraryHandle schemas = nullptr, kernels = nullptr;
  require(aoti_torch_library_init_fragment("gossamer", "csrc/torch/ops.cpp", __LINE__, &schemas),
          "library_init_fragment");
  require(aoti_torch_library_init_impl("gossamer", key, "csrc/torch/ops.cpp", __LINE__, &kernels),
          "library_init_impl");
  for (const Operator& op : operators) {
    require(aoti_torch_library_def(schemas, op.schema), op.schema);
    require(torch_library_impl(kernels, op.name, op.run, kTorch210), op.name);
  }
}

// Runs when the library is loaded; the registrations live as long as the process.
const bool registered = [] {
  add_operators(kOperators, "CPU");
  add_operators(kOfNoDevice, "CompositeExplicitAutograd");
  return true;
}();

}  // namespace
}  // namespace gossamer
