/* gossamer.h: the C ABI of libgossamer, for servers with no Python and no torch.
 *
 * Every function works on the caller's memory, starts no thread of its own and keeps no state
 * between calls but one scratch buffer a thread. It returns 0, or a code from gossamer_status; then
 * gossamer_error() is a sentence that says what was wrong, valid until the calling thread's next
 * call.
 *
 * Layouts of the packed weights are drawn byte for byte in docs/formats.md.
 */
#ifndef GOSSAMER_H_
#define GOSSAMER_H_

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define GOSSAMER_API __attribute__((visibility("default")))
#define GOSSAMER_VERSION "0.1.0"

typedef enum { GOSSAMER_OK = 0, GOSSAMER_INVALID = 1, GOSSAMER_NO_MEMORY = 2 } gossamer_status;
typedef enum {
  GOSSAMER_FLOAT32,
  GOSSAMER_BFLOAT16,
  GOSSAMER_FLOAT16,
  GOSSAMER_UINT8 /* images only: blocked, see gossamer_block */
} gossamer_dtype;
typedef enum {
  GOSSAMER_NONE,
  GOSSAMER_RELU,
  GOSSAMER_GELU,
  GOSSAMER_SILU,
  GOSSAMER_RELU6,
  GOSSAMER_HARDSWISH
} gossamer_activation;

/* Runs body(b, e, ctx) over disjoint ranges that cover [begin, end), none shorter than grain unless
 * it is the last, on as many threads as the caller likes, and returns when all are done. NULL
 * means: this thread. */
typedef void (*gossamer_body)(int64_t begin, int64_t end, void* ctx);
typedef void (*gossamer_parallel_for)(int64_t begin, int64_t end, int64_t grain, gossamer_body body,
                                      void* ctx);

/* How a convolution reads its rows: the input is (images, height, width, channels), in the order
 * that gossamer_input says; a row of the product is one output pixel, its columns are (tap row, tap
 * column, channel rounded up to 4). */
typedef struct {
  int64_t images, height, width, channels;
  int64_t kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w;
  int64_t pad_top, pad_left, out_h, out_w;
} gossamer_conv;

/* The left operand: `rows` rows of k contiguous elements, `stride` elements apart; or, with conv,
 * an image. A product of integers quantizes it on the way, x ~ (u8 - zero) * scale, by the range of
 * each row (a convolution: of each image) where scale is 0, else by this scale and zero point; what
 * lies outside is clamped. The others do not read them.
 *
 * The channels of an image are innermost, or with planar outermost: (channels, height, width),
 * which convolutions of int8 and of fp32 sparse weights take; or it is a blocked image of bytes, GOSSAMER_UINT8, of
 * the scale and zero point given. */
typedef struct {
  const void* data;
  gossamer_dtype dtype;
  int64_t rows, stride;
  const gossamer_conv* conv;
  float scale;
  int32_t zero; /* 0 .. 255 */
  int planar;
} gossamer_input;

/* A blocked result: y ~ (u8 - zero) * scale, from activation(x * w + bias + residual). */
typedef struct {
  float scale;
  int32_t zero;
  const uint8_t* residual; /* a blocked image of y's shape, which may be y itself, or NULL */
  float residual_scale;
  int32_t residual_zero;
} gossamer_blocked;

/* The result, in the input's dtype (of GOSSAMER_UINT8: in float32): y(row, output). planar = 0:
 * rows of n elements, `stride` apart. planar = 1 (conv only): (images, n, out_h, out_w), the layout
 * torch calls contiguous. blocked (of GOSSAMER_UINT8 only): another blocked image. */
typedef struct {
  void* data;
  int64_t stride;
  int planar;
  const float* bias; /* n, or NULL */
  gossamer_activation activation;
  const gossamer_blocked* blocked; /* NULL: floats */
  const void* residual; /* added before the activation: floats as y's, in its layout, which may be
                           y itself; or NULL. gossamer_spmm only */
} gossamer_output;

/* Dense int8: w[o][i] = scale[o] * q[o][i], q in panels of 16 outputs; with the sums of weights that
 * docs/formats.md allows, or products may overflow. */
