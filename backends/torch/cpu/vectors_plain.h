// The operations of vectors.h in plain C++, for the compiler to vectorize; without integer products.

struct V {
    float a[LANES];
};
struct I {
    int32_t a[LANES];
};
#define EACH for (int i = 0; i < LANES; i++)
inline V load(const float* p) {
    V r;
    EACH
    r.a[i] = p[i];
    return r;
}
inline V set(float x) {
    V r;
    EACH
    r.a[i] = x;
    return r;
}
inline V add(V x, V y) {
    EACH
    x.a[i] += y.a[i];
    return x;
}
inline V mul(V x, V y) {
    EACH
    x.a[i] *= y.a[i];
    return x;
}
inline V div(V x, V y) {
    EACH
    x.a[i] /= y.a[i];
    return x;
}
inline V max(V x, V y) {
    EACH
    x.a[i] = x.a[i] > y.a[i] ? x.a[i] : y.a[i];
    return x;
}
inline V round(V x) {
    EACH
    x.a[i] = nearbyintf(x.a[i]);
    return x;
}
inline V times_power(V x, V n) {  // x 2^n
    EACH
    x.a[i] = ldexpf(x.a[i], (int)n.a[i]);
    return x;
}
inline float maximum(V x) { return *std::max_element(x.a, x.a + LANES); }
inline V negated(V x) {
    EACH
    x.a[i] = -x.a[i];
    return x;
}
inline V fma(V x, V y, V z) {
    EACH
    z.a[i] += x.a[i] * y.a[i];
    return z;
}
inline float sum(V x) {
    for (int n = LANES / 2; n; n /= 2)
        for (int i = 0; i < n; i++) x.a[i] += x.a[i + n];
    return x.a[0];
}
inline void store(float* p, V x) {
    EACH
    p[i] = x.a[i];
}
inline I bytes(const uint8_t* p) {
    I r;
    EACH
    r.a[i] = p[i];
    return r;
}
inline I words(const void* p) {
    I r;
    memcpy(&r, p, sizeof r);
    return r;
}
// f of each int16.
template <class F> inline I each_word(I x, F f) {
    int16_t w[2 * LANES];
    memcpy(w, &x, sizeof w);
    for (int i = 0; i < 2 * LANES; i++) w[i] = f(w[i]);
    return words(w);
}
template <int SHIFT, int MASK> inline I field(I x) {  // SHIFT: right, or left if negative
    return each_word(x, [](uint16_t w) { return (SHIFT > 0 ? w >> (SHIFT & 15) : w << (-SHIFT & 15)) & MASK; });
}
inline I join(I x, I y) {
    EACH
    x.a[i] |= y.a[i];
    return x;
}
inline I set_int(int32_t x) {
    I r;
    EACH
    r.a[i] = x;
    return r;
}
inline I set_pair(const int16_t* p) {
    int32_t both;
    memcpy(&both, p, 4);
    return set_int(both);
}
inline I low(I x) {
    EACH
    x.a[i] = (int16_t)x.a[i];
    return x;
}
inline I high(I x) {
    EACH
    x.a[i] >>= 16;
    return x;
}
inline I dot(I sum, I x, I y) {
    EACH
    sum.a[i] += (int16_t)x.a[i] * (int16_t)y.a[i] + (x.a[i] >> 16) * (y.a[i] >> 16);
    return sum;
}
inline I entries(I x, const int8_t* table) {  // bytes below 16
    uint8_t b[4 * LANES];
    memcpy(b, &x, sizeof b);
    for (uint8_t& byte : b) byte = table[byte & 15];
    return words(b);
}
inline I lower_byte(I x) {
    return each_word(x, [](int16_t w) { return (int8_t)w; });
}  // signed
inline I upper_byte(I x) {
    return each_word(x, [](int16_t w) { return w >> 8; });
}
inline V number(I c) {
    V r;
    EACH
    r.a[i] = (float)c.a[i];
    return r;
}
inline V signed_number(const uint8_t* p) {
    V r;
    EACH
    r.a[i] = (int8_t)p[i];
    return r;
}
inline V e4m3(I c) {
    V r;
    EACH
    {
        float x = as_float((c.a[i] & 0x7F) << 20) * 0x1p120f;
        r.a[i] = c.a[i] & 0x80 ? -x : x;
    }
    return r;
}
inline V bf16(const uint8_t* p) {
    V r;
    uint16_t h[LANES];
    memcpy(h, p, sizeof h);
    EACH
    r.a[i] = as_float((uint32_t)h[i] << 16);
    return r;
}
inline float one_f16(const uint8_t* p) {
    const uint32_t h = p[0] | p[1] << 8, size = (h & 0x7FFF) << 13;
    const float x = (h & 0x7C00) == 0x7C00 ? as_float(size | 0x7F800000) : as_float(size) * 0x1p112f;
    return h & 0x8000 ? -x : x;
}
inline V f16(const uint8_t* p) {
    V r;
    EACH
    r.a[i] = one_f16(p + 2 * i);
    return r;
}
inline void store_f16(uint16_t* p, V x) {  // to nearest, ties to even
    EACH
    {
        uint32_t bits;
        memcpy(&bits, &x.a[i], 4);
        const uint32_t sign = bits >> 16 & 0x8000, size = bits & 0x7FFFFFFF;
        if (size > 0x7F800000) {
            p[i] = sign | 0x7E00;
            continue;
        }
        if (size >= 0x477FF000) {
            p[i] = sign | 0x7C00;
            continue;
        }
        if (size >= 0x38800000) {
            p[i] = sign | ((size - 0x38000000 + 0xFFF + (size >> 13 & 1)) >> 13);
            continue;
        }
        const float shifted = as_float(size) + 0.5f;  // adds at the place of f16's last subnormal bit
        memcpy(&bits, &shifted, 4);
        p[i] = sign | (bits - 0x3F000000);
    }
}
inline void store_bf16(uint16_t* p, V x) {
    EACH
    {
        uint32_t b;
        memcpy(&b, &x.a[i], 4);
        p[i] = (uint16_t)((b + 0x7FFF + (b >> 16 & 1)) >> 16);
    }
}
inline float largest(const float* p, int64_t count) {
    float m = 0;
    for (int64_t i = 0; i < count; i++) m = std::max(m, std::fabs(p[i]));
    return m;
}
inline void to_integers(float* p, int64_t count, float inverse, float step, int16_t* out) {
    for (int64_t i = 0; i < count; i++) {
        const float q = nearbyintf(p[i] * inverse);
        out[i] = std::isfinite(q) ? (int16_t)q : 0, p[i] = q * step;
    }
}
inline void transpose(const Words& x, Words& y) {
    for (int r = 0; r < LANES; r++) EACH
    y[r][i] = x[i][r];
}
inline V joined(const uint16_t* low, const uint16_t* high) {
    V r;
    EACH
    r.a[i] = as_float(low[i] | (uint32_t)high[i] << 16);
    return r;
}
inline V pair_f16(V x, V y) {
    uint16_t a[LANES], b[LANES];
    store_f16(a, x), store_f16(b, y);
    return joined(a, b);
}
inline V pair_bf16(V x, V y) {
    uint16_t a[LANES], b[LANES];
    store_bf16(a, x), store_bf16(b, y);
    return joined(a, b);
}
