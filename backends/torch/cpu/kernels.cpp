// GEMV and unpacking of quantized weights on a CPU: y = x w^T.
//
// Compiled once per instruction set (setup.py), called through ctypes (native.py, which lays out the planes). A row of
// a weight is read 64 columns at a time, as four vectors of 16 codes; the codes of a group are multiplied with x first,
// and their sum with the scale, then:
//
//     y[n] = sum over groups of scale * sum(code * x) + bias * sum(x)
//
// x in bf16 or f16 is rounded to int16 per group, and codes are multiplied as integers; x in float32 as floats.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "common.h"
#include "threads.h"

namespace {

// Codes: unsigned integers, indices of a table of 16 values, 8-bit floats.
enum Code : int32_t { CODE_U2, CODE_U3, CODE_U4, CODE_U5, CODE_U6, CODE_U8, CODE_TABLE, CODE_E4M3 };

constexpr int CHUNK = 64;  // columns

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

// ---- 64 columns of codes; chunk c of a row

template <int C> inline void codes(const Rows& w, const uint8_t* row, const uint8_t* high, int64_t c, V (&q)[4]) {
    if constexpr (C == CODE_U8 || C == CODE_E4M3) {
        UNROLL
        for (int i = 0; i < 4; i++) q[i] = (C == CODE_U8 ? number : e4m3)(bytes(row + 64 * c + 16 * i));
    } else if constexpr (C == CODE_U2 || C == CODE_U3) {  // byte i: columns i, 16 + i, 32 + i, 48 + i
        Codes b = bytes(row + 16 * c), f[4] = {field<0, 3>(b), field<2, 3>(b), field<4, 3>(b), field<6, 3>(b)};
        UNROLL
        for (int i = 0; i < 4; i++) q[i] = number(C == CODE_U2 ? f[i] : join_bits<2>(f[i], high + 8 * c + 2 * i));
    } else {  // byte i: columns i, 32 + i
        Codes f[4], b = bytes(row + 32 * c), d = bytes(row + 32 * c + 16);
        f[0] = field<0, 15>(b), f[1] = field<0, 15>(d), f[2] = field<4, 15>(b), f[3] = field<4, 15>(d);
        if constexpr (C == CODE_TABLE) {
            UNROLL
            for (int i = 0; i < 4; i++) q[i] = entry(f[i], w.table);
            return;
        }
        if constexpr (C == CODE_U6) {
            Codes h = bytes(high + 16 * c);
            f[0] = join<4>(f[0], field<0, 3>(h)), f[1] = join<4>(f[1], field<2, 3>(h));
            f[2] = join<4>(f[2], field<4, 3>(h)), f[3] = join<4>(f[3], field<6, 3>(h));
        }
        UNROLL
        for (int i = 0; i < 4; i++) q[i] = number(C == CODE_U5 ? join_bits<4>(f[i], high + 8 * c + 2 * i) : f[i]);
    }
}

#if defined(__AVX2__)
template <int C>
inline void integer_codes(const Rows& w, const uint8_t* row, const uint8_t* high, int64_t c, I& a, I& b) {
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
        if constexpr (C == CODE_U6) { join_crumbs(a, b, high + 16 * c); }
    }
}
#endif

// ---- scales

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
    if constexpr (G < 4)
        if (w.super_scales) scale = mul(scale, supers<G>(w, w.super_scales, n, g));
    if (w.row_scales) scale = mul(scale, set(((const float*)w.row_scales)[n]));
    bool biased = false;
    if (w.zeros)
        bias = mul(scale, negated(numbers(U8, w.zeros + at))), biased = true;
    else if (w.zero != 0)
        bias = mul(scale, set(-w.zero)), biased = true;
    if (w.biases) {
        const V more = numbers(w.scale, w.biases + at * size_of(w.scale));
        bias = biased ? add(more, bias) : more, biased = true;
    }
    if constexpr (G < 4)
        if (w.super_mins) {
            const V mins = w.scale == U4 ? numbers(HIGH_U4, p) : numbers(U8, w.mins + at);
            bias = mul(mins, negated(supers<G>(w, w.super_mins, n, g))), biased = true;
        }
    return biased;
}

// ---- y = x w^T

// Rows of x, padded with zeros.
struct Input {
    int64_t rows, columns, groups;  // groups: padded to a multiple of 16
    std::vector<float> x, sums;    // (rows, columns), (rows, groups)
    std::vector<int16_t> integers;  // x in `steps`
    std::vector<float> steps;      // (rows, groups)
};

