// damage.cpp: gossamer_check_index stands between a file and the kernels. Whatever it lets pass
// must be safe to run.

#include "native.h"

namespace {

// One element of pairs {a, b} changes, or trades places with another of its kind.
template <typename T>
void damage(std::vector<T>& values, std::mt19937& random) {
  if (values.size() < 2) return;
  const size_t at = random() % values.size(), other = random() % (values.size() / 2) * 2 + at % 2;
  T& value = values[at];
  switch (random() % 4) {
    case 0:
      value = static_cast<T>(value + 1);
      break;
    case 1:
      value = static_cast<T>(value - 1);
      break;
    case 2:
      value = static_cast<T>(random());
      break;
    default:
      std::swap(value, values[other]);
  }
}

// The index in guarded memory; returns whether it was refused, and multiplies by it if it was not.
bool refused(const Index& index, const Weight& weight, int64_t unit, Side side) {
  const Guarded<uint8_t> columns(index.columns, side);
  const Guarded<uint16_t> rows(index.rows, side);
  const Guarded<int32_t> cells(index.cells, side), wsum(weight.sums(), side);
  const Guarded<int8_t> values(index.values, side);
  const Guarded<float> floats(std::vector<float>(index.values.begin(), index.values.end()), side);
  const Guarded<float> scale(weight.scale, side);
  const gossamer_index view{weight.n,       weight.k,    index.entries(), index.row_count(),
                            columns.data(), rows.data(), cells.data()};
  if (gossamer_check_index(&view, index.cell_count(), unit) != GOSSAMER_OK) return true;

  const int64_t lines = 3;
  const Guarded<float> x(std::vector<float>(static_cast<size_t>(lines * weight.k), 0.5f), side);
  Guarded<float> y(lines * weight.n, side);
  const gossamer_input input{x.data(), GOSSAMER_FLOAT32, lines, weight.k, nullptr, 0, 0, 0};
  const gossamer_output output{y.data(), weight.n, 0, nullptr, GOSSAMER_NONE, nullptr, nullptr};
  const gossamer_sparse sparse{view, floats.data()};
  const gossamer_sparse_int8 sparse_int8{view, values.data(), scale.data(), wsum.data()};
  require_ok(unit == 1 ? gossamer_spmm(&input, &sparse, &output, nullptr)
                       : gossamer_spmm_int8(&input, &sparse_int8, &output, nullptr));
  return false;
}

bool refused_after_random_damage(const Weight& weight, int64_t unit, std::mt19937& random) {
  Index index(weight, unit);
  const int64_t hits = 1 + static_cast<int64_t>(random() % 3);
  for (int64_t i = 0; i < hits; ++i) {
    const auto which = random() % 4;
    if (which == 0) damage(index.columns, random);
    if (which == 1) damage(index.rows, random);
    if (which >= 2) damage(index.cells, random);
  }
  return refused(index, weight, unit, random() % 2 ? Side::kEnd : Side::kBegin);
}

// Damage that chance finds too seldom. The index has 15 of 16 outputs, a chunk, and in the first of
// its blocks four columns fewer than fit.
struct Damage {
  const char* what;
  void (*edit)(Index& index, int64_t last_width);
};
const Damage kDamages[] = {
    {"a column behind its block",
     [](Index& x, int64_t width) { x.columns.back() = static_cast<uint8_t>(width); }},
    {"an output behind its chunk", [](Index& x, int64_t) { x.rows[x.rows.size() - 2] = 16; }},
    {"a row longer than the one before", [](Index& x, int64_t) { x.rows[1] -= 2, x.rows[3] += 2; }},
    {"a row longer than its block",
     [](Index& x, int64_t) { x.rows[1] += 5, x.rows[2 * 14 + 1] -= 5; }},
    {"a row of nothing",
     [](Index& x, int64_t) {
       x.rows.insert(x.rows.end(), {15, 0}), ++x.cells[x.cells.size() - 2];
     }},
    {"more rows than outputs",
     [](Index& x, int64_t) {
       x.rows.insert(x.rows.end(), {15, 2, 0, 2}), x.columns.resize(x.columns.size() + 4);
       x.cells[x.cells.size() - 2] += 2, x.cells.back() += 4;
     }},
    {"rows that no cell has", [](Index& x, int64_t) { x.rows.insert(x.rows.end(), {0, 2}); }},
    {"entries that no row has", [](Index& x, int64_t) { x.columns.resize(x.columns.size() + 2); }},
    {"entries that are not there",
     [](Index& x, int64_t) { x.columns.resize(x.columns.size() - 2); }},
    {"a cell before its predecessor", [](Index& x, int64_t) { x.cells[2] = -1; }},
    {"a first cell that skips a row", [](Index& x, int64_t) { ++x.cells[0]; }},
    {"a cell too many",
     [](Index& x, int64_t) { x.cells.insert(x.cells.end(), x.cells.end() - 2, x.cells.end()); }},
};
const Damage kOddRows{"rows of an odd number of blocks",
                      [](Index& x, int64_t) { ++x.rows[1], --x.rows[2 * 14 + 1]; }};

void check_chosen_damage(std::mt19937& random) {
  for (const int64_t unit : {1, 4}) {
    Weight weight(16, 200 * unit, 0, unit, random);
    for (int64_t o = 0; o < 15; ++o)
      std::fill_n(weight.q.begin() + o * weight.k + 4 * unit, weight.k - 4 * unit, 1);
    const int64_t width = 200 % gossamer_block_columns(unit);
    const auto check = [&](const Damage& damage) {
      Index index(weight, unit);
      damage.edit(index, width);
      require(refused(index, weight, unit, Side::kEnd),
              std::string("must be refused: ") + damage.what);
    };
    require(!refused(Index(weight, unit), weight, unit, Side::kEnd), "a sound index must pass");
    for (const Damage& damage : kDamages) check(damage);
    if (unit == 4) check(kOddRows);
  }
}

}  // namespace

void check_damaged_indices(std::mt19937& random) {
  check_chosen_damage(random);
  const struct {
    int64_t n, k;
    double density;
  } shapes[] = {{1, 1, 1}, {5, 9, 0.7}, {20, 97, 0.3}, {17, 775, 0.1}, {1030, 5, 0.2}};
  std::vector<const char*> isas;
  for (const char* const* isa = gossamer_isas(); *isa; ++isa) isas.push_back(*isa);
  for (const auto& s : shapes) {
    for (const int64_t unit : {1, 4}) {
      const Weight weight(s.n, s.k, s.density, unit, random);
      int64_t count = 0;
      for (int i = 0; i < 400; ++i) {
        require_ok(gossamer_use_isa(isas[static_cast<size_t>(i) % isas.size()]));
        count += refused_after_random_damage(weight, unit, random);
      }
      require(count > 200, "most damage must be noticed");
    }
  }
}
