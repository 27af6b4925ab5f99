// The operations of vectors.h for AVX2, FMA and F16C: pairs of registers.

struct V {
    __m256 a, b;
};
struct Codes {
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
inline Codes bytes(const uint8_t* p) { return {widened(p), widened(p + 8)}; }
template <int SHIFT, int MASK> inline Codes field(Codes c) {
    __m256i mask = _mm256_set1_epi32(MASK);
    return {
        _mm256_and_si256(_mm256_srli_epi32(c.a, SHIFT), mask), _mm256_and_si256(_mm256_srli_epi32(c.b, SHIFT), mask)
    };
}
template <int SHIFT> inline Codes join(Codes low, Codes high) {
    return {
        _mm256_or_si256(low.a, _mm256_slli_epi32(high.a, SHIFT)),
        _mm256_or_si256(low.b, _mm256_slli_epi32(high.b, SHIFT))
    };
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
    auto half = [](const uint8_t* q) {
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)q)));
    };
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
inline void store_bf16(uint16_t* p, V x) {  // to nearest, ties to even
    auto rounded = [](__m256 y) {
        __m256i bits = _mm256_castps_si256(y),
                odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
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
struct I {
    __m256i a, b;
};  // 32 int16
inline I words(const uint8_t* p) {
    return {
        _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)p)),
        _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)(p + 16)))
    };
}
inline I words(const int16_t* p) {
    return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 16))};
}
template <int SHIFT, int MASK> inline I field(I x) {
    const __m256i mask = _mm256_set1_epi16(MASK);
    return {
        _mm256_and_si256(_mm256_srli_epi16(x.a, SHIFT), mask), _mm256_and_si256(_mm256_srli_epi16(x.b, SHIFT), mask)
    };
}
inline void crumbs(const uint8_t* p, I& first, I& second) {  // 2 bits each
    const __m256i b = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)p));
    first = field<0, 3>(I{b, _mm256_srli_epi16(b, 2)}), second = field<4, 3>(I{b, _mm256_srli_epi16(b, 2)});
}
inline void join_crumbs(I& first, I& second, const uint8_t* p) {  // as bits 4 and 5
    const __m256i b = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)p)), mask = _mm256_set1_epi16(0x30);
    first.a = _mm256_or_si256(first.a, _mm256_and_si256(_mm256_slli_epi16(b, 4), mask));
    first.b = _mm256_or_si256(first.b, _mm256_and_si256(_mm256_slli_epi16(b, 2), mask));
    second.a = _mm256_or_si256(second.a, _mm256_and_si256(b, mask));
    second.b = _mm256_or_si256(second.b, _mm256_and_si256(_mm256_srli_epi16(b, 2), mask));
}
template <int BIT> inline I join_bits(I low, const uint8_t* p) {  // 32 bits at p
    const __m256i each =
        _mm256_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, -32768);
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
    return {
        _mm256_cvtepi32_ps(_mm256_add_epi32(_mm256_madd_epi16(x.a, y.a), _mm256_madd_epi16(z.a, t.a))),
        _mm256_cvtepi32_ps(_mm256_add_epi32(_mm256_madd_epi16(x.b, y.b), _mm256_madd_epi16(z.b, t.b)))
    };
}
inline float one_f16(const uint8_t* p) { return _cvtsh_ss(*(const uint16_t*)p); }
inline V pair(const float* p) { return {_mm256_set1_ps(p[0]), _mm256_set1_ps(p[1])}; }
inline V halves(float x, float y) { return {_mm256_set1_ps(x), _mm256_set1_ps(y)}; }
inline void entries(const uint8_t* p, __m128i table, I& first, I& second) {  // 32 bytes of two indices each
    const __m256i b = _mm256_loadu_si256((const __m256i*)p), mask = _mm256_set1_epi8(15),
                  t = _mm256_broadcastsi128_si256(table);
    auto widened = [&](__m256i i) {
        const __m256i v = _mm256_shuffle_epi8(t, _mm256_and_si256(i, mask));
        return I{_mm256_cvtepi8_epi16(_mm256_castsi256_si128(v)), _mm256_cvtepi8_epi16(_mm256_extracti128_si256(v, 1))};
    };
    first = widened(b), second = widened(_mm256_srli_epi16(b, 4));
}
