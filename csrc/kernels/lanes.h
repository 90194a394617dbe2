// lanes.h: what the sparse kernels share. Rows of x lie in the lanes of a vector: a panel is
// [column][T] 32-bit words (floats, or four u8), T = kLanes, twice that, ... or 64 rows, so that one
// non-zero weight is broadcast and multiplies a whole line of the panel.
#pragma once

#include "epilogue.h"

namespace gossamer {
namespace GOSSAMER_ISA {

// One cell (see gossamer_index): its outputs, longest first, and where their entries start.
struct Cell {
  const uint16_t* rows;  // {output inside the chunk, entries} each
  int64_t count;
  int64_t entry;
};

static inline Cell cell_at(const gossamer_index& w, int64_t block, int64_t chunk) {
  const int32_t* at = w.cells + 2 * (block * chunk_count(w.n) + chunk);
  return {w.rows + 2 * at[0], at[2] - at[0], at[1]};
}

// Calls body(output) for those of `count` outputs that have no entry in a cell: mostly none or few.
template <typename Body>
static inline void each_empty(const Cell& c, int64_t count, Body body) {
  if (c.count == count) return;
  constexpr uint64_t kAll = 0x0101010101010101u;
  uint64_t met[kMaxChunk / 8];
  for (int64_t i = 0; i * 8 < count; ++i) met[i] = 0;
  auto* each = reinterpret_cast<uint8_t*>(met);
  for (int64_t r = 0; r < c.count; ++r) each[c.rows[2 * r]] = 1;
  for (int64_t i = 0; i * 8 < count; ++i) {
    if (met[i] == kAll) continue;
    for (int64_t output = 8 * i; output < count && output < 8 * i + 8; ++output)
      if (!each[output]) body(output);
  }
}

// Walks chunks of outputs: zeroes sums[output][width], calls multiply(block, cell) for each block of
// `block` of the `columns`, then finish(outputs).
template <typename Multiply, typename Finish>
static inline void each_chunk(const gossamer_index& w, Range chunks, int64_t columns, int64_t block,
                              void* sums, int64_t width, Multiply multiply, Finish finish) {
  const int64_t n = w.n, size = chunk_rows(n);
  for (int64_t chunk = chunks.begin; chunk < chunks.end; ++chunk) {
    const int64_t begin = chunk * size, end = n - begin < size ? n : begin + size;
    memset(sums, 0, static_cast<size_t>(round_up(end - begin, kPanel) * width) * 4);
    for (int64_t b = 0; b * block < columns; ++b) multiply(b, cell_at(w, b, chunk));
    finish(Range{begin, end});
  }
}

// sum += the 1x4 blocks of one output x a panel of V vectors of words: two entries a turn, which
// dot() adds in 16 bits.
template <int V>
static inline void multiply_row(const int32_t* panel, int64_t length, const int8_t*& values,
                                const uint8_t*& columns, I32 (&sum)[V]) {
  constexpr int64_t kWidth = V * kLanes;
  for (int64_t i = 0; i < length; i += 2, values += 8, columns += 2) {
    const I32 w0 = set_word(values), w1 = set_word(values + 4);
    const int32_t *x0 = panel + columns[0] * kWidth, *x1 = panel + columns[1] * kWidth;
    for (int v = 0; v < V; ++v)
      sum[v] = dot(sum[v], load(x0 + v * kLanes), w0, load(x1 + v * kLanes), w1);
  }
}

// sums[output][V vectors] += a cell of 1x4 blocks x a panel.
template <int V>
static inline void multiply_blocks(const int32_t* panel, const gossamer_sparse_int8& w,
                                   const Cell& c, int32_t* sums) {
  const int8_t* values = w.values + c.entry * 4;
  const uint8_t* columns = w.index.columns + c.entry;
  for (int64_t r = 0; r < c.count; ++r) {
    int32_t* to = sums + c.rows[2 * r] * V * kLanes;
    I32 sum[V];
    for (int v = 0; v < V; ++v) sum[v] = load(to + v * kLanes);
    multiply_row(panel, c.rows[2 * r + 1], values, columns, sum);
    for (int v = 0; v < V; ++v) store(to + v * kLanes, sum[v]);
  }
}

// words[rows][columns] -> panel[columns][T]; load_word_vector(row, column, count) gives kLanes
// words of a row. Rows that are not there become zeros.
template <typename LoadWords>
static inline void pack_lanes(int64_t rows, int64_t columns, int64_t lanes, int32_t* panel,
                              LoadWords load_word_vector) {
  for (int64_t r = 0; r < lanes; r += kLanes) {
    for (int64_t c = 0; c < columns; c += kLanes) {
      const int count = lanes_left(columns, c);
      I32 square[kLanes];
      for (int i = 0; i < kLanes; ++i)
        square[i] = r + i < rows ? load_word_vector(r + i, c, count) : set(int32_t{0});
      transpose(square);
      for (int i = 0; i < count; ++i) store(panel + (c + i) * lanes + r, square[i]);
    }
  }
}

// Some columns of a tile of floats -> panel[columns][T].
static inline void pack_floats(const FloatTile& x, Range columns, int64_t lanes, float* panel) {
  by_dtype(x.dtype, [&](auto type) {
    const auto* data = static_cast<const decltype(type)*>(x.x) + columns.begin;
    pack_lanes(x.rows, columns.end - columns.begin, lanes, reinterpret_cast<int32_t*>(panel),
               [&](int64_t row, int64_t column, int count) {
                 const auto* at = data + row * x.stride + column;
                 return as_i32(load_some(at, count));
               });
  });
}

// Writes sums[output][T] of a chunk: squares of kLanes outputs x kLanes rows are transposed, so
// that a row's outputs are neighbours. All outputs of kLanes rows before the next rows: where rows of
// y lie a multiple of 4 KB apart, more of them at once evict each other from L1 (avx2, 128 rows,
// 768 -> 3072, 95 % zeros: 354 us for 305). make_value(outputs) prepares what value(sum, row) needs to
// turn sums into floats. sums has outputs up to a multiple of 16.
template <typename MakeValue>
static inline void write_lanes(const int32_t* sums, int64_t lanes, int64_t rows, int64_t n,
                               Range range, const Destination& to, MakeValue make_value) {
  by_dtype(to.dtype, [&](auto type) {
    for (int64_t r = 0; r < rows; r += kLanes) {
      const int64_t left = rows - r < kLanes ? rows - r : kLanes;
      const int32_t* from = sums + r;
      for (int64_t o = range.begin; o < range.end; o += kLanes, from += kLanes * lanes) {
        const Outputs outputs(to, n, o);
        const auto value = make_value(outputs);
        I32 square[kLanes];
        for (int i = 0; i < kLanes; ++i) square[i] = load(from + i * lanes);
        transpose(square);
        for (int64_t i = 0; i < left; ++i)
          write<decltype(type)>(to, r + i, outputs, value(square[i], r + i));
      }
    }
  });
}

// What quad_cell walks.
template <typename Word, typename Value>
struct Quads {
  static constexpr int kValues = 4 / sizeof(Value);
  const Word* x;
  const Value* values;
  const uint8_t* columns;
  const uint16_t *rows, *end;