typedef struct {
  int64_t n, k;
  const int8_t* panels; /* (ceil(n/16), k rounded up to 8 / 4, 16, 4) */
  const float* scale;   /* n */
  const int32_t* wsum;  /* n: sum over i of q[o][i]; not read by gossamer_gemm_w8 */
} gossamer_int8;

/* Dense int4: w[o][i] = scale[o] * group_scale[o][i / group] * value[o][i], in panels of 16 outputs;
 * a value is one of -32 -25 -20 -15 -12 -8 -5 -3 0 3 6 9 12 16 21 27, stored as its place there. */
typedef struct {
  int64_t n, k, group;       /* group: inputs that share a scale, 16 or 32 */
  const uint8_t* panels;     /* (ceil(n/16), k rounded up to 32 / 8, 16, 4), two places a byte */
  const int8_t* group_scale; /* (ceil(n/16), k rounded up to 32 / group, 16) */
  const float* scale;        /* n */
  const int32_t* wsum;       /* n: sum over i of group_scale[o][i / group] * value[o][i] */
} gossamer_int4;

/* The index that both sparse formats share: columns in blocks, outputs in chunks; a (block, chunk)
 * pair is a cell, and a cell lists its non-empty outputs, longest first. */
typedef struct {
  int64_t n, k;
  int64_t entries, row_count;
  const uint8_t* columns; /* entries: column inside its block */
  const uint16_t* rows;   /* row_count x {output inside its chunk, number of entries} */
  const int32_t* cells;   /* (blocks * chunks + 1) x {first row, first entry}; block outermost */
} gossamer_index;

typedef struct {
  gossamer_index index; /* a column is one input */
  const float* values;  /* entries */
} gossamer_sparse;

typedef struct {
  gossamer_index index; /* a column is four inputs; every row has an even number of entries */
  const int8_t* values; /* entries x 4 */
  const float* scale;   /* n */
  const int32_t* wsum;  /* n */
} gossamer_sparse_int8;

/* y = activation(x @ w^T + bias), x quantized to u8 on the way. */
GOSSAMER_API int gossamer_gemm_int8(const gossamer_input* x, const gossamer_int8* w,
                                    const gossamer_output* y, gossamer_parallel_for parallel_for);
/* The same weights, x in fp32. */
GOSSAMER_API int gossamer_gemm_w8(const gossamer_input* x, const gossamer_int8* w,
                                  const gossamer_output* y, gossamer_parallel_for parallel_for);
/* x is quantized as for gossamer_gemm_int8. */
GOSSAMER_API int gossamer_gemm_int4(const gossamer_input* x, const gossamer_int4* w,
                                    const gossamer_output* y, gossamer_parallel_for parallel_for);
GOSSAMER_API int gossamer_spmm(const gossamer_input* x, const gossamer_sparse* w,
                               const gossamer_output* y, gossamer_parallel_for parallel_for);
GOSSAMER_API int gossamer_spmm_int8(const gossamer_input* x, const gossamer_sparse_int8* w,
                                    const gossamer_output* y, gossamer_parallel_for parallel_for);

/* Convolutions of gossamer_gemm_int8 and gossamer_spmm_int8, which call them for x->conv. Where the
 * k of dense weights is kernel_h * kernel_w, output o reads channel o alone: a depthwise convolution
 * of n channels. */
GOSSAMER_API int gossamer_conv_int8(const gossamer_input* x, const gossamer_int8* w,
                                    const gossamer_output* y, gossamer_parallel_for parallel_for);
GOSSAMER_API int gossamer_conv_spmm_int8(const gossamer_input* x, const gossamer_sparse_int8* w,
                                         const gossamer_output* y,
                                         gossamer_parallel_for parallel_for);

/* x, images of `channels` x `pixels` floats each (planar or not; stride elements apart), by its
 * scale and zero point to blocked images q: (rows, ceil(channels / 4), pixels, 4) bytes, channels
 * that are added hold the zero point. GOSSAMER_INVALID where x holds a NaN or an Inf. */
GOSSAMER_API int gossamer_block(const gossamer_input* x, int64_t channels, int64_t pixels,
                                uint8_t* q, gossamer_parallel_for parallel_for);
/* And back: y is (rows, channels, pixels) floats. */
GOSSAMER_API int gossamer_unblock(const gossamer_input* q, int64_t channels, int64_t pixels,
                                  void* y, gossamer_dtype dtype,
                                  gossamer_parallel_for parallel_for);
