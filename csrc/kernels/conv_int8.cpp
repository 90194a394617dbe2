// conv_int8: y = act(dequantize(conv(q, w)) + bias + residual), dense weights, blocked images.
//
//   q       (channels/4, height, width, 4)  u8, one image
//   panels  (n/16, k/4, 16, 4)              s8, as gemm_int8 reads them; k = taps x channels up to 4
//   panel   [k/4][width] words              scratch: what lies under the taps of <= 72 pixels
//   sums    [16][width] int32               scratch
//   y       see gossamer_output
//
// Pixels fill the lanes, weights are broadcast: four outputs (a word of a blocked y) x kConvVectors
// vectors of pixels stay in registers. Two columns a turn, which dot() adds in 16 bits ("depth 4").
// A turn of a 256-bit Isa: 4 loads of pixels and 8 broadcasts for 24 multiplies, at two a cycle 6
// cycles of loads under 12 of arithmetic. Columns in blocks, whose weights and pixels come from L1 while
// four quads of outputs and all pixels meet.
//
// A network's weights come from memory, and the first pass over a block of them reads lines faster than
// the hardware fetches them: it fetches the next block's meanwhile, where they are cold (7 x 7 pixels:
// 5 to 25 % of a layer). ResNet-50's layers but the first, batch 1, one core of a Zen 5: 10.1 ms on
// avx512vnni (3x3: 830 to 940 GOP/s of a ceiling of 1030), 25.8 on avx2 (317 GOP/s of 346).
//
// Tails: pixels that fill less than half a vector are multiplied one by one, outputs in the lanes (7 x
// 7 and 14 x 14 pixels: 3 and 12 vectors and 1 and 4 pixels; 5 to 20 % of such layers); more are a
// vector, of which those past the last are not written. Outputs past n have weights of 0.
// Numerics: exact in int32 for k <= 65536.
// Where each output reads its own channel: depthwise.h. 3x3 kernels that go on by one pixel: winograd.h,
// where conv.cpp finds that it pays.

#include "depthwise.h"
#include "winograd.h"

namespace gossamer {
namespace GOSSAMER_ISA {
namespace {

// In a block: what 32 KB hold of a panel of weights and as many words of kConvVectors of pixels; even.
constexpr int64_t kColumns = 32768 / (4 * (kPanel + kConvVectors * kLanes)) / 2 * 2;
// Up to so many pixels are dearer as a vector than one by one.
constexpr int kConvRest = kLanes / 2;

// sums[4][width] += the columns' words x their weights, for V vectors of pixels; kFirst: = instead.
// kFetch: fetches as many bytes from `next` on as its weights are. Unrolled by name: else gcc 12 may
// keep the sums in memory (avx2: 1.25 times as long).
template <int V, bool kFirst, bool kFetch>
void quad(const int32_t* panel, int64_t width, int64_t columns, const int8_t* weights,
          int32_t* sums, const int8_t* next) {
  I32 sum[4][V];
#pragma GCC unroll 4
  for (int o = 0; o < 4; ++o) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v)
      sum[o][v] = kFirst ? set(int32_t{0}) : load(sums + o * width + v * kLanes);
  }
  for (int64_t c = 0; c < columns; c += 2, panel += 2 * width, weights += 8 * kPanel) {
    if (kFetch) {
      prefetch(next);
      next += 32;
    }
    I32 x0[V], x1[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      x0[v] = load(panel + v * kLanes);
      x1[v] = load(panel + width + v * kLanes);
    }
#pragma GCC unroll 4
    for (int o = 0; o < 4; ++o) {
      const I32 w0 = set_word(weights + 4 * o), w1 = set_word(weights + 4 * kPanel + 4 * o);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[o][v] = dot_tight(sum[o][v], x0[v], w0, x1[v], w1);
    }
  }
#pragma GCC unroll 4
  for (int o = 0; o < 4; ++o) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(sums + o * width + v * kLanes, sum[o][v]);
  }
}

