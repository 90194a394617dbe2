// gemm_int8: y = act(dequantize(q @ w^T) + bias), u8 activations times s8 weights, dense.
//
//   q       rows x stride       u8; rows padded with anything to a multiple of 8 (weights are 0)
//   panels  (n/16, k/4, 16, 4)  s8: 16 outputs x 4 inputs, 64 bytes, a step; even number of steps
//   y       rows x n            see epilogue.h
//
// Tile: MR = kGemmRows rows x NP = kGemmPanels panels, all of k in one go: sums leave their
// registers once. Two steps (8 inputs) a turn, because dot() adds the products of two steps in 16
// bits ("depth 4"). A 256-bit Isa needs, for MR x 16 x 8 MACs,
//
//   4 MR vpmaddubsw + 2 MR vpmaddwd at two a cycle  = 3 MR cycles  42.7 MACs a cycle, whatever MR
//   4 weights + 2 MR broadcasts     at two a cycle  = MR + 2       so MR > 1 hides the loads
//
// Registers: MR x NP x 16/kLanes sums, the weights of a turn, two broadcasts: see simd/<isa>.h.
// Tails: rows by a smaller MR, outputs by the masked store (panels are padded with zeros).
// Numerics: exact in int32 for k <= 65536.

#include "epilogue.h"

namespace gossamer {
namespace GOSSAMER_ISA {
namespace {

constexpr int kVecs = kPanel / kLanes;
constexpr int kAhead = 1024;
// Panels that one row walks at once: each is a stream of its own to the prefetcher.
constexpr int kOneRowPanels = 4;

template <int MR, int NP>
void tile(const QuantizedTile& x, int64_t row, const gossamer_int8& w, int64_t panel,
          const Destination& to) {
  constexpr int kColumns = NP * kVecs;
  const int64_t k = round_up(w.k, kStep), panel_bytes = k * kPanel, stride = x.stride;
  const int8_t* weights = w.panels + panel * panel_bytes;
  // One pointer for three rows: base, base + stride and base + 2 stride are all addressing modes. A
  // pointer a row would spill.
  const uint8_t* rows[(MR + 2) / 3];
  for (int i = 0; i < (MR + 2) / 3; ++i) rows[i] = x.q + (row + 3 * i) * stride;
  // One tile of rows reads its panels from memory: fetch kAhead, faster than the hardware follows.
  // Where more tiles follow, the first two fetch a half each of the next panels meanwhile.
  const bool alone = x.rows <= kGemmLastRows;
  const int8_t* ahead =
      alone ? weights + kAhead : weights + NP * panel_bytes + (row ? panel_bytes / 2 : 0);
  const bool fetch = row <= kGemmRows;
  fetch_lines(to, row, MR, panel * kPanel, NP * kPanel);
  I32 sum[MR][kColumns];
  for (auto& line : sum)
    for (I32& s : line) s = set(int32_t{0});

  for (int64_t i = 0; i < k; i += kStep, weights += kStep * kPanel) {
    I32 w0[kColumns], w1[kColumns];
    for (int v = 0; v < kColumns; ++v) {
      const int8_t* from = weights + v / kVecs * panel_bytes + v % kVecs * kLanes * 4;
      if (v % kVecs == 0 && fetch) {
        prefetch(ahead + v / kVecs * panel_bytes);
        if (alone) prefetch(ahead + v / kVecs * panel_bytes + 64);
      }
      w0[v] = load_words(from);
      w1[v] = load_words(from + 4 * kPanel);
    }
    for (int r = 0; r < MR; ++r) {
      const uint8_t* q = rows[r / 3] + r % 3 * stride;
      const I32 x0 = set_word(q), x1 = set_word(q + 4);
      for (int v = 0; v < kColumns; ++v) sum[r][v] = dot(sum[r][v], x0, w0[v], x1, w1[v]);
    }
    for (const uint8_t*& q : rows) q += kStep;
    ahead += alone ? 128 : 64;
  }

  by_dtype(to.dtype, [&](auto type) {
    for (int v = 0; v < kColumns; ++v) {
      const int64_t output = panel * kPanel + v * kLanes;
      if (output >= w.n) break;
      const Outputs outputs(to, w.n, output);
      const Dequantize dequantize{outputs.take(w.scale), outputs.take(w.wsum)};
      for (int r = 0; r < MR; ++r) {
        const F32 value = dequantize(sum[r][v], x.scale[row + r], x.zero[row + r]);
        write<decltype(type)>(to, row + r, outputs, value);
      }
    }
  });
}

// All rows against NP panels.
template <int NP>
void columns(const QuantizedTile& x, const gossamer_int8& w, int64_t panel, const Destination& to) {
  int64_t row = 0;
  for (; x.rows - row > kGemmLastRows; row += kGemmRows) tile<kGemmRows, NP>(x, row, w, panel, to);
  by_count<kGemmLastRows>(
      x.rows - row, [&](auto rows) { tile<decltype(rows)::value, NP>(x, row, w, panel, to); });
}

}  // namespace

void gemm_int8(const QuantizedTile& x, const gossamer_int8& w, Range panels,
               const Destination& to) {
  int64_t p = panels.begin;
  for (; x.rows == 1 && p + kOneRowPanels <= panels.end; p += kOneRowPanels) {
    tile<1, kOneRowPanels>(x, 0, w, p, to);
  }
  for (; p + kGemmPanels <= panels.end; p += kGemmPanels) columns<kGemmPanels>(x, w, p, to);
  for (; p < panels.end; ++p) columns<1>(x, w, p, to);
}

}  // namespace GOSSAMER_ISA
}  // namespace gossamer
