// contract.cpp: every function of simd/<isa>.h against its plain twin in simd/base.h, bit for bit.
// Compiled once an Isa with the flags of its kernels, and as they are without anything of std.

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

bool check_floats() {
  return floats("add", [](auto a, auto b, auto...) { return add(a, b); }) &&
         floats("sub", [](auto a, auto b, auto...) { return sub(a, b); }) &&
         floats("mul", [](auto a, auto b, auto...) { return mul(a, b); }) &&
         floats("div", [](auto a, auto b, auto...) { return div(a, b); }) &&
         floats("max", [](auto a, auto b, auto...) { return max(a, b); }) &&
         floats("min", [](auto a, auto b, auto...) { return min(a, b); }) &&
         floats("abs", [](auto a, auto...) { return abs(a); }) &&
         floats("copysign", [](auto a, auto b, auto...) { return copysign(a, b); }) &&
         floats("round", [](auto a, auto...) { return round(a); }) &&
         floats("as_i32", [](auto a, auto...) { return as_i32(a); });
}
bool check_ints() {
  return ints("add", [](auto a, auto b, auto...) { return add(a, b); }) &&
         ints("sub", [](auto a, auto b, auto...) { return sub(a, b); }) &&
         ints("mul", [](auto a, auto b, auto...) { return mul(a, b); }) &&
         ints("max", [](auto a, auto b, auto...) { return max(a, b); }) &&
         ints("min", [](auto a, auto b, auto...) { return min(a, b); }) &&
         ints("to_f32", [](auto a, auto...) { return to_f32(a); }) &&
         ints("as_f32", [](auto a, auto...) { return as_f32(a); }) &&
         ints(
             "exp2", [](auto a, auto...) { return exp2(a); }, exponent) &&
         ints("signed_byte<0>", [](auto a, auto...) { return signed_byte<0>(a); }) &&
         ints("signed_byte<1>", [](auto a, auto...) { return signed_byte<1>(a); }) &&
         ints("signed_byte<3>", [](auto a, auto...) { return signed_byte<3>(a); }) &&
         ints("unsigned_byte(3)", [](auto a, auto...) { return unsigned_byte(a, 3); }) &&
         ints("max_bytes", [](auto a, auto b, auto...) { return max_bytes(a, b); }) &&
         ints(
             "join_bytes",
             [](auto a, auto b, auto c, auto d, auto...) { return join_bytes(a, b, c, d); },
             any_word);
}

// sum, x0, w0, x1, w1: any x, and weights of which two products of two words fit in int16: four of
// up to 32 a pair of bytes, or one of any size.
void draw_dot(Numbers (&x)[5]) {
  for (int i = 0; i < kCount; ++i) {
    uint8_t w[2][4] = {};
    for (int pair = 0; pair < 4; pair += 2) {
      if (random_bits() % 2) {
        w[random_bits() % 2][pair + random_bits() % 2] = static_cast<uint8_t>(random_bits());
      } else {
        for (auto& word : w)
          for (int byte = pair; byte < pair + 2; ++byte)
            word[byte] = static_cast<uint8_t>(random_int(-32, 32));
      }
    }
    x[0].bits[i] = static_cast<uint32_t>(random_int(-(1 << 29), 1 << 29));
    for (int word = 0; word < 2; ++word) {
      x[1 + 2 * word].bits[i] = random_bits() % 4 ? random_bits() : 0xffffffff;
      memcpy(x[2 + 2 * word].bits + i, w[word], 4);
    }
  }
}
bool check_dot() {
  return lanes<I32, base::I32>("dot", draw_dot, [](auto... v) { return dot(v...); }) &&
         lanes<I32, base::I32>("dot_tight", draw_dot, [](auto... v) { return dot_tight(v...); });
}

// Rounded once or twice.
bool check_muladd() {
  for (int round = 0; round < kRounds; ++round) {
    float a[kLanes], b[kLanes], c[kLanes], got[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      a[i] = base::from_bits(any_float()), b[i] = base::from_bits(any_float());
      c[i] = base::from_bits(any_float());
    }
    store(got, muladd(load(a), load(b), load(c)));
    for (int i = 0; i < kLanes; ++i) {
      const float once = fmaf(a[i], b[i], c[i]), twice = a[i] * b[i] + c[i];
      if (!require("muladd", got[i] == once || got[i] == twice ||
                                 (isnan(got[i]) && (isnan(once) || isnan(twice)))))
        return false;
    }
  }
  return true;
}