// R pixels, too few for a vector: outputs fill the lanes, as they lie in a panel of weights.
template <int R>
void rest(const int32_t* panel, int64_t width, int64_t columns, const int8_t* weights,
          int32_t* sums) {
  constexpr int P = kPanel / kLanes;
  I32 sum[R][P];
  for (int r = 0; r < R; ++r)
    for (int p = 0; p < P; ++p) sum[r][p] = set(int32_t{0});
  for (int64_t c = 0; c < columns; c += 2, panel += 2 * width, weights += 8 * kPanel) {
    I32 w0[P], w1[P];
    for (int p = 0; p < P; ++p) {
      w0[p] = load_words(weights + 4 * p * kLanes);
      w1[p] = load_words(weights + 4 * (kPanel + p * kLanes));
    }
    for (int r = 0; r < R; ++r) {
      const I32 x0 = set_word(panel + r), x1 = set_word(panel + width + r);
      for (int p = 0; p < P; ++p) sum[r][p] = dot(sum[r][p], x0, w0[p], x1, w1[p]);
    }
  }
  for (int r = 0; r < R; ++r) {
    int32_t line[kPanel];
    for (int p = 0; p < P; ++p) store(line + p * kLanes, sum[r][p]);
    for (int o = 0; o < kPanel; ++o) sums[o * width + r] = line[o];
  }
}

// All pixels against one panel of 16 outputs.
void outputs_of(const int32_t* panel, int64_t width, int64_t pixels, int64_t columns,
                const int8_t* weights, bool cold, int32_t* sums) {
  const int64_t left = pixels % kLanes, few = left <= kConvRest ? left : 0;
  const int64_t whole = few ? pixels - few : width;
  for (int64_t c = 0; c < columns; c += kColumns) {
    const int64_t count = columns - c < kColumns ? columns - c : kColumns;
    for (int64_t p = 0; p < whole; p += kConvVectors * kLanes) {
      by_count<kConvVectors>(
          whole - p < kConvVectors * kLanes ? (whole - p) / kLanes : kConvVectors, [&](auto v) {
            constexpr int V = decltype(v)::value;
            const bool fetch = cold && p == 0;
            const auto add = c == 0 ? (fetch ? quad<V, true, true> : quad<V, true, false>)
                                    : (fetch ? quad<V, false, true> : quad<V, false, false>);
            const int8_t* next = weights + (c + count) * kPanel * 4;
            for (int o = 0; o < kPanel; o += 4, next += count * kPanel) {
              add(panel + c * width + p, width, count, weights + (c * kPanel + o) * 4,
                  sums + o * width + p, next);
            }
          });
    }
  }
  by_count<kConvRest>(few, [&](auto r) {
    rest<decltype(r)::value>(panel + whole, width, columns, weights, sums + whole);
  });
}

}  // namespace

void conv_int8(const ImageTile& x, const gossamer_int8& w, Range panels, const ImageDestination& to,
               void* scratch) {
  if (is_depthwise(x.conv, w.n, w.k)) return depthwise(x, w, panels, to, scratch);
  const int64_t width = width_of(x.pixels), filled = ceil_div(w.k, 4),
                columns = round_up(filled, 2);
  auto* panel = static_cast<int32_t*>(scratch);
  int32_t* sums = panel + columns * width;
  gather(x, panel);
  // The weights of the last column are 0 then: any number would do.
  memset(panel + filled * width, 0, static_cast<size_t>((columns - filled) * width) * 4);
  const Epilogue finish{x, w.scale, w.wsum, w.n, to};
  for (int64_t p = panels.begin; p < panels.end; ++p) {
    outputs_of(panel, width, x.pixels.end - x.pixels.begin, columns,
               w.panels + p * columns * kPanel * 4, x.cold, sums);
    finish(sums, {p * kPanel, w.n < (p + 1) * kPanel ? w.n : (p + 1) * kPanel});
  }
}

}  // namespace GOSSAMER_ISA
}  // namespace gossamer
