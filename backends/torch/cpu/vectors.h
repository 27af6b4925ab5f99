// Vectors of an instruction set, all with the same operations.
//
//     V       16 floats: load, store, set, add, mul, div, fma (x y + z), negated, max, round, times_power, exp; sum and
//             maximum of one; transpose (16 x 16)
//     I       16 lanes of 32 bits, or as many pairs of int16: words (loaded), field (bits of each int16), join (or),
//             set_pair, set_int, dot (adds the sums of products of pairs); number, low and high (of pairs), e4m3 as V
//
// f16 and bf16 load 16 values, store_f16 and store_bf16 round; pair_f16 and pair_bf16 round two to the halves of lanes,
// to nearest, ties to even.

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

using Words = float[LANES][LANES];  // of 32 bits, whatever they mean

constexpr bool keeps_all(int shift, int mask) { return shift >= 0 && (0xFFFF >> shift) == mask; }

inline float as_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

#if defined(__AVX2__)
inline void transpose(const Words& x, Words& y) {
    for (int r = 0; r < LANES; r += 8) {
        for (int c = 0; c < LANES; c += 8) {
            __m256 a[8], b[8];
            UNROLL
            for (int i = 0; i < 8; i++) a[i] = _mm256_loadu_ps(x[c + i] + r);
            UNROLL
            for (int i = 0; i < 8; i += 2)
                b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]), b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
            UNROLL
            for (int i = 0; i < 8; i += 4) {  // a[i + n]: column n of four, and n + 4
                a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44), a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xEE);
                a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
                a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xEE);
            }
            UNROLL
            for (int i = 0; i < 4; i++) {
                _mm256_storeu_ps(y[r + i] + c, _mm256_permute2f128_ps(a[i], a[i + 4], 0x20));
                _mm256_storeu_ps(y[r + i + 4] + c, _mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
            }
        }
    }
}
#endif

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

}  // namespace
