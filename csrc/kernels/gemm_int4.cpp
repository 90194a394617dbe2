// gemm_int4: y = act((sum over groups of s[g] (q[g] . w[g])  -  zero wsum) (x_scale scale) + bias),
// u8 activations times 4-bit weights, which have a scale for each group of 16 or 32 inputs.
//
//   q            rows x stride       u8; rows padded with anything to a multiple of 32
//   panels       (n/16, k/8, 16, 4)  two nibbles a byte, 16 outputs x 8 inputs, 64 bytes, a line:
//                                    inputs 0 .. 3 in the low halves, inputs 4 .. 7 in the high
//   group_scale  (n/16, k/group, 16) s8
//   y            rows x n            see epilogue.h
//
// Tile: MR = kInt4Rows rows x NP = kInt4Panels panels, group by group: its 2 or 4 lines are
// multiplied in integers, then scaled and added to the float sums. One row walks kInt4RowPanels
// panels at once: memory bounds it, and a chain of sums would wait for itself.
//
// Registers: MR x NP x 16/kLanes integer and as many float sums, a line's weights, two broadcasts:
// see simd/<isa>.h.
// Tails: rows by a smaller MR, panels one by one, outputs by the masked store (what pads a panel is
// 0).
// Numerics: exact in a group, and times its scale too, 255 * 32 * group * |s| < 2^24 since
// |s| group <= 2048. So only the float additions round, in the order of k, whether the Isa fuses
// them with the multiply or not: the same bits on every Isa.

#include "epilogue.h"

namespace gossamer {
namespace GOSSAMER_ISA {
namespace {

constexpr int kVecs = kPanel / kLanes;
constexpr int kLine = 4 * kPanel;
constexpr int kAhead = 512;

// One group of MR rows: sum[r][v] += q . w.
template <int kGroup, int MR, int NP>
static inline void group(const uint8_t* q, int64_t stride, const uint8_t* lines,
                         int64_t panel_bytes, I32 (&sum)[MR][NP * kVecs]) {
  for (int i = 0; i < kGroup; i += kStep, lines += kLine, q += kStep) {
    I32 w0[NP * kVecs], w1[NP * kVecs];
    for (int v = 0; v < NP * kVecs; ++v) {
      const I32 codes = load_words(lines + v / kVecs * panel_bytes + v % kVecs * kLanes * 4);
      w0[v] = decode<0>(codes);
      w1[v] = decode<1>(codes);
    }
    for (int r = 0; r < MR; ++r) {
      const I32 x0 = set_word(q + r * stride), x1 = set_word(q + r * stride + 4);
      for (int v = 0; v < NP * kVecs; ++v) sum[r][v] = dot(sum[r][v], x0, w0[v], x1, w1[v]);
    }
  }
}

template <int kGroup, int MR, int NP>
void tile(const QuantizedTile& x, int64_t row, const gossamer_int4& w, int64_t panel,
          const Destination& to) {
  constexpr int kColumns = NP * kVecs;
  const int64_t k = round_up(w.k, kInt4Step), panel_bytes = k * kPanel / 2;
  const int64_t panel_scales = k / kGroup * kPanel;
  const uint8_t* q = x.q + row * x.stride;
  const uint8_t* lines = w.panels + panel * panel_bytes;
  const int8_t* scales = w.group_scale + panel * panel_scales;
  fetch_lines(to, row, MR, panel * kPanel, NP * kPanel);
  F32 total[MR][kColumns];
  for (auto& line : total)
    for (F32& t : line) t = set(0.0f);

  for (int64_t i = 0; i < k; i += kGroup, q += kGroup) {
    // The first rows read a panel from L3 or memory, faster than the hardware prefetcher follows:
    // 1.5 -> 1.35 ms for one row of 8192 x 8192, against 1024 bytes ahead and none for the scales.
    for (int p = 0; p < NP && row == 0; ++p) {
      prefetch(scales + p * panel_scales + kAhead / 2);
      for (int line = 0; line < kGroup / kStep; ++line)
        prefetch(lines + p * panel_bytes + kAhead + line * kLine);
    }
    I32 sum[MR][kColumns];
    for (auto& line : sum)
      for (I32& s : line) s = set(int32_t{0});
    group<kGroup, MR, NP>(q, x.stride, lines, panel_bytes, sum);
    for (int v = 0; v < kColumns; ++v) {
      const F32 scale = to_f32(load_signed(scales + v / kVecs * panel_scales + v % kVecs * kLanes));
      for (int r = 0; r < MR; ++r) total[r][v] = muladd(to_f32(sum[r][v]), scale, total[r][v]);
    }
    lines += kGroup / kStep * kLine;
    scales += kPanel;
  }

  by_dtype(to.dtype, [&](auto type) {
    for (int v = 0; v < kColumns; ++v) {
      const int64_t output = panel * kPanel + v * kLanes;
      if (output >= w.n) break;
      const Outputs outputs(to, w.n, output);
      const F32 scale = outputs.take(w.scale), wsum = to_f32(outputs.take(w.wsum));
      for (int r = 0; r < MR; ++r) {
        const F32 zero = set(static_cast<float>(x.zero[row + r]));
        const F32 value = sub(total[r][v], mul(zero, wsum));
        write<decltype(type)>(to, row + r, outputs, mul(value, mul(set(x.scale[row + r]), scale)));
      }
    }
  });
}

// All rows against NP panels.
template <int kGroup, int NP>
void columns(const QuantizedTile& x, const gossamer_int4& w, int64_t panel, const Destination& to) {
  int64_t row = 0;
  for (; row + kInt4Rows <= x.rows; row += kInt4Rows)
    tile<kGroup, kInt4Rows, NP>(x, row, w, panel, to);
  by_count<kInt4Rows - 1>(x.rows - row, [&](auto rows) {
    tile<kGroup, decltype(rows)::value, NP>(x, row, w, panel, to);
  });
}

template <int kGroup>
void all(const QuantizedTile& x, const gossamer_int4& w, Range panels, const Destination& to) {
  int64_t p = panels.begin;
  if (x.rows == 1)
    for (; p + kInt4RowPanels <= panels.end; p += kInt4RowPanels)
      tile<kGroup, 1, kInt4RowPanels>(x, 0, w, p, to);
  for (; p + kInt4Panels <= panels.end; p += kInt4Panels) columns<kGroup, kInt4Panels>(x, w, p, to);
  for (; p < panels.end; ++p) columns<kGroup, 1>(x, w, p, to);
}

}  // namespace

void gemm_int4(const QuantizedTile& x, const gossamer_int4& w, Range panels,
               const Destination& to) {
  w.group == 16 ? all<16>(x, w, panels, to) : all<32>(x, w, panels, to);
}

}  // namespace GOSSAMER_ISA
}  // namespace gossamer
