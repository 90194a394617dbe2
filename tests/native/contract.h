// contract.h: how contract.cpp draws operands and compares an Isa with base.h.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include GOSSAMER_SIMD
#include "simd/base.h"

namespace gossamer {
namespace GOSSAMER_ISA {
namespace {

constexpr int kRounds = 2000;
constexpr int kCount = 16;
static_assert(kCount % kLanes == 0 && kCount % base::kLanes == 0, "whole vectors of both");

// 16 floats or int32, by their bits.
struct Numbers {
  uint32_t bits[kCount];
};

template <typename V>
V vector_at(const Numbers& from, int i) {
  V v;
  memcpy(&v, from.bits + i, sizeof v);
  return v;
}
// Vectors of one Isa, from give(first lane).
template <typename Give>
Numbers collect(Give give) {
  Numbers all;
  for (int i = 0; i < kCount; i += sizeof(give(0)) / 4) {
    const auto v = give(i);
    memcpy(all.bits + i, &v, sizeof v);
  }
  return all;
}

uint32_t state = 1;
uint32_t random_bits() {  // xorshift32
  state ^= state << 13, state ^= state >> 17, state ^= state << 5;
  return state;
}
int32_t random_int(int32_t low, int32_t high) {
  return low + static_cast<int32_t>(random_bits() % static_cast<uint32_t>(high - low + 1));
}

// Operands: any floats, with the edges of all functions among them.
uint32_t any_float() {
  static const float kEdges[] = {0.0f,   -0.0f,    0.5f,     -1.5f,     2.5f,  0x1p31f,   -0x1p31f,
                                 65504,  0x1p-149, 0x1p-126, 0x1p-24f,  65520, 0x1.8p-25, 0x1p127f,
                                 -65535, INFINITY, NAN,      -INFINITY, -NAN,  12582912};
  static const uint32_t kTies[] = {0x0fff, 0x1000, 0x1001, 0x3000, 0x7fff, 0x8000, 0x8001, 0};
  switch (random_bits() % 4) {
    case 0:
      return base::to_bits(kEdges[random_bits() % (sizeof kEdges / sizeof kEdges[0])]);
    case 1:
      return base::to_bits(static_cast<float>(random_int(-512, 512)) / 2);
    case 2:  // 2^-26 to 2^17, halfway between two 16-bit floats or beside it
      return (random_bits() & 0x807f0000) | kTies[random_bits() % 8] |
             static_cast<uint32_t>(random_int(101, 144)) << 23;
    default:
      return random_bits();
  }
}
uint32_t any_int() { return random_bits(); }
uint32_t any_word() {
  return random_bits() % 4 ? static_cast<uint32_t>(random_int(-300, 600)) : random_bits();
}
uint32_t exponent() { return static_cast<uint32_t>(random_int(-126, 127)); }
uint32_t small_float() { return base::to_bits(static_cast<float>(random_int(-999, 999))); }

char failure[256];

// Equal bits but for the payload of a NaN; else `failure` says which.
bool same(const char* name, const Numbers& got, const Numbers& want, bool floats) {
  for (int i = 0; i < kCount; ++i) {
    const uint32_t a = got.bits[i], b = want.bits[i];
    const bool both_nan = floats && isnan(base::from_bits(a)) && isnan(base::from_bits(b));
    if (a == b || both_nan) continue;
    snprintf(failure, sizeof failure, "%s gives %08x in lane %d, base.h %08x", name, a, i % kLanes,
             b);
    return false;
  }
  return true;
}
bool require(const char* name, bool condition) {
  if (!condition) snprintf(failure, sizeof failure, "%s is not what base.h says", name);
  return condition;
}

bool is_float(F32) { return true; }
bool is_float(I32) { return false; }

// op on up to five vectors: V of this Isa, Plain of base.h, which argument-dependent lookup finds.
template <typename V, typename Plain, typename Draw, typename Op>
bool lanes(const char* name, Draw draw, Op op) {
  for (int round = 0; round < kRounds; ++round) {
    Numbers x[5];
    draw(x);
    const auto apply = [&](auto type, int i) {
      using T = decltype(type);
      return op(vector_at<T>(x[0], i), vector_at<T>(x[1], i), vector_at<T>(x[2], i),
                vector_at<T>(x[3], i), vector_at<T>(x[4], i));
    };
    const Numbers got = collect([&](int i) { return apply(V(), i); });
    const Numbers want = collect([&](int i) { return apply(Plain(), i); });
    if (!same(name, got, want, is_float(apply(V(), 0)))) return false;
  }
  return true;
}
template <typename Draw>
auto each_lane(Draw draw) {
  return [=](Numbers(&x)[5]) {
    for (Numbers& numbers : x)
      for (uint32_t& bits : numbers.bits) bits = draw();
  };
}
template <typename Op>
bool floats(const char* name, Op op) {
  return lanes<F32, base::F32>(name, each_lane(any_float), op);
}
template <typename Op>
bool ints(const char* name, Op op, uint32_t (*draw)() = any_int) {
  return lanes<I32, base::I32>(name, each_lane(draw), op);
}

}  // namespace
}  // namespace GOSSAMER_ISA
}  // namespace gossamer
