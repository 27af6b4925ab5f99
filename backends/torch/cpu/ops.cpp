// Norms, rotary embedding and gates of rows, in float32 between loads and stores. Strides are in elements.

#include <vector>

#include "common.h"
#include "threads.h"

namespace {

constexpr int64_t PART = 4096;  // elements of a task, at least: a loop of threads costs 1 us

inline int64_t rows_per_task(int64_t columns) { return std::max<int64_t>(PART / columns, 1); }

inline void* at(const void* p, int32_t dtype, int64_t element) { return (uint8_t*)p + element * size_of((Dtype)dtype); }

template <Dtype D> float mean_square(const void* x, int64_t n) {
    V total[2] = {set(0), set(0)};
    vectors<D>(n, [&](int64_t i, auto part) {
        const V v = part.load(x, i);
        V& sum = total[i / LANES % 2];
        sum = fma(v, v, sum);
    });
    return sum(add(total[0], total[1])) / n;
}

// w plus the offset, times x / sqrt(mean square + eps)
template <Dtype D> void normalize(const void* x, const void* w, void* out, int64_t n, float eps, float offset) {
    const V scale = set(1 / std::sqrt(mean_square<D>(x, n) + eps)), more = set(offset);
    vectors<D>(n, [&](int64_t i, auto part) {
        part.store(out, i, mul(mul(part.load(x, i), scale), add(part.load(w, i), more)));
    });
}

INLINE V times_sigmoid(V x, V y) { return div(x, add(set(1), exp(negated(y)))); }  // x / (1 + e^-y)

// 0.5 x (1 + tanh(u)) = x / (1 + e^(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3)
INLINE V gelu(V x) {
    return times_sigmoid(x, mul(mul(set(2 * 0.797884561f), x), fma(mul(x, x), set(0.044715f), set(1))));
}

}  // namespace

// rms_norm of rows: x (rows, n), of x + y where there is y, which goes to `total` (rows, n). w (n,).
struct Norm {
    const void *x, *y, *w;
    void *total, *out;
    int64_t rows, n, x_stride, y_stride;
    float eps, offset;
    int32_t dtype;
};

extern "C" void llmrs_rms_norm(const Norm* norm, int32_t threads) {
    const Norm& a = *norm;
    with_dtype(a.dtype, [&](auto d) {
        parallel(a.rows, rows_per_task(a.n), threads, [&](int64_t begin, int64_t end) {
            for (int64_t r = begin; r < end; r++) {
                const void* x = at(a.x, d, r * a.x_stride);
                if (a.y) {
                    const void* y = at(a.y, d, r * a.y_stride);
                    void* both = at(a.total, d, r * a.n);
                    vectors<d>(a.n, [&](int64_t i, auto part) {
                        part.store(both, i, add(part.load(x, i), part.load(y, i)));
                    });
                    x = both;
                }
                normalize<d>(x, a.w, at(a.out, d, r * a.n), a.n, a.eps, a.offset);
            }
        });
    });
}

// silu(gate) * up, or gelu: (rows, n) each.
struct Gate {
    const void *gate, *up;
    void* out;
    int64_t rows, n, gate_stride, up_stride;
    int32_t dtype, is_gelu;
};

extern "C" void llmrs_act_and_mul(const Gate* gate, int32_t threads) {
    const Gate& a = *gate;
    with_dtype(a.dtype, [&](auto d) {
        parallel(a.rows, rows_per_task(a.n), threads, [&](int64_t begin, int64_t end) {
            for (int64_t r = begin; r < end; r++) {
                const void *g = at(a.gate, d, r * a.gate_stride), *u = at(a.up, d, r * a.up_stride);
                void* out = at(a.out, d, r * a.n);
                vectors<d>(a.n, [&](int64_t i, auto part) {
                    const V x = part.load(g, i);
                    const V gated = a.is_gelu ? gelu(x) : times_sigmoid(x, x);
                    part.store(out, i, mul(gated, part.load(u, i)));
                });
            }
        });
    });
}

