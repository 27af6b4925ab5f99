// Gumbel-max sampling: the argmax of each vocabulary block, of the logit (greedy) or of logit / temperature + noise.
//
// Layouts (row-major): logits T (S, VOCAB); temperature float (S,), 0: greedy; min_p float (S,), 0: off; rng_keys uint32
// (S,); thresholds uint32 (S, 3) of find_thresholds, not read without FILTER.
// Outputs: partial_max float (S, blocks), partial_argmax int32 (S, blocks); -INFINITY and VOCAB for a block without
// tokens. Ties take the lowest id.
// Grid: threadgroups (blocks, S) of SIMDS simdgroups, BLOCK_V tokens each.
// Bytes: VOCAB * sizeof(T) per sequence.
// Formula: `sample` of core/sampling.py.
threadgroup float simd_best[SIMDS];
threadgroup uint simd_id[SIMDS];
const uint tid = thread_index_in_threadgroup, lane = thread_index_in_simdgroup, simd = simdgroup_index_in_threadgroup;
const uint block = threadgroup_position_in_grid.x, s = threadgroup_position_in_grid.y;
const uint end = min((block + 1) * BLOCK_V, uint(VOCAB));
const float temp = temperature[s];

float best = -INFINITY;
uint id = VOCAB;
for (uint i = block * BLOCK_V + tid; i < end; i += 32 * SIMDS) {
  float x = float(logits[size_t(s) * VOCAB + i]);
  if (temp > 0.0f) {
    x /= temp;
    if (FILTER) {
      const uint bits = ordered_bits(x), threshold = thresholds[3 * s];
      if (bits < threshold || (bits == threshold && i > thresholds[3 * s + 1])) continue;
      if (metal::precise::exp(x - float_of(thresholds[3 * s + 2])) < min_p[s]) continue;
    }
    x += gumbel(rng_keys[s], i);
  }
  if (id == VOCAB || x > best) {  // i ascends, so ties keep the lowest id
    best = x;
    id = i;
  }
}
float top = simd_max(best);
id = simd_min(best == top ? id : uint(VOCAB));
if (lane == 0) {
  simd_best[simd] = top;
  simd_id[simd] = id;
}
threadgroup_barrier(mem_flags::mem_threadgroup);
if (simd == 0) {
  best = lane < SIMDS ? simd_best[lane] : -INFINITY;
  top = simd_max(best);
  id = simd_min(lane < SIMDS && best == top ? simd_id[lane] : uint(VOCAB));
  if (lane == 0) {
    partial_max[s * threadgroups_per_grid.x + block] = top;
    partial_argmax[s * threadgroups_per_grid.x + block] = id;
  }
}