  // The rows of 4 i + kTail entries that follow each other.
  template <int kTail, typename Combine>
  void equal_rows(Word* sums, Combine combine) {
    const uint16_t length = rows[1];
    for (; rows != end && rows[1] == length; rows += 2) {
      Word* to = sums + rows[0] * 4;
      auto sum = load_quad<4>(to);
      for (int left = length / 4; left > 0; --left, values += 4 * kValues, columns += 4)
        sum = combine(sum, pick_quad<4>(x, columns), load_quad<4>(values));
      if constexpr (kTail > 0) {
        sum = combine(sum, pick_quad<kTail>(x, columns), load_quad<kTail>(values));
        values += kTail * kValues;
        columns += kTail;
      }
      store_quad(to, sum);
    }
  }
};

// A cell against one row of x: four entries of an output at a time, whose sums stay apart in
// sums[output][4]. Word is float or int32_t (four u8); combine(sum, x, values) adds the products.
template <typename Word, typename Value, typename Combine>
static inline void quad_cell(const Word* x, const Value* values, const uint8_t* columns,
                             const Cell& c, Word* sums, Combine combine) {
  Quads<Word, Value> quads{x, values, columns, c.rows, c.rows + 2 * c.count};
  while (quads.rows != quads.end) {
    switch (quads.rows[1] % 4) {
      case 0:
        quads.template equal_rows<0>(sums, combine);
        break;
      case 1:
        quads.template equal_rows<1>(sums, combine);
        break;
      case 2:
        quads.template equal_rows<2>(sums, combine);
        break;
      default:
        quads.template equal_rows<3>(sums, combine);
    }
  }
}

// Writes sums[output][4] of a chunk to the one row of y; value(outputs, sums) as in write_lanes.
template <typename Word, typename MakeValue>
static inline void write_quads(const Word* sums, int64_t n, Range range, const Destination& to,
                               MakeValue make_value) {
  by_dtype(to.dtype, [&](auto type) {
    for (int64_t o = range.begin; o < range.end; o += kLanes) {
      const Outputs outputs(to, n, o);
      Word line[kLanes];
      for (int i = 0; i < kLanes; ++i, sums += 4)
        line[i] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
      write<decltype(type)>(to, 0, outputs, make_value(outputs)(load(line), 0));
    }
  });
}

// The narrowest panel for `rows` rows, at most `most` lanes.
static inline int64_t lanes_for(int64_t rows, int64_t most) {
  int64_t lanes = kLanes;
  while (lanes < rows && lanes < most) lanes *= 2;
  return lanes;
}

// Calls body with the number of vectors in a line of `lanes`, as a type.
template <int V = kMaxLanes / kLanes, typename Body>
static inline void by_vectors(int64_t lanes, Body body) {
  if constexpr (V > 1) {
    if (lanes < V * kLanes) return by_vectors<V / 2>(lanes, body);
  }
  body(Int<V>());
}

}  // namespace GOSSAMER_ISA
}  // namespace gossamer