// Rotary embedding of q (T, H, d) and k (T, Hk, d), after a norm of each head if there are weights, and k and v
// (T, Hk, d) written to their slots.
struct Rope {
    const void *q, *k, *v, *norms;  // norms (H + Hk, d), or null
    const float *cos, *sin;         // (T, d / 2)
    const int64_t* slots;           // (T,)
    void *out, *keys, *values;      // out (T, H, d); keys, values (slots, Hk, d)
    int64_t tokens, size, heads, kv_heads;
    int64_t q_stride, q_head_stride, k_stride, k_head_stride, v_stride, v_head_stride;
    float eps;
    int32_t dtype, norm_dtype, kv_dtype;
};

namespace {

// (a cos - b sin, b cos + a sin) of the halves of a head in float32.
void rotate(const float* x, const float* cos, const float* sin, int64_t half, float* y) {
    int64_t i = 0;
    for (; i + LANES <= half; i += LANES) {
        const V a = load(x + i), b = load(x + half + i), c = load(cos + i), s = load(sin + i);
        store(y + i, fma(a, c, negated(mul(b, s)))), store(y + half + i, fma(b, c, mul(a, s)));
    }
    for (; i < half; i++) {
        const float a = x[i], b = x[half + i];
        y[i] = a * cos[i] - b * sin[i], y[half + i] = b * cos[i] + a * sin[i];
    }
}

// Head h of token t from x, to `out` with its norm and rotation. `a` and `b` have room for a head.
void rotated_head(const Rope& r, const void* x, int64_t t, int64_t h, float* a, float* b, void* out, int32_t dtype) {
    with_dtype(r.dtype, [&](auto d) {
        const float scale = r.norms ? 1 / std::sqrt(mean_square<d>(x, r.size) + r.eps) : 1;
        vectors<d>(r.size, [&](int64_t i, auto part) { store(a + i, mul(part.load(x, i), set(scale))); });
    });
    if (r.norms)
        with_dtype(r.norm_dtype, [&](auto d) {
            const void* w = at(r.norms, d, h * r.size);
            vectors<d>(r.size, [&](int64_t i, auto part) { store(a + i, mul(load(a + i), part.load(w, i))); });
        });
    rotate(a, r.cos + t * r.size / 2, r.sin + t * r.size / 2, r.size / 2, b);
    with_dtype(dtype, [&](auto d) {
        vectors<d>(r.size, [&](int64_t i, auto part) { part.store(out, i, load(b + i)); });
    });
}

void one_head(const Rope& r, int64_t t, int64_t h, float* a, float* b) {
    if (h < r.heads) {
        const void* x = at(r.q, r.dtype, t * r.q_stride + h * r.q_head_stride);
        return rotated_head(r, x, t, h, a, b, at(r.out, r.dtype, (t * r.heads + h) * r.size), r.dtype);
    }
    const int64_t k = h - r.heads, slot = (r.slots[t] * r.kv_heads + k) * r.size;
    const void* x = at(r.k, r.dtype, t * r.k_stride + k * r.k_head_stride);
    rotated_head(r, x, t, h, a, b, at(r.keys, r.kv_dtype, slot), r.kv_dtype);
    const void* v = at(r.v, r.dtype, t * r.v_stride + k * r.v_head_stride);
    with_dtype(r.dtype, [&](auto d) {
        vectors<d>(r.size, [&](int64_t i, auto part) { store(a + i, part.load(v, i)); });
    });
    with_dtype(r.kv_dtype, [&](auto d) {
        void* to = at(r.values, d, slot);
        vectors<d>(r.size, [&](int64_t i, auto part) { part.store(to, i, load(a + i)); });
    });
}

}  // namespace

extern "C" void llmrs_rope_write_kv(const Rope* r, int32_t threads) {
    const int64_t heads = r->heads + r->kv_heads;
    parallel(r->tokens * heads, rows_per_task(r->size), threads, [&](int64_t begin, int64_t end) {
        std::vector<float> a(r->size + LANES), b(r->size + LANES);  // padded to whole vectors
        for (int64_t i = begin; i < end; i++) one_head(*r, i / heads, i % heads, a.data(), b.data());
    });
}
