// Values in memory, by dtype.

#pragma once

#include "vectors.h"

enum Dtype : int32_t { F32, F16, BF16, U8, I8, U4, E8M0, HALF_E8M0, E4M3, HIGH_U4 };

namespace {

inline float power_of_two(int exponent, int bias) {  // of an e8m0 byte; 2^-127 and 2^-128 are subnormal
    const int at = exponent - bias + 127;
    return as_float(at > 0 ? (uint32_t)at << 23 : 1u << std::max(22 + at, 0));
}

inline int64_t size_of(Dtype dtype) { return dtype == F32 ? 4 : dtype == F16 || dtype == BF16 ? 2 : 1; }

INLINE V numbers(Dtype dtype, const uint8_t* p) {  // 16 of them
    switch (dtype) {
        case F32: return load((const float*)p);
        case F16: return f16(p);
        case BF16: return bf16(p);
        case U8: return number(bytes(p));
        case U4: return number(field<0, 15>(bytes(p)));
        case HIGH_U4: return number(field<4, 15>(bytes(p)));
        case I8: return signed_number(p);
        case E4M3: return e4m3(bytes(p));
        default: break;
    }
    float found[LANES];
    UNROLL
    for (int i = 0; i < LANES; i++) found[i] = power_of_two(p[i], dtype == E8M0 ? 127 : 128);
    return load(found);
}

// At element `at` of p; F32, F16 or BF16.
INLINE V load_as(Dtype dtype, const void* p, int64_t at) {
    return numbers(dtype, (const uint8_t*)p + at * size_of(dtype));
}

INLINE void store_as(Dtype dtype, void* out, int64_t at, V v) {
    if (dtype == F32)
        store((float*)out + at, v);
    else
        (dtype == F16 ? store_f16 : store_bf16)((uint16_t*)out + at, v);
}

// `count` values, less than 16; the other lanes are 0.
INLINE V load_some(Dtype dtype, const void* p, int64_t at, int64_t count) {
    uint8_t values[4 * LANES] = {};
    memcpy(values, (const uint8_t*)p + at * size_of(dtype), count * size_of(dtype));
    return numbers(dtype, values);
}

INLINE void store_some(Dtype dtype, void* out, int64_t at, int64_t count, V v) {
    uint8_t values[4 * LANES];
    store_as(dtype, values, 0, v);
    memcpy((uint8_t*)out + at * size_of(dtype), values, count * size_of(dtype));
}

// f(i, part) for vectors at i in [0, n): part.load(p, i), part.store(p, i, v); the last may be cut.
template <Dtype D> struct Whole {
    INLINE V load(const void* p, int64_t i) const { return load_as(D, p, i); }
    INLINE void store(void* p, int64_t i, V v) const { store_as(D, p, i, v); }
};
template <Dtype D> struct Some {
    int64_t count;
    INLINE V load(const void* p, int64_t i) const { return load_some(D, p, i, count); }
    INLINE void store(void* p, int64_t i, V v) const { store_some(D, p, i, count, v); }
};
template <Dtype D, class F> INLINE void vectors(int64_t n, F f) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) f(i, Whole<D>());
    if (i < n) f(i, Some<D>{n - i});
}

// f(dtype) with a dtype of F32, F16 or BF16 that the compiler knows.
template <class F> INLINE void with_dtype(int32_t dtype, F f) {
    switch (dtype) {
        case F32: f(std::integral_constant<Dtype, F32>()); break;
        case F16: f(std::integral_constant<Dtype, F16>()); break;
        default: f(std::integral_constant<Dtype, BF16>()); break;
    }
}

}  // namespace
