// Causal attention of prefill chunks over the paged KV cache, in tiles of query tokens: y = softmax(q k^T * scale) v.
//
// Layouts (row-major): q, out T (tokens, HQ, D); keys, values T (blocks, BLOCK, HK, D); block_tables int32 (sequences,
// columns): position p of sequence s is row p % BLOCK of block block_tables[s, p / BLOCK]; query_start_loc int32
// (sequences + 1,); seq_lens int32 (sequences,): context including this step's tokens; tiles int32 (N, 2): sequence and
// first token of each tile; scale float. A token attends to the positions up to its own, the last WINDOW if WINDOW > 0.
//
// Grid: threadgroups (1, HQ, N) of SIMDS simdgroups. A threadgroup computes TILE = 8 * SIMDS tokens of one head, 8 per
// simdgroup; in each iteration TILE keys, then their values are loaded to threadgroup memory.
// Everything is 8x8 matrices: scores = q * k^T, acc = diag(alpha) * acc + p * v. The lane that holds a matrix element is
// undocumented, so scores go through threadgroup memory, four lanes per row, and rows are scaled by a diagonal matrix.
// FLOPs: 4 * D * context_len per token and head. Bytes: 2 * context_len * D * sizeof(T) per tile and head.
// Formula: "Online normalizer calculation for softmax" (arXiv 1805.02867), tiled as in "FlashAttention-2" (arXiv
// 2307.08691).
constexpr uint TILE = 8 * SIMDS, THREADS = 32 * SIMDS;
constexpr uint COLS = TILE / 4;    // scores per lane, four lanes per row
constexpr float NEG_INF = -1e30f;  // finite: inf - inf is NaN
threadgroup T tile[TILE * D];
threadgroup float scores[SIMDS * 8 * TILE];
threadgroup float diagonal[SIMDS * 64];

const uint tid = thread_index_in_threadgroup, lane = thread_index_in_simdgroup, simd = simdgroup_index_in_threadgroup;
const uint head = threadgroup_position_in_grid.y, kv_head = head / (HQ / HK);
const uint sequence = tiles[2 * threadgroup_position_in_grid.z], token = tiles[2 * threadgroup_position_in_grid.z + 1];
const uint after = query_start_loc[sequence + 1];
const uint count = min(TILE, after - token);
const int first = seq_lens[sequence] - int(after - token);  // position of the first token
const int end = first + int(count);  // exclusive
const int begin = WINDOW > 0 ? max(first - WINDOW + 1, 0) : 0;
threadgroup float* my_scores = scores + simd * 8 * TILE;  // (8, TILE)
threadgroup float* my_diagonal = diagonal + simd * 64;

// load queries: 8 rows per simdgroup, as D / 8 matrices
for (uint i = tid; i < TILE * D; i += THREADS) {
  const uint r = i / D;
  tile[i] = r < count ? q[(size_t(token + r) * HQ + head) * D + i % D] : T(0.0f);
}
for (uint i = lane; i < 64; i += 32) my_diagonal[i] = 0.0f;
threadgroup_barrier(mem_flags::mem_threadgroup);
simdgroup_matrix<T, 8, 8> query[D / 8];
simdgroup_matrix<float, 8, 8> acc[D / 8];
UNROLLED (uint c = 0; c < D / 8; c++) {
  simdgroup_load(query[c], tile + simd * 8 * D + c * 8, D);
  acc[c] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
}

const uint r = lane / 4, column = lane % 4 * COLS;  // this lane's scores
const int position = first + int(simd * 8 + r);
float m = NEG_INF, l = 0.0f;
for (int key = begin; key < end; key += TILE) {
  threadgroup_barrier(mem_flags::mem_threadgroup);  // all reads of `tile` are done
  for (uint i = tid; i < TILE * D; i += THREADS) {
    const int p = key + int(i / D);
    const size_t block = p < end ? block_tables[sequence * block_tables_shape[1] + p / BLOCK] : 0;
    tile[i] = p < end ? keys[((block * BLOCK + p % BLOCK) * HK + kv_head) * D + i % D] : T(0.0f);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint j = 0; j < SIMDS; j++) {  // 8 keys at a time
    simdgroup_matrix<float, 8, 8> score = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    UNROLLED (uint c = 0; c < D / 8; c++) {
      simdgroup_matrix<T, 8, 8> k;
      simdgroup_load(k, tile + j * 8 * D + c * 8, D, ulong2(0, 0), true);
      simdgroup_multiply_accumulate(score, query[c], k, score);
    }
    simdgroup_store(score, my_scores + j * 8, TILE);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint i = tid; i < TILE * D; i += THREADS) {
    const int p = key + int(i / D);
    const size_t block = p < end ? block_tables[sequence * block_tables_shape[1] + p / BLOCK] : 0;
    tile[i] = p < end ? values[((block * BLOCK + p % BLOCK) * HK + kv_head) * D + i % D] : T(0.0f);
  }

  // online softmax: p replaces the scores, alpha rescales acc. While all keys of a row are masked, p is 1; the first
  // unmasked score then makes alpha 0.
  float m_new = m, sum = 0.0f;
  for (uint j = column; j < column + COLS; j++) {
    const int p = key + int(j);
    const bool unmasked = p <= position && (WINDOW == 0 || position - p < WINDOW);
    my_scores[r * TILE + j] = unmasked ? my_scores[r * TILE + j] * scale : NEG_INF;
    m_new = max(m_new, my_scores[r * TILE + j]);
  }
  m_new = max(m_new, simd_shuffle_xor(m_new, 1));
  m_new = max(m_new, simd_shuffle_xor(m_new, 2));
  for (uint j = column; j < column + COLS; j++) {
    const float p_score = fast::exp(my_scores[r * TILE + j] - m_new);
    my_scores[r * TILE + j] = p_score;
    sum += p_score;
  }
  sum += simd_shuffle_xor(sum, 1);
  sum += simd_shuffle_xor(sum, 2);
  const float alpha = fast::exp(m - m_new);
  l = l * alpha + sum;
  m = m_new;
  if (lane % 4 == 0) my_diagonal[r * 9] = alpha;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  simdgroup_matrix<float, 8, 8> scaling;
  simdgroup_load(scaling, my_diagonal, 8);
  UNROLLED (uint c = 0; c < D / 8; c++) simdgroup_multiply(acc[c], scaling, acc[c]);
  for (uint j = 0; j < SIMDS; j++) {
    simdgroup_matrix<float, 8, 8> p_tile;
    simdgroup_load(p_tile, my_scores + j * 8, TILE);
    UNROLLED (uint c = 0; c < D / 8; c++) {
      simdgroup_matrix<T, 8, 8> v;
      simdgroup_load(v, tile + j * 8 * D + c * 8, D);
      simdgroup_multiply_accumulate(acc[c], p_tile, v, acc[c]);
    }
  }
}

// store 8 columns at a time, through the scores' memory
UNROLLED (uint c = 0; c < D / 8; c++) {
  simdgroup_barrier(mem_flags::mem_threadgroup);
  simdgroup_store(acc[c], my_scores, 8);
  simdgroup_barrier(mem_flags::mem_threadgroup);
  const uint row = simd * 8 + r;
  for (uint e = 0; e < 2; e++) {
    const uint d = lane % 4 * 2 + e;
    if (row < count) out[(size_t(token + row) * HQ + head) * D + c * 8 + d] = static_cast<T>(my_scores[r * 8 + d] / l);
  }
}
