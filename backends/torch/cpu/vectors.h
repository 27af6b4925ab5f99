// Vectors of an instruction set, all with the same operations.
//
//     V       16 floats: load, store, set, add, mul, div, fma (x y + z), negated, max, round, times_power, exp; sum and
//             maximum of one; halves and pair (8 of x, 8 of y)
//     Codes   16 unsigned codes: bytes, field (bits of each), join and join_bits (upper bits), number, entry, e4m3
//     I       32 int16: words, field, join_bits, crumbs (2 bits each), join_crumbs, entries; dot (sums of pairs, a V)
//
// f16 and bf16 load 16 values, store_f16 and store_bf16 round to nearest, ties to even.

#pragma once

#include <algorithm>
#include <cmath>
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

// e^x = 2^n e^r, |r| <= ln 2 / 2, by a Taylor polynomial: relative error 2e-7. x is bounded to +-87; NaN stays.
inline V exp(V x) {
    x = max(set(-87.f), negated(max(set(-87.f), negated(x))));  // the second operand stays if it is NaN
    const V n = round(mul(x, set(1.44269504f)));
    const V r = fma(n, set(-1.42860682e-6f), fma(n, set(-0.693145752f), x));  // ln 2 in two parts
    V y = set(1.f / 5040);
    for (const float c : {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 0.5f, 1.f, 1.f}) y = fma(y, r, set(c));
    return times_power(y, n);
}

#if defined(__AVX2__)
constexpr bool HAS_INTEGERS = true;  // I, and products of int16
#else
constexpr bool HAS_INTEGERS = false;
#endif

}  // namespace
