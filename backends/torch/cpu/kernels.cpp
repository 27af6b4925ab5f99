// GEMV and unpacking of quantized weights on a CPU, in float32: y = x w^T.
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

enum Dtype : int32_t { F32, F16, BF16, U8, I8, U4, E8M0, HALF_E8M0, E4M3, HIGH_U4 };
// Codes: unsigned integers, indices of a table of 16 values, 8-bit floats.
enum Code : int32_t { CODE_U2, CODE_U3, CODE_U4, CODE_U5, CODE_U6, CODE_U8, CODE_TABLE, CODE_E4M3 };

constexpr int CHUNK = 64;  // columns
constexpr int LANES = 16;
#define UNROLL _Pragma("GCC unroll 16")
#define INLINE __attribute__((always_inline)) inline
#if defined(__AVX2__)
constexpr bool HAS_INTEGERS = true;  // products of int16
#else
constexpr bool HAS_INTEGERS = false;
#endif

}  // namespace

// Rows of a weight; strides are in bytes. `columns` is padded to whole chunks of codes that are zero. Behind each plane
// of scales lie SLACK readable bytes.
struct Rows {
    int64_t rows, columns, group, groups;  // columns per scale: 16, 32, 64, 128 or 256
    Code code;
    Dtype scale;
    const uint8_t *codes, *high;  // high: the upper 1 or 2 bits of U3, U5, U6
    int64_t codes_stride, high_stride;
    const uint8_t *scales, *biases, *zeros, *mins, *super_scales, *super_mins, *row_scales;  // null: none
    float zero, factor;
    float table[16];
    int8_t entries[16];  // `factor` times these are the table
};

namespace {

// ---- 16 floats

inline float as_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

#if defined(__AVX512F__)
struct V { __m512 a; };
struct Codes { __m512i a; };
inline V load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline V set(float x) { return {_mm512_set1_ps(x)}; }
inline V add(V x, V y) { return {_mm512_add_ps(x.a, y.a)}; }
inline V mul(V x, V y) { return {_mm512_mul_ps(x.a, y.a)}; }
inline V negated(V x) { return {_mm512_sub_ps(_mm512_setzero_ps(), x.a)}; }
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
inline V signed_number(const uint8_t* p) { return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)))}; }
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

inline float largest(const float* p, int64_t count) {
    __m512 m = _mm512_setzero_ps();
    for (int64_t i = 0; i < count; i += LANES) m = _mm512_max_ps(_mm512_abs_ps(_mm512_loadu_ps(p + i)), m);
    return _mm512_reduce_max_ps(m);
}
// Rounds x / step, in place too: to whole steps.
inline void to_integers(float* p, int64_t count, float inverse, float step, int16_t* out) {
    for (int64_t i = 0; i < count; i += LANES) {
        const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(p + i), _mm512_set1_ps(inverse)));
        _mm256_storeu_si256((__m256i*)(out + i), _mm512_cvtsepi32_epi16(q));
        _mm512_storeu_ps(p + i, _mm512_mul_ps(_mm512_cvtepi32_ps(q), _mm512_set1_ps(step)));
    }
}
struct I { __m512i a; };  // 32 int16
inline I words(const uint8_t* p) { return {_mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)p))}; }
inline I words(const int16_t* p) { return {_mm512_loadu_si512(p)}; }
template <int SHIFT, int MASK> inline I field(I x) {
    x.a = SHIFT ? _mm512_srli_epi16(x.a, SHIFT) : x.a;
    return {MASK >> (8 - SHIFT) ? x.a : _mm512_and_si512(x.a, _mm512_set1_epi16(MASK))};
}
inline void crumbs(const uint8_t* p, I& first, I& second) {  // 2 bits each
    const __m512i two = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(2), 1), mask = _mm512_set1_epi16(3);
    const __m512i b = _mm512_cvtepu8_epi16(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)p)));
    first = {_mm512_and_si512(_mm512_srlv_epi16(b, two), mask)};
    second = {_mm512_and_si512(_mm512_srlv_epi16(_mm512_srli_epi16(b, 4), two), mask)};
}
template <int SHIFT> inline I join(I low, I high) { return {_mm512_or_si512(low.a, _mm512_slli_epi16(high.a, SHIFT))}; }
template <int BIT> inline I join_bits(I low, const uint8_t* p) {  // 32 bits at p
    uint32_t bits;
    memcpy(&bits, p, 4);
    return {_mm512_or_si512(low.a, _mm512_maskz_set1_epi16(bits, 1 << BIT))};
}
inline V dot(I x, I y) { return {_mm512_cvtepi32_ps(_mm512_madd_epi16(x.a, y.a))}; }
inline V dot(I x, I y, I z, I t) {
    return {_mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_madd_epi16(x.a, y.a), _mm512_madd_epi16(z.a, t.a)))};
}
inline float one_f16(const uint8_t* p) { return _cvtsh_ss(*(const uint16_t*)p); }
inline V halves(float x, float y) { return {_mm512_insertf32x8(_mm512_set1_ps(x), _mm256_set1_ps(y), 1)}; }
inline void entries(const uint8_t* p, __m128i table, I& first, I& second) {  // 32 bytes of two indices each
    const __m256i b = _mm256_loadu_si256((const __m256i*)p), mask = _mm256_set1_epi8(15), t = _mm256_broadcastsi128_si256(table);
    first = {_mm512_cvtepi8_epi16(_mm256_shuffle_epi8(t, _mm256_and_si256(b, mask)))};
    second = {_mm512_cvtepi8_epi16(_mm256_shuffle_epi8(t, _mm256_and_si256(_mm256_srli_epi16(b, 4), mask)))};
}

