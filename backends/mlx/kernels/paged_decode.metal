// Attention of decode tokens over the paged KV cache (split-KV): y = softmax(q k^T * scale) v.
//
// Layouts (row-major): q T (tokens, HQ, D); keys, values K (blocks, BLOCK, HK, D); block_tables int32 (sequences, columns):
// position p of sequence s is row p % BLOCK of block block_tables[s, p / BLOCK]; token_to_seq int32 (tokens,);
// context_lens int32 (tokens,): a token attends to positions 0 .. context_lens - 1, the last WINDOW of them if WINDOW > 0;
// scale float. HQ / HK query heads share a KV head.
// Output, SPLIT false: out (tokens, HQ, D). SPLIT true: out float (tokens, HQ, splits, D + 2), for paged_combine: per
// split acc = sum of exp(score - m) * value, then m = largest score and l = sum of exp(score - m).
//
// Grid: threadgroups (1, HQ / G * splits, tokens) of SIMDS simdgroups, each for G query heads that share one KV head. The
// lanes split D, E elements each; the simdgroups stride over the positions.
// Bytes: 2 * context_len * HK * D * sizeof(K) * (HQ / HK / G) per token; q and out are small in comparison.
// Formula: "Online normalizer calculation for softmax" (arXiv 1805.02867), combined over splits as in "Flash-Decoding".
constexpr uint ROW = SPLIT ? D + 2 : D;
constexpr uint HEAD_GROUPS = HQ / G;
constexpr float NEG_INF = -1e30f;  // finite: inf - inf is NaN
threadgroup float m_shared[SIMDS];
threadgroup float l_shared[SIMDS];
threadgroup float acc_shared[SIMDS * D];

const uint lane = thread_index_in_simdgroup, simd = simdgroup_index_in_threadgroup;
const uint token = threadgroup_position_in_grid.z;
const uint head_group = threadgroup_position_in_grid.y % HEAD_GROUPS, split = threadgroup_position_in_grid.y / HEAD_GROUPS;
const uint splits = threadgroups_per_grid.y / HEAD_GROUPS;
const uint first = head_group * G;    // query heads first .. first + G - 1
const uint head = first / (HQ / HK);  // KV head
const uint at = lane * E;             // this lane's elements: at .. at + E - 1
const bool active = at < D;

const uint sequence = token_to_seq[token], end = context_lens[token];
const uint begin = WINDOW > 0 && end > uint(WINDOW) ? end - WINDOW : 0;
const uint share = (end - begin + splits - 1) / splits;
const uint from = begin + split * share, to = min(from + share, end);  // may be empty

float q_reg[G * E], acc[G * E], m[G], l[G];
for (uint g = 0; g < G; g++) {
  m[g] = NEG_INF;
  l[g] = 0.0f;
  for (uint e = 0; e < E; e++) {
    q_reg[g * E + e] = active ? float(q[(size_t(token) * HQ + first + g) * D + at + e]) * scale : 0.0f;
    acc[g * E + e] = 0.0f;
  }
}

for (uint p = from + simd; p < to; p += SIMDS) {
  const size_t block = block_tables[sequence * block_tables_shape[1] + p / BLOCK];
  const size_t row = ((block * BLOCK + p % BLOCK) * HK + head) * D + at;
  float k[E], v[E];
  for (uint e = 0; e < E; e++) {
    k[e] = active ? float(keys[row + e]) : 0.0f;
    v[e] = active ? float(values[row + e]) : 0.0f;
  }
  for (uint g = 0; g < G; g++) {
    float score = 0.0f;
    for (uint e = 0; e < E; e++) score += q_reg[g * E + e] * k[e];
    score = simd_sum(score);
    const float m_new = max(m[g], score);
    const float alpha = fast::exp(m[g] - m_new), p_score = fast::exp(score - m_new);
    m[g] = m_new;
    l[g] = l[g] * alpha + p_score;
    for (uint e = 0; e < E; e++) acc[g * E + e] = acc[g * E + e] * alpha + p_score * v[e];
  }
}

// reduce over the simdgroups, one head at a time
for (uint g = 0; g < G; g++) {
  if (lane == 0) {
    m_shared[simd] = m[g];
    l_shared[simd] = l[g];
  }
  for (uint e = 0; e < E; e++)
    if (active) acc_shared[simd * D + at + e] = acc[g * E + e];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float m_all = NEG_INF, l_all = 0.0f;
  for (uint s = 0; s < SIMDS; s++) m_all = max(m_all, m_shared[s]);
  for (uint s = 0; s < SIMDS; s++) l_all += l_shared[s] * fast::exp(m_shared[s] - m_all);
  const size_t row = ((size_t(token) * HQ + first + g) * splits + split) * ROW;
  for (uint d = thread_index_in_threadgroup; d < D; d += 32 * SIMDS) {
    float sum = 0.0f;
    for (uint s = 0; s < SIMDS; s++) sum += acc_shared[s * D + d] * fast::exp(m_shared[s] - m_all);
    out[row + d] = static_cast<O>(SPLIT || l_all == 0.0f ? sum : sum / l_all);
  }
  if (SPLIT && thread_index_in_threadgroup == 0) {
    out[row + D] = static_cast<O>(m_all);
    out[row + D + 1] = static_cast<O>(l_all);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);  // the next head overwrites the shared arrays
}
