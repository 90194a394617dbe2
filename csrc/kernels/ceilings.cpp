// ceilings: loops that do one thing only, as fast as the Isa can: what bounds the kernels.
//
//   muladd  a = a * w + w            2 kLanes operations; a starts at 0
//   dot     s = s + x . w + y . w    16 kLanes operations; x counts the turns, y those before
//   read    s = s + data             4 kLanes bytes; four streams, as a CPU prefetches several
//   data    bytes / 4 int32          all 1; bytes a multiple of 4096
//
// Chains: kChains sums that do not wait for each other hide an instruction's latency: for dot two
// vpdpbusd of 4 or 5 cycles each, at up to two a cycle. On AVX2 10 sums, x, y, ones and 2 products
// are 15 of 16 registers; weights are memory operands. x and y change each turn, or the compiler
// would lift the products out of the loop; each chain reads another address, or one chain would
// remain of ten.
// Tails: none.
// Numerics: exact, which proves that the loop ran: a becomes `turns` (up to 2^24), s turns^2 (up to
// 255; no overflow up to 2^22), and read gives the sum of what it read, modulo 2^32.

#include GOSSAMER_SIMD
#include "kernels.h"

namespace gossamer {
namespace GOSSAMER_ISA {
namespace {

constexpr int kChains = 10;
constexpr int kStreams = 4;
// Vectors a stream and step.
constexpr int kWide = 2;

double muladd_loop(const int32_t* data, int64_t turns, float* mean) {
  const F32 w = to_f32(load_words(data));
  F32 a[kChains];
  for (int i = 0; i < kChains; ++i) a[i] = sub(to_f32(load_words(data + i * kLanes)), w);
  for (int64_t turn = 0; turn < turns; ++turn)
    for (F32& chain : a) chain = muladd(chain, w, w);
  float sum = 0;
  for (const F32& chain : a) sum += reduce_add(chain);
  *mean = sum / (kChains * kLanes);
  return 2.0 * kLanes * kChains * double(turns);
}

double dot_loop(const int32_t* data, int64_t turns, float* mean) {
  I32 s[kChains], w[kChains];
  for (int i = 0; i < kChains; ++i) {
    s[i] = set(int32_t{0});
    w[i] = load_words(data + i * kLanes);
  }
  I32 x = set(int32_t{0});
  for (int64_t turn = 0; turn < turns; ++turn) {
    const I32 y = x;
    x = add(x, w[0]);
    for (int i = 0; i < kChains; ++i) s[i] = dot(s[i], x, w[i], y, w[i]);
  }
  float sum = 0;
  for (const I32& chain : s) sum += reduce_add(to_f32(chain));
  *mean = sum / (kChains * kLanes);
  return 16.0 * kLanes * kChains * double(turns);
}

double read_loop(const int32_t* data, int64_t bytes, int64_t turns, float* mean) {
  const int64_t stream = bytes / 4 / kStreams;
  I32 s[kStreams * kWide];
  for (I32& sum : s) sum = set(int32_t{0});
  for (int64_t turn = 0; turn < turns; ++turn) {
    for (int64_t at = 0; at < stream; at += kWide * kLanes) {
      for (int i = 0; i < kStreams * kWide; ++i)
        s[i] = add(s[i], load_words(data + i / kWide * stream + at + i % kWide * kLanes));
    }
  }
  for (int i = 1; i < kStreams * kWide; ++i) s[0] = add(s[0], s[i]);
  *mean = reduce_add(to_f32(s[0])) / kLanes;
  return double(bytes) * double(turns);
}

}  // namespace

double ceilings(gossamer_loop loop, const int32_t* data, int64_t bytes, int64_t turns,
                float* mean) {
  if (loop == GOSSAMER_LOOP_MULADD) return muladd_loop(data, turns, mean);
  if (loop == GOSSAMER_LOOP_DOT) return dot_loop(data, turns, mean);
  return read_loop(data, bytes, turns, mean);
}

}  // namespace GOSSAMER_ISA
}  // namespace gossamer
