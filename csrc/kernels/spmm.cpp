// spmm: y = act(x @ w^T + bias), w sparse without structure, all in fp32.
//
//   x      rows x k          float32, bfloat16 or float16; rows <= T; or images, see planes.h
//   w      gossamer_sparse   blocks of 96 columns x chunks of about 512 outputs; the rows of a cell
//                            sorted by length
//   panel  [96][T] float     scratch: a block of x transposed, rows in lanes
//   sums   [n][T] float      scratch
//   y      rows x n          see epilogue.h; or planes, see plane_writer.h
//
// One entry = one broadcast and T/8 multiply-adds whose operand comes from the panel: 8 independent
// sums at T = 64 hide the latency of 4 at two a cycle. Narrower panels take R rows of equal length
// together, to have as many. The first entry multiplies and the sums so far are added at the end:
// no load before the chain starts. Rows of a cell are sorted by length: the exit of the inner loop is
// predicted, and R equal rows are neighbours.
//
// A block of columns is packed just before its chunks of outputs meet it, and stays in L1 while they
// do (24 KB); the sums, which each block but the first adds to, wait in L2. The last block does not
// store the sums of planes: they go from registers to y. ResNet-50's layers at 90 % zeros, batch 1,
// one core with AVX-512: 15.9 ms so, 19.2 with all of x packed first and an epilogue of its own. Of
// those, 8.7 are what the loads of entries take.
//
// One row has no lanes to fill: four entries of an output at a time instead, and four sums an
// output, which lanes.h walks and adds up (1.35x at one row of 768 -> 3072, 90 % zeros).
//
// Registers: 8 sums, a broadcast; the panel is a memory operand.
// Tails: lanes past the last row hold zeros and are not written; outputs by the masked store.
// Numerics: fp32, entries of a row in order, blocks in order: error <= k eps (|x| @ |w|^T), and the
// same bits for any split over threads and any number of rows but one; an image has the same bits in
// either layout.

#include "plane_writer.h"
#include "planes.h"

