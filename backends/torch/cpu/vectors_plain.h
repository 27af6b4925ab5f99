// The operations of vectors.h in plain C++, for the compiler to vectorize; without integer products.

struct V {
    float a[LANES];
};
struct Codes {
    int32_t a[LANES];
};
inline float largest(const float*, int64_t) { return 0; }
inline void to_integers(float*, int64_t, float, float, int16_t*) {}
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
inline Codes bytes(const uint8_t* p) {
    Codes r;
    EACH
    r.a[i] = p[i];
    return r;
}
template <int SHIFT, int MASK> inline Codes field(Codes c) {
    EACH
    c.a[i] = c.a[i] >> SHIFT & MASK;
    return c;
}
template <int SHIFT> inline Codes join(Codes low, Codes high) {
    EACH
    low.a[i] |= high.a[i] << SHIFT;
    return low;
}
template <int BIT> inline Codes join_bits(Codes low, const uint8_t* p) {
    EACH
    low.a[i] |= (p[i / 8] >> i % 8 & 1) << BIT;
    return low;
}
inline V number(Codes c) {
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
inline V entry(Codes c, const float* table) {
    V r;
    EACH
    r.a[i] = table[c.a[i] & 15];
    return r;
}
inline V e4m3(Codes c) {
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
inline V halves(float x, float y) {
    V r;
    EACH
    r.a[i] = i < LANES / 2 ? x : y;
    return r;
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
