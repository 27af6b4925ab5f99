// Attention of single query tokens over a paged KV cache: y = softmax(q k^T * scale) v.
//
// Layouts (row-major): q T (tokens, HQ, D); keys, values K (blocks, BLOCK, HK, D); tables int32 (sequences, columns):
// position p of sequence s lies in row p % BLOCK of block tables[s, p / BLOCK]; owners int32 (tokens,): the sequence of
// a token; visible int32 (tokens,): it sees the positions 0 .. visible - 1, of them the last WINDOW where WINDOW > 0;
// scale float, one number. HQ / HK query heads share a KV head.
// Output, SPLIT false: out (tokens, HQ, D). SPLIT true: out float (tokens, HQ, splits, D + 2), for paged_combine: each
// split's sum of exp(score - largest) * value, then its largest score and its sum of exp(score - largest).
//
// Grid: threadgroups (1, HQ / G * splits, tokens) of SIMDS simdgroups. A threadgroup works on G query heads of one KV
// head, which it reads once for them all. Lanes split D, E elements each; simdgroups take turns over the positions.
// Bytes: 2 * (positions seen) * HK * D * sizeof(K) * (HQ / HK / G) per token; q and out are small beside it.
// Formula: the running maximum and sum of "Online normalizer calculation for softmax" (arXiv 1805.02867), and their
// combination over parts ("Flash-Decoding").
constexpr uint ROW = SPLIT ? D + 2 : D;
constexpr uint CHUNKS = HQ / G;
constexpr float NONE = -1e30f;  // less than every score; finite, because infinities cancel to NaN
threadgroup float largest[SIMDS];
threadgroup float total[SIMDS];
threadgroup float sums[SIMDS * D];

const uint lane = thread_index_in_simdgroup, simd = simdgroup_index_in_threadgroup;
const uint token = threadgroup_position_in_grid.z;
const uint chunk = threadgroup_position_in_grid.y % CHUNKS, split = threadgroup_position_in_grid.y / CHUNKS;
const uint splits = threadgroups_per_grid.y / CHUNKS;
const uint first = chunk * G;               // query heads first .. first + G - 1
const uint head = first / (HQ / HK);        // read this KV head
const uint at = lane * E;                   // this lane's elements of D: at .. at + E - 1
const bool active = at < D;

const uint sequence = owners[token], end = visible[token];
const uint begin = WINDOW > 0 && end > uint(WINDOW) ? end - WINDOW : 0;
const uint share = (end - begin + splits - 1) / splits;
const uint from = begin + split * share, to = min(from + share, end);  // may be empty

float query[G * E], result[G * E], m[G], l[G];
for (uint g = 0; g < G; g++) {
  m[g] = NONE;
  l[g] = 0.0f;
  for (uint e = 0; e < E; e++) {
    query[g * E + e] = active ? float(q[(size_t(token) * HQ + first + g) * D + at + e]) * scale : 0.0f;
    result[g * E + e] = 0.0f;
  }
}

for (uint p = from + simd; p < to; p += SIMDS) {
  const size_t block = tables[sequence * tables_shape[1] + p / BLOCK];
  const size_t row = ((block * BLOCK + p % BLOCK) * HK + head) * D + at;
  float k[E], v[E];
  for (uint e = 0; e < E; e++) {
    k[e] = active ? float(keys[row + e]) : 0.0f;
    v[e] = active ? float(values[row + e]) : 0.0f;
  }
  for (uint g = 0; g < G; g++) {
    float score = 0.0f;
    for (uint e = 0; e < E; e++) score += query[g * E + e] * k[e];
    score = simd_sum(score);
    const float grown = max(m[g], score);
    const float kept = fast::exp(m[g] - grown), weight = fast::exp(score - grown);
    m[g] = grown;
    l[g] = l[g] * kept + weight;
    for (uint e = 0; e < E; e++) result[g * E + e] = result[g * E + e] * kept + weight * v[e];
  }
}

// the simdgroups' parts become one, head after head
for (uint g = 0; g < G; g++) {
  if (lane == 0) {
    largest[simd] = m[g];
    total[simd] = l[g];
  }
  for (uint e = 0; e < E; e++)
    if (active) sums[simd * D + at + e] = result[g * E + e];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float top = NONE, all = 0.0f;
  for (uint s = 0; s < SIMDS; s++) top = max(top, largest[s]);
  for (uint s = 0; s < SIMDS; s++) all += total[s] * fast::exp(largest[s] - top);
  const size_t row = ((size_t(token) * HQ + first + g) * splits + split) * ROW;
  for (uint d = thread_index_in_threadgroup; d < D; d += 32 * SIMDS) {
    float sum = 0.0f;
    for (uint s = 0; s < SIMDS; s++) sum += sums[s * D + d] * fast::exp(largest[s] - top);
    out[row + d] = static_cast<O>(SPLIT || all == 0.0f ? sum : sum / all);
  }
  if (SPLIT && thread_index_in_threadgroup == 0) {
    out[row + D] = static_cast<O>(top);
    out[row + D + 1] = static_cast<O>(all);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);  // before the next head overwrites what is read here
}
