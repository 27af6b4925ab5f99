// The best token of each part of the vocabulary: the largest logit, or the largest logit / temperature + noise.
//
// Layouts (row-major): logits T (S, VOCAB); temperature float (S,), 0: greedy; min_p float (S,), 0: all; keys uint32 (S,)
// of the noise; edges uint32 (S, 3) of sample_keep, not read without FILTER.
// Outputs: scores float (S, parts), ids int32 (S, parts); -INFINITY and VOCAB where no token of a part stays. Of equal
// scores the lowest id wins.
// Grid: threadgroups (parts, S) of SIMDS simdgroups; a threadgroup works on PART tokens.
// Bytes: VOCAB * sizeof(T) per sequence.
// Formula: `sample` of core/sampling.py.
threadgroup float best_score[SIMDS];
threadgroup uint best_id[SIMDS];
const uint tid = thread_index_in_threadgroup, lane = thread_index_in_simdgroup, simd = simdgroup_index_in_threadgroup;
const uint part = threadgroup_position_in_grid.x, s = threadgroup_position_in_grid.y;
const uint to = min((part + 1) * PART, uint(VOCAB));
const float heat = temperature[s];

float best = -INFINITY;
uint id = VOCAB;
for (uint i = part * PART + tid; i < to; i += 32 * SIMDS) {
  float x = float(logits[size_t(s) * VOCAB + i]);
  if (heat > 0.0f) {
    x /= heat;
    if (FILTER) {
      const uint key = ordered(x), edge = edges[3 * s];
      if (key < edge || (key == edge && i > edges[3 * s + 1])) continue;
      if (metal::precise::exp(x - value_of(edges[3 * s + 2])) < min_p[s]) continue;
    }
    x += gumbel(keys[s], i);
  }
  if (id == VOCAB || x > best) {  // ids rise, so the first of equal scores stays
    best = x;
    id = i;
  }
}
float top = simd_max(best);
id = simd_min(best == top ? id : uint(VOCAB));
if (lane == 0) {
  best_score[simd] = top;
  best_id[simd] = id;
}
threadgroup_barrier(mem_flags::mem_threadgroup);
if (simd == 0) {
  best = lane < SIMDS ? best_score[lane] : -INFINITY;
  top = simd_max(best);
  id = simd_min(lane < SIMDS && best == top ? best_id[lane] : uint(VOCAB));
  if (lane == 0) {
    scores[s * threadgroups_per_grid.x + part] = top;
    ids[s * threadgroups_per_grid.x + part] = id;
  }
}
