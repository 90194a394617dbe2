// lanes.h: what the two sparse kernels share. Rows of x lie in the lanes of a vector: a panel is
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

// words[rows][columns] -> panel[columns][T]; load_word_vector(row, column, count) gives kLanes
// words of a row. Rows that are not there become zeros.
template <typename LoadWords>
static inline void pack_lanes(int64_t rows, int64_t columns, int64_t lanes, int32_t* panel,
                              LoadWords load_some) {
  for (int64_t r = 0; r < lanes; r += kLanes) {
    for (int64_t c = 0; c < columns; c += kLanes) {
      const int count = lanes_left(columns, c);
      I32 square[kLanes];
      for (int i = 0; i < kLanes; ++i)
        square[i] = r + i < rows ? load_some(r + i, c, count) : set(int32_t{0});
      transpose(square);
      for (int i = 0; i < count; ++i) store(panel + (c + i) * lanes + r, square[i]);
    }
  }
}

// Writes sums[output][T] of a chunk: squares of kLanes outputs x kLanes rows are transposed, so
// that a row's outputs are neighbours. make_value(outputs) prepares what value(sum, row) needs to
// turn sums into floats. sums has outputs up to a multiple of 16.
template <typename MakeValue>
static inline void write_lanes(const int32_t* sums, int64_t lanes, int64_t rows, int64_t n,
                               Range range, const Destination& to, MakeValue make_value) {
  by_dtype(to.dtype, [&](auto type) {
    for (int64_t o = range.begin; o < range.end; o += kLanes, sums += kLanes * lanes) {
      const Outputs outputs(to, n, o);
      const auto value = make_value(outputs);
      for (int64_t r = 0; r < rows; r += kLanes) {
        I32 square[kLanes];
        for (int i = 0; i < kLanes; ++i) square[i] = load(sums + i * lanes + r);
        transpose(square);
        const int64_t left = rows - r < kLanes ? rows - r : kLanes;
        for (int64_t i = 0; i < left; ++i)
          write<decltype(type)>(to, r + i, outputs, value(square[i], r + i));
      }
    }
  });
}

// The narrowest panel for `rows` rows, at most `most` lanes.
static inline int64_t lanes_for(int64_t rows, int64_t most) {
  int64_t lanes = kLanes;
  while (lanes < rows && lanes < most) lanes *= 2;
  return lanes;
}

// Calls body with the number of vectors in a line of `lanes`, as a type: Vectors<V>.
template <int V>
struct Vectors {
  static constexpr int kCount = V;
};
template <int V = kMaxLanes / kLanes, typename Body>
static inline void by_vectors(int64_t lanes, Body body) {
  if constexpr (V > 1) {
    if (lanes < V * kLanes) return by_vectors<V / 2>(lanes, body);
  }
  body(Vectors<V>());
}

}  // namespace GOSSAMER_ISA
}  // namespace gossamer