// T is what memory holds, `any` gives its elements. Whole vectors as base.h has them, the first
// lanes as the whole vector has them.
template <typename T, typename Any>
bool check_loads(const char* name, Any any) {
  for (int round = 0; round < 65536 / kCount; ++round) {
    T in[kCount];
    for (int i = 0; i < kCount; ++i) in[i] = any(round * kCount + i);
    const Numbers got = collect([&](int i) { return load(in + i); });
    const Numbers want = collect([&](int i) { return base::load(in + i); });
    if (!same(name, got, want, is_float(load(in)))) return false;
    for (int count = 1; count < kLanes; ++count) {
      const auto part = load_first(in, count);
      Numbers first = got, expected = got;
      memcpy(first.bits, &part, sizeof part);
      for (int i = count; i < kLanes; ++i) expected.bits[i] = 0;
      if (!same("load_first", first, expected, is_float(part))) return false;
    }
  }
  return true;
}
template <typename T>
bool check_stores(const char* name) {
  for (int round = 0; round < 4 * kRounds; ++round) {
    Numbers x;
    for (uint32_t& bits : x.bits) bits = any_float();
    T got[kCount], want[kCount];
    for (int i = 0; i < kCount; i += kLanes) store(got + i, vector_at<F32>(x, i));
    for (int i = 0; i < kCount; i += base::kLanes)
      base::store(want + i, vector_at<base::F32>(x, i));
    if (!require(name, memcmp(got, want, sizeof got) == 0)) return false;
    for (int count = 1; count < kLanes; ++count) {
      T first[kLanes], untouched[kLanes];
      memset(first, 0x5a, sizeof first), memset(untouched, 0x5a, sizeof untouched);
      store_first(first, vector_at<F32>(x, 0), count);
      const size_t size = static_cast<size_t>(count) * sizeof(T);
      if (!require("store_first", memcmp(first, got, size) == 0 &&
                                      memcmp(first + count, untouched, sizeof first - size) == 0))
        return false;
    }
  }
  return true;
}
bool check_memory() {
  const auto half = [](int i) { return static_cast<uint16_t>(i); };
  return check_loads<float>("load float", [](int) { return base::from_bits(any_float()); }) &&
         check_loads<int32_t>("load int32", [](int) { return random_int(-999, 999); }) &&
         check_loads<BFloat16>("load bfloat16", [=](int i) { return BFloat16{half(i)}; }) &&
         check_loads<Float16>("load float16", [=](int i) { return Float16{half(i)}; }) &&
         check_stores<float>("store float") && check_stores<BFloat16>("store bfloat16") &&
         check_stores<Float16>("store float16");
}

