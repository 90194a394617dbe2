// sddmm: dw(o, i) (+)= sum over rows of dy(row, o) * x(row, i), only where w has an entry (o, i): the
// gradient of a sparse weight, a sampled dense-dense product.
//
//   x, dy   rows x k, rows x n   float32, bfloat16 or float16; rows <= T
//   w       gossamer_index       blocks of 96 columns x chunks of about 512 outputs
//   xs      [k][T] float         scratch: x transposed, rows in lanes
//   dys     [chunk][T] float     scratch: the same of a chunk's part of dy
//   dw      entries              in the order of w's entries; `first` writes, otherwise adds
//
// An output's line of dy stays in registers while its entries pass: an entry is T/8 multiply-adds
// with the line of its column, an operand in L1 (a block of xs is 24 KB). Four entries at a time: four
// chains of sums, then one tree of shuffles adds the lanes of all four (13 instructions; adding up
// one vector alone takes 8).
//
// Registers (avx2): 8 of dy, 4 sums; xs is a memory operand.
// Tails: lanes behind the last row hold zeros; the last entries of an output, fewer than four, are
// summed with the last one repeated, and only what is there is written.
// Numerics: fp32, a tile's rows in the order of the lanes' tree, tiles in order: error <= rows eps
// (|dy|^T @ |x|), the same bits for any number of threads.

#include "lanes.h"

namespace gossamer {
namespace GOSSAMER_ISA {
namespace {

// The products of kCount entries of one output with its line of dy.
template <int V, int kCount>
F4 dots(const F32 (&dy)[V], const float* xs, const uint8_t* columns) {
  constexpr int64_t kWidth = V * kLanes;
  const float* x[4];
  F32 sum[4];
  for (int i = 0; i < 4; ++i) {
    x[i] = xs + columns[i < kCount ? i : kCount - 1] * kWidth;
    sum[i] = mul(dy[0], load(x[i]));
  }
  for (int v = 1; v < V; ++v)
    for (int i = 0; i < 4; ++i) sum[i] = muladd(dy[v], load(x[i] + v * kLanes), sum[i]);
  return reduce_quad(sum[0], sum[1], sum[2], sum[3]);
}

template <int V>
void cell(const float* xs, const float* dys, const uint8_t* columns, const Cell& c, bool first,
          float* dw) {
  for (int64_t r = 0; r < c.count; ++r) {
    const uint16_t* row = c.rows + 2 * r;
    const float* line = dys + row[0] * V * kLanes;
    F32 dy[V];
    for (int v = 0; v < V; ++v) dy[v] = load(line + v * kLanes);
    const int64_t length = row[1], whole = length / 4 * 4;
    for (int64_t i = 0; i < whole; i += 4) {
      const F4 sum = dots<V, 4>(dy, xs, columns + i);
      store_quad(dw + i, first ? sum : add(load_quad<4>(dw + i), sum));
    }
    by_count<3>(length - whole, [&](auto count) {
      constexpr int kCount = decltype(count)::value;
      float sums[4];
      store_quad(sums, dots<V, kCount>(dy, xs, columns + whole));
      for (int i = 0; i < kCount; ++i) dw[whole + i] = first ? sums[i] : dw[whole + i] + sums[i];
    });
    columns += length;
    dw += length;
  }
}

}  // namespace

void sddmm(const FloatTile& x, const FloatTile& dy, const gossamer_index& w, Range chunks,
           bool first, float* dw, void* scratch) {
  const int64_t lanes = lanes_for(x.rows, kMaxLanes), size = chunk_rows(w.n);
  float* xs = static_cast<float*>(scratch);
  float* dys = xs + w.k * lanes;
  pack_floats(x, {0, w.k}, lanes, xs);
  for (int64_t chunk = chunks.begin; chunk < chunks.end; ++chunk) {
    const int64_t begin = chunk * size, count = w.n - begin < size ? w.n - begin : size;
    const char* part = static_cast<const char*>(dy.x) + begin * element_size(dy.dtype);
    pack_floats({part, dy.stride, dy.dtype, dy.rows}, {0, count}, lanes, dys);
    by_vectors(lanes, [&](auto v) {
      constexpr int V = decltype(v)::value;
      for (int64_t b = 0; b * kBlockFloats < w.k; ++b) {
        const Cell c = cell_at(w, b, chunk);
        cell<V>(xs + b * kBlockFloats * V * kLanes, dys, w.columns + c.entry, c, first,
                dw + c.entry);
      }
    });
  }
}

}  // namespace GOSSAMER_ISA
}  // namespace gossamer
