// y = x w^T for few rows of x and a weight in bf16 or f16, read as it lies in the file.

#include <vector>

#include "common.h"
#include "threads.h"

// x (m, columns), w (rows, columns), bias (rows,) or null, and y (m, rows), all of `dtype`.
struct Dense {
    const void *x, *w, *bias;
    void* y;
    int64_t m, rows, columns;
    int32_t dtype;
};

namespace {

// The products of R rows of w and M rows of x: x (M, stride) in float32, with zeros behind its columns. S sums each, as
// one would wait for its last addition.
template <Dtype D, int R, int M, int S>
INLINE void products(const void* w, const float* x, int64_t stride, int64_t n, float (&y)[R][M]) {
    V sums[R][M][S];
    UNROLL
    for (int r = 0; r < R; r++) {
        UNROLL
        for (int m = 0; m < M; m++) {
            UNROLL
            for (int s = 0; s < S; s++) sums[r][m][s] = set(0);
        }
    }
    int64_t i = 0;
    for (; i + S * LANES <= n; i += S * LANES) {
        UNROLL
        for (int s = 0; s < S; s++) {
            V v[R];
            UNROLL
            for (int r = 0; r < R; r++) v[r] = load_as(D, w, r * n + i + s * LANES);
            UNROLL
            for (int m = 0; m < M; m++) {
                UNROLL
                for (int r = 0; r < R; r++)
                    sums[r][m][s] = fma(v[r], load(x + m * stride + i + s * LANES), sums[r][m][s]);
            }
        }
    }
    for (; i < n; i += LANES) {
        UNROLL
        for (int r = 0; r < R; r++) {
            const V v = load_some(D, w, r * n + i, std::min<int64_t>(n - i, LANES));
            UNROLL
            for (int m = 0; m < M; m++) sums[r][m][0] = fma(v, load(x + m * stride + i), sums[r][m][0]);
        }
    }
    UNROLL
    for (int r = 0; r < R; r++) {
        UNROLL
        for (int m = 0; m < M; m++) {
            V total = sums[r][m][0];
            UNROLL
            for (int s = 1; s < S; s++) total = add(total, sums[r][m][s]);
            y[r][m] = sum(total);
        }
    }
}

#if defined(__AVX512F__)
constexpr int MOST = 8, PAIR = 2;  // rows of x and of w at once, for 32 registers
#else
constexpr int MOST = 4, PAIR = 1;
#endif

// All rows of x and `count` rows of w from n on.
template <Dtype D, int R> void rows_of(const Dense& a, const float* x, int64_t stride, int64_t n) {
    const void* w = (const uint8_t*)a.w + n * a.columns * size_of(D);
    V bias[R];
    for (int r = 0; r < R; r++) bias[r] = a.bias ? load_some(D, a.bias, n + r, 1) : set(0);
    int64_t m = 0;
    auto run = [&](auto rows, auto sums) {
        float y[R][rows];
        products<D, R, rows, sums>(w, x + m * stride, stride, a.columns, y);
        for (int i = 0; i < rows; i++)
            for (int r = 0; r < R; r++) store_some(D, a.y, (m + i) * a.rows + n + r, 1, add(set(y[r][i]), bias[r]));
        m += rows;
    };
    while (m + MOST <= a.m) run(std::integral_constant<int, MOST>(), std::integral_constant<int, 1>());
    if (MOST > 4 && m + 4 <= a.m) run(std::integral_constant<int, 4>(), std::integral_constant<int, 1>());
    if (m + 2 <= a.m) run(std::integral_constant<int, 2>(), std::integral_constant<int, 2>());
    if (m < a.m) run(std::integral_constant<int, 1>(), std::integral_constant<int, 4>());
}

}  // namespace

extern "C" void llmrs_dense(const Dense* a, int32_t threads) {
    static thread_local std::vector<float> wide;
    // 16 more: rows 4 KiB apart would share a set of the L1 cache
    const int64_t stride = (a->columns + LANES - 1) / LANES * LANES + LANES;
    wide.assign(a->m * stride, 0.f);
    const float* x = wide.data();
    with_dtype(a->dtype, [&](auto d) {
        for (int64_t m = 0; m < a->m; m++) {
            const void* row = (const uint8_t*)a->x + m * a->columns * size_of(d);
            float* to = wide.data() + m * stride;
            vectors<d>(a->columns, [&](int64_t i, auto part) { store(to + i, part.load(row, i)); });
        }
        parallel(a->rows, 16, threads, [&](int64_t begin, int64_t end) {
            int64_t n = begin;
            if (a->m > 1)  // one row of x waits for memory: it reads one stream
                for (; n + PAIR <= end; n += PAIR) rows_of<d, PAIR>(*a, x, stride, n);
            for (; n < end; n++) rows_of<d, 1>(*a, x, stride, n);
        });
    });
}