inline void store_one(Dtype dtype, void* out, int64_t at, float value) {
    if (dtype == F32) {
        ((float*)out)[at] = value;
        return;
    }
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
    const Rows& w, const uint8_t* row, const uint8_t* high, int64_t c, const Input& in, int64_t m0,
    const float (&scales)[M][LANES], int64_t i, V (&acc)[M][2]
) {
    V q[4];
    codes<C>(w, row, high, c, q);
    UNROLL
    for (int v = 0; v < 4; v += G) {
        UNROLL
        for (int m = 0; m < M; m++) {
            const float* p = in.x.data() + (m0 + m) * in.columns + c * CHUNK + v * LANES;
            V product = mul(q[v], load(p));
            UNROLL
            for (int j = 1; j < G; j++) product = fma(q[v + j], load(p + j * LANES), product);
            V& sum = acc[m][v / G % 2];
            sum = fma(product, set(scales[m][i + v / G]), sum);
        }
    }
}

#if defined(__AVX2__)
template <int C, int G, int M> inline void integer_chunk(
    const Rows& w, const uint8_t* row, const uint8_t* high, int64_t c, const Input& in, int64_t m0,
    const float (&scales)[M][LANES], int64_t i, V (&acc)[M][2]
) {
    I a, b;
    integer_codes<C>(w, row, high, c, a, b);
    UNROLL
    for (int m = 0; m < M; m++) {
        const int16_t* p = in.integers.data() + (m0 + m) * in.columns + c * CHUNK;
        const float* s = scales[m] + i;
        const I u = words(p), v = words(p + 32);
        if constexpr (G == 4) {
            acc[m][0] = fma(dot(a, u, b, v), set(s[0]), acc[m][0]);
        } else {
            acc[m][0] = fma(dot(a, u), G == 2 ? set(s[0]) : pair(s), acc[m][0]);
            acc[m][1] = fma(dot(b, v), G == 2 ? set(s[1]) : pair(s + 2), acc[m][1]);
        }
    }
}
#else
template <int C, int G, int M, class... Args> inline void integer_chunk(Args&&...) {}
#endif

// The products of one row of w and M rows of x. G: vectors of a chunk that share a scale.
template <int C, int G, int M, bool INTEGERS>
inline void products(const Rows& w, int64_t n, const Input& in, int64_t m0, float* y) {
    const uint8_t *row = w.codes + n * w.codes_stride, *high = w.high + n * w.high_stride;
    const int64_t chunks = in.columns / CHUNK, per = G == 4 ? w.group / CHUNK : 1, block = LANES * G / 4 * per;
    V acc[M][2], biases[M];  // two sums, as one would wait for its last addition
    UNROLL
    for (int m = 0; m < M; m++) acc[m][0] = acc[m][1] = biases[m] = set(0);
    for (int64_t begin = 0, g = 0; begin < chunks; begin += block, g += LANES) {
        float scales[M][LANES];
        V scale, bias;
        const bool biased = scales_of<G>(w, n, g, scale, bias);
        UNROLL
        for (int m = 0; m < M; m++) {
            store(scales[m], INTEGERS ? mul(scale, load(in.steps.data() + (m0 + m) * in.groups + g)) : scale);
            if (biased) biases[m] = fma(bias, load(in.sums.data() + (m0 + m) * in.groups + g), biases[m]);
        }
        const int64_t end = std::min(chunks, begin + block);
        for (int64_t c = begin; c < end; c++) {
            const int64_t i = G == 4 ? (c - begin) / per : (c - begin) * (4 / G);
            if constexpr (INTEGERS)
                integer_chunk<C, G, M>(w, row, high, c, in, m0, scales, i, acc);
            else
                float_chunk<C, G, M>(w, row, high, c, in, m0, scales, i, acc);
        }
    }
    UNROLL
    for (int m = 0; m < M; m++) y[m] = sum(add(add(acc[m][0], acc[m][1]), biases[m]));
}

