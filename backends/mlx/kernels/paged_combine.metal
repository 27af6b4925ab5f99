// Makes one result of what the splits of paged_decode found.
//
// Layouts (row-major): partial float (tokens, HQ, splits, D + 2): each split's sum of exp(score - largest) * value, then
// its largest score and its sum of exp(score - largest). Output: out O (tokens, HQ, D).
// Grid: threads (D, tokens * HQ, 1); a thread makes one element. A split without positions has sum 0.
// Bytes: 4 * splits * (D + 2) per query head of a token, read mostly once.
// Formula: as in paged_decode.
const uint d = thread_position_in_grid.x, row = thread_position_in_grid.y;
const uint splits = partial_shape[2];
const device float* part = partial + size_t(row) * splits * (D + 2);
float top = part[D];
for (uint s = 1; s < splits; s++) top = max(top, part[s * (D + 2) + D]);
float sum = 0.0f, all = 0.0f;
for (uint s = 0; s < splits; s++) {
  const float weight = fast::exp(part[s * (D + 2) + D] - top);
  sum += part[s * (D + 2) + d] * weight;
  all += part[s * (D + 2) + D + 1] * weight;
}
out[size_t(row) * D + d] = static_cast<O>(all == 0.0f ? 0.0f : sum / all);
