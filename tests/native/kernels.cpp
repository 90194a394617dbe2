// kernels.cpp: the kernels without the C ABI around them: their scratch and quantized rows end at a
// guard page too. And what they are written against, see contract.cpp.

#include "kernels.h"

#include "native.h"

namespace gossamer {
namespace avx2 {
const char* broken_contract();
}
namespace avxvnni {
const char* broken_contract();
}
namespace avx512vnni {
const char* broken_contract();
}
namespace neon {
const char* broken_contract();
}
}  // namespace gossamer

namespace {

using namespace gossamer;

struct Table {
  const Kernels& kernels;
  const char* (*broken_contract)();
};
const Table kTables[] = {
    {base::kernels, [] { return static_cast<const char*>(nullptr); }},  // base.h is the contract
#if defined(__x86_64__)
    {avx2::kernels, avx2::broken_contract},
    {avxvnni::kernels, avxvnni::broken_contract},
    {avx512vnni::kernels, avx512vnni::broken_contract},
#elif defined(__aarch64__)
    {neon::kernels, neon::broken_contract},
#endif
};

bool runs_here(const Kernels& table) {
  for (const char* const* isa = gossamer_isas(); *isa; ++isa)
    if (std::string(*isa) == table.isa) return true;
  return false;
}

// The first rows of a product, as many as a tile of the stem may have.
struct Tile {
  Product product;

  Tile(const Product& p, int64_t most) : product(p) {
    const int64_t rows = std::min(most, p.x.rows);
    product.x.rows = rows;
    product.x.x.resize(static_cast<size_t>(rows * p.x.k));
    product.lines.assign(p.lines.begin(), p.lines.begin() + rows);
  }
};

class Run {
 public:
  Run(const Kernels& table, const Product& whole, Side side)
      : table_(table),
        whole_(whole),
        side_(side),
        operands_(whole.weight, side),
        bias_(whole.bias, side) {}

  void all() {
    const int64_t n = whole_.weight.n, k = whole_.weight.k;
    // Of the tile: as many as it may have.
    const int64_t rows = std::min(kMaxLanes, whole_.x.rows);
    const Range panels{0, ceil_div(n, kPanel)}, chunks{0, chunk_count(n)};
    quantized(Arithmetic::kInt8, whole_.x.rows, 0,
              [&](const QuantizedTile& x, const Destination& to, void*) {
                table_.gemm_int8(x, operands_.int8(), panels, to);
              });
    quantized(Arithmetic::kInt4, whole_.x.rows, 0,
              [&](const QuantizedTile& x, const Destination& to, void*) {
                table_.gemm_int4(x, operands_.int4(), panels, to);
              });
    quantized(Arithmetic::kSparseInt8, kMaxLanes, spmm_int8_scratch(n, k, rows),
              [&](const QuantizedTile& x, const Destination& to, void* scratch) {
                table_.spmm_int8(x, operands_.sparse_int8(), chunks, to, scratch);
              });
    floats(Arithmetic::kWeightOnly, gemm_w8_scratch(k, rows),
           [&](const FloatTile& x, const Destination& to, void* scratch) {
             table_.gemm_w8(x, operands_.int8(), panels, to, scratch);
           });
    floats(Arithmetic::kSparse, spmm_scratch(n, k, rows),
           [&](const FloatTile& x, const Destination& to, void* scratch) {
             table_.spmm(x, operands_.sparse(), chunks, to, scratch);
           });
    check_gradient_kernel(table_, whole_, operands_, side_);
  }

 private:
  template <typename Multiply>
  void quantized(Arithmetic arithmetic, int64_t most, int64_t scratch_bytes, Multiply multiply) {
    const Product p = Tile(whole_, most).product;
    const int64_t unit = arithmetic == Arithmetic::kInt4 ? kInt4Step : kStep;
    const int64_t stride = round_up(p.weight.k, unit);
    const Guarded<char> x(p.encoded_x(), side_);
    Guarded<uint8_t> q(p.x.rows * stride, side_);
    Guarded<float> scale(p.x.rows, side_);
    Guarded<int32_t> zero(p.x.rows, side_);
    table_.quantize_rows({x.data(), p.x.k + p.gap, p.dtype, p.x.rows}, p.weight.k,
                         {p.given.scale, p.given.zero}, q.data(), stride, scale.data(),
                         zero.data());
    const Guarded<uint8_t> read_only(q.values(), side_);
    finish(p, arithmetic, scratch_bytes, [&](const Destination& to, void* scratch) {
      multiply(QuantizedTile{read_only.data(), stride, scale.data(), zero.data(), p.x.rows}, to,
               scratch);
    });
  }

  template <typename Multiply>
  void floats(Arithmetic arithmetic, int64_t scratch_bytes, Multiply multiply) {
    const Product p = Tile(whole_, kMaxLanes).product;
    const Guarded<char> x(p.encoded_x(), side_);
    finish(p, arithmetic, scratch_bytes, [&](const Destination& to, void* scratch) {
      multiply(FloatTile{x.data(), p.x.k + p.gap, p.dtype, p.x.rows}, to, scratch);
    });
  }

  template <typename Multiply>
  void finish(const Product& p, Arithmetic arithmetic, int64_t scratch_bytes, Multiply multiply) {
    Guarded<char> scratch(scratch_bytes, side_), y(p.y_extent() * size_of(p.dtype), side_);
    multiply(Destination{y.data(), p.weight.n + p.gap, p.dtype, bias_.data(), p.activation},
             scratch.data());
    compare(p, p.reference(arithmetic), y.values(),
            std::string(table_.isa) + ", kernel of product " + std::to_string(int(arithmetic)));
  }

  const Kernels& table_;
  const Product& whole_;
  Side side_;
  Operands operands_;
  Guarded<float> bias_;
};

}  // namespace

void check_kernels(const Product& product) {
  if (product.x.rows == 0) return;  // the C ABI calls no kernel
  for (const Table& table : kTables)
    for (const Side side : kSides)
      if (runs_here(table.kernels)) Run(table.kernels, product, side).all();
}

std::vector<const Kernels*> tables_here() {
  std::vector<const Kernels*> tables;
  for (const Table& table : kTables)
    if (runs_here(table.kernels)) tables.push_back(&table.kernels);
  return tables;
}

void check_contracts() {
  for (const Table& table : kTables) {
    if (!runs_here(table.kernels)) continue;
    const char* broken = table.broken_contract();
    require(!broken, std::string(table.kernels.isa) + ", simd: " + (broken ? broken : ""));
  }
}
