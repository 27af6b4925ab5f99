// Quantized weights: rows, codes and scales.
//
// 16 rows of a weight lie interleaved (native.py), one in each lane, so that sums need no reduction across lanes and
// one load brings the scales of 16 rows. A chunk of 32 columns is 16 vectors of pairs: of columns 2 j and 2 j + 1 of
// each row.

#pragma once

#include "common.h"

namespace {

// Codes: unsigned integers, indices of a table of 16 values, 8-bit floats.
enum Code : int32_t { CODE_U2, CODE_U3, CODE_U4, CODE_U5, CODE_U6, CODE_U8, CODE_TABLE, CODE_E4M3 };

constexpr int CHUNK = 32, PAIRS = CHUNK / 2;  // columns
constexpr int64_t SUPER = 256;                // columns of a super-scale

}  // namespace

// Rows of a weight. Planes are (blocks of 16 rows, chunks or groups, 16): rows beyond the last one are zeros.
struct Rows {
    int64_t first, rows, columns, group, groups;  // first: row of the planes; columns: of whole chunks, padded with
                                                  // codes that are zero; group: columns per scale, 16 or n * 32
    Code code;
    Dtype scale;
    const uint8_t *codes, *high;        // high: the upper 1 or 2 bits of U3, U5, U6
    int64_t codes_stride, high_stride;  // bytes of a block
    const uint8_t *scales, *biases, *zeros, *mins, *super_scales, *super_mins, *row_scales;  // null: none
    float zero, factor;
    int8_t entries[16];  // `factor` times these are the table
};

namespace {

// ---- Codes

// Pair J of a chunk, whose vectors lie at p. A vector of b-bit codes holds 16 / b pairs.
template <int BITS, int J> INLINE I packed_pair(const uint8_t* p) {
    constexpr int PER = 16 / BITS;
    return field<BITS*(J % PER), (1 << BITS) - 1>(words(p + 64 * (J / PER)));
}

// The upper bits of pair J, at their place.
template <int BITS, int J, int TO> INLINE I high_pair(const uint8_t* p) {
    constexpr int PER = 16 / BITS;
    return field<BITS*(J % PER) - TO, ((1 << BITS) - 1) << TO>(words(p + 64 * (J / PER)));
}

template <int J> INLINE I table_pair(const Rows& w, const uint8_t* p) {
    const I x = words(p + 64 * (J / 4));
    const I found = entries(J % 2 ? field<4, 0x0F0F>(x) : field<0, 0x0F0F>(x), w.entries);
    return J % 4 < 2 ? lower_byte(found) : upper_byte(found);
}

template <int C, int J> INLINE I pair(const Rows& w, const uint8_t* p, const uint8_t* high) {
    if constexpr (C == CODE_TABLE) return table_pair<J>(w, p);
    if constexpr (C == CODE_U2) return packed_pair<2, J>(p);
    if constexpr (C == CODE_U3) return join(packed_pair<2, J>(p), high_pair<1, J, 2>(high));
    if constexpr (C == CODE_U4) return packed_pair<4, J>(p);
    if constexpr (C == CODE_U5) return join(packed_pair<4, J>(p), high_pair<1, J, 4>(high));
    if constexpr (C == CODE_U6) return join(packed_pair<4, J>(p), high_pair<2, J, 4>(high));
    return packed_pair<8, J>(p);
}

template <int C> INLINE V value(I codes) {
    if constexpr (C == CODE_E4M3) return e4m3(codes);
    return number(codes);
}

// f(j) for pairs FROM to FROM + COUNT - 1, each an integral_constant.
template <int FROM, class F, int... J> INLINE void each_pair(F f, std::integer_sequence<int, J...>) {
    (f(std::integral_constant<int, FROM + J>()), ...);
}

struct Block {  // 16 rows
    const Rows& w;
    int64_t n;  // number of the block
};

template <int C> constexpr int CODE_BITS = C == CODE_U2 || C == CODE_U3 ? 2 : C == CODE_U8 || C == CODE_E4M3 ? 8 : 4;
template <int C> constexpr int HIGH_BITS = C == CODE_U3 || C == CODE_U5 ? 1 : C == CODE_U6 ? 2 : 0;

template <int C> INLINE const uint8_t* chunk_of(const Block& b, int64_t c) {
    return b.w.codes + b.n * b.w.codes_stride + c * 64 * CODE_BITS<C>;
}

template <int C> INLINE const uint8_t* high_chunk_of(const Block& b, int64_t c) {
    return b.w.high + b.n * b.w.high_stride + c * 64 * HIGH_BITS<C>;
}

// ---- Scales

constexpr int GROUPS = 16;  // whose scales are made at once

struct Scales {  // w = scale * code + bias, for 16 rows
    float scale[GROUPS][LANES], bias[GROUPS][LANES];
    bool biased;
};

// Of `count` groups from g on. Of integers, that of the form's zero is left out: it is in Input's offsets.
__attribute__((noinline)) void scales_of(const Block& b, int64_t g, int64_t count, bool with_zero, Scales& out) {
    const Rows& w = b.w;
    const V row_scale = w.row_scales ? load((const float*)w.row_scales + b.n * LANES) : set(1), zero = set(-w.zero);
    out.biased = w.zeros || w.biases || w.super_mins || (with_zero && w.zero != 0);
    for (int64_t i = 0; i < count; i++, g++) {
        const int64_t at = (b.n * w.groups + g) * LANES;
        const int64_t super = LANES * (b.n * ((w.columns + SUPER - 1) / SUPER) + g * w.group / SUPER);
        V scale = load_as(w.scale, w.scales, at);
        if (w.super_scales) scale = mul(scale, load_as(F16, w.super_scales, super));
        if (w.row_scales) scale = mul(scale, row_scale);
        store(out.scale[i], scale);
        if (!out.biased) continue;
        V bias = w.zeros ? mul(scale, negated(load_as(U8, w.zeros, at))) : with_zero ? mul(scale, zero) : set(0);
        if (w.biases) bias = add(load_as(w.scale, w.biases, at), bias);
        if (w.super_mins) {
            const V min = w.scale == U4 ? load_as(HIGH_U4, w.scales, at) : load_as(U8, w.mins, at);
            bias = fma(min, negated(load_as(F16, w.super_mins, super)), bias);
        }
        store(out.bias[i], bias);
    }
}

#define OF_CODE(table, w)                                                                                              \
    ((w).code == CODE_U2      ? table<CODE_U2>                                                                         \
     : (w).code == CODE_U3    ? table<CODE_U3>                                                                         \
     : (w).code == CODE_U4    ? table<CODE_U4>                                                                         \
     : (w).code == CODE_U5    ? table<CODE_U5>                                                                         \
     : (w).code == CODE_U6    ? table<CODE_U6>                                                                         \
     : (w).code == CODE_U8    ? table<CODE_U8>                                                                         \
     : (w).code == CODE_TABLE ? table<CODE_TABLE>                                                                      \
                              : table<CODE_E4M3>)[(w).group == 16]

}  // namespace
