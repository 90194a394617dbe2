// kernels.h: one function pointer a stem; one table an Isa.
//
// A kernel is a pure function on raw pointers: one thread, one range of the output, no allocation,
// no exceptions. Whoever calls it has checked the shapes and owns the scratch.
#pragma once

#include "layout.h"

namespace gossamer {

// Where a kernel writes: y[row * stride + output], for rows of one tile and any outputs; or, where
// plane is not 0, into y (images, n, plane), of which the tile's rows are the pixels from `first` on.
struct Destination {
  void* y;
  int64_t stride;
  gossamer_dtype dtype;
  const float* bias;
  gossamer_activation activation;
  int64_t plane = 0, first = 0;
  const void* residual = nullptr;  // as y, added before the activation
};

// A tile of activations as quantize_rows leaves them. stride is a multiple of kStep, for gemm_int4
// of kInt4Step; bytes behind k are 0.
struct QuantizedTile {
  const uint8_t* q;
  int64_t stride;
  const float* scale;
  const int32_t* zero;
  int64_t rows;
};

// Rows of a matrix; or, with conv, output pixels from `first` on, counted over all images: x is the
// images then, planes of a channel each (planar) or channels innermost.
struct FloatTile {
  const void* x;
  int64_t stride;
  gossamer_dtype dtype;
  int64_t rows;
  const gossamer_conv* conv = nullptr;
  int64_t first = 0;
  bool planar = false;
  bool more = false;  // see Tile
};

// x ~ (q - zero) * scale; to a kernel, a scale of 0 means: of each row's own range.
struct Affine {
  float scale;
  int32_t zero;
};

struct Range {
  int64_t begin, end;
};

// An image of floats: planar, or with its channels innermost.
struct FloatImage {
  const void* x;
  gossamer_dtype dtype;
  bool planar;
  int64_t channels, pixels;
};

// Some output pixels of one blocked image.
struct ImageTile {
  const uint8_t* q;
  const gossamer_conv& conv;
  Affine affine;  // a scale of NaN makes all results NaN
  Range pixels;
  bool gathered = false;  // scratch holds their panel
  bool cold = false;      // the weights come from memory
  bool more = false;      // see Tile
  int64_t images = 1;     // these pixels of as many images, one behind the other: for winograd only
};

// Where they go, in the image that to.y points to: blocked; planar, to.stride is a plane's pixels;
// or with its channels innermost, to.stride elements a pixel.
struct ImageDestination {
  Destination to;
  bool planar;
  const gossamer_blocked* blocked;  // its residual is that of this image
  // All zero points are 0, and every value is an int32 once it is counted in its scale: saturation
  // to 0 and 255 is all that is left to do.
  bool saturates;
  int64_t image;  // bytes from an image's results to the next one's
};

// Where the results of image number i go; `its` holds what blocked points to then.
static inline ImageDestination of_image(const ImageDestination& to, int64_t i,
                                        gossamer_blocked& its) {
  ImageDestination result = to;
  result.to.y = static_cast<char*>(to.to.y) + i * to.image;
  if (!to.blocked) return result;
  its = *to.blocked;
  if (its.residual) its.residual += i * to.image;
  result.blocked = &its;
  return result;
}

// One type a stem. Scratch is what the functions below say, 64-byte aligned.
using QuantizeRows = void(const FloatTile& x, int64_t k, Affine given, uint8_t* q, int64_t q_stride,
                          float* scale, int32_t* zero);
using GemmInt8 = void(const QuantizedTile& x, const gossamer_int8& w, Range panels,
                      const Destination& to);
using GemmW8 = void(const FloatTile& x, const gossamer_int8& w, Range panels, const Destination& to,
                    void* scratch);
using GemmInt4 = void(const QuantizedTile& x, const gossamer_int4& w, Range panels,
                      const Destination& to);
using Spmm = void(const FloatTile& x, const gossamer_sparse& w, Range chunks, const Destination& to,
                  void* scratch);
using SpmmInt8 = void(const QuantizedTile& x, const gossamer_sparse_int8& w, Range chunks,
                      const Destination& to, void* scratch);
// `first`: dw = instead of dw +=. dw has all entries of w, of which those of `chunks` are written.
using Sddmm = void(const FloatTile& x, const FloatTile& dy, const gossamer_index& w, Range chunks,
                   bool first, float* dw, void* scratch);
// Rows (output pixels) of one image; `size` bytes an element; `pad` fills what lies outside.
using Im2col = void(const void* image, const gossamer_conv& conv, int64_t size, uint8_t pad,
                    Range rows, void* out);
using ConvInt8 = void(const ImageTile& x, const gossamer_int8& w, Range panels,
                      const ImageDestination& to, void* scratch);
using ConvSpmmInt8 = void(const ImageTile& x, const gossamer_sparse_int8& w, Range chunks,
                          const ImageDestination& to, void* scratch);
// Pixels of one image (all of them where `given` is its own range). -> the range; a scale of NaN
// where they hold a NaN or an Inf.
using Block = Affine(const FloatImage& x, Affine given, Range pixels, uint8_t* q);
// Blocks of four channels of one image.
using Unblock = void(const uint8_t* q, Affine affine, int64_t channels, int64_t pixels,
                     Range blocks, gossamer_dtype dtype, void* y);
// Rows of the output of one image: blocked bytes, or planes of float32, of x that is planar or has its
// channels innermost. Scratch: pool_line words a row.
using MaxPool = void(const void* x, gossamer_dtype dtype, bool planar, const gossamer_conv& conv,
                     Range rows, void* y, void* scratch);
// Blocks of four channels of one image.
using Mean = void(const uint8_t* q, Affine affine, int64_t channels, int64_t pixels, Range blocks,
                  float* y);
// No operator: what bounds them, for benchmarks. -> operations or bytes; `mean` of the loop's sums.
using Ceilings = double(gossamer_loop loop, const int32_t* data, int64_t bytes, int64_t turns,
                        float* mean);

struct Kernels {
  const char* isa;
  int64_t lanes;
  // Up to this k, 1x4 products are faster on wide tiles than on those of kNarrowLanes.
  int64_t wide_k;
  WinogradCost winograd_cost;
  QuantizeRows* quantize_rows;
  GemmInt8* gemm_int8;
  GemmW8* gemm_w8;
  GemmInt4* gemm_int4;
  Spmm* spmm;
  SpmmInt8* spmm_int8;
  Sddmm* sddmm;
  Im2col* im2col;
  ConvInt8* conv_int8;
  ConvInt8* winograd;  // conv_int8 of 3x3 kernels with stride 1, in units of their own
  ConvSpmmInt8* conv_spmm_int8;
  Block* block;
  Unblock* unblock;
  MaxPool* max_pool;
  Mean* mean;
  Ceilings* ceilings;
};

// Most rows in a tile of gemm_w8 and of the sparse kernels.
constexpr int64_t kMaxLanes = 64;
// Outputs of spmm whose sums wait together, 256 KB of L2.
constexpr int64_t kSpmmOutputs = 1024;
// Rows in a tile of spmm_int8 or pixels in one of conv_spmm_int8, see Kernels::wide_k.
constexpr int64_t kNarrowLanes = 32;
// Most pixels in a tile of a convolution, and more of them in a dense one, that fill no vector.
constexpr int64_t kMaxPixels = 64;
constexpr int64_t kRestPixels = 8;
// Winograd's: most tiles of a unit, and most tiles x channels (72 bytes each: 2.4 MB); tiles that take as
// long as a unit's weights; most panels of outputs that meet; blocks of four channels that do.
constexpr int64_t kWinogradTiles = 64;
constexpr int64_t kWinogradPixels = 1 << 15;
constexpr int64_t kWinogradSetUp = 3;
constexpr int64_t kWinogradPanels = 2;
constexpr int64_t kWinogradBlocks = 16;
// About as many in whole rows of a depthwise one.
constexpr int64_t kDepthwisePixels = 448;
// Most in a tile of a sparse one, as many vectors as leave an entry's sums in registers: those of
// nets for 224 x 224 pixels have a multiple of 7.
constexpr int64_t sparse_pixels(int64_t lanes) { return lanes < 16 ? 56 : 112; }

// Whether a weight of n outputs is one channel's taps for each: no other has so few columns.
static inline bool is_depthwise(const gossamer_conv& c, int64_t n, int64_t k) {
  return k == c.kernel_h * c.kernel_w && round_up(c.channels, 4) == round_up(n, 4);
}

// Whether winograd computes such convolutions.
static inline bool is_winograd(const gossamer_conv& c) {
  return c.kernel_h == 3 && c.kernel_w == 3 && c.stride_h == 1 && c.stride_w == 1 &&
         c.dilation_h == 1 && c.dilation_w == 1;
}

// Scratch bytes of a tile of `rows` rows. Panels have a power of two of lanes, at least those of a
// vector: 16 on the widest Isa.
static inline int64_t panel_lanes(int64_t rows) {
  int64_t lanes = 16;
  while (lanes < rows) lanes *= 2;
  return lanes;
}
static inline int64_t gemm_w8_scratch(int64_t k, int64_t rows) { return k * rows * 4; }
// Columns of a block, or where outputs wait in several groups all, a line that packing may overwrite,
// and sums. One row has no lanes: its k floats.
static inline int64_t spmm_scratch(int64_t n, int64_t k, int64_t rows) {
  const int64_t outputs = round_up(n, kPanel), most = kSpmmOutputs;
  const int64_t columns = (outputs > most ? k : kBlockFloats) + 1;
  return (columns + (outputs < most ? outputs : most)) * panel_lanes(rows) * 4 + k * 4;
}
static inline int64_t spmm_int8_scratch(int64_t n, int64_t k, int64_t rows) {
  return (ceil_div(k, 4) + chunk_rows(n)) * panel_lanes(rows) * 4;
}
// Of a tile of `pixels`: the panel, its lines rounded up to two, and the sums.
static inline int64_t conv_int8_scratch(int64_t k, int64_t pixels) {
  return (round_up(ceil_div(k, 4), 2) + kPanel) * round_up(pixels, 16) * 4;
}
// Words of winograd.h's scratch, and where its parts begin.
struct WinogradScratch {
  int64_t v, u, m, y, sums, strip, mapped, end;
};
static inline WinogradScratch winograd_scratch(const gossamer_conv& c, int64_t images,
                                               int64_t out_rows) {
  constexpr int64_t kLines = 36, kWide = kWinogradPanels * kPanel;
  const int64_t columns = ceil_div(c.out_w, 4), rows = ceil_div(out_rows, 4),
                tiles = images * rows * columns, blocks = ceil_div(c.channels, 4),
                width = round_up(out_rows * c.out_w, 16), seen = 4 * columns + 2;
  WinogradScratch at{};
  at.u = kLines * (2 * tiles + 1) * round_up(blocks, kWinogradBlocks);
  at.m = at.u + kLines * (2 * kWinogradBlocks * kWide + 16);
  at.y = at.m + kLines * tiles * kWide;
  at.sums = at.y + images * width * kWide;
  at.strip = at.sums + kPanel * width;
  at.mapped = at.strip + (4 * rows + 2) * seen * round_up(blocks, 16);
  at.end = at.mapped + seen * 6 * 16;
  return at;
}

// What depthwise windows see of an image: rows, for each phase of the stride so many columns.
struct DepthwiseRows {
  int64_t rows, columns;
};
static inline DepthwiseRows depthwise_rows(const gossamer_conv& c, int64_t out_rows) {
  const int64_t wide = (c.out_w - 1) * c.stride_w + (c.kernel_w - 1) * c.dilation_w + 1;
  return {(out_rows - 1) * c.stride_h + (c.kernel_h - 1) * c.dilation_h + 1,
          ceil_div(wide, c.stride_w)};
}
// Places of taps, sums of 16 channels, these rows, and a vector that is read behind them.
static inline int64_t depthwise_scratch(const gossamer_conv& c, int64_t k, int64_t pixels) {
  const DepthwiseRows shape = depthwise_rows(c, pixels / c.out_w);
  return round_up(k, 8) * 8 + (kPanel * round_up(pixels, 16) +
                               round_up(shape.rows * shape.columns * c.stride_w, 16) + 16) *
                                  4;
}
static inline int64_t conv_spmm_int8_scratch(int64_t n, int64_t k, int64_t pixels) {
  return (ceil_div(k, 4) + chunk_rows(n)) * round_up(pixels, 16) * 4;
}

// Words of a row of max_pool's windows, and 32 that vectors read behind the last.
static inline int64_t pool_line(const gossamer_conv& c) {
  const int64_t reach = (c.out_w - 1) * c.stride_w + (c.kernel_w - 1) * c.dilation_w + 1,
                image = c.pad_left + c.width;
  return (reach > image ? reach : image) + 32;
}

static inline int64_t sddmm_scratch(int64_t n, int64_t k, int64_t rows) {
  return (k + chunk_rows(n)) * panel_lanes(rows) * 4;
}

// Which of them are linked depends on the architecture: see isa.cpp.
namespace base {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace avxvnni {
extern const Kernels kernels;
}
namespace avx512vnni {
extern const Kernels kernels;
}
namespace neon {
extern const Kernels kernels;
}

}  // namespace gossamer
