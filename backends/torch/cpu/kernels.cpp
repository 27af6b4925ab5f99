// GEMV and unpacking of quantized and 16-bit weights on a CPU, in float32: y = x w^T.
//
// Compiled once per instruction set (setup.py), called through ctypes (native.py, which lays out the planes). A row of a
// weight is read 64 columns at a time, as four vectors of 16 codes; the codes of a group are multiplied with x first, and
// their sum with the scale, then:
//
//     y[n] = sum over groups of scale * sum(code * x) + bias * sum(x)
//
// OpenMP is the one that torch has loaded, so both share threads.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

enum Dtype : int32_t { F32, F16, BF16, U8, I8, U4, E8M0, HALF_E8M0, E4M3 };
// Codes: unsigned integers, indices of a table of 16 values, 8-bit floats, and values themselves.
enum Code : int32_t { CODE_U2, CODE_U3, CODE_U4, CODE_U5, CODE_U6, CODE_U8, CODE_TABLE, CODE_E4M3, CODE_F16, CODE_BF16 };

constexpr int CHUNK = 64;  // columns
constexpr int LANES = 16;

}  // namespace

// Rows of a weight; strides are in bytes. `columns` is padded to whole chunks of codes that are zero.
struct Rows {
    int64_t rows, columns, group;  // columns per scale: 16, 32, or a multiple of 64
    Code code;
    Dtype scale;
    const uint8_t *codes, *high;  // high: the upper 1 or 2 bits of U3, U5, U6
    int64_t codes_stride, high_stride;
    const uint8_t *scales, *biases, *zeros, *mins, *super_scales, *super_mins, *row_scales;  // null: none
    int64_t groups, supers;                                                                // of a row
    float zero;
    float table[16];
};

namespace {

// ---- 16 floats

#if defined(__AVX512F__)
struct V { __m512 a; };
struct Codes { __m512i a; };
inline V load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline V set(float x) { return {_mm512_set1_ps(x)}; }
inline V mul(V x, V y) { return {_mm512_mul_ps(x.a, y.a)}; }
inline V fma(V x, V y, V z) { return {_mm512_fmadd_ps(x.a, y.a, z.a)}; }
inline float sum(V x) { return _mm512_reduce_add_ps(x.a); }
inline void store(float* p, V x) { _mm512_storeu_ps(p, x.a); }
inline Codes bytes(const uint8_t* p) { return {_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p))}; }
template <int SHIFT, int MASK> inline Codes field(Codes c) {
    __m512i x = SHIFT ? _mm512_srli_epi32(c.a, SHIFT) : c.a;
    return {MASK >> (8 - SHIFT) ? x : _mm512_and_si512(x, _mm512_set1_epi32(MASK))};
}
template <int SHIFT> inline Codes join(Codes low, Codes high) { return {_mm512_or_si512(low.a, _mm512_slli_epi32(high.a, SHIFT))}; }
template <int BIT> inline Codes join_bits(Codes low, const uint8_t* p) {  // 16 bits at p
    uint16_t bits;
    memcpy(&bits, p, 2);
    return {_mm512_mask_or_epi32(low.a, bits, low.a, _mm512_set1_epi32(1 << BIT))};
}
inline V number(Codes c) { return {_mm512_cvtepi32_ps(c.a)}; }
inline V entry(Codes c, const float* table) { return {_mm512_permutexvar_ps(c.a, _mm512_loadu_ps(table))}; }
inline V e4m3(Codes c) {
    __m512i size = _mm512_slli_epi32(_mm512_and_si512(c.a, _mm512_set1_epi32(0x7F)), 20);
    __m512 x = _mm512_mul_ps(_mm512_castsi512_ps(size), _mm512_set1_ps(0x1p120f));
    __m512i sign = _mm512_slli_epi32(_mm512_and_si512(c.a, _mm512_set1_epi32(0x80)), 24);
    return {_mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(x), sign))};
}
inline V bf16(const uint8_t* p) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16))};
}
inline V f16(const uint8_t* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
inline void store_f16(uint16_t* p, V x) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(x.a, 0)); }
inline void store_bf16(uint16_t* p, V x) {  // to nearest, ties to even
    __m512i bits = _mm512_castps_si512(x.a), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    bits = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)));
}