#elif defined(__AVX2__)
struct V { __m256 a, b; };
struct Codes { __m256i a, b; };
inline V load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline V set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline V add(V x, V y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline V mul(V x, V y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline V negated(V x) { return {_mm256_sub_ps(_mm256_setzero_ps(), x.a), _mm256_sub_ps(_mm256_setzero_ps(), x.b)}; }
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
inline V signed_number(const uint8_t* p) {
    auto half = [](const uint8_t* q) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)q))); };
    return {half(p), half(p + 8)};
}
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

inline float largest(const float* p, int64_t count) {
    const __m256 sign = _mm256_set1_ps(-0.f);
    __m256 m = _mm256_setzero_ps();
    for (int64_t i = 0; i < count; i += 8) m = _mm256_max_ps(_mm256_andnot_ps(sign, _mm256_loadu_ps(p + i)), m);
    float all[8];
    _mm256_storeu_ps(all, m);
    return *std::max_element(all, all + 8);
}
// Rounds x / step, in place too: to whole steps.
inline void to_integers(float* p, int64_t count, float inverse, float step, int16_t* out) {
    for (int64_t i = 0; i < count; i += 8) {
        const __m256i q = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(p + i), _mm256_set1_ps(inverse)));
        const __m256i both = _mm256_permute4x64_epi64(_mm256_packs_epi32(q, q), 0xD8);
        _mm_storeu_si128((__m128i*)(out + i), _mm256_castsi256_si128(both));
        _mm256_storeu_ps(p + i, _mm256_mul_ps(_mm256_cvtepi32_ps(q), _mm256_set1_ps(step)));
    }
}
struct I { __m256i a, b; };  // 32 int16
inline I words(const uint8_t* p) {
    return {_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)p)), _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)(p + 16)))};
}
inline I words(const int16_t* p) { return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 16))}; }
template <int SHIFT, int MASK> inline I field(I x) {
    const __m256i mask = _mm256_set1_epi16(MASK);
    return {_mm256_and_si256(_mm256_srli_epi16(x.a, SHIFT), mask), _mm256_and_si256(_mm256_srli_epi16(x.b, SHIFT), mask)};
}
inline void crumbs(const uint8_t* p, I& first, I& second) {  // 2 bits each
    const __m256i b = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)p));
    first = field<0, 3>(I{b, _mm256_srli_epi16(b, 2)}), second = field<4, 3>(I{b, _mm256_srli_epi16(b, 2)});
}
template <int SHIFT> inline I join(I low, I high) {
    return {_mm256_or_si256(low.a, _mm256_slli_epi16(high.a, SHIFT)), _mm256_or_si256(low.b, _mm256_slli_epi16(high.b, SHIFT))};
}
template <int BIT> inline I join_bits(I low, const uint8_t* p) {  // 32 bits at p
    const __m256i each = _mm256_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, -32768);
    auto joined = [&](__m256i x, const uint8_t* q) {
        int16_t bits;
        memcpy(&bits, q, 2);
        __m256i set = _mm256_cmpeq_epi16(_mm256_and_si256(_mm256_set1_epi16(bits), each), each);
        return _mm256_or_si256(x, _mm256_and_si256(set, _mm256_set1_epi16(1 << BIT)));
    };
    return {joined(low.a, p), joined(low.b, p + 2)};
}
inline V dot(I x, I y) {
    return {_mm256_cvtepi32_ps(_mm256_madd_epi16(x.a, y.a)), _mm256_cvtepi32_ps(_mm256_madd_epi16(x.b, y.b))};
}
inline V dot(I x, I y, I z, I t) {
    return {_mm256_cvtepi32_ps(_mm256_add_epi32(_mm256_madd_epi16(x.a, y.a), _mm256_madd_epi16(z.a, t.a))),
            _mm256_cvtepi32_ps(_mm256_add_epi32(_mm256_madd_epi16(x.b, y.b), _mm256_madd_epi16(z.b, t.b)))};
}
inline float one_f16(const uint8_t* p) { return _cvtsh_ss(*(const uint16_t*)p); }
inline V halves(float x, float y) { return {_mm256_set1_ps(x), _mm256_set1_ps(y)}; }
inline void entries(const uint8_t* p, __m128i table, I& first, I& second) {  // 32 bytes of two indices each
    const __m256i b = _mm256_loadu_si256((const __m256i*)p), mask = _mm256_set1_epi8(15), t = _mm256_broadcastsi128_si256(table);
    auto widened = [&](__m256i i) {
        const __m256i v = _mm256_shuffle_epi8(t, _mm256_and_si256(i, mask));
        return I{_mm256_cvtepi8_epi16(_mm256_castsi256_si128(v)), _mm256_cvtepi8_epi16(_mm256_extracti128_si256(v, 1))};
    };
    first = widened(b), second = widened(_mm256_srli_epi16(b, 4));
}

