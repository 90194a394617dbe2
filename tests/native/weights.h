// weights.h: random weights, and the layouts of docs/formats.md written down a second time, as
// plain loops.
#pragma once

#include <stdint.h>

#include <algorithm>
#include <random>
#include <vector>

#include "gossamer.h"
#include "guarded.h"

// The values of int4 weights.
constexpr int kValues[16] = {-32, -25, -20, -15, -12, -8, -5, -3, 0, 3, 6, 9, 12, 16, 21, 27};

// q (n, k) int8 and a scale an output. |q| <= 32, so that no lane of four can overflow whatever its
// place.
struct Weight {
  int64_t n, k;
  std::vector<int8_t> q;
  std::vector<float> scale;

  Weight(int64_t outputs, int64_t inputs, double density, int64_t unit, std::mt19937& random)
      : n(outputs), k(inputs), q(static_cast<size_t>(outputs * inputs)) {
    std::uniform_int_distribution<int> value(-32, 32);
    std::bernoulli_distribution kept(density);
    for (int64_t o = 0; o < n; ++o) {
      bool keep = false;
      for (int64_t i = 0; i < k; ++i) {
        if (i % unit == 0) keep = kept(random);
        if (keep) q[static_cast<size_t>(o * k + i)] = static_cast<int8_t>(value(random));
      }
      scale.push_back(1.0f / static_cast<float>(50 + o % 7));
    }
  }
  int8_t at(int64_t o, int64_t i) const {
    return i < k ? q[static_cast<size_t>(o * k + i)] : int8_t{0};
  }
  std::vector<int32_t> sums() const {
    std::vector<int32_t> sums(static_cast<size_t>(n));
    for (int64_t o = 0; o < n; ++o)
      for (int64_t i = 0; i < k; ++i) sums[static_cast<size_t>(o)] += at(o, i);
    return sums;
  }
  std::vector<int8_t> panels() const {
    const int64_t steps = (k + 7) / 8 * 2, whole = (n + 15) / 16;
    std::vector<int8_t> panels;
    for (int64_t p = 0; p < whole; ++p)
      for (int64_t s = 0; s < steps; ++s)
        for (int64_t o = p * 16; o < p * 16 + 16; ++o)
          for (int64_t i = s * 4; i < s * 4 + 4; ++i)
            panels.push_back(o < n ? at(o, i) : int8_t{0});
    return panels;
  }

  // The int4 weight: of each q the place of the value next below it, and scales out of a hat.
  int64_t group() const { return n % 2 ? 16 : 32; }
  int group_scale(int64_t o, int64_t i) const {
    return static_cast<int>((o * 5 + i / group() * 3) % 128) - 64;
  }
  uint8_t place(int64_t o, int64_t i) const {
    const int8_t value = o < n ? at(o, i) : int8_t{0};
    return static_cast<uint8_t>(std::upper_bound(kValues, kValues + 16, value) - kValues - 1);
  }
  int int4(int64_t o, int64_t i) const { return kValues[place(o, i)] * group_scale(o, i); }
  std::vector<int32_t> int4_sums() const {
    std::vector<int32_t> sums(static_cast<size_t>(n));
    for (int64_t o = 0; o < n; ++o)
      for (int64_t i = 0; i < k; ++i) sums[static_cast<size_t>(o)] += int4(o, i);
    return sums;
  }
  std::vector<uint8_t> int4_panels() const {
    std::vector<uint8_t> panels;
    for (int64_t p = 0; p < (n + 15) / 16; ++p)
      for (int64_t line = 0; line < (k + 31) / 32 * 32; line += 8)
        for (int64_t o = p * 16; o < p * 16 + 16; ++o)
          for (int64_t i = line; i < line + 4; ++i)
            panels.push_back(static_cast<uint8_t>(place(o, i) | place(o, i + 4) << 4));
    return panels;
  }
  std::vector<int8_t> group_scales() const {
    std::vector<int8_t> scales;
    for (int64_t p = 0; p < (n + 15) / 16; ++p)
      for (int64_t i = 0; i < (k + 31) / 32 * 32; i += group())
        for (int64_t o = p * 16; o < p * 16 + 16; ++o)
          scales.push_back(static_cast<int8_t>(group_scale(o, i)));
    return scales;
  }
};

// Blocks of columns (outermost) x chunks of outputs; a row of a cell is {output, entries}, longest
// first.
struct Index {
  std::vector<uint8_t> columns;
  std::vector<uint16_t> rows;
  std::vector<int32_t> cells;
  std::vector<int8_t> values;  // entries x unit

