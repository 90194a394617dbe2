// spmm_int8: y = act(dequantize(q @ w^T) + bias), w int8 in blocks of 1 output x 4 inputs.
//
//   q      rows x stride         u8, rows <= T, padded with zeros to a multiple of 8 bytes
//   w      gossamer_sparse_int8  blocks of 192 columns (of 4 inputs) x chunks of about 512 outputs;
//                                the rows of a cell sorted by their even number of entries
//   panel  [k/4][T] words        scratch: q transposed, rows in lanes, a word = 4 u8
//   sums   [chunk][T] int32      scratch
//   y      rows x n              see epilogue.h
//
// Two entries a turn, which dot() adds in 16 bits ("depth 4"): two broadcasts, then for 8 rows two
// loads, two vpmaddubsw, one vpmaddwd and two adds. 64 products for 3 multiplies at two a cycle are
// 42.7 MACs a cycle. At T = 32 a block's panel is 24 KB and stays in L1. T = 64 halves the visits
// of a row, which pays where all of k fits in L1 (3x3 convolution of 32 channels: 1.1x) or where
// wide registers let L2 keep up (avx512vnni: 1.1x; avx2 gains 4 % at k = 512 and loses 7 at 768):
// Kernels::wide_k.
//
// One row has no lanes to fill: four entries of an output at a time (lanes.h; 1.4x at one row of
// 4096 x 4096, 90 % zeros).
//
// Registers: T / kLanes sums, 2 weights, ones.
// Tails: lanes past the last row hold zeros and are not written; outputs by the masked store.
// Numerics: exact in int32 for k <= 65536.

#include "lanes.h"

namespace gossamer {
namespace GOSSAMER_ISA {
namespace {

// What turns the sums of some outputs into floats, for write_lanes and write_quads.
auto dequantizer(const QuantizedTile& x, const gossamer_sparse_int8& w) {
  return [&](const Outputs& outputs) {
    const Dequantize dequantize{outputs.take(w.scale), outputs.take(w.wsum)};
    return [=, &x](I32 sum, int64_t row) { return dequantize(sum, x.scale[row], x.zero[row]); };
  };
}

template <int V>
void chunks_of(const QuantizedTile& x, const gossamer_sparse_int8& w, Range chunks,
               const Destination& to, int32_t* panel) {
  constexpr int64_t kWidth = V * kLanes;
  const int64_t columns = ceil_div(w.index.k, 4);
  int32_t* sums = panel + columns * kWidth;
  each_chunk(
      w.index, chunks, columns, kBlockWords, sums, kWidth,
      [&](int64_t b, const Cell& c) {
        multiply_blocks<V>(panel + b * kBlockWords * kWidth, w, c, sums);
      },
      [&](Range outputs) {
        write_lanes(sums, kWidth, x.rows, w.index.n, outputs, to, dequantizer(x, w));
      });
}

// One row.
void chunks_of_row(const QuantizedTile& x, const gossamer_sparse_int8& w, Range chunks,
                   const Destination& to, int32_t* sums) {
  each_chunk(
      w.index, chunks, ceil_div(w.index.k, 4), kBlockWords, sums, 4,
      [&](int64_t b, const Cell& c) {
        quad_cell(reinterpret_cast<const int32_t*>(x.q) + b * kBlockWords, w.values + c.entry * 4,
                  w.index.columns + c.entry, c, sums,
                  [](I4 sum, I4 q, I4 values) { return dot(sum, q, values); });
      },
      [&](Range outputs) { write_quads(sums, w.index.n, outputs, to, dequantizer(x, w)); });
}

}  // namespace

void spmm_int8(const QuantizedTile& x, const gossamer_sparse_int8& w, Range chunks,
               const Destination& to, void* scratch) {
  int32_t* panel = static_cast<int32_t*>(scratch);
  if (x.rows == 1) return chunks_of_row(x, w, chunks, to, panel);
  const int64_t lanes = lanes_for(x.rows, kMaxLanes);
  pack_lanes(x.rows, ceil_div(w.index.k, 4), lanes, panel,
             [&](int64_t row, int64_t column, int count) {
               const int32_t* at = reinterpret_cast<const int32_t*>(x.q + row * x.stride) + column;
               return load_some(at, count);
             });
  by_vectors(lanes, [&](auto v) { chunks_of<decltype(v)::value>(x, w, chunks, to, panel); });
}

}  // namespace GOSSAMER_ISA
}  // namespace gossamer