#else
struct V { float a[LANES]; };
struct Codes { int32_t a[LANES]; };
inline float largest(const float*, int64_t) { return 0; }
inline void to_integers(float*, int64_t, float, float, int16_t*) {}
#define EACH for (int i = 0; i < LANES; i++)
inline V load(const float* p) { V r; EACH r.a[i] = p[i]; return r; }
inline V set(float x) { V r; EACH r.a[i] = x; return r; }
inline V add(V x, V y) { EACH x.a[i] += y.a[i]; return x; }
inline V mul(V x, V y) { EACH x.a[i] *= y.a[i]; return x; }
inline V negated(V x) { EACH x.a[i] = -x.a[i]; return x; }
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
inline V signed_number(const uint8_t* p) { V r; EACH r.a[i] = (int8_t)p[i]; return r; }
inline V entry(Codes c, const float* table) { V r; EACH r.a[i] = table[c.a[i] & 15]; return r; }
inline V e4m3(Codes c) {
    V r;
    EACH { float x = as_float((c.a[i] & 0x7F) << 20) * 0x1p120f; r.a[i] = c.a[i] & 0x80 ? -x : x; }
    return r;
}
inline V bf16(const uint8_t* p) { V r; uint16_t h[LANES]; memcpy(h, p, sizeof h); EACH r.a[i] = as_float((uint32_t)h[i] << 16); return r; }
inline float one_f16(const uint8_t* p) {
    const uint32_t h = p[0] | p[1] << 8, size = (h & 0x7FFF) << 13;
    const float x = (h & 0x7C00) == 0x7C00 ? as_float(size | 0x7F800000) : as_float(size) * 0x1p112f;
    return h & 0x8000 ? -x : x;
}
inline V halves(float x, float y) { V r; EACH r.a[i] = i < LANES / 2 ? x : y; return r; }
inline V f16(const uint8_t* p) { V r; EACH r.a[i] = one_f16(p + 2 * i); return r; }
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
    if constexpr (C == CODE_U8 || C == CODE_E4M3) {
        UNROLL for (int i = 0; i < 4; i++) q[i] = (C == CODE_U8 ? number : e4m3)(bytes(row + 64 * c + 16 * i));
    } else if constexpr (C == CODE_U2 || C == CODE_U3) {  // byte i: columns i, 16 + i, 32 + i, 48 + i
        Codes b = bytes(row + 16 * c), f[4] = {field<0, 3>(b), field<2, 3>(b), field<4, 3>(b), field<6, 3>(b)};
        UNROLL for (int i = 0; i < 4; i++) q[i] = number(C == CODE_U2 ? f[i] : join_bits<2>(f[i], high + 8 * c + 2 * i));
    } else {  // byte i: columns i, 32 + i
        Codes f[4], b = bytes(row + 32 * c), d = bytes(row + 32 * c + 16);
        f[0] = field<0, 15>(b), f[1] = field<0, 15>(d), f[2] = field<4, 15>(b), f[3] = field<4, 15>(d);
        if constexpr (C == CODE_TABLE) {
            UNROLL for (int i = 0; i < 4; i++) q[i] = entry(f[i], w.table);
            return;
        }
        if constexpr (C == CODE_U6) {
            Codes h = bytes(high + 16 * c);
            f[0] = join<4>(f[0], field<0, 3>(h)), f[1] = join<4>(f[1], field<2, 3>(h));
            f[2] = join<4>(f[2], field<4, 3>(h)), f[3] = join<4>(f[3], field<6, 3>(h));
        }
        UNROLL for (int i = 0; i < 4; i++) q[i] = number(C == CODE_U5 ? join_bits<4>(f[i], high + 8 * c + 2 * i) : f[i]);
    }
}