/* The largest of each window of x->conv: of a blocked image, whose bytes are ordered as what they
 * stand for, or of float32, where a NaN is the largest and y has planes, whether x does (x->planar) or
 * not. What lies outside is the least there is. */
GOSSAMER_API int gossamer_max_pool(const gossamer_input* x, void* y,
                                   gossamer_parallel_for parallel_for);
/* The mean of all pixels of each channel: y is (rows, channels), (sum - pixels * zero) * (scale /
 * pixels) of exact sums, rounded once. */
GOSSAMER_API int gossamer_mean(const gossamer_input* q, int64_t channels, int64_t pixels, float* y,
                               gossamer_parallel_for parallel_for);

/* The gradient of a sparse weight: dw(entry of output o, input i) = sum over rows of dy(row, o) *
 * x(row, i), for the entries of an index. dy has a row of n elements for each row of x (with conv:
 * each output pixel), and no conv of its own. */
GOSSAMER_API int gossamer_sddmm(const gossamer_input* x, const gossamer_input* dy,
                                const gossamer_index* w, float* dw,
                                gossamer_parallel_for parallel_for);

/* q = clamp(round(x / scale) + zero, 0, 255) a row of k elements; q has rows of q_stride >= k
 * bytes. */
GOSSAMER_API int gossamer_quantize_rows(const gossamer_input* x, int64_t k, uint8_t* q,
                                        int64_t q_stride, float* scale, int32_t* zero,
                                        gossamer_parallel_for parallel_for);
/* The rows that a convolution multiplies, (images * out_h * out_w, kernel_h * kernel_w * channels
 * up to 4). */
GOSSAMER_API int gossamer_im2col(const gossamer_input* x, void* rows,
                                 gossamer_parallel_for parallel_for);

/* Loops that do one thing only, as fast as the instruction set in use can: multiply-adds of floats,
 * int8 dots, reading memory. For benchmarks: no kernel is faster than these. */
typedef enum { GOSSAMER_LOOP_MULADD, GOSSAMER_LOOP_DOT, GOSSAMER_LOOP_READ } gossamer_loop;
/* Runs `turns` turns, at most 2^22, on this thread. data: bytes / 4 int32, all 1; bytes a multiple
 * of 4096, of which only the third loop reads more than the first 4096. `work` becomes the
 * operations, or bytes read; `mean` that of the loop's sums, from which one can tell that it ran:
 * turns; turns^2 (up to 255); turns * bytes / 4 / lanes (up to 2^31). */
GOSSAMER_API int gossamer_ceiling(gossamer_loop loop, const int32_t* data, int64_t bytes,
                                  int64_t turns, double* work, float* mean);

/* Are all shapes, offsets and columns of an index inside their bounds? Run it once on what came
 * from a file: the products trust their operands. `unit` is the number of inputs a column stands
 * for (1 or 4). */
GOSSAMER_API int gossamer_check_index(const gossamer_index* index, int64_t cell_count,
                                      int64_t unit);

/* The number of cells, blocks * chunks, of an n x k index whose columns stand for `unit` inputs. */
GOSSAMER_API int64_t gossamer_cell_count(int64_t n, int64_t k, int64_t unit);
/* Columns in a block (unit 1 or 4), outputs in a chunk. */
GOSSAMER_API int64_t gossamer_block_columns(int64_t unit);
GOSSAMER_API int64_t gossamer_chunk_rows(int64_t n);

/* The instruction set in use ("base", "avx2", ...), chosen once: the best this CPU has, or the one
 * that the environment variable GOSSAMER_ISA names (it may only lower it). NULL when that names
 * none: see gossamer_error. */
GOSSAMER_API const char* gossamer_isa(void);
/* Names of the sets that this CPU can run, best first, NULL at the end. */
GOSSAMER_API const char* const* gossamer_isas(void);
/* Use the named set from now on: for tests and benchmarks, while no other call is in flight. */
GOSSAMER_API int gossamer_use_isa(const char* name);

GOSSAMER_API const char* gossamer_error(void);
GOSSAMER_API const char* gossamer_version(void);

#ifdef __cplusplus
}
#endif
#endif /* GOSSAMER_H_ */
