// The operations of vectors.h for AVX512 F, BW, DQ and VL.

struct V {
    __m512 a;
};
struct Codes {
    __m512i a;
};
inline V load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline V set(float x) { return {_mm512_set1_ps(x)}; }
inline V add(V x, V y) { return {_mm512_add_ps(x.a, y.a)}; }
inline V mul(V x, V y) { return {_mm512_mul_ps(x.a, y.a)}; }
inline V div(V x, V y) { return {_mm512_div_ps(x.a, y.a)}; }
inline V max(V x, V y) { return {_mm512_max_ps(x.a, y.a)}; }
inline V round(V x) { return {_mm512_roundscale_ps(x.a, 0)}; }
inline V times_power(V x, V n) { return {_mm512_scalef_ps(x.a, n.a)}; }  // x 2^n
inline float maximum(V x) { return _mm512_reduce_max_ps(x.a); }
inline V negated(V x) { return {_mm512_sub_ps(_mm512_setzero_ps(), x.a)}; }
inline V fma(V x, V y, V z) { return {_mm512_fmadd_ps(x.a, y.a, z.a)}; }
inline float sum(V x) { return _mm512_reduce_add_ps(x.a); }
inline void store(float* p, V x) { _mm512_storeu_ps(p, x.a); }
inline Codes bytes(const uint8_t* p) { return {_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p))}; }
template <int SHIFT, int MASK> inline Codes field(Codes c) {
    __m512i x = SHIFT ? _mm512_srli_epi32(c.a, SHIFT) : c.a;
    return {MASK >> (8 - SHIFT) ? x : _mm512_and_si512(x, _mm512_set1_epi32(MASK))};
}
template <int SHIFT> inline Codes join(Codes low, Codes high) {
    return {_mm512_or_si512(low.a, _mm512_slli_epi32(high.a, SHIFT))};
}
template <int BIT> inline Codes join_bits(Codes low, const uint8_t* p) {  // 16 bits at p
    uint16_t bits;
    memcpy(&bits, p, 2);
    return {_mm512_mask_or_epi32(low.a, bits, low.a, _mm512_set1_epi32(1 << BIT))};
}
inline V number(Codes c) { return {_mm512_cvtepi32_ps(c.a)}; }
inline V signed_number(const uint8_t* p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)))};
}
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
struct I {
    __m512i a;
};  // 32 int16
inline I words(const uint8_t* p) { return {_mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)p))}; }
inline I words(const int16_t* p) { return {_mm512_loadu_si512(p)}; }
template <int SHIFT, int MASK> inline I field(I x) {
    x.a = SHIFT ? _mm512_srli_epi16(x.a, SHIFT) : x.a;
    return {MASK >> (8 - SHIFT) ? x.a : _mm512_and_si512(x.a, _mm512_set1_epi16(MASK))};
}
inline void crumbs(const uint8_t* p, I& first, I& second) {  // 2 bits each
    const __m512i two = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(2), 1),
                  mask = _mm512_set1_epi16(3);
    const __m512i b = _mm512_cvtepu8_epi16(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)p)));
    first = {_mm512_and_si512(_mm512_srlv_epi16(b, two), mask)};
    second = {_mm512_and_si512(_mm512_srlv_epi16(_mm512_srli_epi16(b, 4), two), mask)};
}
inline void join_crumbs(I& first, I& second, const uint8_t* p) {  // as bits 4 and 5
    const __m512i two = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(2), 1),
                  four = _mm512_sub_epi16(_mm512_set1_epi16(4), two), mask = _mm512_set1_epi16(0x30);
    const __m512i b = _mm512_cvtepu8_epi16(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)p)));
    first.a = _mm512_ternarylogic_epi32(first.a, _mm512_sllv_epi16(b, four), mask, 0xF8);  // a | b & c
    second.a = _mm512_ternarylogic_epi32(second.a, _mm512_srlv_epi16(b, two), mask, 0xF8);
}
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
inline V pair(const float* p) {  // 8 of each
    const __m512i both = _mm512_broadcastq_epi64(_mm_loadl_epi64((const __m128i*)p));
    const __m512i lanes = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi32(1), 1);
    return {_mm512_permutevar_ps(_mm512_castsi512_ps(both), lanes)};
}
inline V halves(float x, float y) { return {_mm512_insertf32x8(_mm512_set1_ps(x), _mm256_set1_ps(y), 1)}; }
inline void entries(const uint8_t* p, __m128i table, I& first, I& second) {  // 32 bytes of two indices each
    const __m256i b = _mm256_loadu_si256((const __m256i*)p), mask = _mm256_set1_epi8(15),
                  t = _mm256_broadcastsi128_si256(table);
    first = {_mm512_cvtepi8_epi16(_mm256_shuffle_epi8(t, _mm256_and_si256(b, mask)))};
    second = {_mm512_cvtepi8_epi16(_mm256_shuffle_epi8(t, _mm256_and_si256(_mm256_srli_epi16(b, 4), mask)))};
}
