// conv_int8: y = act(dequantize(conv(q, w)) + bias + residual), dense weights, blocked images.
//
//   q       (channels/4, height, width, 4)  u8, one image
//   panels  (n/16, k/4, 16, 4)              s8, as gemm_int8 reads them; k = taps x channels up to 4
//   panel   [k/4][width] words              scratch: what lies under the taps of <= 64 pixels
//   sums    [16][width] int32               scratch
//   y       see gossamer_output
//
// Pixels fill the lanes, weights are broadcast: four outputs (a word of a blocked y) x kConvVectors
// vectors of pixels stay in registers. Two columns a turn, which dot() adds in 16 bits ("depth 4").
// A turn of a 256-bit Isa: 4 loads of pixels and 8 broadcasts for 24 multiplies, at two a cycle 6
// cycles of loads under 12 of arithmetic. Columns in blocks of 256: 16 KB of weights and 16 KB of
// pixels, so that both come from L1 while four quads of outputs and all pixels meet.
//
// ResNet-50's layers, batch 1, one core: 24.4 ms on avx512vnni (3x3: 290 to 420 GOP/s), 38.7 on
// avx2 (180 to 250); torch's fp32 takes 97 there.
//
// Tails: pixels past the last are computed and not written, outputs past n have weights of 0.
// Numerics: exact in int32 for k <= 65536.

#include "pixels.h"

namespace gossamer {
namespace GOSSAMER_ISA {
namespace {

constexpr int64_t kColumns = 256;

// sums[4][width] += the columns' words x their weights, for V vectors of pixels.
template <int V>
void quad(const int32_t* panel, int64_t width, int64_t columns, const int8_t* weights,
          int32_t* sums) {
  I32 sum[4][V];
  for (int o = 0; o < 4; ++o)
    for (int v = 0; v < V; ++v) sum[o][v] = load(sums + o * width + v * kLanes);
  for (int64_t c = 0; c < columns; c += 2, panel += 2 * width, weights += 8 * kPanel) {
    I32 x0[V], x1[V];
    for (int v = 0; v < V; ++v) {
      x0[v] = load(panel + v * kLanes);
      x1[v] = load(panel + width + v * kLanes);
    }
    for (int o = 0; o < 4; ++o) {
      const I32 w0 = set_word(weights + 4 * o), w1 = set_word(weights + 4 * kPanel + 4 * o);
      for (int v = 0; v < V; ++v) sum[o][v] = dot(sum[o][v], x0[v], w0, x1[v], w1);
    }
  }
  for (int o = 0; o < 4; ++o)
    for (int v = 0; v < V; ++v) store(sums + o * width + v * kLanes, sum[o][v]);
}

// All pixels against one panel of 16 outputs.
void outputs_of(const int32_t* panel, int64_t width, int64_t columns, const int8_t* weights,
                int32_t* sums) {
  memset(sums, 0, static_cast<size_t>(kPanel * width) * 4);
  for (int64_t c = 0; c < columns; c += kColumns) {
    const int64_t count = columns - c < kColumns ? columns - c : kColumns;
    for (int64_t p = 0; p < width; p += kConvVectors * kLanes) {
      by_count<kConvVectors>(
          width - p < kConvVectors * kLanes ? (width - p) / kLanes : kConvVectors, [&](auto v) {
            for (int o = 0; o < kPanel; o += 4) {
              quad<decltype(v)::value>(panel + c * width + p, width, count,
                                       weights + (c * kPanel + o) * 4, sums + o * width + p);
            }
          });
    }
  }
}

}  // namespace

void conv_int8(const ImageTile& x, const gossamer_int8& w, Range panels, const ImageDestination& to,
               void* scratch) {
  const int64_t width = width_of(x.pixels), filled = ceil_div(w.k, 4),
                columns = round_up(filled, 2);
  auto* panel = static_cast<int32_t*>(scratch);
  int32_t* sums = panel + columns * width;
  gather(x, panel);
  // The weights of the last column are 0 then: any number would do.
  memset(panel + filled * width, 0, static_cast<size_t>((columns - filled) * width) * 4);
  const Epilogue finish{x, w.scale, w.wsum, w.n, to};
  for (int64_t p = panels.begin; p < panels.end; ++p) {
    outputs_of(panel, width, columns, w.panels + p * columns * kPanel * 4, sums);
    finish(sums, {p * kPanel, w.n < (p + 1) * kPanel ? w.n : (p + 1) * kPanel});
  }
}

}  // namespace GOSSAMER_ISA
}  // namespace gossamer
