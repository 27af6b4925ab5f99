// The operations of vectors.h for AVX2, FMA and F16C: pairs of registers.

struct V {
    __m256 a, b;
};
struct I {
    __m256i a, b;
};
inline V load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline V set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline V add(V x, V y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline V mul(V x, V y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline V div(V x, V y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline V max(V x, V y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline V round(V x) { return {_mm256_round_ps(x.a, 8), _mm256_round_ps(x.b, 8)}; }
inline V times_power(V x, V n) {  // x 2^n; |n| < 127
    auto power = [](__m256 y) {
        return _mm256_castsi256_ps(
            _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(y), _mm256_set1_epi32(127)), 23)
        );
    };
    return mul(x, {power(n.a), power(n.b)});
}
inline V negated(V x) { return {_mm256_sub_ps(_mm256_setzero_ps(), x.a), _mm256_sub_ps(_mm256_setzero_ps(), x.b)}; }
inline V fma(V x, V y, V z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline float sum(V x) {
    __m256 s = _mm256_add_ps(x.a, x.b);
    __m128 h = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    h = _mm_add_ps(h, _mm_movehl_ps(h, h));
    return _mm_cvtss_f32(_mm_add_ss(h, _mm_shuffle_ps(h, h, 1)));
}
inline float maximum(V x) {
    float all[LANES];
    _mm256_storeu_ps(all, x.a), _mm256_storeu_ps(all + 8, x.b);
    return *std::max_element(all, all + LANES);
}
inline void store(float* p, V x) { _mm256_storeu_ps(p, x.a), _mm256_storeu_ps(p + 8, x.b); }
inline __m256i widened(const uint8_t* p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
inline I bytes(const uint8_t* p) { return {widened(p), widened(p + 8)}; }
inline I words(const void* p) {
    return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)p + 1)};
}
template <int SHIFT, int MASK> inline I field(I x) {  // SHIFT: right, or left if negative
    if constexpr (SHIFT > 0) x = {_mm256_srli_epi16(x.a, SHIFT), _mm256_srli_epi16(x.b, SHIFT)};
    if constexpr (SHIFT < 0) x = {_mm256_slli_epi16(x.a, -SHIFT), _mm256_slli_epi16(x.b, -SHIFT)};
    if constexpr (keeps_all(SHIFT, MASK)) return x;
    const __m256i mask = _mm256_set1_epi16(MASK);
    return {_mm256_and_si256(x.a, mask), _mm256_and_si256(x.b, mask)};
}
inline I join(I x, I y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
inline I set_int(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline I set_pair(const int16_t* p) {
    int32_t both;
    memcpy(&both, p, 4);
    return set_int(both);
}
inline I dot(I sum, I x, I y) {
    return {_mm256_add_epi32(sum.a, _mm256_madd_epi16(x.a, y.a)), _mm256_add_epi32(sum.b, _mm256_madd_epi16(x.b, y.b))};
}
inline V number(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline I high(I x) { return {_mm256_srai_epi32(x.a, 16), _mm256_srai_epi32(x.b, 16)}; }
inline I low(I x) { return high({_mm256_slli_epi32(x.a, 16), _mm256_slli_epi32(x.b, 16)}); }
inline I entries(I x, const int8_t* table) {  // bytes below 16
    const __m256i t = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)table));
    return {_mm256_shuffle_epi8(t, x.a), _mm256_shuffle_epi8(t, x.b)};
}
inline I upper_byte(I x) { return {_mm256_srai_epi16(x.a, 8), _mm256_srai_epi16(x.b, 8)}; }  // of each int16, signed
inline I lower_byte(I x) { return upper_byte({_mm256_slli_epi16(x.a, 8), _mm256_slli_epi16(x.b, 8)}); }
inline V signed_number(const uint8_t* p) {
    auto half = [](const uint8_t* q) {
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)q)));
    };
    return {half(p), half(p + 8)};
}
inline V e4m3(I c) {
    auto value = [](__m256i i) {
        __m256i size = _mm256_slli_epi32(_mm256_and_si256(i, _mm256_set1_epi32(0x7F)), 20);
        __m256i sign = _mm256_slli_epi32(_mm256_and_si256(i, _mm256_set1_epi32(0x80)), 24);
        return _mm256_or_ps(
            _mm256_mul_ps(_mm256_castsi256_ps(size), _mm256_set1_ps(0x1p120f)), _mm256_castsi256_ps(sign)
        );
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
    return {
        _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 16)))
    };
}
inline void store_f16(uint16_t* p, V x) {
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x.a, 0)),
        _mm_storeu_si128((__m128i*)(p + 8), _mm256_cvtps_ph(x.b, 0));
}
inline __m256i rounded_bf16(__m256 y) {  // to nearest, ties to even; in the upper half of each lane
    __m256i bits = _mm256_castps_si256(y), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
}
inline void store_bf16(uint16_t* p, V x) {
    const __m256i a = _mm256_srli_epi32(rounded_bf16(x.a), 16), b = _mm256_srli_epi32(rounded_bf16(x.b), 16);
    _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(_mm256_packus_epi32(a, b), 0xD8));
}
inline V pair_bf16(V x, V y) {
    auto half = [](__m256 u, __m256 v) {
        return _mm256_castsi256_ps(_mm256_blend_epi16(_mm256_srli_epi32(rounded_bf16(u), 16), rounded_bf16(v), 0xAA));
    };
    return {half(x.a, y.a), half(x.b, y.b)};
}
inline V pair_f16(V x, V y) {
    auto half = [](__m256 u, __m256 v) {
        const __m256i low = _mm256_cvtepu16_epi32(_mm256_cvtps_ph(u, 0)),
                      high = _mm256_cvtepu16_epi32(_mm256_cvtps_ph(v, 0));
        return _mm256_castsi256_ps(_mm256_or_si256(low, _mm256_slli_epi32(high, 16)));
    };
    return {half(x.a, y.a), half(x.b, y.b)};
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
