// conv_spmm_int8: y = act(dequantize(conv(q, w)) + bias + residual), w int8 in blocks of one output x
// four channels at one tap, blocked images.
//
//   q      (channels/4, height, width, 4)  u8, one image
//   w      gossamer_sparse_int8            as spmm_int8 reads it; k = taps x channels up to 4
//   panel  [k/4][width] words              scratch: what lies under the taps of <= 112 pixels
//   sums   [chunk][width] int32            scratch
//   y      see gossamer_output
//
// The panel and the loop are those of spmm_int8 (lanes.h), but an image in blocks of four channels
// has its pixels side by side: filling the panel is copying, without a transpose.
//
// Seven vectors of pixels a tile: 56 x 56, 28 x 28 and 14 x 14 pixels are whole tiles then, and two
// threads have as many (ResNet-50's layers against 64 pixels, avx512vnni: 5.70 -> 5.53 ms, on two
// threads 3.19 -> 3.09).
//
// Registers: width / kLanes sums, 2 weights, ones.
// Tails: pixels past the last are computed and not written.
// Numerics: exact in int32 for k <= 65536.

#include "blocks.h"

namespace gossamer {
namespace GOSSAMER_ISA {

namespace {

// bytes[output][packed vectors], four of V vectors each -> words of y; the last vector has `last`
// pixels.
template <int V>
void write_words(const int32_t* bytes, int64_t outputs, int64_t plane, int last, int32_t* y) {
  constexpr int64_t kLine = (V + 3) / 4 * kLanes;
  for (int64_t o = 0; o < outputs; o += 4, bytes += 4 * kLine, y += plane) {
    for (int v = 0; v < V; v += 4) {
      I32 words[4];
      for (int i = 0; i < 4; ++i) words[i] = load(bytes + i * kLine + v / 4 * kLanes);
      interleave(words);
      for (int i = v; i < v + 4 && i < V; ++i)
        store_some(y + i * kLanes, words[i - v], i < V - 1 ? kLanes : last);
    }
  }
}

// Outputs come in the order of their entries, which no hardware foresees: the residual, or else y, is
// fetched so many outputs before it is met.
constexpr int64_t kOutputsAhead = 8;

// Where all columns are in one block, the sums of an output are done when its row is: they go from
// registers to bytes, and these wait in L1 for the other three of their words. Without it the sums
// are zeroed, added to and read again: 64-byte lines in L2, for the one or two entries that a 1x1
// layer of 64 channels has at 90 %.
template <int V, bool kResidual, Clamp kClamp>
void one_block(const ImageTile& x, const gossamer_sparse_int8& w, int64_t chunk,
               const ImageDestination& to, const int32_t* panel, int32_t* bytes) {
  constexpr int kFours = (V + 3) / 4;
  const int64_t begin = chunk * chunk_rows(w.index.n), plane = to.to.stride,
                left = round_up(w.index.n, 4) - begin,
                outputs = left < chunk_rows(w.index.n) ? left : chunk_rows(w.index.n);
  const Epilogue of{x, w.scale, w.wsum, w.index.n, to};
  const Requantize<kResidual, kClamp> requantize(*to.blocked, to.to.activation);
  // The word of output `begin` at the first pixel; the last vector may have fewer pixels.
  const int64_t first = begin / 4 * plane + x.pixels.begin;
  const int last = lanes_left(x.pixels.end - x.pixels.begin, (V - 1) * kLanes);
  auto* y = static_cast<int32_t*>(to.to.y) + first;
  const auto* residual = reinterpret_cast<const int32_t*>(to.blocked->residual) + first;
  const int32_t* touched = kResidual ? residual : y;
  const bool far = is_far(w.index.n, plane);

  const auto finish = [=](int64_t output, const Output& floats, const I32(&sum)[V]) {
    I32 byte[4 * kFours];
    for (int v = 0; v < 4 * kFours; ++v) byte[v] = set(int32_t{0});
    for (int v = 0; v < V; ++v) {
      I32 other = set(int32_t{0});
      if (kResidual) {
        const int32_t* at = residual + output / 4 * plane + v * kLanes;
        other =
            unsigned_byte(v < V - 1 ? load(at) : load_some(at, last), static_cast<int>(output % 4));
      }
      byte[v] = requantize(floats.corrected(sum[v]), other);
    }
    for (int v = 0; v < 4 * kFours; v += 4) {
      store(bytes + (output * kFours + v / 4) * kLanes,
            requantize.pack(byte[v], byte[v + 1], byte[v + 2], byte[v + 3]));
    }
  };
  const auto one = [=](int64_t output, auto multiply) {
    const Output floats = of.output(begin + output);
    I32 sum[V];
    for (I32& s : sum) s = sub(set(int32_t{0}), floats.correction);
    multiply(sum);
    finish(output, floats, sum);
  };
  const Cell c = cell_at(w.index, 0, chunk);
  const int8_t* values = w.values + c.entry * 4;
  const uint8_t* columns = w.index.columns + c.entry;
  for (int64_t r = 0; r < c.count; ++r) {
    if (far && r + kOutputsAhead < c.count)
      fetch(touched + c.rows[2 * (r + kOutputsAhead)] / 4 * plane, V * kLanes);
    one(c.rows[2 * r],
        [&](I32(&sum)[V]) { multiply_row(panel, c.rows[2 * r + 1], values, columns, sum); });
  }
  each_empty(c, outputs, [&](int64_t output) { one(output, [](I32(&)[V]) {}); });
  write_words<V>(bytes, outputs, plane, last, y);
}

}  // namespace

void conv_spmm_int8(const ImageTile& x, const gossamer_sparse_int8& w, Range chunks,
                    const ImageDestination& to, void* scratch) {
  const int64_t width = width_of(x.pixels), columns = ceil_div(w.index.k, 4);
  auto* panel = static_cast<int32_t*>(scratch);
  int32_t* sums = panel + columns * width;
  gather(x, panel);
  const bool direct = to.blocked && columns <= kBlockWords && clamp_of(to) != Clamp::kActivated;
  const Epilogue finish{x, w.scale, w.wsum, w.index.n, to};
  by_count<kSparseVectors>(width / kLanes, [&](auto vectors) {
    constexpr int V = decltype(vectors)::value;
    if (direct) {
      return by_result(to, [&](auto residual, auto clamp) {
        constexpr auto kClamp = Clamp(decltype(clamp)::value);
        if constexpr (kClamp != Clamp::kActivated) {
          for (int64_t chunk = chunks.begin; chunk < chunks.end; ++chunk)
            one_block<V, decltype(residual)::value, kClamp>(x, w, chunk, to, panel, sums);
        }
      });
    }
    each_chunk(
        w.index, chunks, columns, kBlockWords, sums, width,
        [&](int64_t b, const Cell& c) {
          multiply_blocks<V>(panel + b * kBlockWords * width, w, c, sums);
        },
        [&](Range outputs) { finish(sums, outputs); });
  });
}

}  // namespace GOSSAMER_ISA
}  // namespace gossamer
