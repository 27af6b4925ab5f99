// Where top-k and top-p cut: the least likely token that stays, for each sequence. No sort.
//
// Layouts (row-major): logits T (S, VOCAB); temperature float (S,), 0: greedy, nothing to do; top_k int32 (S,), 0: all;
// top_p float (S,), 1: all. A token's value is logit / temperature, its key the value's bits, ordered as the values.
// Output: edges uint32 (S, 3): token i stays if its key is greater than edges[0], or equal and i <= edges[1];
// edges[2] is the greatest key, which min-p needs.
//
// Grid: threadgroups (1, S) of SIMDS simdgroups; a threadgroup works on one sequence. It narrows the bracket (low, high]
// of the edge's key by four in each pass over the logits, until one token or one value is in it. As soon as no more than
// LIST tokens are above low, their keys move to threadgroup memory, and passes cost next to nothing. All threads know the
// bracket, so they take the same branches.
// Bytes: VOCAB * sizeof(T) per pass and sequence, from the cache after the first. Counted for random logits of 151,936
// tokens: 4 to 8 passes with top-k, 5 to 18 for top-p alone, which may keep more tokens than the list takes.
// Formula: `keep` of core/sampling.py: top-p keeps a token if the weight exp(value - largest) of what is likelier, within
// top-k, is less than top_p of all of it; of equal values the lower id is likelier.
constexpr uint THREADS = 32 * SIMDS;
threadgroup float scratch[6 * SIMDS];
threadgroup uint found[1];
threadgroup uint list[LIST];
const uint tid = thread_index_in_threadgroup, lane = thread_index_in_simdgroup, simd = simdgroup_index_in_threadgroup;
const uint s = threadgroup_position_in_grid.y;
const device T* row = logits + size_t(s) * VOCAB;
const float heat = temperature[s];
if (heat == 0.0f) {
  if (tid < 3) edges[3 * s + tid] = tid == 1 ? VOCAB : 0;
  return;
}

// the largest and the least value
float top = -INFINITY, bottom = INFINITY;
for (uint i = tid; i < VOCAB; i += THREADS) {
  top = max(top, float(row[i]) / heat);
  bottom = min(bottom, float(row[i]) / heat);
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

// stage 0 finds the edge of top-k; stage 1 that of top-p among what top-k leaves
uint edge = 0, last = VOCAB;                                // all stay
uint low = ordered(bottom) - 1, above_low = VOCAB;          // the tokens above low
uint size = VOCAB, surplus = 0;                             // tokens to look at; those equal to the edge that do not stay
bool listed = false;
float most = VOCAB, limit = INFINITY;                       // tokens before the edge must be fewer, and weigh less
for (uint stage = 0; stage < 2; stage++) {
  if (stage == 0) {
    if (top_k[s] == 0 || uint(top_k[s]) >= VOCAB) continue;
    most = top_k[s];
  } else {
    if (top_p[s] >= 1.0f) continue;
    float sum[1] = {0.0f};
    for (uint i = tid; i < size; i += THREADS) {
      const uint key = listed ? list[i] : ordered(float(row[i]) / heat);
      if (key > low) sum[0] += metal::precise::exp(value_of(key) - top);
    }
    sum_of_all<1, SIMDS>(sum, scratch, lane, simd);
    if (surplus > 0) sum[0] -= float(surplus) * metal::precise::exp(value_of(edge) - top);
    limit = max(top_p[s] * sum[0], 1e-30f);  // the likeliest token always stays
  }
  uint high = ordered(top), above_high = 0;
  float weight = 0.0f;  // of the tokens above high
  while (high - low > 1 && above_low - above_high > 1) {
    if (!listed && above_low <= LIST) {
      uint mine = 0;
      for (uint i = tid; i < VOCAB; i += THREADS) mine += ordered(float(row[i]) / heat) > low ? 1 : 0;
      uint at = sum_before<SIMDS>(mine, scratch, lane, simd);
      for (uint i = tid; i < VOCAB; i += THREADS) {
        const uint key = ordered(float(row[i]) / heat);
        if (key > low) list[at++] = key;
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      listed = true;
      size = above_low;
    }
    const uint step = max((high - low) / 4, 1u);
    uint pivot[3];
    for (uint j = 0; j < 3; j++) pivot[j] = high - low > (j + 1) * step ? low + (j + 1) * step : high;
    float sums[6] = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};  // count and weight above each pivot
    for (uint i = tid; i < size; i += THREADS) {
      const uint key = listed ? list[i] : ordered(float(row[i]) / heat);
      if (key <= pivot[0]) continue;
      const float w = stage == 0 ? 0.0f : metal::precise::exp(value_of(key) - top);
      for (uint j = 0; j < 3; j++) {
        sums[j] += key > pivot[j] ? 1.0f : 0.0f;
        sums[3 + j] += key > pivot[j] ? w : 0.0f;
      }
    }
    sum_of_all<6, SIMDS>(sums, scratch, lane, simd);
    for (uint j = 3; j-- > 0;) {  // the edge is at a pivot or below it where what is above it is little
      if (sums[j] < most && sums[3 + j] < limit) {
        high = pivot[j];
        above_high = uint(sums[j]);
        weight = sums[3 + j];
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
  edge = low + 1;
  if (equal == 1) {  // a single token, wherever between low and high its key lies
    last = VOCAB;
    surplus = 0;
    continue;
  }
  // one value is left, of `equal` tokens: the first `room` of them stay
  const float fit = ceil(min((limit - weight) / metal::precise::exp(value_of(high) - top), float(VOCAB)));
  const uint room = uint(max(min(most - float(above_high), fit), 1.0f));
  last = VOCAB;
  surplus = room < equal ? equal - room : 0;
  if (surplus == 0) continue;
  const uint span = (VOCAB + THREADS - 1) / THREADS, from = tid * span, to = min(from + span, uint(VOCAB));
  uint mine = 0;
  for (uint i = from; i < to; i++) mine += ordered(float(row[i]) / heat) == high ? 1 : 0;
  uint before = sum_before<SIMDS>(mine, scratch, lane, simd);
  for (uint i = from; i < to; i++) {
    if (ordered(float(row[i]) / heat) != high) continue;
    before++;
    if (before == room) found[0] = i;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  last = found[0];
}
if (tid == 0) {
  edges[3 * s] = edge;
  edges[3 * s + 1] = last;
  edges[3 * s + 2] = ordered(top);
}