// What broadcasts, moves bytes or works across lanes.
bool check_moves() {
  uint8_t bytes[kLanes * 4], out[kLanes];
  int32_t words[kLanes], back[kLanes], first[kLanes];
  for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random_bits());
  memcpy(words, bytes, sizeof words);
  prefetch(bytes);
  store(back, load_words(bytes));
  bool right = require("load_words", memcmp(back, bytes, sizeof back) == 0);
  store(back, set_word(bytes)), store(first, set(words[0]));
  for (const int32_t lane : back) right = right && require("set_word", lane == words[0]);
  for (const int32_t lane : first) right = right && require("set", lane == words[0]);
  float floats[kLanes];
  store(floats, set(1.5f));
  for (const float lane : floats) right = right && require("set", lane == 1.5f);
  int8_t codes[kLanes * 4];
  memcpy(codes, bytes, sizeof codes);
  store(back, load_signed(codes));
  store(first, load_unsigned(bytes));
  for (int i = 0; i < kLanes; ++i)
    right = right && require("load_signed", back[i] == codes[i] && first[i] == bytes[i]);
  int8_t high[kLanes * 4];
  store(back, decode<0>(load_words(bytes))), memcpy(codes, back, sizeof codes);
  store(back, decode<1>(load_words(bytes))), memcpy(high, back, sizeof high);
  for (int i = 0; i < kLanes * 4; ++i)
    right = right && require("decode", codes[i] == kInt4Values[bytes[i] & 15] &&
                                           high[i] == kInt4Values[bytes[i] >> 4]);
  int32_t where[kLanes], backwards[kLanes], other[kLanes];
  for (int i = 0; i < kLanes; ++i)
    where[i] = -static_cast<int32_t>(random_bits() % 2), backwards[i] = kLanes - 1 - i;
  store(back, load_where(words, load(where)));
  store(first, load_at(words, load(backwards), load(where)));
  store(other, every_other(load(words), load(backwards)));
  for (int i = 0; i < kLanes; ++i) {
    const int32_t lane = i < kLanes / 2 ? words[2 * i] : backwards[2 * i + 1 - kLanes];
    right = right && require("load_where", back[i] == (where[i] & words[i])) &&
            require("load_at", first[i] == (where[i] & words[kLanes - 1 - i])) &&
            require("every_other", other[i] == lane);
  }
  first[kLanes - 1] = 0;
  store_first(first, load(words), kLanes - 1);
  words[kLanes - 1] = 0;
  right = right && require("store_first", memcmp(first, words, sizeof first) == 0);
  for (int i = 0; i < kLanes; ++i) words[i] = bytes[i];
  store_bytes(out, load(words));
  return right && require("store_bytes", memcmp(out, bytes, sizeof out) == 0);
}
bool check_transpose() {
  I32 rows[kLanes];
  int32_t before[kLanes][kLanes], after[kLanes][kLanes];
  for (int i = 0; i < kLanes; ++i) {
    for (int32_t& word : before[i]) word = static_cast<int32_t>(random_bits());
    rows[i] = load(before[i]);
  }
  transpose(rows);
  bool right = true;
  for (int i = 0; i < kLanes; ++i) store(after[i], rows[i]);
  for (int i = 0; i < kLanes; ++i)
    for (int j = 0; j < kLanes; ++j)
      right = right && require("transpose", after[i][j] == before[j][i]);
  return right;
}
// Of small integers, whose sum is exact in any order.
bool check_reductions() {
  for (int round = 0; round < kRounds; ++round) {
    float x[kLanes], sum = 0, most = -999, least = 999;
    for (float& lane : x) {
      lane = base::from_bits(small_float());
      sum += lane, most = lane > most ? lane : most, least = lane < least ? lane : least;
    }
    if (!require("reduce_add", reduce_add(load(x)) == sum) ||
        !require("reduce_max", reduce_max(load(x)) == most) ||
        !require("reduce_min", reduce_min(load(x)) == least))
      return false;
    x[round % kLanes] = NAN;
    if (!require("reduce_add", isnan(reduce_add(load(x))))) return false;
  }
  return true;
}
bool check_reduce_quad() {
  for (int round = 0; round < kRounds; ++round) {
    float x[4][kLanes], other[4], got[4];
    for (int i = 0; i < 4; ++i) {
      for (float& lane : x[i]) lane = base::from_bits(small_float());
      other[i] = base::from_bits(small_float());
    }
    const F4 sums = reduce_quad(load(x[0]), load(x[1]), load(x[2]), load(x[3]));
    store_quad(got, add(load_quad<4>(other), sums));
    for (int i = 0; i < 4; ++i)
      if (!require("reduce_quad", got[i] == other[i] + reduce_add(load(x[i])))) return false;
  }
  return true;
}

// Four words of one row, against base's; the weights' products fit in 16 bits, two by two.
template <int kWords>
bool check_quads_of() {
  float x[256], values[4], sums[4], got[4], want[4];
  uint8_t q[256 * 4], at[4];
  int8_t weights[16];
  int32_t totals[4], got_totals[4], want_totals[4];
  for (float& value : x) value = base::from_bits(small_float());
  for (uint8_t& byte : q) byte = static_cast<uint8_t>(random_bits());
  for (int8_t& weight : weights) weight = static_cast<int8_t>(random_int(-64, 64));
  for (int i = 0; i < 4; ++i) {
    values[i] = base::from_bits(small_float()), sums[i] = base::from_bits(small_float());
    at[i] = static_cast<uint8_t>(random_bits()), totals[i] = static_cast<int32_t>(random_bits());
  }
  store_quad(got, muladd(load_quad<kWords>(values), pick_quad<kWords>(x, at), load_quad<4>(sums)));
  base::store_quad(want, muladd(base::load_quad<kWords>(values), base::pick_quad<kWords>(x, at),
                                base::load_quad<4>(sums)));
  const auto words = [](const void* p) { return p; };
  store_quad(got_totals, dot(load_quad<4>(words(totals)), pick_quad<kWords>(words(q), at),
                             load_quad<kWords>(words(weights))));
  base::store_quad(want_totals,
                   dot(base::load_quad<4>(words(totals)), base::pick_quad<kWords>(words(q), at),
                       base::load_quad<kWords>(words(weights))));
  return require("quads of float", memcmp(got, want, sizeof got) == 0) &&
         require("quads of bytes", memcmp(got_totals, want_totals, sizeof got_totals) == 0);
}
bool check_quads() {
  bool right = true;
  for (int round = 0; right && round < kRounds; ++round)
    right =
        check_quads_of<1>() && check_quads_of<2>() && check_quads_of<3>() && check_quads_of<4>();
  return right;
}

}  // namespace

// What breaks the contract, or null.
const char* broken_contract() {
  const bool right = check_floats() && check_ints() && check_dot() && check_muladd() &&
                     check_memory() && check_moves() && check_transpose() && check_reductions() &&
                     check_reduce_quad() && check_quads();
  return right ? nullptr : failure;
}

}  // namespace GOSSAMER_ISA
}  // namespace gossamer