#if defined(__AVX2__)
template <int C> inline void integer_codes(const Rows& w, const uint8_t* row, const uint8_t* high, int64_t c, I& a, I& b) {
    if constexpr (C == CODE_U8) {
        a = words(row + 64 * c), b = words(row + 64 * c + 32);
    } else if constexpr (C == CODE_TABLE) {
        entries(row + 32 * c, _mm_loadu_si128((const __m128i*)w.entries), a, b);
    } else if constexpr (C == CODE_U2 || C == CODE_U3) {
        crumbs(row + 16 * c, a, b);
        if constexpr (C == CODE_U3) a = join_bits<2>(a, high + 8 * c), b = join_bits<2>(b, high + 8 * c + 4);
    } else {
        const I x = words(row + 32 * c);
        a = field<0, 15>(x), b = field<4, 15>(x);
        if constexpr (C == CODE_U5) a = join_bits<4>(a, high + 8 * c), b = join_bits<4>(b, high + 8 * c + 4);
        if constexpr (C == CODE_U6) {
            I h, k;
            crumbs(high + 16 * c, h, k);
            a = join<4>(a, h), b = join<4>(b, k);
        }
    }
}
#endif

// ---- scales

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
    UNROLL for (int i = 0; i < LANES; i++) found[i] = power_of_two(p[i], dtype == E8M0 ? 127 : 128);
    return load(found);
}

// Super-scales of the groups g to g + 15 of row n; each counts for 256 columns.
template <int G> inline V supers(const Rows& w, const uint8_t* plane, int64_t n, int64_t g) {
    static_assert(G < 4);
    const uint8_t* p = plane + 2 * (n * (w.groups * G / LANES) + g * G / LANES);
    return G == 1 ? set(one_f16(p)) : halves(one_f16(p), one_f16(p + 2));
}

