// Products of quantized weights with few rows of x: y = x w^T.
//
// x in bf16 or f16 is rounded to int16 per group of columns, and codes are multiplied as integers; x in float32 as
// floats. Then, for each row, w = scale * (code - zero) + bias gives
//
//     y = sum over groups of scale * (sum(code * x) - zero * sum(x)) + bias * sum(x)

#include <vector>

#include "quantized.h"
#include "threads.h"

// y (m, stride) = x w^T + bias for x (m, columns). x in 16 bits is rounded to integers.
struct Linear {
    const Rows* w;
    const void *x, *bias;  // bias (N,), of x's dtype; or null
    void* y;
    int64_t m, columns, stride;
    int32_t x_dtype, y_dtype;
};

namespace {

// ---- x

// Rows of x, padded with zeros to `stride` columns; sums and steps (rows, groups).
struct Input {
    int64_t rows, stride, groups;
    std::vector<float> x, sums, steps;
    std::vector<int16_t> integers;  // x in `steps`
    std::vector<int32_t> offsets;   // -zero times the sums of integers
};

// Integers are in steps of 1 / 32767 of the largest magnitude of the group; NaN where x is not finite.
void prepare_group(const Rows& w, Input& in, int64_t r, int64_t g, bool as_integers) {
    const int64_t at = r * in.stride + g * w.group, end = std::min(w.group, w.columns - g * w.group);
    float* p = in.x.data() + at;
    int64_t i = r * in.groups + g;
    V total = set(0), nan = set(0);
    if (as_integers) {
        int16_t* q = in.integers.data() + at;
        for (int64_t j = 0; j < end; j += LANES) nan = fma(load(p + j), set(0), nan);
        const float step = largest(p, end) / 32767 + sum(nan);
        to_integers(p, end, step > 0 ? 1 / step : 0, step, q);
        int32_t whole = 0;
        for (int64_t j = 0; j < end; j++) whole += q[j];
        in.steps[i] = step * w.factor, in.offsets[i] = -(int32_t)w.zero * whole;
    }
    for (int64_t j = 0; j < end; j += LANES) total = add(load(p + j), total);
    in.sums[i] = sum(total);
}

// x (m, columns)
void prepare(const Rows& w, const void* x, Dtype dtype, int64_t m, int64_t columns, bool as_integers, Input& in) {
    in.rows = m, in.groups = w.groups;
    in.stride = w.columns + CHUNK;  // more, as rows 4 KiB apart would share a set of the L1 cache
    in.x.assign(m * in.stride, 0.f), in.sums.resize(m * in.groups);
    if (as_integers)
        in.integers.resize(m * in.stride), in.steps.resize(m * in.groups), in.offsets.resize(m * in.groups);
    for (int64_t r = 0; r < m; r++) {
        float* row = in.x.data() + r * in.stride;
        const void* from = (const uint8_t*)x + r * columns * size_of(dtype);
        with_dtype(dtype, [&](auto d) {
            vectors<d>(columns, [&](int64_t i, auto part) { store(row + i, part.load(from, i)); });
        });
        for (int64_t g = 0; g < w.groups; g++) prepare_group(w, in, r, g, as_integers);
    }
}

// ---- Products

// Of a pointer about which the compiler knows nothing: it would keep an address for each of its uses.
template <class T> INLINE T* opaque(T* p) {
    asm("" : "+r"(p));
    return p;
}

// Adds code * x of the pairs FROM to FROM + COUNT - 1 of chunk c to `sums`, for rows m0 to m0 + M - 1 of x.
template <int C, int FROM, int COUNT, int M>
INLINE void add_integers(const Block& b, int64_t c, const Input& in, int64_t m0, I (&sums)[M]) {
    const uint8_t *p = chunk_of<C>(b, c), *upper = high_chunk_of<C>(b, c);
    const int16_t* x[M];
    for (int m = 0; m < M; m++) x[m] = opaque(in.integers.data() + (m0 + m) * in.stride + c * CHUNK);
    each_pair<FROM>(
        [&](auto j) __attribute__((always_inline)) {
            const I q = pair<C, j>(b.w, p, upper);
            UNROLL
            for (int m = 0; m < M; m++) sums[m] = dot(sums[m], q, set_pair(x[m] + 2 * j));
        },
        std::make_integer_sequence<int, COUNT>()
    );
}

template <int C, int FROM, int COUNT, int M>
INLINE void add_floats(const Block& b, int64_t c, const Input& in, int64_t m0, V (&sums)[M]) {
    const uint8_t *p = chunk_of<C>(b, c), *upper = high_chunk_of<C>(b, c);
    const float* x[M];
    for (int m = 0; m < M; m++) x[m] = opaque(in.x.data() + (m0 + m) * in.stride + c * CHUNK);
    each_pair<FROM>(
        [&](auto j) __attribute__((always_inline)) {
            const I q = pair<C, j>(b.w, p, upper);
            const V even = value<C>(low(q)), odd = value<C>(high(q));
            UNROLL
            for (int m = 0; m < M; m++) {
                const float* at = x[m] + 2 * j;
                sums[m] = fma(even, set(at[0]), fma(odd, set(at[1]), sums[m]));
            }
        },
        std::make_integer_sequence<int, COUNT>()
    );
}

// Sums over group g of code * x. Of integers the form's zero is taken off.
template <int C, bool HALF, int M, bool INTEGERS>
INLINE void group_sums(const Block& b, int64_t g, const Input& in, int64_t m0, V (&sums)[M]) {
    const int64_t at = m0 * in.groups + g, per = HALF ? 1 : b.w.group / CHUNK, begin = HALF ? g / 2 : g * per;
    const int64_t end = HALF ? begin + 1 : std::min(begin + per, b.w.columns / CHUNK);
    if constexpr (INTEGERS) {
        I whole[M];
        UNROLL
        for (int m = 0; m < M; m++) whole[m] = set_int(in.offsets[at + m * in.groups]);
        for (int64_t c = begin; c < end; c++) {
            if constexpr (!HALF)
                add_integers<C, 0, PAIRS>(b, c, in, m0, whole);
            else if (g % 2)
                add_integers<C, PAIRS / 2, PAIRS / 2>(b, c, in, m0, whole);
            else
                add_integers<C, 0, PAIRS / 2>(b, c, in, m0, whole);
        }
        UNROLL
        for (int m = 0; m < M; m++) sums[m] = mul(number(whole[m]), set(in.steps[at + m * in.groups]));
    } else {
        UNROLL
        for (int m = 0; m < M; m++) sums[m] = set(0);
        for (int64_t c = begin; c < end; c++) {
            if constexpr (!HALF)
                add_floats<C, 0, PAIRS>(b, c, in, m0, sums);
            else if (g % 2)
                add_floats<C, PAIRS / 2, PAIRS / 2>(b, c, in, m0, sums);
            else
                add_floats<C, 0, PAIRS / 2>(b, c, in, m0, sums);
        }
        if constexpr (C == CODE_TABLE) {
            UNROLL
            for (int m = 0; m < M; m++) sums[m] = mul(sums[m], set(b.w.factor));
        }
    }
}

// The products of a block and M rows of x.
template <int C, bool HALF, int M, bool INTEGERS>
void products(const Block& b, const Input& in, int64_t m0, float (&y)[M][LANES]) {
    V total[M];
    UNROLL
    for (int m = 0; m < M; m++) total[m] = set(0);
    for (int64_t begin = 0; begin < b.w.groups; begin += GROUPS) {
        const int64_t count = std::min<int64_t>(GROUPS, b.w.groups - begin);
        Scales scales;
        scales_of(b, begin, count, !INTEGERS, scales);
        for (int64_t i = 0; i < count; i++) {
            V sums[M];
            group_sums<C, HALF, M, INTEGERS>(b, begin + i, in, m0, sums);
            const V scale = load(scales.scale[i]);
            UNROLL
            for (int m = 0; m < M; m++) total[m] = fma(scale, sums[m], total[m]);
            if (!scales.biased) continue;
            const V bias = load(scales.bias[i]);
            const float* x = in.sums.data() + m0 * in.groups + begin + i;
            UNROLL
            for (int m = 0; m < M; m++) total[m] = fma(bias, set(x[m * in.groups]), total[m]);
        }
    }
    UNROLL
    for (int m = 0; m < M; m++) store(y[m], total[m]);
}

// Row m of y: those columns that `w` has in this block.
void store_rows(const Linear& a, const Block& b, const float* y, int64_t m) {
    const Dtype dtype = (Dtype)a.y_dtype, x_dtype = (Dtype)a.x_dtype;
    void* row = (uint8_t*)a.y + m * a.stride * size_of(dtype);
    const int64_t at = b.n * LANES - b.w.first, skipped = std::max<int64_t>(-at, 0),
                  count = std::min<int64_t>(LANES, b.w.rows - at) - skipped;
    if (count == LANES) return store_as(dtype, row, at, a.bias ? add(load(y), load_as(x_dtype, a.bias, at)) : load(y));
    for (int64_t i = skipped; i < skipped + count; i++) {
        const V bias = a.bias ? load_some(x_dtype, a.bias, at + i, 1) : set(0);
        store_some(dtype, row, at + i, 1, add(set(y[i]), bias));
    }
}

template <int C, bool HALF, bool INTEGERS>
void blocks_of(const Linear& a, int64_t begin, int64_t end, const Input& in) {
    // float32 of integer codes is for checks: one row of x at a time, for less code
    constexpr int MOST = INTEGERS || C == CODE_E4M3 ? 4 : 1;
    for (int64_t n = begin; n < end; n++) {
        const Block block{*a.w, n};
        int64_t m = 0;
        auto run = [&](auto rows) {
            float found[rows][LANES];
            products<C, HALF, rows, INTEGERS>(block, in, m, found);
            for (int i = 0; i < rows; i++, m++) store_rows(a, block, found[i], m);
        };
        while (m + MOST <= in.rows) run(std::integral_constant<int, MOST>());
        if (MOST > 2 && m + 2 <= in.rows) run(std::integral_constant<int, MOST == 1 ? 1 : 2>());
        if (m < in.rows) run(std::integral_constant<int, 1>());
    }
}

using Product = void (*)(const Linear&, int64_t, int64_t, const Input&);

template <int C> constexpr bool IS_INTEGER = C < CODE_E4M3;
template <int C> constexpr Product floats_of[] = {blocks_of<C, false, false>, blocks_of<C, true, false>};
template <int C>
constexpr Product integers_of[] = {blocks_of<C, false, IS_INTEGER<C>>, blocks_of<C, true, IS_INTEGER<C>>};

}  // namespace

extern "C" void llmrs_linear(const Linear* a, int32_t threads) {
    static thread_local Input made;
    const Rows& w = *a->w;
    const bool as_integers = a->x_dtype != F32 && w.code < CODE_E4M3;
    prepare(w, a->x, (Dtype)a->x_dtype, a->m, a->columns, as_integers, made);
    const Product run = as_integers ? OF_CODE(integers_of, w) : OF_CODE(floats_of, w);
    const Input& in = made;
    const int64_t first = w.first / LANES, blocks = (w.first + w.rows + LANES - 1) / LANES - first;
    parallel(blocks, 2, threads, [&](int64_t begin, int64_t end) { run(*a, first + begin, first + end, in); });
}
