// The best of the parts' best tokens.
//
// Layouts (row-major): scores float (S, parts), ids int32 (S, parts), as sample_part gives them. Output: tokens int32 (S,).
// Grid: threadgroups (1, S) of one simdgroup each. Parts rise with ids, so the lowest id of equal scores wins.
// Bytes: 8 per part and sequence.
const uint lane = thread_index_in_simdgroup, s = threadgroup_position_in_grid.y, parts = scores_shape[1];
float best = -INFINITY;
int id = VOCAB;
for (uint p = lane; p < parts; p += 32) {
  const float x = scores[s * parts + p];
  const int token = ids[s * parts + p];
  if (x > best || (x == best && token < id)) {
    best = x;
    id = token;
  }
}
const float top = simd_max(best);
id = simd_min(best == top ? id : int(VOCAB));
if (lane == 0) tokens[s] = id;