// Scales and biases of these groups: w = scale * code + bias. Those past the row's end are of the next row. Returns
// whether there are biases.
template <int G> INLINE bool scales_of(const Rows& w, int64_t n, int64_t g, V& scale, V& bias) {
    const int64_t at = n * w.groups + g;
    const uint8_t* p = w.scales + at * size_of(w.scale);
    scale = numbers(w.scale, p);
    if constexpr (G < 4) if (w.super_scales) scale = mul(scale, supers<G>(w, w.super_scales, n, g));
    if (w.row_scales) scale = mul(scale, set(((const float*)w.row_scales)[n]));
    bool biased = false;
    if (w.zeros) bias = mul(scale, negated(numbers(U8, w.zeros + at))), biased = true;
    else if (w.zero != 0) bias = mul(scale, set(-w.zero)), biased = true;
    if (w.biases) {
        const V more = numbers(w.scale, w.biases + at * size_of(w.scale));
        bias = biased ? add(more, bias) : more, biased = true;
    }
    if constexpr (G < 4) if (w.super_mins) {
        const V mins = w.scale == U4 ? numbers(HIGH_U4, p) : numbers(U8, w.mins + at);
        bias = mul(mins, negated(supers<G>(w, w.super_mins, n, g))), biased = true;
    }
    return biased;
}

// ---- y = x w^T

