// index.cpp: the sizes of a sparse index, and the check that none of it points outside.

#include <algorithm>

#include "error.h"
#include "layout.h"

using namespace gossamer;

extern "C" int64_t gossamer_block_columns(int64_t unit) {
  return unit == 1 ? kBlockFloats : kBlockWords;
}
extern "C" int64_t gossamer_chunk_rows(int64_t n) { return chunk_rows(n); }
extern "C" int64_t gossamer_cell_count(int64_t n, int64_t k, int64_t unit) {
  return ceil_div(ceil_div(k, unit), gossamer_block_columns(unit)) * chunk_count(n);
}

extern "C" int gossamer_check_index(const gossamer_index* w, int64_t cell_count, int64_t unit) {
  if (!w) return fail("the index must not be NULL");
  if (unit != 1 && unit != 4)
    return fail("unit=%lld: a column stands for 1 or 4 inputs", Long(unit));
  if (w->n < 1 || w->k < 1 || w->k > kMaxK || w->n > INT32_MAX) {
    return fail("n=%lld, k=%lld: an index covers 1 .. 2^31 - 1 outputs and 1 .. 65536 inputs",
                Long(w->n), Long(w->k));
  }
  const int64_t cells = gossamer_cell_count(w->n, w->k, unit), chunks = chunk_count(w->n),
                size = chunk_rows(w->n);
  if (cell_count != cells) {
    return fail("the index has %lld cells, n=%lld and k=%lld need %lld", Long(cell_count),
                Long(w->n), Long(w->k), Long(cells));
  }
  const int64_t columns = ceil_div(w->k, unit), block = gossamer_block_columns(unit);
  int64_t row = 0, entry = 0;
  for (int64_t c = 0; c <= cells; ++c) {
    if (w->cells[2 * c] != row || w->cells[2 * c + 1] != entry) {
      return fail("cell %lld starts at row %d, entry %d; the cells before it end at %lld, %lld",
                  Long(c), w->cells[2 * c], w->cells[2 * c + 1], Long(row), Long(entry));
    }
    if (c == cells) break;
    const int64_t width = std::min(block, columns - c / chunks * block);
    const int64_t height = std::min(size, w->n - c % chunks * size);
    const int64_t end = w->cells[2 * c + 2];
    if (end < row || end > w->row_count || end - row > height) {
      return fail("cell %lld ends at row %lld, it may hold %lld from row %lld of %lld", Long(c),
                  Long(end), Long(height), Long(row), Long(w->row_count));
    }
    bool met[kMaxChunk] = {};
    for (int64_t last = width + 1; row < end; ++row) {
      const int64_t output = w->rows[2 * row], length = w->rows[2 * row + 1];
      if (output >= height || length < 1 || length > round_up(width, unit == 4 ? 2 : 1) ||
          length > last || (unit == 4 && length % 2) || entry + length > w->entries) {
        return fail(
            "row %lld of the index (output %lld, %lld entries) lies outside its cell of %lld x "
            "%lld",
            Long(row), Long(output), Long(length), Long(height), Long(width));
      }
      // Kernels store an output's first sums and do not add to them.
      if (met[output]) {
        return fail("row %lld of the index lists output %lld of its cell again", Long(row),
                    Long(output));
      }
      met[output] = true;
      for (int64_t i = 0; i < length; ++i, ++entry) {
        if (w->columns[entry] >= width) {
          return fail("entry %lld has column %d in a block of %lld", Long(entry), w->columns[entry],
                      Long(width));
        }
      }
      last = length;
    }
  }
  if (row != w->row_count || entry != w->entries) {
    return fail("the cells end at row %lld, entry %lld of %lld, %lld", Long(row), Long(entry),
                Long(w->row_count), Long(w->entries));
  }
  return GOSSAMER_OK;
}
