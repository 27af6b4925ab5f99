// The operations of vectors.h for AVX512 F, BW, DQ and VL.

struct V {
    __m512 a;
};
struct I {
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
inline I bytes(const uint8_t* p) { return {_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p))}; }
inline I words(const void* p) { return {_mm512_loadu_si512(p)}; }
template <int SHIFT, int MASK> inline I field(I x) {  // SHIFT: right, or left if negative
    if constexpr (SHIFT > 0) x.a = _mm512_srli_epi16(x.a, SHIFT);
    if constexpr (SHIFT < 0) x.a = _mm512_slli_epi16(x.a, -SHIFT);
    return {keeps_all(SHIFT, MASK) ? x.a : _mm512_and_si512(x.a, _mm512_set1_epi16(MASK))};
}
inline I join(I x, I y) { return {_mm512_or_si512(x.a, y.a)}; }
inline I set_int(int32_t x) { return {_mm512_set1_epi32(x)}; }
inline I set_pair(const int16_t* p) {
    int32_t both;
    memcpy(&both, p, 4);
    return set_int(both);
}
inline I dot(I sum, I x, I y) { return {_mm512_add_epi32(sum.a, _mm512_madd_epi16(x.a, y.a))}; }
inline V number(I x) { return {_mm512_cvtepi32_ps(x.a)}; }
inline I low(I x) { return {_mm512_srai_epi32(_mm512_slli_epi32(x.a, 16), 16)}; }
inline I high(I x) { return {_mm512_srai_epi32(x.a, 16)}; }
inline I entries(I x, const int8_t* table) {  // bytes below 16
    return {_mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)table)), x.a)};
}
inline I lower_byte(I x) { return {_mm512_srai_epi16(_mm512_slli_epi16(x.a, 8), 8)}; }  // of each int16, signed
inline I upper_byte(I x) { return {_mm512_srai_epi16(x.a, 8)}; }
inline V signed_number(const uint8_t* p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)))};
}
inline V e4m3(I c) {
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
inline __m512i rounded_bf16(V x) {  // to nearest, ties to even; in the upper half of each lane
    __m512i bits = _mm512_castps_si512(x.a), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
}
inline void store_bf16(uint16_t* p, V x) {
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded_bf16(x), 16)));
}
inline V pair_bf16(V x, V y) {
    const __m512i low = _mm512_srli_epi32(rounded_bf16(x), 16), high = rounded_bf16(y);
    return {_mm512_castsi512_ps(_mm512_mask_mov_epi16(low, 0xAAAAAAAA, high))};
}
inline V pair_f16(V x, V y) {
    const __m512i low = _mm512_cvtepu16_epi32(_mm512_cvtps_ph(x.a, 0)),
                  high = _mm512_cvtepu16_epi32(_mm512_cvtps_ph(y.a, 0));
    return {_mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)))};
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
