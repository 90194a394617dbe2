// gemm_w8: y = act((x @ w^T) * scale + bias), fp32 activations times s8 weights: weight-only int8.
//
//   x       rows x k             float32, bfloat16 or float16
//   panels  (n/16, k/4, 16, 4)   s8, as in gemm_int8
//   y       rows x n             see epilogue.h
//
// Tile: MR rows x 16 outputs, all of k in one go. The bytes of a step are widened in registers (a
// shift or two and a conversion for kLanes weights) and meet MR rows there: widening a panel into
// scratch first was no faster at 128 rows and took 2.4 times as long at one, 3.2 at 4096 x 4096.
// 16-bit rows are widened into scratch.
//
// Registers: 5 rows x 2 vectors of sums, 2 weights, words and a broadcast on 256 bits; 8 rows x 1
// on 512. One row more and gcc 12 spills on AVX2: 7.9 ms for 5.9 (128 rows, 768 -> 3072).
// Tails: rows by a smaller MR, the last inputs one by one, outputs by the masked store.
// Numerics: fp32 multiply-adds in the order of k, error <= k eps (|x| @ |w|^T).

#include "epilogue.h"

namespace gossamer {
namespace GOSSAMER_ISA {
namespace {

constexpr int kVecs = kPanel / kLanes;
constexpr int kRows = kVecs == 1 ? 8 : 5;
// One or two rows walk two panels at once: they have too few sums to hide a latency of 4.
constexpr int kWideRows = 2;
constexpr int kWidePanels = 2;

struct Rows {
  const float *x, *ill;
  int64_t stride;
};

template <int MR, int NP>
void tile(const Rows& x, int64_t row, const gossamer_int8& w, int64_t panel,
          const Destination& to) {
  constexpr int kColumns = NP * kVecs;
  const int64_t panel_bytes = round_up(w.k, kStep) * kPanel;
  const int8_t* weights = w.panels + panel * panel_bytes;
  const float* a = x.x + row * x.stride;
  F32 sum[MR][kColumns];
  for (auto& line : sum)
    for (F32& s : line) s = set(0.0f);
  const auto input = [&](int64_t i, auto byte) {
    F32 b[kColumns];
    for (int v = 0; v < kColumns; ++v) {
      const I32 words = load_words(weights + v / kVecs * panel_bytes + v % kVecs * kLanes * 4);
      b[v] = to_f32(signed_byte<decltype(byte)::value>(words));
    }
    for (int r = 0; r < MR; ++r) {
      const F32 broadcast = set(a[r * x.stride + i]);
      for (int v = 0; v < kColumns; ++v) sum[r][v] = muladd(broadcast, b[v], sum[r][v]);
    }
  };
  int64_t i = 0;
  for (; i + 4 <= w.k; i += 4, weights += 4 * kPanel) {
    input(i, Int<0>());
    input(i + 1, Int<1>());
    input(i + 2, Int<2>());
    input(i + 3, Int<3>());
  }
  if (i < w.k) input(i, Int<0>());
  if (i + 1 < w.k) input(i + 1, Int<1>());
  if (i + 2 < w.k) input(i + 2, Int<2>());

  by_dtype(to.dtype, [&](auto type) {
    for (int v = 0; v < kColumns; ++v) {
      const int64_t output = panel * kPanel + v * kLanes;
      if (output >= w.n) break;
      const Outputs outputs(to, w.n, output);
      const F32 scale = outputs.take(w.scale);
      for (int r = 0; r < MR; ++r) {
        const F32 value = add(mul(sum[r][v], scale), set(x.ill[row + r]));
        write<decltype(type)>(to, row + r, outputs, value);
      }
    }
  });
}

template <typename T>
void widen_rows(const FloatTile& x, int64_t k, float* out) {
  for (int64_t r = 0; r < x.rows; ++r)
    widen_row(static_cast<const T*>(x.x) + r * x.stride, k, out + r * k);
}

}  // namespace

void gemm_w8(const FloatTile& x, const gossamer_int8& w, Range panels, const Destination& to,
             void* scratch) {
  const float* rows = static_cast<const float*>(x.x);
  int64_t stride = x.stride;
  if (x.dtype != GOSSAMER_FLOAT32) {
    float* wide = static_cast<float*>(scratch);
    x.dtype == GOSSAMER_BFLOAT16 ? widen_rows<BFloat16>(x, w.k, wide)
                                 : widen_rows<Float16>(x, w.k, wide);
    rows = wide;
    stride = w.k;
  }
  float ill[kMaxLanes];
  for (int64_t r = 0; r < x.rows; ++r) ill[r] = illness(rows + r * stride, w.k);
  const Rows in{rows, ill, stride};
  int64_t p = panels.begin;
  for (; x.rows <= kWideRows && p + kWidePanels <= panels.end; p += kWidePanels) {
    by_count<kWideRows>(
        x.rows, [&](auto count) { tile<decltype(count)::value, kWidePanels>(in, 0, w, p, to); });
  }
  for (; p < panels.end; ++p) {
    int64_t row = 0;
    for (; row + kRows <= x.rows; row += kRows) tile<kRows, 1>(in, row, w, p, to);
    by_count<kRows - 1>(x.rows - row,
                        [&](auto count) { tile<decltype(count)::value, 1>(in, row, w, p, to); });
  }
}

}  // namespace GOSSAMER_ISA
}  // namespace gossamer