#elif defined(__AVX2__)
struct V { __m256 a, b; };
struct Codes { __m256i a, b; };
inline V load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline V set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline V mul(V x, V y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline V fma(V x, V y, V z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline float sum(V x) {
    __m256 s = _mm256_add_ps(x.a, x.b);
    __m128 h = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    h = _mm_add_ps(h, _mm_movehl_ps(h, h));
    return _mm_cvtss_f32(_mm_add_ss(h, _mm_shuffle_ps(h, h, 1)));
}
inline void store(float* p, V x) { _mm256_storeu_ps(p, x.a), _mm256_storeu_ps(p + 8, x.b); }
inline __m256i widened(const uint8_t* p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
inline Codes bytes(const uint8_t* p) { return {widened(p), widened(p + 8)}; }
template <int SHIFT, int MASK> inline Codes field(Codes c) {
    __m256i mask = _mm256_set1_epi32(MASK);
    return {_mm256_and_si256(_mm256_srli_epi32(c.a, SHIFT), mask), _mm256_and_si256(_mm256_srli_epi32(c.b, SHIFT), mask)};
}
template <int SHIFT> inline Codes join(Codes low, Codes high) {
    return {_mm256_or_si256(low.a, _mm256_slli_epi32(high.a, SHIFT)), _mm256_or_si256(low.b, _mm256_slli_epi32(high.b, SHIFT))};
}
template <int BIT> inline Codes join_bits(Codes low, const uint8_t* p) {  // 16 bits at p
    const __m256i each = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128), one = _mm256_set1_epi32(1 << BIT);
    auto joined = [&](__m256i x, int bits) {
        __m256i set = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(bits), each), each);
        return _mm256_or_si256(x, _mm256_and_si256(set, one));
    };
    return {joined(low.a, p[0]), joined(low.b, p[1])};
}
inline V number(Codes c) { return {_mm256_cvtepi32_ps(c.a), _mm256_cvtepi32_ps(c.b)}; }
inline V entry(Codes c, const float* table) {
    __m256 low = _mm256_loadu_ps(table), high = _mm256_loadu_ps(table + 8);
    auto found = [&](__m256i i) {
        __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(i, 28));  // its sign: bit 3
        return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, i), _mm256_permutevar8x32_ps(high, i), upper);
    };
    return {found(c.a), found(c.b)};
}
inline V e4m3(Codes c) {
    auto value = [](__m256i i) {
        __m256i size = _mm256_slli_epi32(_mm256_and_si256(i, _mm256_set1_epi32(0x7F)), 20);
        __m256i sign = _mm256_slli_epi32(_mm256_and_si256(i, _mm256_set1_epi32(0x80)), 24);
        return _mm256_or_ps(_mm256_mul_ps(_mm256_castsi256_ps(size), _mm256_set1_ps(0x1p120f)), _mm256_castsi256_ps(sign));
    };
    return {value(c.a), value(c.b)};
}
inline V bf16(const uint8_t* p) {
    auto half = [](const uint8_t* q) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)q)), 16));
    };
    return {half(p), half(p + 16)};
}
inline V f16(const uint8_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 16)))};
}
inline void store_f16(uint16_t* p, V x) {
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x.a, 0)), _mm_storeu_si128((__m128i*)(p + 8), _mm256_cvtps_ph(x.b, 0));
}
inline void store_bf16(uint16_t* p, V x) {  // to nearest, ties to even
    auto rounded = [](__m256 y) {
        __m256i bits = _mm256_castps_si256(y), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        return _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF))), 16);
    };
    __m256i both = _mm256_packus_epi32(rounded(x.a), rounded(x.b));
    _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(both, 0xD8));
}

