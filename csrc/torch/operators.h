// operators.h: the operators that other files than their own name.
#pragma once

#include "torch/tensor.h"

namespace gossamer {

// One that chain.cpp calls too: the kinds of its arguments (tensor.h); what it does with them, the
// result to go to *result. in_place: the name ends with _, and the residual is a tensor that the result
// is written over.
struct Operation {
  const char* kinds;
  void (*run)(Arguments& arguments, StableIValue* result);
  bool in_place = false;
};

template <bool kInPlace>
void spmm(Arguments& arguments, StableIValue* result);
template <bool kInPlace>
void conv_int8(Arguments& arguments, StableIValue* result);
template <bool kInPlace>
void conv_spmm_int8(Arguments& arguments, StableIValue* result);
void max_pool(Arguments& arguments, StableIValue* result);
void mean(Arguments& arguments, StableIValue* result);
void block(Arguments& arguments, StableIValue* result);
void unblock(Arguments& arguments, StableIValue* result);
void gemm_int8(Arguments& arguments, StableIValue* result);
void spmm_int8(Arguments& arguments, StableIValue* result);

template <bool kInPlace>
inline constexpr Operation kSpmm{kInPlace ? "TWWWWITVIIP" : "TWWWWIOVIIP", spmm<kInPlace>,
                                 kInPlace};
template <bool kInPlace>
inline constexpr Operation kConvInt8{kInPlace ? "TWWWWVVTVIIL" : "TWWWWVVOVIIL",
                                     conv_int8<kInPlace>, kInPlace};
template <bool kInPlace>
inline constexpr Operation kConvSpmmInt8{kInPlace ? "TWWWWWWWVVTVIIL" : "TWWWWWWWVVOVIIL",
                                         conv_spmm_int8<kInPlace>, kInPlace};
inline constexpr Operation kMaxPool{"TLLLL", max_pool}, kMean{"TWII", mean}, kBlock{"TW", block},
    kUnblock{"TWII", unblock}, kGemmInt8{"TWWWVVIIP", gemm_int8},
    kSpmmInt8{"TWWWWWWVVIIP", spmm_int8};

// As torch calls it.
template <const Operation& kOperation>
void called(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack, kOperation.kinds);
  kOperation.run(arguments, stack);
}

void chain_keep(StableIValue* stack, uint64_t, uint64_t);
void chain(StableIValue* stack, uint64_t, uint64_t);

}  // namespace gossamer
