// contract.cpp: every function of simd/<isa>.h against its plain twin in simd/base.h, bit for bit.
// Compiled once an Isa with the flags of its kernels, and as they are without anything of std.

#include "contract.h"

namespace gossamer {
namespace GOSSAMER_ISA {
namespace {

bool check_floats() {
  return floats("add", [](auto a, auto b, auto...) { return add(a, b); }) &&
         floats("sub", [](auto a, auto b, auto...) { return sub(a, b); }) &&
         floats("mul", [](auto a, auto b, auto...) { return mul(a, b); }) &&
         floats("div", [](auto a, auto b, auto...) { return div(a, b); }) &&
         floats("max", [](auto a, auto b, auto...) { return max(a, b); }) &&
         floats("larger", [](auto a, auto b, auto...) { return larger(a, b); }) &&
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
         ints("unsigned_byte(0)", [](auto a, auto...) { return unsigned_byte(a, 0); }) &&
         ints("unsigned_byte(3)", [](auto a, auto...) { return unsigned_byte(a, 3); }) &&
         ints("shift_right", [](auto a, auto...) { return shift_right(a, 6); }) &&
         ints("dot_halves", [](auto a, auto b, auto c, auto...) { return dot_halves(a, b, c); }) &&
         ints("max_bytes", [](auto a, auto b, auto...) { return max_bytes(a, b); });
}

// Four vectors of any words, and a number of 0..255 twice in each lane.
void draw_packed(Numbers (&x)[5]) {
  each_lane(any_word)(x);
  const auto number = static_cast<uint32_t>(random_int(0, 255));
  for (uint32_t& bits : x[4].bits) bits = number << 16 | number;
}
// Vector kVector of four packed lines, which hold the operands in four orders.
template <int kVector>
bool check_interleave() {
  return lanes<I32, base::I32>(
      "interleave", draw_packed, [](auto a, auto b, auto c, auto d, auto zero) {
        const auto none = sub(zero, zero);
        decltype(a) lines[4] = {
            pack_bytes(a, b, c, d, zero, none), pack_bytes(b, c, d, a, none, none),
            pack_bytes(c, d, a, b, zero, zero), pack_bytes(d, a, b, c, none, zero)};
        interleave(lines);
        return lines[kVector];
      });
}
bool check_bytes() {
  int32_t twice[kLanes];
  store(twice, set_twice(200));
  for (const int32_t word : twice)
    if (!require("set_twice", word == (200 << 16 | 200))) return false;
  return lanes<I32, base::I32>("pack_bytes", draw_packed,
                               [](auto a, auto b, auto c, auto d, auto zero) {
                                 return in_words(pack_bytes(a, b, c, d, zero, sub(zero, zero)));
                               }) &&
         lanes<I32, base::I32>("pack_bytes and its least", draw_packed,
                               [](auto a, auto b, auto c, auto d, auto zero) {
                                 return in_words(pack_bytes(a, b, c, d, zero, zero));
                               }) &&
         lanes<I32, base::I32>("pack_bytes of bytes from 0", draw_packed,
                               [](auto a, auto b, auto c, auto d, auto) {
                                 return in_words(pack_bytes(a, b, c, d));
                               }) &&
         check_interleave<0>() && check_interleave<1>() && check_interleave<2>() &&
         check_interleave<3>();
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
  for (int i = 0; i < kLanes; ++i) right = right && require("load_signed", back[i] == codes[i]);
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
  const bool right = check_floats() && check_ints() && check_bytes() && check_dot() &&
                     check_muladd() && check_memory() && check_moves() && check_transpose() &&
                     check_reductions() && check_reduce_quad() && check_quads();
  return right ? nullptr : failure;
}

}  // namespace GOSSAMER_ISA
}  // namespace gossamer