  Index(const Weight& w, int64_t unit) {
    const int64_t block = gossamer_block_columns(unit), chunk = gossamer_chunk_rows(w.n),
                  width = (w.k + unit - 1) / unit;
    for (int64_t column = 0; column < width; column += block)
      for (int64_t output = 0; output < w.n; output += chunk)
        add_cell(w, unit, column, std::min(column + block, width), output,
                 std::min(output + chunk, w.n));
    add_position();
  }
  int64_t row_count() const { return static_cast<int64_t>(rows.size() / 2); }
  int64_t entries() const { return static_cast<int64_t>(columns.size()); }
  int64_t cell_count() const { return static_cast<int64_t>(cells.size() / 2) - 1; }

 private:
  void add_position() {
    cells.push_back(static_cast<int32_t>(row_count()));
    cells.push_back(static_cast<int32_t>(entries()));
  }
  void add_cell(const Weight& w, int64_t unit, int64_t first, int64_t last, int64_t top,
                int64_t bottom) {
    add_position();
    struct Row {
      int64_t output;
      std::vector<int64_t> columns;
    };
    std::vector<Row> found;
    for (int64_t o = top; o < bottom; ++o) {
      Row row{o, {}};
      for (int64_t c = first; c < last; ++c) {
        bool filled = false;
        for (int64_t i = 0; i < unit; ++i) filled |= w.at(o, c * unit + i) != 0;
        if (filled) row.columns.push_back(c);
      }
      if (unit == 4 && row.columns.size() % 2) row.columns.push_back(-1);  // a block of zeros
      if (!row.columns.empty()) found.push_back(row);
    }
    std::stable_sort(found.begin(), found.end(), [](const Row& a, const Row& b) {
      return a.columns.size() > b.columns.size();
    });
    for (const Row& row : found) {
      rows.push_back(static_cast<uint16_t>(row.output - top));
      rows.push_back(static_cast<uint16_t>(row.columns.size()));
      for (const int64_t c : row.columns) {
        columns.push_back(static_cast<uint8_t>(c < 0 ? 0 : c - first));
        for (int64_t i = 0; i < unit; ++i)
          values.push_back(c < 0 ? int8_t{0} : w.at(row.output, c * unit + i));
      }
    }
  }
};

// The operands of all products, guarded, and the views that the C ABI takes.
struct Operands {
  Weight weight;
  Index floats, words;
  Guarded<int8_t> panels;
  Guarded<float> scale;
  Guarded<int32_t> wsum;
  Guarded<uint8_t> int4_panels;
  Guarded<int8_t> group_scale;
  Guarded<int32_t> int4_wsum;
  Guarded<uint8_t> float_columns, word_columns;
  Guarded<uint16_t> float_rows, word_rows;
  Guarded<int32_t> float_cells, word_cells;
  Guarded<float> float_values;
  Guarded<int8_t> word_values;

  Operands(const Weight& w, Side side)
      : weight(w),
        floats(w, 1),
        words(w, 4),
        panels(w.panels(), side),
        scale(w.scale, side),
        wsum(w.sums(), side),
        int4_panels(w.int4_panels(), side),
        group_scale(w.group_scales(), side),
        int4_wsum(w.int4_sums(), side),
        float_columns(floats.columns, side),
        word_columns(words.columns, side),
        float_rows(floats.rows, side),
        word_rows(words.rows, side),
        float_cells(floats.cells, side),
        word_cells(words.cells, side),
        float_values(std::vector<float>(floats.values.begin(), floats.values.end()), side),
        word_values(words.values, side) {}

  gossamer_int8 int8() const {
    return {weight.n, weight.k, panels.data(), scale.data(), wsum.data()};
  }
  gossamer_int4 int4() const {
    return {weight.n,           weight.k,     weight.group(),  int4_panels.data(),
            group_scale.data(), scale.data(), int4_wsum.data()};
  }
  gossamer_sparse sparse() const {
    return {view(floats, float_columns, float_rows, float_cells), float_values.data()};
  }
  gossamer_sparse_int8 sparse_int8() const {
    return {view(words, word_columns, word_rows, word_cells), word_values.data(), scale.data(),
            wsum.data()};
  }

 private:
  gossamer_index view(const Index& index, const Guarded<uint8_t>& columns,
                      const Guarded<uint16_t>& rows, const Guarded<int32_t>& cells) const {
    return {weight.n,       weight.k,    index.entries(), index.row_count(),
            columns.data(), rows.data(), cells.data()};
  }
};
