// gemm_int8: y = act(dequantize(q @ w^T) + bias), u8 activations times s8 weights, dense.
//
//   q       rows x stride        u8, rows padded with anything to a multiple of 8 (the weights there are 0)
//   panels  (n/16, k/4, 16, 4)   s8: 16 outputs x 4 inputs, 64 bytes, a step; an even number of steps
//   y       rows x n             see epilogue.h
//
// Tile: kGemmRows rows x kGemmPanels panels, all of k in one go, so sums leave their registers once.
// Two steps (8 inputs) a turn, because dot() adds the products of two steps in 16 bits ("depth 4"):
// a 256-bit Isa needs 4 MR of vpmaddubsw, 2 MR of vpmaddwd and 4 MR of adds for MR x 16 x 8 MACs. At two
// multiplies a cycle that is 42.7 MACs a cycle, whatever MR; MR only has to make loads (2 a cycle) scarcer than
// multiplies: 4 weights + 4 MR broadcasts < 2 * 3 MR needs MR > 2.
// Tails: rows by a smaller MR, outputs by the masked store of epilogue.h (panels are padded with zeros).
// Numerics: exact in int32 for k <= 65536.

#include "epilogue.h"

namespace gossamer {
namespace GOSSAMER_ISA {
namespace {

constexpr int kVecs = kPanel / kLanes;

template <int MR, int NP>
void tile(const QuantizedTile& x, int64_t row, const gossamer_int8& w, int64_t panel, const Destination& to) {
  const int64_t k = round_up(w.k, kStep), panel_bytes = k * kPanel;
  const uint8_t* q = x.q + row * x.stride;
  const int8_t* b = w.panels + panel * panel_bytes;
  I32 sum[NP * kVecs][MR];
  for (auto& column : sum)
    for (I32& s : column) s = set(int32_t{0});

  for (int64_t i = 0; i < k; i += kStep, q += kStep, b += kStep * kPanel) {
    for (int v = 0; v < NP * kVecs; ++v) {
      const int8_t* weights = b + v / kVecs * panel_bytes + v % kVecs * kLanes * 4;
      // Two lines of the next steps: a stream of 64 bytes a step outruns the hardware prefetcher in one row.
      if (MR == 1 && v % kVecs == 0) prefetch(weights + 1024), prefetch(weights + 1088);
      const I32 w0 = load_words(weights), w1 = load_words(weights + 4 * kPanel);
      for (int r = 0; r < MR; ++r) {
        const uint8_t* a = q + r * x.stride;
        sum[v][r] = dot(sum[v][r], set_word(a), w0, set_word(a + 4), w1);
      }
    }
  }

  for (int v = 0; v < NP * kVecs; ++v) {
    const int64_t output = panel * kPanel + v * kLanes;
    const int count = lanes_left(w.n, output);
    if (count <= 0) break;
    const Dequantize dequantize(w.scale + output, w.wsum + output, count);
    for (int r = 0; r < MR; ++r) {
      write(to, row + r, output, count, dequantize(sum[v][r], x.scale[row + r], x.zero[row + r]));
    }
  }
}

// All rows against NP panels: the widest tile first, then one narrower tile for the rest.
template <int NP>
void columns(const QuantizedTile& x, const gossamer_int8& w, int64_t panel, const Destination& to) {
  int64_t row = 0;
  for (; row + kGemmRows <= x.rows; row += kGemmRows) tile<kGemmRows, NP>(x, row, w, panel, to);
  for (; row + 4 <= x.rows; row += 4) tile<4, NP>(x, row, w, panel, to);
  switch (x.rows - row) {
    case 3:
      return tile<3, NP>(x, row, w, panel, to);
    case 2:
      return tile<2, NP>(x, row, w, panel, to);
    case 1:
      return tile<1, NP>(x, row, w, panel, to);
  }
}

}  // namespace

void gemm_int8(const QuantizedTile& x, const gossamer_int8& w, Range panels, const Destination& to) {
  int64_t p = panels.begin;
  for (; p + kGemmPanels <= panels.end; p += kGemmPanels) columns<kGemmPanels>(x, w, p, to);
  for (; p < panels.end; ++p) columns<1>(x, w, p, to);
}

}  // namespace GOSSAMER_ISA
}  // namespace gossamer