#else
struct V { float a[LANES]; };
struct Codes { int32_t a[LANES]; };
#define EACH for (int i = 0; i < LANES; i++)
inline float as_float(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
inline V load(const float* p) { V r; EACH r.a[i] = p[i]; return r; }
inline V set(float x) { V r; EACH r.a[i] = x; return r; }
inline V mul(V x, V y) { EACH x.a[i] *= y.a[i]; return x; }
inline V fma(V x, V y, V z) { EACH z.a[i] += x.a[i] * y.a[i]; return z; }
inline float sum(V x) {
    for (int n = LANES / 2; n; n /= 2) for (int i = 0; i < n; i++) x.a[i] += x.a[i + n];
    return x.a[0];
}
inline void store(float* p, V x) { EACH p[i] = x.a[i]; }
inline Codes bytes(const uint8_t* p) { Codes r; EACH r.a[i] = p[i]; return r; }
template <int SHIFT, int MASK> inline Codes field(Codes c) { EACH c.a[i] = c.a[i] >> SHIFT & MASK; return c; }
template <int SHIFT> inline Codes join(Codes low, Codes high) { EACH low.a[i] |= high.a[i] << SHIFT; return low; }
template <int BIT> inline Codes join_bits(Codes low, const uint8_t* p) { EACH low.a[i] |= (p[i / 8] >> i % 8 & 1) << BIT; return low; }
inline V number(Codes c) { V r; EACH r.a[i] = (float)c.a[i]; return r; }
inline V entry(Codes c, const float* table) { V r; EACH r.a[i] = table[c.a[i] & 15]; return r; }
inline V e4m3(Codes c) {
    V r;
    EACH { float x = as_float((c.a[i] & 0x7F) << 20) * 0x1p120f; r.a[i] = c.a[i] & 0x80 ? -x : x; }
    return r;
}
inline V bf16(const uint8_t* p) { V r; uint16_t h[LANES]; memcpy(h, p, sizeof h); EACH r.a[i] = as_float((uint32_t)h[i] << 16); return r; }
inline V f16(const uint8_t* p) {
    V r;
    EACH {
        const uint32_t h = p[2 * i] | p[2 * i + 1] << 8, size = (h & 0x7FFF) << 13, sign = (h & 0x8000) << 16;
        const float x = (h & 0x7C00) == 0x7C00 ? as_float(size | 0x7F800000) : as_float(size) * 0x1p112f;
        r.a[i] = sign ? -x : x;
    }
    return r;
}
inline void store_f16(uint16_t* p, V x) {  // to nearest, ties to even
    EACH {
        uint32_t bits;
        memcpy(&bits, &x.a[i], 4);
        const uint32_t sign = bits >> 16 & 0x8000, size = bits & 0x7FFFFFFF;
        if (size > 0x7F800000) { p[i] = sign | 0x7E00; continue; }
        if (size >= 0x477FF000) { p[i] = sign | 0x7C00; continue; }
        if (size >= 0x38800000) { p[i] = sign | ((size - 0x38000000 + 0xFFF + (size >> 13 & 1)) >> 13); continue; }
        const float shifted = as_float(size) + 0.5f;  // adds at the place of f16's last subnormal bit
        memcpy(&bits, &shifted, 4);
        p[i] = sign | (bits - 0x3F000000);
    }
}
inline void store_bf16(uint16_t* p, V x) {
    EACH { uint32_t b; memcpy(&b, &x.a[i], 4); p[i] = (uint16_t)((b + 0x7FFF + (b >> 16 & 1)) >> 16); }
}
#endif

// ---- 64 columns of codes; chunk c of a row

template <int C> inline void codes(const Rows& w, const uint8_t* row, const uint8_t* high, int64_t c, V (&q)[4]) {
    if constexpr (C == CODE_F16 || C == CODE_BF16) {
        for (int i = 0; i < 4; i++) q[i] = (C == CODE_F16 ? f16 : bf16)(row + 128 * c + 32 * i);
    } else if constexpr (C == CODE_U8 || C == CODE_E4M3) {
        for (int i = 0; i < 4; i++) q[i] = (C == CODE_U8 ? number : e4m3)(bytes(row + 64 * c + 16 * i));
    } else if constexpr (C == CODE_U2 || C == CODE_U3) {  // byte i: columns i, 16 + i, 32 + i, 48 + i
        Codes b = bytes(row + 16 * c), f[4] = {field<0, 3>(b), field<2, 3>(b), field<4, 3>(b), field<6, 3>(b)};
        for (int i = 0; i < 4; i++) q[i] = number(C == CODE_U2 ? f[i] : join_bits<2>(f[i], high + 8 * c + 2 * i));
    } else {  // byte i of 16: columns i, 16 + i
        Codes f[4], b = bytes(row + 32 * c), d = bytes(row + 32 * c + 16);
        if constexpr (C == CODE_TABLE) {
            q[0] = entry(b, w.table), q[1] = entry(field<4, 15>(b), w.table);
            q[2] = entry(d, w.table), q[3] = entry(field<4, 15>(d), w.table);
            return;
        }
        f[0] = field<0, 15>(b), f[1] = field<4, 15>(b), f[2] = field<0, 15>(d), f[3] = field<4, 15>(d);
        if constexpr (C == CODE_U6) {
            Codes h = bytes(high + 16 * c);
            f[0] = join<4>(f[0], field<0, 3>(h)), f[1] = join<4>(f[1], field<2, 3>(h));
            f[2] = join<4>(f[2], field<4, 3>(h)), f[3] = join<4>(f[3], field<6, 3>(h));
        }
        for (int i = 0; i < 4; i++) q[i] = number(C == CODE_U5 ? join_bits<4>(f[i], high + 8 * c + 2 * i) : f[i]);
    }
}

// ---- scales

inline float power_of_two(int exponent, int bias) {  // of an e8m0 byte; 2^-127 is a subnormal
    uint32_t bits = exponent > bias - 127 ? (uint32_t)(exponent - bias + 127) << 23 : 1u << std::max(22 + exponent - (bias - 127), 0);
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

inline void floats(Dtype dtype, const uint8_t* p, int64_t count, float* out) {
    int64_t i = 0;
    if (dtype == F16 || dtype == BF16) {
        for (; i + LANES <= count; i += LANES) store(out + i, dtype == F16 ? f16(p + 2 * i) : bf16(p + 2 * i));
        if (i < count) {
            uint8_t rest[2 * LANES] = {};
            float values[LANES];
            memcpy(rest, p + 2 * i, 2 * (count - i));
            store(values, dtype == F16 ? f16(rest) : bf16(rest));
            memcpy(out + i, values, 4 * (count - i));
        }
        return;
    }
    switch (dtype) {
        case F32: memcpy(out, p, 4 * count); break;
        case U8: for (; i < count; i++) out[i] = p[i]; break;
        case I8: for (; i < count; i++) out[i] = (int8_t)p[i]; break;
        case U4: for (; i < count; i++) out[i] = p[i] & 15; break;
        case E8M0: for (; i < count; i++) out[i] = power_of_two(p[i], 127); break;
        case HALF_E8M0: for (; i < count; i++) out[i] = power_of_two(p[i], 128); break;
        default: for (; i < count; i++) {
            uint32_t bits = (p[i] & 0x7F) << 20;
            float x;
            memcpy(&x, &bits, 4);
            out[i] = (p[i] & 0x80 ? -x : x) * 0x1p120f;
        }
    }
}

inline int64_t size_of(Dtype dtype) { return dtype == F32 ? 4 : dtype == F16 || dtype == BF16 ? 2 : 1; }

struct Scratch {  // of a thread
    std::vector<float> scales, biases, supers, minima;
    void reserve(const Rows& w) {
        for (auto* v : {&scales, &biases, &minima}) v->resize(w.groups);
        supers.resize(w.supers);
    }
};

// Scale and bias of each group: w = scale * code + bias. Returns whether there are biases.
inline bool scales_of(const Rows& w, int64_t n, Scratch& t) {
    float *s = t.scales.data(), *b = t.biases.data();
    const int64_t per = w.supers ? w.groups / w.supers : 1;
    if (!w.scales) {
        std::fill(t.scales.begin(), t.scales.end(), 1.f);
        return false;
    }
    const uint8_t* p = w.scales + n * w.groups * size_of(w.scale);
    floats(w.scale, p, w.groups, s);
    if (w.super_scales) {
        floats(F16, w.super_scales + 2 * n * w.supers, w.supers, t.supers.data());
        for (int64_t i = 0; i < w.supers; i++) for (int64_t j = 0; j < per; j++) s[i * per + j] *= t.supers[i];
    }
    if (w.row_scales) {
        float row;
        memcpy(&row, w.row_scales + 4 * n, 4);
        for (int64_t g = 0; g < w.groups; g++) s[g] *= row;
    }
    bool biased = false;
    if (w.zeros) {
        for (int64_t g = 0; g < w.groups; g++) b[g] = -s[g] * w.zeros[n * w.groups + g];
        biased = true;
    } else if (w.zero != 0 || w.biases || w.super_mins) {
        for (int64_t g = 0; g < w.groups; g++) b[g] = -s[g] * w.zero;
        biased = true;
    }
    if (w.biases) {
        floats(w.scale, w.biases + n * w.groups * size_of(w.scale), w.groups, t.minima.data());
        for (int64_t g = 0; g < w.groups; g++) b[g] += t.minima[g];
    }
    if (w.super_mins) {
        floats(F16, w.super_mins + 2 * n * w.supers, w.supers, t.supers.data());
        const uint8_t* m = w.scale == U4 ? p : w.mins + n * w.groups;
        const int shift = w.scale == U4 ? 4 : 0;
        for (int64_t i = 0; i < w.supers; i++)
            for (int64_t j = i * per; j < (i + 1) * per; j++) b[j] -= t.supers[i] * (m[j] >> shift);
    }
    return biased;
}

// ---- y = x w^T

struct Input {  // x in float32, padded with zeros, and its sum in each group
    int64_t rows, stride, groups;
    std::vector<float> x, sums;
};

inline void store_as(Dtype dtype, void* out, int64_t at, V v) {
    if (dtype == F32) store((float*)out + at, v);
    else (dtype == F16 ? store_f16 : store_bf16)((uint16_t*)out + at, v);
}

inline void store_one(Dtype dtype, void* out, int64_t at, float value) {
    if (dtype == F32) { ((float*)out)[at] = value; return; }
    uint16_t all[LANES];
    (dtype == F16 ? store_f16 : store_bf16)(all, set(value));
    ((uint16_t*)out)[at] = all[0];
}

inline float* padded(std::vector<float>& v, int64_t size) {
    v.assign(size, 0.f);
    return v.data();
}

void prepare(const Rows& w, const void* x, Dtype dtype, int64_t m, int64_t columns, Input& in) {
    in = {m, w.columns, w.groups, std::move(in.x), std::move(in.sums)};
    float *to = padded(in.x, m * w.columns), *sums = padded(in.sums, m * w.groups);
    for (int64_t r = 0; r < m; r++) {
        floats(dtype, (const uint8_t*)x + r * columns * size_of(dtype), columns, to + r * w.columns);
        for (int64_t g = 0; g < w.groups; g++) {
            float total = 0;
            const float* p = to + r * w.columns + g * w.group;
            for (int64_t i = 0; i < std::min(w.group, w.columns - g * w.group); i++) total += p[i];
            sums[r * w.groups + g] = total;
        }
    }
}

// One row of w times M rows of x. G: vectors of a chunk that share a scale.
template <int C, int G, int M> inline void products(const Rows& w, int64_t n, const Scratch& t, const float* x, float* y) {
    const uint8_t *row = w.codes + n * w.codes_stride, *high = w.high + n * w.high_stride;
    V acc[M];
    for (int m = 0; m < M; m++) acc[m] = set(0);
    const int64_t chunks = w.columns / CHUNK, per = G == 4 ? std::max<int64_t>(w.group / CHUNK, 1) : 0;
    for (int64_t c = 0, g = 0, left = per; c < chunks; c++) {
        V q[4];
        codes<C>(w, row, high, c, q);
        for (int i = 0; i < 4; i += G) {
            const V s = set(t.scales[g]);
            for (int m = 0; m < M; m++) {
                const float* p = x + m * w.columns + c * CHUNK + i * LANES;
                V product = mul(q[i], load(p));
                for (int j = 1; j < G; j++) product = fma(q[i + j], load(p + j * LANES), product);
                acc[m] = fma(product, s, acc[m]);
            }
            if (G < 4) g += g + 1 < w.groups;
        }
        if (G == 4 && --left == 0) left = per, g++;
    }
    for (int m = 0; m < M; m++) y[m] = sum(acc[m]);
}

template <int C, int G> void rows_of(const Rows& w, int64_t begin, int64_t end, const Input& in, Dtype dtype, void* y, int64_t stride) {
    thread_local Scratch t;
    t.reserve(w);
    for (int64_t n = begin; n < end; n++) {
        const bool biased = scales_of(w, n, t);
        for (int64_t m = 0; m < in.rows;) {
            float found[4];
            const float* x = in.x.data() + m * in.stride;
            const int count = (int)std::min<int64_t>(in.rows - m, 4);
            if (count == 4) products<C, G, 4>(w, n, t, x, found);
            else if (count == 3) products<C, G, 3>(w, n, t, x, found);
            else if (count == 2) products<C, G, 2>(w, n, t, x, found);
            else products<C, G, 1>(w, n, t, x, found);
            for (int i = 0; i < count; i++, m++) {
                float bias = 0;
                if (biased) {
                    const float* sums = in.sums.data() + m * in.groups;
#pragma omp simd reduction(+ : bias)
                    for (int64_t g = 0; g < w.groups; g++) bias += t.biases[g] * sums[g];
                }
                store_one(dtype, y, m * stride + n, found[i] + bias);
            }
        }
    }
}

template <int C, int G> void unpack_rows(const Rows& w, const int64_t* index, int64_t begin, int64_t end, int64_t columns, Dtype dtype, void* out) {
    thread_local Scratch t;
    t.reserve(w);
    const int64_t per = std::max<int64_t>(w.group / CHUNK, 1);
    for (int64_t r = begin; r < end; r++) {
        const int64_t n = index ? index[r] : r;
        const bool biased = scales_of(w, n, t);
        const uint8_t *row = w.codes + n * w.codes_stride, *high = w.high + n * w.high_stride;
        for (int64_t c = 0; c * CHUNK < columns; c++) {
            V q[4];
            codes<C>(w, row, high, c, q);
            for (int i = 0; i < 4; i++) {
                const int64_t g = std::min(G == 4 ? c / per : (4 * c + i) / G, w.groups - 1), at = c * CHUNK + i * LANES;
                const V value = fma(q[i], set(t.scales[g]), set(biased ? t.biases[g] : 0.f));
                if (at + LANES <= columns) store_as(dtype, out, r * columns + at, value);
                else if (at < columns) {
                    float rest[LANES];
                    store(rest, value);
                    for (int64_t j = at; j < columns; j++) store_one(dtype, out, r * columns + j, rest[j - at]);
                }
            }
        }
    }
}

using Linear = void (*)(const Rows&, int64_t, int64_t, const Input&, Dtype, void*, int64_t);
using Unpack = void (*)(const Rows&, const int64_t*, int64_t, int64_t, int64_t, Dtype, void*);

template <int C> constexpr Linear linear_of[] = {rows_of<C, 1>, rows_of<C, 2>, rows_of<C, 4>};
template <int C> constexpr Unpack unpack_of[] = {unpack_rows<C, 1>, unpack_rows<C, 2>, unpack_rows<C, 4>};

#define OF_CODE(table, w) \
    ((w).code == CODE_U2 ? table<CODE_U2> : (w).code == CODE_U3 ? table<CODE_U3> : (w).code == CODE_U4 ? table<CODE_U4> : \
     (w).code == CODE_U5 ? table<CODE_U5> : (w).code == CODE_U6 ? table<CODE_U6> : (w).code == CODE_U8 ? table<CODE_U8> : \
     (w).code == CODE_TABLE ? table<CODE_TABLE> : (w).code == CODE_E4M3 ? table<CODE_E4M3> : \
     (w).code == CODE_F16 ? table<CODE_F16> : table<CODE_BF16>)[(w).group == 16 ? 0 : (w).group == 32 ? 1 : 2]

// Tasks are a few per thread, so that a thread whose core is busy takes fewer.
template <class F> void parallel(int64_t count, int threads, F run) {
    const int64_t task = std::max<int64_t>((count + 8 * threads - 1) / (8 * threads), 4), tasks = (count + task - 1) / task;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t i = 0; i < tasks; i++) run(i * task, std::min(count, (i + 1) * task));
}

}  // namespace

// x (m, columns), y (m, stride) from its column 0 on, both row by row in `dtype`.
extern "C" void llmrs_linear(const Rows* w, const void* x, int64_t m, int64_t columns, int32_t dtype, void* y, int64_t stride, int32_t threads) {
    static thread_local Input in;
    prepare(*w, x, (Dtype)dtype, m, columns, in);
    const Linear run = OF_CODE(linear_of, *w);
    const Input& input = in;
    parallel(w->rows, threads, [&](int64_t begin, int64_t end) { run(*w, begin, end, input, (Dtype)dtype, y, stride); });
}

// Rows, all or by their numbers, to out (count, columns).
extern "C" void llmrs_unpack(const Rows* w, const int64_t* index, int64_t count, int64_t columns, int32_t dtype, void* out, int32_t threads) {
    const Unpack run = OF_CODE(unpack_of, *w);
    parallel(count, threads, [&](int64_t begin, int64_t end) { run(*w, index, begin, end, columns, (Dtype)dtype, out); });
}
