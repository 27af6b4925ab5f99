// Attention of one new token per sequence to its paged KV cache.

#include <vector>

#include "common.h"
#include "threads.h"

struct Attention {
    const void *q, *keys, *values;    // q (s, H, d), keys and values (blocks, block_size, Hk, d)
    void* out;                        // (s, H, d)
    const int64_t *blocks, *lengths;  // (s, blocks_stride), (s,)
    int64_t sequences, heads, kv_heads, size, block_size, blocks_stride, q_stride, window, max_length;
    float scale;
    int32_t dtype, kv_dtype;
};

namespace {

constexpr int64_t SPLIT = 256;  // keys of a task
constexpr int64_t TILE = 64;    // keys whose scores are weighted at once

// Of one query head over the keys of a split: the largest score, the sum of weights, and the weighted values.
struct Partial {
    float largest, sum;
};

template <Dtype D> struct Split {
    const Attention& a;
    const int64_t* blocks;  // of the sequence
    int64_t kv_head;
    void rows_of(const void* pool, int64_t key, int64_t count, const void** rows) const {
        for (int64_t i = 0; i < count; i++, key++) {
            const int64_t slot = blocks[key / a.block_size] * a.block_size + key % a.block_size;
            rows[i] = (const uint8_t*)pool + (slot * a.kv_heads + kv_head) * a.size * size_of(D);
        }
    }
};

template <Dtype D, int HEADS>
INLINE void scores_of(const Attention& a, const void* key, const float* q, int64_t stride, float* scores) {
    V sums[HEADS];
    UNROLL
    for (int h = 0; h < HEADS; h++) sums[h] = set(0);
    vectors<D>(a.size, [&](int64_t i, auto part) {
        const V v = part.load(key, i);
        UNROLL
        for (int h = 0; h < HEADS; h++) sums[h] = fma(load(q + h * stride + i), v, sums[h]);
    });
    UNROLL
    for (int h = 0; h < HEADS; h++) scores[h * TILE] = sum(sums[h]) * a.scale;
}

template <Dtype D, int HEADS> INLINE void
add_values(const Attention& a, const void** rows, int64_t count, const float* weights, float* acc, int64_t stride) {
    vectors<D>(a.size, [&](int64_t i, auto part) {
        V sums[HEADS];
        UNROLL
        for (int h = 0; h < HEADS; h++) sums[h] = load(acc + h * stride + i);
        for (int64_t n = 0; n < count; n++) {
            const V v = part.load(rows[n], i);
            UNROLL
            for (int h = 0; h < HEADS; h++) sums[h] = fma(set(weights[h * TILE + n]), v, sums[h]);
        }
        UNROLL
        for (int h = 0; h < HEADS; h++) store(acc + h * stride + i, sums[h]);
    });
}

// Weights e^(score - largest) of a tile in place of its scores; what was summed before is rescaled.
void weigh(float* scores, int64_t count, Partial& p, float* acc, int64_t stride) {
    for (int64_t i = count; i % LANES; i++) scores[i] = -INFINITY;
    V most = set(p.largest), total = set(0);
    for (int64_t i = 0; i < count; i += LANES) most = max(most, load(scores + i));
    const float largest = maximum(most);
    for (int64_t i = 0; i < count; i += LANES) {
        const V w = exp(add(load(scores + i), set(-largest)));
        store(scores + i, w), total = add(w, total);
    }
    for (int64_t i = count; i % LANES; i++) scores[i] = 0;
    const float before = p.sum ? std::exp(p.largest - largest) : 0;
    if (before != 1)
        for (int64_t i = 0; i < stride; i += LANES) store(acc + i, mul(load(acc + i), set(before)));
    p.sum = p.sum * before + sum(total), p.largest = largest;
}

// HEADS query heads of a KV head over the keys [begin, end); q and acc (HEADS, stride), zeros behind d.
template <Dtype D, int HEADS>
void attend(const Split<D>& split, int64_t begin, int64_t end, const float* q, int64_t stride, Partial* p, float* acc) {
    float scores[HEADS * TILE];
    const void* rows[TILE];
    for (int64_t tile = begin; tile < end; tile += TILE) {
        const int64_t count = std::min(TILE, end - tile);
        split.rows_of(split.a.keys, tile, count, rows);
        for (int64_t i = 0; i < count; i++) scores_of<D, HEADS>(split.a, rows[i], q, stride, scores + i);
        for (int h = 0; h < HEADS; h++) weigh(scores + h * TILE, count, p[h], acc + h * stride, stride);
        split.rows_of(split.a.values, tile, count, rows);
        add_values<D, HEADS>(split.a, rows, count, scores, acc, stride);
    }
}

struct Work {
    int64_t splits, stride;         // stride: d, padded to whole vectors
    std::vector<Partial> partials;  // (s, splits, H)
    std::vector<float> values;      // (s, splits, H, stride)
};

void one_split(const Attention& a, Work& work, int64_t sequence, int64_t n, int64_t kv_head) {
    const int64_t length = a.lengths[sequence], first = a.window ? std::max<int64_t>(length - a.window, 0) : 0,
                  begin = std::max(first, n * SPLIT), end = std::min(length, (n + 1) * SPLIT),
                  group = a.heads / a.kv_heads, at = (sequence * work.splits + n) * a.heads + kv_head * group;
    Partial* p = work.partials.data() + at;
    float* acc = work.values.data() + at * work.stride;
    std::fill(p, p + group, Partial{-INFINITY, 0}), std::fill(acc, acc + group * work.stride, 0.f);
    if (begin >= end) return;
    std::vector<float> q(group * work.stride);
    with_dtype(a.dtype, [&](auto d) {
        for (int64_t h = 0; h < group; h++) {
            const auto* from =
                (const uint8_t*)a.q + (sequence * a.q_stride + (kv_head * group + h) * a.size) * size_of(d);
            vectors<d>(a.size, [&](int64_t i, auto part) {
                store(q.data() + h * work.stride + i, part.load(from, i));
            });
        }
    });
    with_dtype(a.kv_dtype, [&](auto d) {
        const Split<d> split{a, a.blocks + sequence * a.blocks_stride, kv_head};
        int64_t h = 0;
        for (; h + 4 <= group; h += 4)
            attend<d, 4>(split, begin, end, q.data() + h * work.stride, work.stride, p + h, acc + h * work.stride);
        for (; h + 2 <= group; h += 2)
            attend<d, 2>(split, begin, end, q.data() + h * work.stride, work.stride, p + h, acc + h * work.stride);
        for (; h < group; h++)
            attend<d, 1>(split, begin, end, q.data() + h * work.stride, work.stride, p + h, acc + h * work.stride);
    });
}

// The sum of a head's splits, weighted by e^(largest of the split - largest of all).
void combine(const Attention& a, const Work& work, int64_t sequence, int64_t head) {
    float largest = -INFINITY, total = 0;
    const int64_t at = sequence * work.splits * a.heads + head;
    for (int64_t n = 0; n < work.splits; n++) largest = std::max(largest, work.partials[at + n * a.heads].largest);
    std::vector<float> y(work.stride);
    for (int64_t n = 0; n < work.splits; n++) {
        const Partial& p = work.partials[at + n * a.heads];
        if (p.sum == 0) continue;
        const float weight = std::exp(p.largest - largest);
        const float* values = work.values.data() + (at + n * a.heads) * work.stride;
        total += weight * p.sum;
        for (int64_t i = 0; i < work.stride; i += LANES)
            store(y.data() + i, fma(set(weight), load(values + i), load(y.data() + i)));
    }
    with_dtype(a.dtype, [&](auto d) {
        auto* to = (uint8_t*)a.out + (sequence * a.heads * a.size + head * a.size) * size_of(d);
        vectors<d>(a.size, [&](int64_t i, auto part) { part.store(to, i, div(load(y.data() + i), set(total))); });
    });
}

}  // namespace

// Splits do not depend on the number of threads, nor on other sequences: nor do results.
extern "C" void llmrs_attend(const Attention* a, int32_t threads) {
    static thread_local Work made;
    Work& work = made;
    work.splits = (a->max_length + SPLIT - 1) / SPLIT, work.stride = (a->size + LANES - 1) / LANES * LANES;
    const int64_t parts = a->sequences * work.splits;
    work.partials.resize(parts * a->heads), work.values.resize(parts * a->heads * work.stride);
    parallel(parts * a->kv_heads, 1, threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++)
            one_split(*a, work, i / a->kv_heads / work.splits, i / a->kv_heads % work.splits, i % a->kv_heads);
    });
    parallel(a->sequences * a->heads, 64, threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) combine(*a, work, i / a->heads, i % a->heads);
    });
}
