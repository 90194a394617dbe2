// operators.h: the operators that other files than their own name; of those that chain.cpp calls the
// kinds of their arguments (tensor.h) too.
#pragma once

#include "torch/shim.h"

namespace gossamer {

// kInPlace: the name ends with _, and the residual is a tensor that the result is written over.
template <bool kInPlace>
constexpr const char* kSpmm = kInPlace ? "TTTTTITOIIP" : "TTTTTIOOIIP";
template <bool kInPlace>
constexpr const char* kConvInt8 = kInPlace ? "TTTTTOOTOIIL" : "TTTTTOOOOIIL";
template <bool kInPlace>
constexpr const char* kConvSpmmInt8 = kInPlace ? "TTTTTTTTOOTOIIL" : "TTTTTTTTOOOOIIL";
constexpr const char *kMaxPool = "TLLLL", *kMean = "TTII";

template <bool kInPlace>
void spmm(StableIValue* stack, uint64_t, uint64_t);
template <bool kInPlace>
void conv_int8(StableIValue* stack, uint64_t, uint64_t);
template <bool kInPlace>
void conv_spmm_int8(StableIValue* stack, uint64_t, uint64_t);
void block(StableIValue* stack, uint64_t, uint64_t);
void unblock(StableIValue* stack, uint64_t, uint64_t);
void max_pool(StableIValue* stack, uint64_t, uint64_t);
void mean(StableIValue* stack, uint64_t, uint64_t);
void chain(StableIValue* stack, uint64_t, uint64_t);

}  // namespace gossamer
