// Top-k and top-p thresholds of each sequence by pivot search, without a sort.
//
// Layouts (row-major): logits T (S, VOCAB); temperature float (S,), 0: greedy, skipped; top_k int32 (S,), 0: off; top_p
// float (S,), 1: off. "Bits" are ordered_bits(logit / temperature).
// Output: thresholds uint32 (S, 3): token i is kept if bits > thresholds[0], or bits == thresholds[0] and i <=
// thresholds[1]; thresholds[2] is the maximum, for min-p.
//
// Grid: threadgroups (1, S) of SIMDS simdgroups, one sequence each. Each pass over the logits narrows the bracket (low,
// high] of the threshold to a quarter, until it holds one token or one value. Once at most MAX_CANDIDATES tokens are above
// low, their bits move to threadgroup memory and passes are nearly free. All threads hold the same bracket, so branches
// are uniform.
// Bytes: VOCAB * sizeof(T) per pass and sequence, cached after the first. For random logits of 151,936 tokens: 4 to 8
// passes with top-k; 5 to 18 with top-p alone, which may keep more than MAX_CANDIDATES tokens.
// Formula: `keep` of core/sampling.py: top-p keeps a token if the mass exp(value - max) of all likelier tokens, within
// top-k, is less than top_p times the total. Ties keep the lower ids.
constexpr uint THREADS = 32 * SIMDS;
threadgroup float scratch[6 * SIMDS];
threadgroup uint last_tie[1];
threadgroup uint candidates[MAX_CANDIDATES];
const uint tid = thread_index_in_threadgroup, lane = thread_index_in_simdgroup, simd = simdgroup_index_in_threadgroup;
const uint s = threadgroup_position_in_grid.y;
const device T* row = logits + size_t(s) * VOCAB;
const float temp = temperature[s];
if (temp == 0.0f) {
  if (tid < 3) thresholds[3 * s + tid] = tid == 1 ? VOCAB : 0;
  return;
}

// maximum and minimum
float top = -INFINITY, bottom = INFINITY;
for (uint i = tid; i < VOCAB; i += THREADS) {
  top = max(top, float(row[i]) / temp);
  bottom = min(bottom, float(row[i]) / temp);
}
top = simd_max(top);
bottom = simd_min(bottom);
if (lane == 0) {
  scratch[simd] = top;
  scratch[SIMDS + simd] = bottom;
}
threadgroup_barrier(mem_flags::mem_threadgroup);
top = simd_max(lane < SIMDS ? scratch[lane] : -INFINITY);
bottom = simd_min(lane < SIMDS ? scratch[SIMDS + lane] : INFINITY);

// stage 0: threshold of top-k; stage 1: of top-p among the tokens that top-k keeps
uint threshold = 0, last_id = VOCAB;                     // keep all
uint low = ordered_bits(bottom) - 1, above_low = VOCAB;  // number of tokens above low
uint size = VOCAB, ties_dropped = 0;                     // tokens to scan; tokens equal to the threshold that are dropped
bool compacted = false;
float max_count = VOCAB, max_mass = INFINITY;            // exclusive limits of the tokens above the threshold
for (uint stage = 0; stage < 2; stage++) {
  if (stage == 0) {
    if (top_k[s] == 0 || uint(top_k[s]) >= VOCAB) continue;
    max_count = top_k[s];
  } else {
    if (top_p[s] >= 1.0f) continue;
    float sum[1] = {0.0f};
    for (uint i = tid; i < size; i += THREADS) {
      const uint bits = compacted ? candidates[i] : ordered_bits(float(row[i]) / temp);
      if (bits > low) sum[0] += metal::precise::exp(float_of(bits) - top);
    }
    group_sum<1, SIMDS>(sum, scratch, lane, simd);
    if (ties_dropped > 0) sum[0] -= float(ties_dropped) * metal::precise::exp(float_of(threshold) - top);
    max_mass = max(top_p[s] * sum[0], 1e-30f);  // always keeps the likeliest token
  }
  uint high = ordered_bits(top), above_high = 0;
  float mass = 0.0f;  // of the tokens above high
  while (high - low > 1 && above_low - above_high > 1) {
    if (!compacted && above_low <= MAX_CANDIDATES) {
      uint count = 0;
      for (uint i = tid; i < VOCAB; i += THREADS) count += ordered_bits(float(row[i]) / temp) > low ? 1 : 0;
      uint at = group_prefix_sum<SIMDS>(count, scratch, lane, simd);
      for (uint i = tid; i < VOCAB; i += THREADS) {
        const uint bits = ordered_bits(float(row[i]) / temp);
        if (bits > low) candidates[at++] = bits;
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      compacted = true;
      size = above_low;
    }
    const uint step = max((high - low) / 4, 1u);
    uint pivot[3];
    for (uint j = 0; j < 3; j++) pivot[j] = high - low > (j + 1) * step ? low + (j + 1) * step : high;
    float sums[6] = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};  // count and mass above each pivot
    for (uint i = tid; i < size; i += THREADS) {
      const uint bits = compacted ? candidates[i] : ordered_bits(float(row[i]) / temp);
      if (bits <= pivot[0]) continue;
      const float w = stage == 0 ? 0.0f : metal::precise::exp(float_of(bits) - top);
      for (uint j = 0; j < 3; j++) {
        sums[j] += bits > pivot[j] ? 1.0f : 0.0f;
        sums[3 + j] += bits > pivot[j] ? w : 0.0f;
      }
    }
    group_sum<6, SIMDS>(sums, scratch, lane, simd);
    for (uint j = 3; j-- > 0;) {  // the threshold is at or below a pivot with count and mass within the limits
      if (sums[j] < max_count && sums[3 + j] < max_mass) {
        high = pivot[j];
        above_high = uint(sums[j]);
        mass = sums[3 + j];
      }
    }
    for (uint j = 0; j < 3; j++) {
      if (pivot[j] < high) {
        low = pivot[j];
        above_low = uint(sums[j]);
      }
    }
  }
  const uint equal = above_low - above_high;
  threshold = low + 1;
  if (equal == 1) {  // a single token between low and high
    last_id = VOCAB;
    ties_dropped = 0;
    continue;
  }
  // `equal` tokens share one value: keep the first `ties_kept`
  const float mass_room = ceil(min((max_mass - mass) / metal::precise::exp(float_of(high) - top), float(VOCAB)));
  const uint ties_kept = uint(max(min(max_count - float(above_high), mass_room), 1.0f));
  last_id = VOCAB;
  ties_dropped = ties_kept < equal ? equal - ties_kept : 0;
  if (ties_dropped == 0) continue;
  const uint span = (VOCAB + THREADS - 1) / THREADS, from = tid * span, to = min(from + span, uint(VOCAB));
  uint count = 0;
  for (uint i = from; i < to; i++) count += ordered_bits(float(row[i]) / temp) == high ? 1 : 0;
  uint rank = group_prefix_sum<SIMDS>(count, scratch, lane, simd);
  for (uint i = from; i < to; i++) {
    if (ordered_bits(float(row[i]) / temp) != high) continue;
    rank++;
    if (rank == ties_kept) last_tie[0] = i;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  last_id = last_tie[0];
}
if (tid == 0) {
  thresholds[3 * s] = threshold;
  thresholds[3 * s + 1] = last_id;
  thresholds[3 * s + 2] = ordered_bits(top);
}
