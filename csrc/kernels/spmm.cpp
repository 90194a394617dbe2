// spmm: y = act(x @ w^T + bias), w sparse without structure, all in fp32.
//
//   x      rows x k          float32, bfloat16 or float16; rows <= T; or images, see pixels.h
//   w      gossamer_sparse   blocks of 96 columns x chunks of about 512 outputs; the rows of a cell
//                            sorted by length
//   panel  [k][T] float      scratch: x transposed, rows in lanes
//   sums   [chunk][T] float  scratch
//   y      rows x n          see epilogue.h; or planes, see pixels.h
//
// One entry = one broadcast and T/8 multiply-adds whose operand comes from the panel: 8 independent
// sums at T = 64 hide the latency of 4 at two a cycle. Narrower panels take R rows of equal length
// together, to have as many. The first entry multiplies and the sums so far are added at the end:
// no zeroing, no load before the chain starts. Rows of a cell are sorted by length: the exit of the
// inner loop is predicted, and R equal rows are neighbours.
//
// One row has no lanes to fill: four entries of an output at a time instead, and four sums an
// output, which lanes.h walks and adds up (1.35x at one row of 768 -> 3072, 90 % zeros).
//
// Registers: 8 sums, a broadcast; the panel is a memory operand.
// Tails: lanes past the last row hold zeros and are not written; outputs by the masked store.
// Numerics: fp32, entries of a row in order, blocks in order: error <= k eps (|x| @ |w|^T), and the
// same bits for any split over threads and any number of rows but one; an image has the same bits in
// either layout.

#include "planes.h"

namespace gossamer {
namespace GOSSAMER_ISA {
namespace {

// R outputs of `length` entries each, V vectors of lanes.
template <int V, int R>
void outputs(const float* panel, const float* values, const uint8_t* columns, int64_t length,
             const uint16_t* rows, float* sums) {
  constexpr int64_t kWidth = V * kLanes;
  F32 sum[R][V];
  const auto entry = [&](int64_t i, auto combine) {
    for (int r = 0; r < R; ++r) {
      const F32 value = set(values[r * length + i]);
      const float* x = panel + columns[r * length + i] * kWidth;
      for (int v = 0; v < V; ++v) sum[r][v] = combine(value, load(x + v * kLanes), sum[r][v]);
    }
  };
  entry(0, [](F32 value, F32 x, F32) { return mul(value, x); });
  for (int64_t i = 1; i < length; ++i)
    entry(i, [](F32 value, F32 x, F32 s) { return muladd(value, x, s); });
  for (int r = 0; r < R; ++r) {
    float* to = sums + rows[2 * r] * kWidth;
    for (int v = 0; v < V; ++v) store(to + v * kLanes, add(load(to + v * kLanes), sum[r][v]));
  }
}

template <int V>
void cell(const float* panel, const gossamer_sparse& w, const Cell& c, float* sums) {
  constexpr int kTogether = V >= 8 ? 1 : 8 / V < 4 ? 8 / V : 4;
  const float* values = w.values + c.entry;
  const uint8_t* columns = w.index.columns + c.entry;
  for (int64_t r = 0; r < c.count;) {
    const uint16_t* rows = c.rows + 2 * r;
    const int64_t length = rows[1];
    const bool together = r + kTogether <= c.count && rows[2 * kTogether - 1] == length;
    together ? outputs<V, kTogether>(panel, values, columns, length, rows, sums)
             : outputs<V, 1>(panel, values, columns, length, rows, sums);
    const int64_t done = together ? kTogether : 1;
    r += done;
    values += done * length;
    columns += done * length;
  }
}

template <int V>
void chunks_of(const FloatTile& x, const gossamer_sparse& w, Range chunks, const Destination& to,
               const float* ill, float* panel) {
  constexpr int64_t kWidth = V * kLanes;
  float* sums = panel + w.index.k * kWidth;
  each_chunk(
      w.index, chunks, w.index.k, kBlockFloats, sums, kWidth,
      [&](int64_t b, const Cell& c) { cell<V>(panel + b * kBlockFloats * kWidth, w, c, sums); },
      [&](Range outputs) {
        if (to.plane) {
          return write_planes(sums, kWidth, x.rows, w.index.n, outputs, to,
                              [=](F32 sum, int64_t lane) { return add(sum, load(ill + lane)); });
        }
        write_lanes(reinterpret_cast<const int32_t*>(sums), kWidth, x.rows, w.index.n, outputs, to,
                    [=](const Outputs&) {
                      return [=](I32 sum, int64_t row) { return add(as_f32(sum), set(ill[row])); };
                    });
      });
}

// One row.
void chunks_of_row(const gossamer_sparse& w, Range chunks, const Destination& to, float ill,
                   const float* x, float* sums) {
  each_chunk(
      w.index, chunks, w.index.k, kBlockFloats, sums, 4,
      [&](int64_t b, const Cell& c) {
        quad_cell(x + b * kBlockFloats, w.values + c.entry, w.index.columns + c.entry, c, sums,
                  [](F4 sum, F4 q, F4 values) { return muladd(values, q, sum); });
      },
      [&](Range outputs) {
        write_quads(sums, w.index.n, outputs, to, [=](const Outputs&) {
          return [=](F32 sum, int64_t) { return add(sum, set(ill)); };
        });
      });
}

// A pixel whose line of the panel holds a NaN or an Inf is ill, see illness().
template <int V>
void illness_of_lanes(const float* panel, int64_t k, float* ill) {
  F32 bad[V];
  for (int v = 0; v < V; ++v) bad[v] = set(0.0f);
  for (const float* end = panel + k * V * kLanes; panel != end; panel += V * kLanes)
    for (int v = 0; v < V; ++v) bad[v] = muladd(load(panel + v * kLanes), set(0.0f), bad[v]);
  for (int v = 0; v < V; ++v) store(ill + v * kLanes, bad[v]);
}

}  // namespace

void spmm(const FloatTile& x, const gossamer_sparse& w, Range chunks, const Destination& to,
          void* scratch) {
  float* panel = static_cast<float*>(scratch);
  const int64_t lanes = lanes_for(x.rows, kMaxLanes), k = w.index.k;
  float ill[kMaxLanes + kLanes] = {};
  by_dtype(x.dtype, [&](auto type) {
    const auto* data = static_cast<const decltype(type)*>(x.x);
    if (x.conv) return Pixels(x, lanes).pack(data, panel);
    for (int64_t r = 0; r < x.rows; ++r) ill[r] = illness(data + r * x.stride, k);
    x.rows == 1 ? widen_row(data, k, panel) : pack_floats(x, k, lanes, panel);
  });
  if (x.rows == 1 && !x.conv) return chunks_of_row(w, chunks, to, ill[0], panel, panel + k);
  by_vectors(lanes, [&](auto v) {
    constexpr int V = decltype(v)::value;
    if (x.conv) illness_of_lanes<V>(panel, k, ill);
    chunks_of<V>(x, w, chunks, to, ill, panel);
  });
}

}  // namespace GOSSAMER_ISA
}  // namespace gossamer
