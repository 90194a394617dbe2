// gemm_w8: y = act((x @ w^T) * scale + bias), fp32 activations times s8 weights: weight-only int8.
//
//   x       rows x k             float32, bfloat16 or float16
//   panels  (n/16, k/4, 16, 4)   s8, as in gemm_int8
//   y       rows x n             see epilogue.h
//
// A panel is widened once into scratch (k x 16 floats), then multiplied by all rows of the tile in
// tiles of MR x 16. 16-bit rows are widened into scratch first.
//
// Registers: 6 rows x 2 vectors of sums, 2 weights, a broadcast: 15 of 16 on AVX2.
// Tails: rows by a smaller MR, inputs by the zeros that pad a panel, outputs by the masked store.
// Numerics: fp32 multiply-adds in the order of k, error <= k eps (|x| @ |w|^T).

#include "epilogue.h"

namespace gossamer {
namespace GOSSAMER_ISA {
namespace {

constexpr int kVecs = kPanel / kLanes;
constexpr int kRows = 6;

// Weights [i][16] of one panel, four inputs from one step of bytes.
void widen_panel(const int8_t* panel, int64_t k, float* out) {
  for (int64_t i = 0; i < k; i += 4, panel += 4 * kPanel) {
    for (int v = 0; v < kVecs; ++v) {
      const I32 words = load_words(panel + v * kLanes * 4);
      float* to = out + i * kPanel + v * kLanes;
      store(to, to_f32(signed_byte<0>(words)));
      store(to + kPanel, to_f32(signed_byte<1>(words)));
      store(to + 2 * kPanel, to_f32(signed_byte<2>(words)));
      store(to + 3 * kPanel, to_f32(signed_byte<3>(words)));
    }
  }
}

template <int MR>
void tile(const float* x, int64_t stride, int64_t row, const float* weights, const gossamer_int8& w,
          int64_t panel, const Destination& to, const float* ill) {
  const float* a = x + row * stride;
  F32 sum[MR][kVecs];
  for (auto& line : sum)
    for (F32& s : line) s = set(0.0f);
  for (int64_t i = 0; i < w.k; ++i, weights += kPanel) {
    F32 b[kVecs];
    for (int v = 0; v < kVecs; ++v) b[v] = load(weights + v * kLanes);
    for (int r = 0; r < MR; ++r) {
      const F32 broadcast = set(a[r * stride + i]);
      for (int v = 0; v < kVecs; ++v) sum[r][v] = muladd(broadcast, b[v], sum[r][v]);
    }
  }
  by_dtype(to.dtype, [&](auto type) {
    for (int v = 0; v < kVecs; ++v) {
      const int64_t output = panel * kPanel + v * kLanes;
      if (output >= w.n) break;
      const Outputs outputs(to, w.n, output);
      const F32 scale = outputs.take(w.scale);
      for (int r = 0; r < MR; ++r) {
        const F32 value = add(mul(sum[r][v], scale), set(ill[row + r]));
        write<decltype(type)>(to, row + r, outputs, value);
      }
    }
  });
}

template <typename T>
void widen_rows(const FloatTile& x, int64_t k, float* out) {
  for (int64_t r = 0; r < x.rows; ++r, out += k) {
    const T* row = static_cast<const T*>(x.x) + r * x.stride;
    int64_t i = 0;
    for (; i + kLanes <= k; i += kLanes) store(out + i, load(row + i));
    if (i < k) store_first(out + i, load_first(row + i, lanes_left(k, i)), lanes_left(k, i));
  }
}

}  // namespace

void gemm_w8(const FloatTile& x, const gossamer_int8& w, Range panels, const Destination& to,
             void* scratch) {
  const int64_t k = round_up(w.k, kStep);
  float* weights = static_cast<float*>(scratch);
  const float* rows = static_cast<const float*>(x.x);
  int64_t stride = x.stride;
  if (x.dtype != GOSSAMER_FLOAT32) {
    float* wide = weights + k * kPanel;
    x.dtype == GOSSAMER_BFLOAT16 ? widen_rows<BFloat16>(x, w.k, wide)
                                 : widen_rows<Float16>(x, w.k, wide);
    rows = wide;
    stride = w.k;
  }
  float ill[kMaxLanes];
  for (int64_t r = 0; r < x.rows; ++r) ill[r] = illness(rows + r * stride, w.k);
  for (int64_t p = panels.begin; p < panels.end; ++p) {
    widen_panel(w.panels + p * k * kPanel, k, weights);
    int64_t row = 0;
    for (; row + kRows <= x.rows; row += kRows)
      tile<kRows>(rows, stride, row, weights, w, p, to, ill);
    for (; row + 2 <= x.rows; row += 2) tile<2>(rows, stride, row, weights, w, p, to, ill);
    if (row < x.rows) tile<1>(rows, stride, row, weights, w, p, to, ill);
  }
}

}  // namespace GOSSAMER_ISA
}  // namespace gossamer