template <int C, int G, bool INTEGERS>
void rows_of(const Rows& w, int64_t begin, int64_t end, const Input& in, Dtype dtype, void* y, int64_t stride) {
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

template <int G>
__attribute__((noinline)) void stored_scales(const Rows& w, int64_t n, int64_t g, float* scales, float* biases) {
    V scale, bias;
    if (!scales_of<G>(w, n, g, scale, bias)) bias = set(0);
    store(scales, scale), store(biases, bias);
}

template <int C, int G> void
unpack_rows(const Rows& w, const int64_t* index, int64_t begin, int64_t end, int64_t columns, Dtype dtype, void* out) {
    const int64_t per = G == 4 ? w.group / CHUNK : 1, block = LANES * G / 4 * per;
    for (int64_t r = begin; r < end; r++) {
        const int64_t n = index ? index[r] : r;
        const uint8_t *row = w.codes + n * w.codes_stride, *high = w.high + n * w.high_stride;
        float scales[LANES], biases[LANES];
        for (int64_t c = 0; c * CHUNK < columns; c++) {
            if (c % block == 0) stored_scales<G>(w, n, c / block * LANES, scales, biases);
            V q[4];
            codes<C>(w, row, high, c, q);
            UNROLL
            for (int i = 0; i < 4; i++) {
                const int64_t at = c * CHUNK + i * LANES, g = G == 4 ? c % block / per : (c % block * 4 + i) / G;
                const V value = fma(q[i], set(scales[g]), set(biases[g]));
                if (at + LANES <= columns)
                    store_as(dtype, out, r * columns + at, value);
                else if (at < columns) {
                    float rest[LANES];
                    store(rest, value);
                    for (int64_t j = at; j < columns; j++) store_one(dtype, out, r * columns + j, rest[j - at]);
                }
            }
        }
    }
}

using Product = void (*)(const Rows&, int64_t, int64_t, const Input&, Dtype, void*, int64_t);
using Unpack = void (*)(const Rows&, const int64_t*, int64_t, int64_t, int64_t, Dtype, void*);

template <int C> constexpr Product linear_of[] = {rows_of<C, 1, false>, rows_of<C, 2, false>, rows_of<C, 4, false>};
template <int C> constexpr bool IS_INTEGER = C < CODE_E4M3;
template <int C> constexpr Product integers_of[] = {
    rows_of<C, 1, IS_INTEGER<C>>, rows_of<C, 2, IS_INTEGER<C>>, rows_of<C, 4, IS_INTEGER<C>>
};
template <int C> constexpr Unpack unpack_of[] = {unpack_rows<C, 1>, unpack_rows<C, 2>, unpack_rows<C, 4>};

#define OF_CODE(table, w)                                                                                              \
    ((w).code == CODE_U2      ? table<CODE_U2>                                                                         \
     : (w).code == CODE_U3    ? table<CODE_U3>                                                                         \
     : (w).code == CODE_U4    ? table<CODE_U4>                                                                         \
     : (w).code == CODE_U5    ? table<CODE_U5>                                                                         \
     : (w).code == CODE_U6    ? table<CODE_U6>                                                                         \
     : (w).code == CODE_U8    ? table<CODE_U8>                                                                         \
     : (w).code == CODE_TABLE ? table<CODE_TABLE>                                                                      \
                              : table<CODE_E4M3>)[(w).group == 16   ? 0                                                \
                                                  : (w).group == 32 ? 1                                                \
                                                                    : 2]

}  // namespace

// y (m, N) = x w^T for x (m, columns). x in 16 bits is rounded to integers.
struct Linear {
    const Rows* w;
    const void* x;
    void* y;
    int64_t m, columns;
    int32_t x_dtype, y_dtype;
};

extern "C" void llmrs_linear(const Linear* a, int32_t threads) {
    static thread_local Input in;
    const Rows& w = *a->w;
    const bool as_integers = HAS_INTEGERS && a->x_dtype != F32 && w.code < CODE_E4M3;
    prepare(w, a->x, (Dtype)a->x_dtype, a->m, a->columns, as_integers, in);
    const Product run = as_integers ? OF_CODE(integers_of, w) : OF_CODE(linear_of, w);
    const Input& input = in;
    parallel(w.rows, 4, threads, [&](int64_t begin, int64_t end) {
        run(w, begin, end, input, (Dtype)a->y_dtype, a->y, w.rows);
    });
}

// Rows, all or by their numbers, to out (count, columns).
struct Unpacked {
    const Rows* w;
    const int64_t* index;  // null: all
    void* out;
    int64_t count, columns;
    int32_t dtype;
};

extern "C" void llmrs_unpack(const Unpacked* a, int32_t threads) {
    const Unpack run = OF_CODE(unpack_of, *a->w);
    parallel(a->count, 4, threads, [&](int64_t begin, int64_t end) {
        run(*a->w, a->index, begin, end, a->columns, (Dtype)a->dtype, a->out);
    });
}
