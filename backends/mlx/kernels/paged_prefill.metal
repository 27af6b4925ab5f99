// Attention of prompt tokens over a paged KV cache, a tile of them at a time: y = softmax(q k^T * scale) v, causal.
//
// Layouts (row-major): q T (tokens, HQ, D); keys, values T (blocks, BLOCK, HK, D); tables int32 (sequences, columns):
// position p of sequence s lies in row p % BLOCK of block tables[s, p / BLOCK]; starts int32 (sequences + 1,): sequence s
// has the tokens starts[s] .. starts[s + 1] - 1; lengths int32 (sequences,): its positions, whose last ones those tokens
// are; tiles int32 (N, 2): sequence and first token of each tile; scale float, one number. A token sees the positions up
// to its own, of them the last WINDOW where WINDOW > 0. Output: out T (tokens, HQ, D).
//
// Grid: threadgroups (1, HQ, N) of SIMDS simdgroups. A threadgroup works on ROWS = 8 * SIMDS tokens of one sequence and
// one head; each simdgroup on 8 of the tokens. In each step ROWS keys, then their values come into threadgroup memory.
// Everything is made of 8x8 matrices: scores = query * key^T, result = diagonal(kept) * result + weights * value. Which
// lane holds which element of a matrix is not documented, so scores go through threadgroup memory, where four lanes share
// a row, and a row is scaled by multiplying with a diagonal matrix.
// Work: 4 * D * (positions seen) FLOPs per token and head. Bytes: 2 * (positions seen) * D * sizeof(T) per tile and head.
// Formula: the running maximum and sum of "Online normalizer calculation for softmax" (arXiv 1805.02867), in tiles as in
// "FlashAttention-2" (arXiv 2307.08691).
constexpr uint ROWS = 8 * SIMDS, THREADS = 32 * SIMDS;
constexpr uint COLUMNS = ROWS / 4;  // of the scores of a row, for each of its four lanes
constexpr float NONE = -1e30f;      // less than every score; finite, because infinities cancel to NaN
threadgroup T tile[ROWS * D];
threadgroup float scores[SIMDS * 8 * ROWS];
threadgroup float diagonal[SIMDS * 64];

const uint tid = thread_index_in_threadgroup, lane = thread_index_in_simdgroup, simd = simdgroup_index_in_threadgroup;
const uint head = threadgroup_position_in_grid.y, kv_head = head / (HQ / HK);
const uint sequence = tiles[2 * threadgroup_position_in_grid.z], token = tiles[2 * threadgroup_position_in_grid.z + 1];
const uint after = starts[sequence + 1];
const uint count = min(ROWS, after - token);
const int first = lengths[sequence] - int(after - token);  // position of the tile's first token
const int end = first + int(count);                        // no token of the tile sees this position
const int begin = WINDOW > 0 ? max(first - WINDOW + 1, 0) : 0;
threadgroup float* my_scores = scores + simd * 8 * ROWS;    // 8 rows of ROWS
threadgroup float* my_diagonal = diagonal + simd * 64;

// queries: 8 rows of each simdgroup, as D / 8 matrices
for (uint i = tid; i < ROWS * D; i += THREADS) {
  const uint r = i / D;
  tile[i] = r < count ? q[(size_t(token + r) * HQ + head) * D + i % D] : T(0.0f);
}
for (uint i = lane; i < 64; i += 32) my_diagonal[i] = 0.0f;
threadgroup_barrier(mem_flags::mem_threadgroup);
simdgroup_matrix<T, 8, 8> query[D / 8];
simdgroup_matrix<float, 8, 8> result[D / 8];
UNROLLED (uint c = 0; c < D / 8; c++) {
  simdgroup_load(query[c], tile + simd * 8 * D + c * 8, D);
  result[c] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
}

const uint r = lane / 4, column = lane % 4 * COLUMNS;  // this lane's part of the scores
const int position = first + int(simd * 8 + r);
float m = NONE, l = 0.0f;
for (int key = begin; key < end; key += ROWS) {
  threadgroup_barrier(mem_flags::mem_threadgroup);  // what the tile held has been read
  for (uint i = tid; i < ROWS * D; i += THREADS) {
    const int p = key + int(i / D);
    const size_t block = p < end ? tables[sequence * tables_shape[1] + p / BLOCK] : 0;
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
    simdgroup_store(score, my_scores + j * 8, ROWS);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint i = tid; i < ROWS * D; i += THREADS) {
    const int p = key + int(i / D);
    const size_t block = p < end ? tables[sequence * tables_shape[1] + p / BLOCK] : 0;
    tile[i] = p < end ? values[((block * BLOCK + p % BLOCK) * HK + kv_head) * D + i % D] : T(0.0f);
  }

  // weights in place of the scores; what the rows of the result are to be multiplied with. Where a row has seen nothing
  // yet, its weights are 1, and the first score that it sees makes `kept` 0.
  float grown = m, sum = 0.0f;
  for (uint j = column; j < column + COLUMNS; j++) {
    const int p = key + int(j);
    const bool seen = p <= position && (WINDOW == 0 || position - p < WINDOW);
    my_scores[r * ROWS + j] = seen ? my_scores[r * ROWS + j] * scale : NONE;
    grown = max(grown, my_scores[r * ROWS + j]);
  }
  grown = max(grown, simd_shuffle_xor(grown, 1));
  grown = max(grown, simd_shuffle_xor(grown, 2));
  for (uint j = column; j < column + COLUMNS; j++) {
    const float weight = fast::exp(my_scores[r * ROWS + j] - grown);
    my_scores[r * ROWS + j] = weight;
    sum += weight;
  }
  sum += simd_shuffle_xor(sum, 1);
  sum += simd_shuffle_xor(sum, 2);
  const float kept = fast::exp(m - grown);
  l = l * kept + sum;
  m = grown;
  if (lane % 4 == 0) my_diagonal[r * 9] = kept;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  simdgroup_matrix<float, 8, 8> scaling;
  simdgroup_load(scaling, my_diagonal, 8);
  UNROLLED (uint c = 0; c < D / 8; c++) simdgroup_multiply(result[c], scaling, result[c]);
  for (uint j = 0; j < SIMDS; j++) {
    simdgroup_matrix<float, 8, 8> weights;
    simdgroup_load(weights, my_scores + j * 8, ROWS);
    UNROLLED (uint c = 0; c < D / 8; c++) {
      simdgroup_matrix<T, 8, 8> v;
      simdgroup_load(v, tile + j * 8 * D + c * 8, D);
      simdgroup_multiply_accumulate(result[c], weights, v, result[c]);
    }
  }
}

// eight columns of the result at a time, through the memory of the scores
UNROLLED (uint c = 0; c < D / 8; c++) {
  simdgroup_barrier(mem_flags::mem_threadgroup);
  simdgroup_store(result[c], my_scores, 8);
  simdgroup_barrier(mem_flags::mem_threadgroup);
  const uint row = simd * 8 + r;
  for (uint e = 0; e < 2; e++) {
    const uint d = lane % 4 * 2 + e;
    if (row < count) out[(size_t(token + row) * HQ + head) * D + c * 8 + d] = static_cast<T>(my_scores[r * 8 + d] / l);
  }
}