namespace gossamer {
namespace GOSSAMER_ISA {
namespace {

// R outputs of `length` entries each, V vectors of lanes; kFirst: they have no sums so far.
// done(output, its sums).
template <int V, int R, bool kFirst, typename Done>
void outputs(const float* panel, const float* values, const uint8_t* columns, int64_t length,
             const uint16_t* rows, const float* sums, Done done) {
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
    const float* from = sums + rows[2 * r] * kWidth;
    if (!kFirst)
      for (int v = 0; v < V; ++v) sum[r][v] = add(load(from + v * kLanes), sum[r][v]);
    done(rows[2 * r], sum[r]);
  }
}

// A cell of `count` outputs, of which some may have no entry. done(output, its sums) for all.
template <int V, bool kFirst, typename Done>
void cell(const float* panel, const gossamer_sparse& w, const Cell& c, int64_t count,
          const float* sums, Done done) {
  constexpr int kTogether = V * kLanes >= kMaxLanes ? 1 : 8 / V < 4 ? 8 / V : 4;
  const float* values = w.values + c.entry;
  const uint8_t* columns = w.index.columns + c.entry;
  for (int64_t r = 0; r < c.count;) {
    const uint16_t* rows = c.rows + 2 * r;
    const int64_t length = rows[1];
    const bool together = r + kTogether <= c.count && rows[2 * kTogether - 1] == length;
    together ? outputs<V, kTogether, kFirst>(panel, values, columns, length, rows, sums, done)
             : outputs<V, 1, kFirst>(panel, values, columns, length, rows, sums, done);
    const int64_t some = together ? kTogether : 1;
    r += some;
    values += some * length;
    columns += some * length;
  }
  each_empty(c, count, [&](int64_t output) {
    F32 none[V];
    for (int v = 0; v < V; ++v)
      none[v] = kFirst ? set(0.0f) : load(sums + (output * V + v) * kLanes);
    done(output, none);
  });
}

// A row of which a column holds a NaN or an Inf is ill, see illness().
template <int V>
void illness_of_lanes(const float* panel, int64_t columns, F32 (&ill)[V]) {
  for (const float* end = panel + columns * V * kLanes; panel != end; panel += V * kLanes)
    for (int v = 0; v < V; ++v) ill[v] = muladd(load(panel + v * kLanes), set(0.0f), ill[v]);
}

// Some columns of a tile -> panel[columns][T]; pixels: of images.
void fill(const FloatTile& x, const Pixels* pixels, Range columns, int64_t lanes, float* panel) {
  if (!pixels) return pack_floats(x, columns, lanes, panel);
  by_dtype(x.dtype, [&](auto type) {
    pixels->pack(static_cast<const decltype(type)*>(x.x), columns, panel);
  });
}

// Sums that wait -> y.
template <int V>
void write(const float* sums, int64_t rows, int64_t n, Range range, const Destination& to,
           const F32 (&bad)[V]) {
  float ill[kMaxLanes + kLanes];
  for (int v = 0; v < V; ++v) store(ill + v * kLanes, bad[v]);
  if (to.plane) {
    return write_planes(sums, V * kLanes, rows, n, range, to,
                        [&](F32 sum, int64_t lane) { return add(sum, load(ill + lane)); });
  }
  write_lanes(reinterpret_cast<const int32_t*>(sums), V * kLanes, rows, n, range, to,
              [&](const Outputs&) {
                return [&](I32 sum, int64_t row) { return add(as_f32(sum), set(ill[row])); };
              });
}

template <int V>
void chunks_of(const FloatTile& x, const Pixels* pixels, const gossamer_sparse& w, Range chunks,
               const Destination& to, float* panel) {
  constexpr int64_t kWidth = V * kLanes;
  const int64_t k = w.index.k, n = w.index.n, size = chunk_rows(n);
  const int64_t blocks = ceil_div(k, kBlockFloats), group = kSpmmOutputs / size;
  // All blocks stay packed where more than one group of chunks meets them.
  const int64_t kept = chunks.end - chunks.begin > group ? kBlockFloats * kWidth : 0;
  float* sums = panel + ((kept ? k : kBlockFloats) + 1) * kWidth;
  PlaneWriter<V> writer(x, to, n);
  const bool direct = PlaneWriter<V>::takes(to, x.rows);
  for (int64_t first = chunks.begin; first < chunks.end; first += group) {
    const int64_t end = first + group < chunks.end ? first + group : chunks.end;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t begin = b * kBlockFloats,
                    last = begin + kBlockFloats < k ? begin + kBlockFloats : k;
      float* block = panel + b * kept;
      if (first == chunks.begin) {
        fill(x, pixels, {begin, last}, kWidth, block);
        illness_of_lanes<V>(block, last - begin, writer.ill);
      }
      const bool done = direct && b == blocks - 1;
      for (int64_t chunk = first; chunk < end; ++chunk) {
        const int64_t output = chunk * size, count = n - output < size ? n - output : size;
        float* own = sums + (chunk - first) * size * kWidth;
        const auto meet = [&](auto is_first, auto then) {
          const Cell c = cell_at(w.index, b, chunk);
          cell<V, decltype(is_first)::value>(block, w, c, count, own, then);
        };
        const auto wait = [=](int64_t o, const F32(&sum)[V]) {
          for (int v = 0; v < V; ++v) store(own + (o * V + v) * kLanes, sum[v]);
        };
        const auto finish = [&](int64_t o, const F32(&sum)[V]) { writer(output + o, sum); };
        if (b == 0) {
          done ? meet(Int<1>(), finish) : meet(Int<1>(), wait);
        } else {
          done ? meet(Int<0>(), finish) : meet(Int<0>(), wait);
        }
      }
    }
    for (int64_t chunk = first; !direct && chunk < end; ++chunk) {
      const Range range{chunk * size, n - chunk * size < size ? n : (chunk + 1) * size};
      write<V>(sums + (chunk - first) * size * kWidth, x.rows, n, range, to, writer.ill);
    }
  }
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

}  // namespace

void spmm(const FloatTile& x, const gossamer_sparse& w, Range chunks, const Destination& to,
          void* scratch) {
  float* panel = static_cast<float*>(scratch);
  const int64_t lanes = lanes_for(x.rows, kMaxLanes), k = w.index.k;
  const auto tile = [&](const Pixels* pixels) {
    by_vectors(lanes,
               [&](auto v) { chunks_of<decltype(v)::value>(x, pixels, w, chunks, to, panel); });
  };
  if (x.conv) {
    const Pixels pixels(x, lanes);
    return tile(&pixels);
  }
  if (x.rows > 1) return tile(nullptr);
  by_dtype(x.dtype, [&](auto type) {
    const auto* row = static_cast<const decltype(type)*>(x.x);
    widen_row(row, k, panel);
    chunks_of_row(w, chunks, to, illness(row, k), panel, panel + k);
  });
}

}  // namespace GOSSAMER_ISA
}  // namespace gossamer
