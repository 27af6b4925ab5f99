// Reduces the partial argmax of the vocabulary blocks.
//
// Layouts (row-major): partial_max float (S, blocks), partial_argmax int32 (S, blocks), of sample_gumbel; tokens int32 (S,).
// Grid: threadgroups (1, S) of one simdgroup. Ties take the lowest id.
// Bytes: 8 per block and sequence.
const uint lane = thread_index_in_simdgroup, s = threadgroup_position_in_grid.y, blocks = partial_max_shape[1];
float best = -INFINITY;
int id = VOCAB;
for (uint b = lane; b < blocks; b += 32) {
  const float x = partial_max[s * blocks + b];
  const int token = partial_argmax[s * blocks + b];
  if (x > best || (x == best && token < id)) {
    best = x;
    id = token;
  }
}
const float top = simd_max(best);
id = simd_min(best == top ? id : int(VOCAB));
if (lane == 0) tokens[s] = id;
