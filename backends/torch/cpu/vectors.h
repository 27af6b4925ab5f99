// Vectors of an instruction set, all with the same operations.
//
//     V       16 floats: load, store, set, add, mul, fma (x y + z), negated, sum; halves and pair (8 of x, 8 of y)
//     Codes   16 unsigned codes: bytes, field (bits of each), join and join_bits (upper bits), number, entry, e4m3
//     I       32 int16: words, field, join_bits, crumbs (2 bits each), join_crumbs, entries; dot (sums of pairs, a V)
//
// f16 and bf16 load 16 values, store_f16 and store_bf16 round to nearest, ties to even.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define UNROLL _Pragma("GCC unroll 16")
#define INLINE __attribute__((always_inline)) inline

namespace {

constexpr int LANES = 16;

inline float as_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

#if defined(__AVX512F__)
#include "vectors_avx512.h"
#elif defined(__AVX2__)
#include "vectors_avx2.h"
#else
#include "vectors_plain.h"
#endif

#if defined(__AVX2__)
constexpr bool HAS_INTEGERS = true;  // I, and products of int16
#else
constexpr bool HAS_INTEGERS = false;
#endif

}  // namespace
