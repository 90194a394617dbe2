// conv_spmm_int8: y = act(dequantize(conv(q, w)) + bias + residual), w int8 in blocks of one output x
// four channels at one tap, blocked images.
//
//   q      (channels/4, height, width, 4)  u8, one image
//   w      gossamer_sparse_int8            as spmm_int8 reads it; k = taps x channels up to 4
//   panel  [k/4][width] words              scratch: what lies under the taps of <= 64 pixels
//   sums   [chunk][width] int32            scratch
//   y      see gossamer_output
//
// The panel and the loop are those of spmm_int8 (lanes.h), but an image in blocks of four channels
// has its pixels side by side: filling the panel is copying, without a transpose.
//
// Registers: width / kLanes sums, 2 weights, ones.
// Tails: pixels past the last are computed and not written.
// Numerics: exact in int32 for k <= 65536.

#include "pixels.h"

namespace gossamer {
namespace GOSSAMER_ISA {

void conv_spmm_int8(const ImageTile& x, const gossamer_sparse_int8& w, Range chunks,
                    const ImageDestination& to, void* scratch) {
  const int64_t width = width_of(x.pixels), columns = ceil_div(w.index.k, 4);
  auto* panel = static_cast<int32_t*>(scratch);
  int32_t* sums = panel + columns * width;
  gather(x, panel);
  const Epilogue finish{x, w.scale, w.wsum, w.index.n, to};
  by_count<kMaxVectors>(width / kLanes, [&](auto v) {
    each_chunk(
        w.index, chunks, columns, kBlockWords, sums, width,
        [&](int64_t b, const Cell& c) {
          multiply_blocks<decltype(v)::value>(panel + b * kBlockWords * width, w, c, sums);
        },
        [&](Range outputs) { finish(sums, outputs); });
  });
}

}  // namespace GOSSAMER_ISA
}  // namespace gossamer
