// gradient.cpp: sddmm, through the C ABI and as a kernel alone. All operands are small multiples of
// 1/16: the sums are exact in float, whatever their order.

#include "kernels.h"
#include "native.h"

namespace {

using namespace gossamer;

// sum over lines of dy(line, o) * x(line, i) for each entry of the index.
std::vector<float> expected_gradient(const Product& p, const Matrix& dy, const Index& index) {
  const int64_t chunk = gossamer_chunk_rows(p.weight.n), block = gossamer_block_columns(1);
  const int64_t chunks = (p.weight.n + chunk - 1) / chunk;
  std::vector<float> dw;
  for (int64_t c = 0; c < index.cell_count(); ++c) {
    for (int64_t r = index.cells[size_t(2 * c)]; r < index.cells[size_t(2 * c + 2)]; ++r) {
      const int64_t o = index.rows[size_t(2 * r)] + c % chunks * chunk;
      for (int length = index.rows[size_t(2 * r + 1)]; length > 0; --length) {
        const int64_t i = index.columns[dw.size()] + c / chunks * block;
        double sum = 0;
        for (int64_t line = 0; line < dy.rows; ++line)
          sum += double{dy.at(line, o)} * p.lines[size_t(line)].x[size_t(i)];
        dw.push_back(static_cast<float>(sum));
      }
    }
  }
  return dw;
}

std::vector<char> encoded(const Matrix& m, gossamer_dtype dtype) {
  std::vector<char> bytes(static_cast<size_t>(m.rows * m.k * size_of(dtype)));
  for (int64_t i = 0; i < m.rows * m.k; ++i)
    encode(m.x[size_t(i)], dtype, &bytes[size_t(i * size_of(dtype))]);
  return bytes;
}

}  // namespace

// A tile, written and then added to.
void check_gradient_kernel(const Kernels& table, const Product& p, const Operands& w, Side side) {
  const int64_t rows = std::min(kMaxLanes, p.line_count()), k = p.weight.k, n = p.weight.n;
  std::mt19937 random(2);
  const Matrix dy = random_matrix(rows, n, random);
  const Guarded<char> x(p.encoded_x(), side), gradient(encoded(dy, p.dtype), side);
  Guarded<char> scratch(sddmm_scratch(n, k, rows), side);
  Guarded<float> dw(w.floats.entries(), side);
  const gossamer_index index = w.sparse().index;
  for (const bool first : {true, false})
    table.sddmm({x.data(), k + p.gap, p.dtype, rows}, {gradient.data(), n, p.dtype, rows}, index,
                {0, chunk_count(n)}, first, dw.data(), scratch.data());
  std::vector<float> twice = expected_gradient(p, dy, w.floats);
  for (float& value : twice) value *= 2;
  require(dw.values() == twice, std::string(table.isa) + ": kernel sddmm");
}

void check_gradient(const Product& p, gossamer_parallel_for parallel_for, std::mt19937& random) {
  const Matrix dy = random_matrix(p.line_count(), p.weight.n, random);
  for (const Side side : kSides) {
    const Operands w(p.weight, side);
    const gossamer_index index = w.sparse().index;
    const std::vector<float> want = expected_gradient(p, dy, w.floats);
    const Guarded<char> x(p.encoded_x(), side), gradient(encoded(dy, p.dtype), side);
    const gossamer_input input{x.data(), p.dtype, p.x.rows, p.x.k + p.gap, p.conv, 0, 0, 0};
    const gossamer_input output{gradient.data(), p.dtype, dy.rows, dy.k, nullptr, 0, 0, 0};
    for (const char* const* isa = gossamer_isas(); *isa; ++isa) {
      require_ok(gossamer_use_isa(*isa));
      for (const gossamer_parallel_for on : {gossamer_parallel_for{}, parallel_for}) {
        Guarded<float> dw(w.floats.entries(), side);
        require_ok(gossamer_sddmm(&input, &output, &index, dw.data(), on));
        require(dw.values() == want, std::string(*isa) + ": sddmm");
      }
    }
  }
}
