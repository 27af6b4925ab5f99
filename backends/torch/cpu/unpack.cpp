// Quantized weights as values: slices for a GEMM, and rows of an embedding.

#include "quantized.h"
#include "threads.h"

namespace {

// Chunk c of the 16 rows of a block, as 32-bit words: two values in 16 bits, or first all even columns, then all odd
// ones, in float32. `scale` and `bias` are of its halves.
template <int C, bool HALF, Dtype D>
INLINE void unpack_chunk(const Block& b, int64_t c, const V (&scale)[2], const V (&bias)[2], Words (&rows)[2]) {
    Words columns[2];
    const uint8_t *p = chunk_of<C>(b, c), *upper = high_chunk_of<C>(b, c);
    each_pair<0>(
        [&](auto j) __attribute__((always_inline)) {
            constexpr int half = HALF ? j / (PAIRS / 2) : 0;
            const I q = pair<C, j>(b.w, p, upper);
            const V even = fma(value<C>(low(q)), scale[half], bias[half]);
            const V odd = fma(value<C>(high(q)), scale[half], bias[half]);
            if constexpr (D == F32)
                store(columns[0][j], even), store(columns[1][j], odd);
            else
                store(columns[0][j], D == F16 ? pair_f16(even, odd) : pair_bf16(even, odd));
        },
        std::make_integer_sequence<int, PAIRS>()
    );
    transpose(columns[0], rows[0]);
    if constexpr (D == F32) transpose(columns[1], rows[1]);
}

// `count` columns of row r of a chunk.
template <Dtype D> INLINE void store_chunk(const Words (&rows)[2], int64_t r, int64_t count, void* out) {
    float values[CHUNK];
    if constexpr (D == F32) {
        for (int i = 0; i < PAIRS; i++) values[2 * i] = rows[0][r][i], values[2 * i + 1] = rows[1][r][i];
        memcpy(out, values, count * 4);
    } else if (count == CHUNK) {
        store((float*)out, load(rows[0][r]));
    } else {
        memcpy(out, rows[0][r], count * 2);
    }
}

// Rows [begin, end) of out (count, columns): of `w`, or those that `index` names.
template <int C, bool HALF, Dtype D>
void unpack_rows(const Rows& w, const int64_t* index, int64_t begin, int64_t end, int64_t columns, void* out) {
    const int64_t per = HALF ? 1 : w.group / CHUNK, step = HALF ? GROUPS / 2 : GROUPS * per;  // chunks of GROUPS groups
    for (int64_t r = begin; r < end;) {
        const int64_t row = w.first + (index ? index[r] : r), lane = row % LANES;
        const int64_t count = index ? 1 : std::min(LANES - lane, end - r);
        const Block block{w, row / LANES};
        for (int64_t first = 0, g = 0; first * CHUNK < columns; first += step, g += GROUPS) {
            Scales scales;
            scales_of(block, g, std::min<int64_t>(GROUPS, w.groups - g), true, scales);
            for (int64_t c = first, at = 0; c < first + step && c * CHUNK < columns; at += HALF ? 2 : 1) {
                const int64_t next = std::min<int64_t>(at + HALF, GROUPS - 1);
                const V factor = set(w.factor), none = set(0);
                const V scale[2] = {mul(load(scales.scale[at]), factor), mul(load(scales.scale[next]), factor)};
                const V bias[2] = {
                    scales.biased ? load(scales.bias[at]) : none, scales.biased ? load(scales.bias[next]) : none
                };
                for (int64_t end = std::min(c + per, w.columns / CHUNK); c < end; c++) {
                    Words rows[2];
                    unpack_chunk<C, HALF, D>(block, c, scale, bias, rows);
                    for (int64_t i = 0; i < count; i++)
                        store_chunk<D>(
                            rows, lane + i, std::min<int64_t>(columns - c * CHUNK, CHUNK),
                            (uint8_t*)out + ((r + i) * columns + c * CHUNK) * size_of(D)
                        );
                }
            }
        }
        r += count;
    }
}

using Unpack = void (*)(const Rows&, const int64_t*, int64_t, int64_t, int64_t, void*);

template <int C, Dtype D> constexpr Unpack unpack_of[] = {unpack_rows<C, false, D>, unpack_rows<C, true, D>};
template <int C> constexpr Unpack unpack_f32[] = {unpack_of<C, F32>[0], unpack_of<C, F32>[1]};
template <int C> constexpr Unpack unpack_f16[] = {unpack_of<C, F16>[0], unpack_of<C, F16>[1]};
template <int C> constexpr Unpack unpack_bf16[] = {unpack_of<C, BF16>[0], unpack_of<C, BF16>[1]};

}  // namespace

// Rows, all or by their numbers, to out (count, columns).
struct Unpacked {
    const Rows* w;
    const int64_t* index;  // null: all
    void* out;
    int64_t count, columns;
    int32_t dtype;
};

extern "C" void llmrs_unpack(const Unpacked* a, int32_t threads) {
    const Unpack run = a->dtype == F32   ? OF_CODE(unpack_f32, *a->w)
                       : a->dtype == F16 ? OF_CODE(unpack_f16, *a->w)
                                         : OF_CODE(unpack_bf16, *a->w);
    parallel(a->count, a->index ? 1 : 4 * LANES, threads, [&](int64_t begin, int64_t end) {
        run(*a->w, a->index, begin, end, a->columns, a->out);
    });
}
