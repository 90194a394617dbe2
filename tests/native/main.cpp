// native: every stem on every Isa over odd shapes, against plain loops; see CMakeLists.txt.

#include <cstdlib>

#include "native.h"

namespace {

struct Shape {
  int64_t rows, k, n;
  double density;
};
// Around tiles (3, 6, 32, 64 rows; 16 outputs), steps (4, 8 inputs), blocks (96, 768 inputs),
// chunks (512 outputs).
const Shape kShapes[] = {
    {1, 1, 1, 1},        {2, 3, 2, 1},      {3, 4, 7, 0.5},     {4, 5, 8, 0.5},
    {5, 7, 9, 0.5},      {6, 8, 15, 0.5},   {7, 9, 16, 0.5},    {8, 12, 17, 0.5},
    {9, 15, 31, 0.5},    {13, 17, 33, 0.3}, {31, 40, 24, 0.3},  {32, 41, 25, 0.3},
    {33, 42, 26, 0.3},   {63, 31, 47, 0.3}, {64, 32, 48, 0.3},  {65, 33, 49, 0.3},
    {5, 95, 20, 0.2},    {6, 96, 21, 0.2},  {7, 97, 22, 0.2},   {3, 767, 5, 0.2},
    {2, 768, 6, 0.2},    {4, 769, 7, 0.2},  {2, 20, 1023, 0.3}, {2, 193, 1025, 0.1},
    {0, 24, 20, 0.5},    {5, 40, 20, 0},    {129, 24, 1, 0.5},  {130, 130, 140, 1},
    {200, 72, 513, 0.6},
};

// images, height, width, channels; kernel, stride, dilation, padding at the top and left, output.
const gossamer_conv kConvs[] = {
    {2, 5, 6, 8, 1, 1, 1, 1, 1, 1, 0, 0, 5, 6},   {1, 7, 9, 4, 3, 3, 1, 1, 1, 1, 1, 1, 7, 9},
    {1, 11, 9, 3, 7, 7, 2, 2, 1, 1, 3, 3, 6, 5},  {3, 6, 6, 1, 3, 3, 1, 1, 1, 1, 1, 1, 6, 6},
    {1, 6, 5, 7, 2, 3, 1, 1, 1, 1, 0, 1, 6, 5},   {1, 9, 11, 4, 3, 3, 1, 1, 2, 3, 2, 3, 9, 11},
    {2, 9, 8, 5, 3, 2, 2, 3, 1, 2, 1, 2, 4, 3},   {1, 1, 1, 6, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1},
    {1, 3, 3, 4, 2, 2, 1, 1, 1, 1, 4, 4, 10, 10}, {2, 17, 19, 12, 3, 3, 1, 1, 1, 1, 1, 1, 17, 19},
    {0, 5, 5, 4, 3, 3, 1, 1, 1, 1, 0, 0, 3, 3},
};

// Ranges as short as allowed, last first: nothing may depend on order or length.
void backwards(int64_t begin, int64_t end, int64_t grain, gossamer_body body, void* context) {
  for (int64_t at = begin + (end - begin - 1) / grain * grain; at >= begin; at -= grain) {
    body(at, std::min(at + grain, end), context);
  }
}

int multiply(Arithmetic arithmetic, const gossamer_input& x, const Operands& w,
             const gossamer_output& y, gossamer_parallel_for parallel_for) {
  const gossamer_int8 int8 = w.int8();
  const gossamer_int4 int4 = w.int4();
  const gossamer_sparse sparse = w.sparse();
  const gossamer_sparse_int8 sparse_int8 = w.sparse_int8();
  switch (arithmetic) {
    case Arithmetic::kInt8:
      return gossamer_gemm_int8(&x, &int8, &y, parallel_for);
    case Arithmetic::kWeightOnly:
      return gossamer_gemm_w8(&x, &int8, &y, parallel_for);
    case Arithmetic::kInt4:
      return gossamer_gemm_int4(&x, &int4, &y, parallel_for);
    case Arithmetic::kSparse:
      return gossamer_spmm(&x, &sparse, &y, parallel_for);
    case Arithmetic::kSparseInt8:
      return gossamer_spmm_int8(&x, &sparse_int8, &y, parallel_for);
  }
  return GOSSAMER_INVALID;
}

std::vector<char> result(const Product& p, Arithmetic arithmetic, const Operands& operands,
                         Side side, gossamer_parallel_for parallel_for, bool planes = false,
                         bool adds_nothing = false) {
  const Guarded<char> x(p.encoded_x(planes), side);
  const Guarded<float> bias(p.bias, side);
  Guarded<char> y(p.y_extent() * size_of(p.dtype), side);
  const Guarded<char> zeros(std::vector<char>(size_t(p.y_extent() * size_of(p.dtype))), side);
  const gossamer_input input{x.data(), p.dtype,       p.x.rows,     p.x.k + p.gap,
                             p.conv,   p.given.scale, p.given.zero, planes};
  const gossamer_output output{y.data(),
                               p.weight.n + p.gap,
                               p.planar,
                               bias.data(),
                               p.activation,
                               nullptr,
                               adds_nothing ? zeros.data() : nullptr};
  require_ok(multiply(arithmetic, input, operands, output, parallel_for));
  return y.values();
}

// Of all int8 results, FNV-1a: the same number on every CPU, emulated or not.
uint64_t int8_bits = 0xcbf29ce484222325;

template <typename Byte>
void add_bits(const std::vector<Byte>& bytes) {
  for (const Byte byte : bytes)
    int8_bits = (int8_bits ^ static_cast<uint8_t>(byte)) * 0x100000001b3;
}

void check_products(const Product& p) {
  const Operands operands[] = {{p.weight, Side::kEnd}, {p.weight, Side::kBegin}};
  for (int unit : {1, 4}) {
    const gossamer_index index =
        unit == 1 ? operands[0].sparse().index : operands[0].sparse_int8().index;
    require_ok(gossamer_check_index(&index, gossamer_cell_count(index.n, index.k, unit), unit));
  }
  for (const Arithmetic arithmetic : kArithmetics) {
    const std::vector<Expected> reference = p.reference(arithmetic);
    std::vector<char> first;
    for (const char* const* isa = gossamer_isas(); *isa; ++isa) {
      require_ok(gossamer_use_isa(*isa));
      const std::string what = std::string(*isa) + ", product " + std::to_string(int(arithmetic));
      const std::vector<char> y = result(p, arithmetic, operands[0], Side::kEnd, nullptr);
      compare(p, reference, y, what);
      require(y == result(p, arithmetic, operands[1], Side::kBegin, backwards),
              what + ": another split, other bits");
      for (const Side side : kSides) {
        if (arithmetic != Arithmetic::kSparse) continue;
        if (p.conv)
          require(y == result(p, arithmetic, operands[0], side, backwards, true),
                  what + ": planar images, other bits");
        compare(p, reference, result(p, arithmetic, operands[0], side, nullptr, p.conv, true),
                what + ", a residual of zeros");
      }
      if (integers(arithmetic) && !first.empty())
        require(y == first, what + ": not the bits of the other Isas");
      first = y;
    }
    if (integers(arithmetic)) add_bits(first);
  }
}

void check_quantize_rows(const Product& p) {
  const int64_t rows = p.x.rows, k = p.x.k, stride = k + p.gap;
  for (const char* const* isa = gossamer_isas(); *isa; ++isa) {
    require_ok(gossamer_use_isa(*isa));
    for (const Side side : kSides) {
      const Guarded<char> x(p.encoded_x(), side);
      Guarded<uint8_t> q(rows * stride, side);
      Guarded<float> scale(rows, side);
      Guarded<int32_t> zero(rows, side);
      const gossamer_input input{x.data(), p.dtype,       rows,         stride,
                                 nullptr,  p.given.scale, p.given.zero, 0};
      require_ok(gossamer_quantize_rows(&input, k, q.data(), stride, scale.data(), zero.data(),
                                        backwards));
      for (int64_t r = 0; r < rows; ++r) {
        const Quantized& expected = p.lines[static_cast<size_t>(r)].quantized;
        require(scale.data()[r] == expected.scale && zero.data()[r] == expected.zero,
                "quantize_rows: scale or zero");
        for (int64_t i = 0; i < k; ++i)
          require(q.data()[r * stride + i] == expected(p.x.at(r, i)), "quantize_rows: q");
      }
    }
  }
}

void check_im2col(const Product& p) {
  const int64_t k = p.weight.k, size = size_of(p.dtype);
  for (const char* const* isa = gossamer_isas(); *isa; ++isa) {
    require_ok(gossamer_use_isa(*isa));
    for (const Side side : kSides) {
      const Guarded<char> x(p.encoded_x(), side);
      Guarded<char> rows(p.line_count() * k * size, side);
      const gossamer_input input{x.data(), p.dtype, 0, 0, p.conv, 0, 0, 0};
      require_ok(gossamer_im2col(&input, rows.data(), backwards));
      for (int64_t r = 0; r < p.line_count(); ++r)
        for (int64_t i = 0; i < k; ++i)
          require(decode(rows.data() + (r * k + i) * size, p.dtype) ==
                      double{p.lines[size_t(r)].x[size_t(i)]},
                  "im2col: moved the wrong element");
    }
  }
}

std::vector<float> random_bias(int64_t n, std::mt19937& random) {
  return random_matrix(1, n, random).x;
}

int64_t check_shapes(std::mt19937& random) {
  int64_t checked = 0;
  for (const Shape& s : kShapes) {
    const Matrix x = random_matrix(s.rows, s.k, random);
    const Weight weight(s.n, s.k, s.density, 4, random);
    const Product p{x,
                    nullptr,
                    lines_of(x),
                    weight,
                    random_bias(s.n, random),
                    static_cast<gossamer_dtype>(checked % 3),
                    static_cast<gossamer_activation>(checked % 6),
                    false,
                    checked % 2 * 3};
    for (const Product& product : {p, p.with_a_range()}) {
      check_products(product);
      check_quantize_rows(product);
      check_kernels(product);
    }
    check_gradient(p, backwards, random);
    ++checked;
  }
  return checked;
}

int64_t check_convolutions(std::mt19937& random) {
  int64_t checked = 0;
  for (const gossamer_conv& c : kConvs) {
    const Matrix images = random_matrix(c.images, c.height * c.width * c.channels, random);
    const int64_t k = c.kernel_h * c.kernel_w * ((c.channels + 3) / 4 * 4),
                  n = 3 + 11 * (checked % 5);
    const Weight weight(n, k, 0.5, 4, random);
    for (const bool planar : {false, true}) {
      const Product p{images,
                      &c,
                      lines_of(images, c),
                      weight,
                      random_bias(n, random),
                      static_cast<gossamer_dtype>(checked % 3),
                      static_cast<gossamer_activation>(checked % 6),
                      planar,
                      0};
      check_products(p);
      check_products(p.with_a_range());
      add_bits(check_images(p.with_a_range(), backwards));
      if (!planar) check_im2col(p);
      if (!planar) check_gradient(p, backwards, random);
      ++checked;
    }
  }
  return checked;
}

}  // namespace

int main() try {
  check_contracts();
  std::mt19937 random(1);
  const int64_t shapes = check_shapes(random), convolutions = check_convolutions(random);
  check_depthwise(backwards, random);
  check_damaged_indices(random);
  check_threads(random);
  std::printf("%lld shapes and %lld convolutions, int8 bits %016llx, on", (long long)shapes,
              (long long)convolutions, (unsigned long long)int8_bits);
  for (const char* const* isa = gossamer_isas(); *isa; ++isa) std::printf(" %s", *isa);
  std::printf("\n");
  return EXIT_SUCCESS;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return EXIT_FAILURE;
}