// Rows of x, padded with zeros.
struct Input {
    int64_t rows, columns, groups;  // groups: padded to a multiple of 16
    std::vector<float> x, sums;     // (rows, columns), (rows, groups)
    std::vector<int16_t> integers;  // x in `steps`
    std::vector<float> steps;       // (rows, groups)
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

// x (m, columns). Integers are in steps of 1 / 32767 of the largest magnitude of the group; NaN where x is not finite.
void prepare(const Rows& w, const void* x, Dtype dtype, int64_t m, int64_t columns, bool as_integers, Input& in) {
    in.rows = m, in.columns = w.columns, in.groups = (w.groups + LANES - 1) / LANES * LANES;
    in.x.assign(m * w.columns, 0.f), in.sums.assign(m * in.groups, 0.f);
    if (as_integers) in.integers.resize(m * w.columns), in.steps.assign(m * in.groups, 0.f);
    for (int64_t r = 0; r < m; r++) {
        float* row = in.x.data() + r * w.columns;
        const uint8_t* from = (const uint8_t*)x + r * columns * size_of(dtype);
        int64_t i = 0;
        for (; i + LANES <= columns; i += LANES) store(row + i, numbers(dtype, from + i * size_of(dtype)));
        if (i < columns) {
            uint8_t rest[4 * LANES] = {};
            memcpy(rest, from + i * size_of(dtype), (columns - i) * size_of(dtype));
            store(row + i, numbers(dtype, rest));
        }
        for (int64_t g = 0; g < w.groups; g++) {
            float* p = row + g * w.group;
            const int64_t end = std::min(w.group, w.columns - g * w.group);
            V total = set(0), nan = set(0);
            if (as_integers) {
                for (int64_t j = 0; j < end; j += LANES) nan = fma(load(p + j), set(0), nan);
                const float step = largest(p, end) / 32767 + sum(nan);
                in.steps[r * in.groups + g] = step * w.factor;
                to_integers(p, end, step > 0 ? 1 / step : 0, step, in.integers.data() + r * w.columns + g * w.group);
            }
            for (int64_t j = 0; j < end; j += LANES) total = add(load(p + j), total);
            in.sums[r * in.groups + g] = sum(total);
        }
    }
}

// Adds the products of a chunk; `i`: the first of its scales.
template <int C, int G, int M> inline void float_chunk(
    const Rows& w, const uint8_t* row, const uint8_t* high, int64_t c, const Input& in, int64_t m0, const float (&scales)[M][LANES], int64_t i, V (&acc)[M][2]) {
    V q[4];
    codes<C>(w, row, high, c, q);
    UNROLL for (int v = 0; v < 4; v += G) {
        UNROLL for (int m = 0; m < M; m++) {
            const float* p = in.x.data() + (m0 + m) * in.columns + c * CHUNK + v * LANES;
            V product = mul(q[v], load(p));
            UNROLL for (int j = 1; j < G; j++) product = fma(q[v + j], load(p + j * LANES), product);
            V& sum = acc[m][v / G % 2];
            sum = fma(product, set(scales[m][i + v / G]), sum);
        }
    }
}

#if defined(__AVX2__)
template <int C, int G, int M> inline void integer_chunk(
    const Rows& w, const uint8_t* row, const uint8_t* high, int64_t c, const Input& in, int64_t m0, const float (&scales)[M][LANES], int64_t i, V (&acc)[M][2]) {
    I a, b;
    integer_codes<C>(w, row, high, c, a, b);
    UNROLL for (int m = 0; m < M; m++) {
        const int16_t* p = in.integers.data() + (m0 + m) * in.columns + c * CHUNK;
        const float* s = scales[m] + i;
        const I u = words(p), v = words(p + 32);
        if constexpr (G == 4) {
            acc[m][0] = fma(dot(a, u, b, v), set(s[0]), acc[m][0]);
        } else {
            acc[m][0] = fma(dot(a, u), G == 2 ? set(s[0]) : halves(s[0], s[1]), acc[m][0]);
            acc[m][1] = fma(dot(b, v), G == 2 ? set(s[1]) : halves(s[2], s[3]), acc[m][1]);
        }
    }
}
#else
template <int C, int G, int M, class... Args> inline void integer_chunk(Args&&...) {}
#endif

// The products of one row of w and M rows of x. G: vectors of a chunk that share a scale.
template <int C, int G, int M, bool INTEGERS> inline void products(const Rows& w, int64_t n, const Input& in, int64_t m0, float* y) {
    const uint8_t *row = w.codes + n * w.codes_stride, *high = w.high + n * w.high_stride;
    const int64_t chunks = in.columns / CHUNK, per = G == 4 ? w.group / CHUNK : 1, block = LANES * G / 4 * per;
    V acc[M][2], biases[M];  // two sums, as one would wait for its last addition
    UNROLL for (int m = 0; m < M; m++) acc[m][0] = acc[m][1] = biases[m] = set(0);
    for (int64_t begin = 0, g = 0; begin < chunks; begin += block, g += LANES) {
        float scales[M][LANES];
        V scale, bias;
        const bool biased = scales_of<G>(w, n, g, scale, bias);
        UNROLL for (int m = 0; m < M; m++) {
            store(scales[m], INTEGERS ? mul(scale, load(in.steps.data() + (m0 + m) * in.groups + g)) : scale);
            if (biased) biases[m] = fma(bias, load(in.sums.data() + (m0 + m) * in.groups + g), biases[m]);
        }
        const int64_t end = std::min(chunks, begin + block);
        for (int64_t c = begin; c < end; c++) {
            const int64_t i = G == 4 ? (c - begin) / per : (c - begin) * (4 / G);
            if constexpr (INTEGERS) integer_chunk<C, G, M>(w, row, high, c, in, m0, scales, i, acc);
            else float_chunk<C, G, M>(w, row, high, c, in, m0, scales, i, acc);
        }
    }
    UNROLL for (int m = 0; m < M; m++) y[m] = sum(add(add(acc[m][0], acc[m][1]), biases[m]));
}

template <int C, int G, bool INTEGERS> void rows_of(const Rows& w, int64_t begin, int64_t end, const Input& in, Dtype dtype, void* y, int64_t stride) {
    for (int64_t n = begin; n < end; n++) {
        for (int64_t m = 0; m < in.rows;) {
            float found[4];
            // float32 of integer codes is for checks: one row at a time, for less code
            constexpr bool MANY = INTEGERS || C >= CODE_E4M3 || !HAS_INTEGERS;
            const int64_t left = in.rows - m, count = MANY && left >= 4 ? 4 : MANY && left >= 2 ? 2 : 1;
            if constexpr (MANY) {
                if (count == 4) products<C, G, 4, INTEGERS>(w, n, in, m, found);
                if (count == 2) products<C, G, 2, INTEGERS>(w, n, in, m, found);
            }
            if (count == 1) products<C, G, 1, INTEGERS>(w, n, in, m, found);
            for (int i = 0; i < count; i++, m++) store_one(dtype, y, m * stride + n, found[i]);
        }
    }
}

template <int G> __attribute__((noinline)) void stored_scales(const Rows& w, int64_t n, int64_t g, float* scales, float* biases) {
    V scale, bias;
    if (!scales_of<G>(w, n, g, scale, bias)) bias = set(0);
    store(scales, scale), store(biases, bias);
}

template <int C, int G> void unpack_rows(const Rows& w, const int64_t* index, int64_t begin, int64_t end, int64_t columns, Dtype dtype, void* out) {
    const int64_t per = G == 4 ? w.group / CHUNK : 1, block = LANES * G / 4 * per;
    for (int64_t r = begin; r < end; r++) {
        const int64_t n = index ? index[r] : r;
        const uint8_t *row = w.codes + n * w.codes_stride, *high = w.high + n * w.high_stride;
        float scales[LANES], biases[LANES];
        for (int64_t c = 0; c * CHUNK < columns; c++) {
            if (c % block == 0) stored_scales<G>(w, n, c / block * LANES, scales, biases);
            V q[4];
            codes<C>(w, row, high, c, q);
            UNROLL for (int i = 0; i < 4; i++) {
                const int64_t at = c * CHUNK + i * LANES, g = G == 4 ? c % block / per : (c % block * 4 + i) / G;
                const V value = fma(q[i], set(scales[g]), set(biases[g]));
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

template <int C> constexpr Linear linear_of[] = {rows_of<C, 1, false>, rows_of<C, 2, false>, rows_of<C, 4, false>};
template <int C> constexpr bool IS_INTEGER = C < CODE_E4M3;
template <int C> constexpr Linear integers_of[] = {
    rows_of<C, 1, IS_INTEGER<C>>, rows_of<C, 2, IS_INTEGER<C>>, rows_of<C, 4, IS_INTEGER<C>>};
template <int C> constexpr Unpack unpack_of[] = {unpack_rows<C, 1>, unpack_rows<C, 2>, unpack_rows<C, 4>};

#define OF_CODE(table, w) \
    ((w).code == CODE_U2 ? table<CODE_U2> : (w).code == CODE_U3 ? table<CODE_U3> : (w).code == CODE_U4 ? table<CODE_U4> : \
     (w).code == CODE_U5 ? table<CODE_U5> : (w).code == CODE_U6 ? table<CODE_U6> : (w).code == CODE_U8 ? table<CODE_U8> : \
     (w).code == CODE_TABLE ? table<CODE_TABLE> : table<CODE_E4M3>)[(w).group == 16 ? 0 : (w).group == 32 ? 1 : 2]

// Tasks are a few per thread, so that a thread whose core is busy takes fewer.
template <class F> void parallel(int64_t count, int threads, F run) {
    const int64_t task = std::max<int64_t>((count + 8 * threads - 1) / (8 * threads), 4), tasks = (count + task - 1) / task;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t i = 0; i < tasks; i++) run(i * task, std::min(count, (i + 1) * task));
}

}  // namespace

// x (m, columns), y (m, stride), row by row. x in 16 bits is rounded to integers.
extern "C" void llmrs_linear(
    const Rows* w, const void* x, int32_t x_dtype, int64_t m, int64_t columns, void* y, int32_t y_dtype, int64_t stride, int32_t threads) {
    static thread_local Input in;
    const bool as_integers = HAS_INTEGERS && x_dtype != F32 && w->code < CODE_E4M3;
    prepare(*w, x, (Dtype)x_dtype, m, columns, as_integers, in);
    const Linear run = as_integers ? OF_CODE(integers_of, *w) : OF_CODE(linear_of, *w);
    const Input& input = in;
    parallel(w->rows, threads, [&](int64_t begin, int64_t end) { run(*w, begin, end, input, (Dtype)y_dtype, y, stride); });
}

// Rows, all or by their numbers, to out (count, columns).
extern "C" void llmrs_unpack(const Rows* w, const int64_t* index, int64_t count, int64_t columns, int32_t dtype, void* out, int32_t threads) {
    const Unpack run = OF_CODE(unpack_of, *w);
    parallel(count, threads, [&](int64_t begin, int64_t end) { run(*w, index, begin, end, columns, (Dtype)dtype, out); });
}
