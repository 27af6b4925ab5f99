// Combines the KV splits of paged_decode.
//
// Layouts (row-major): partial float (tokens, HQ, splits, D + 2): per split acc, m, l of paged_decode; out O (tokens, HQ, D).
// Grid: threads (D, tokens * HQ, 1), one element each. A split without positions has l = 0.
// Bytes: 4 * splits * (D + 2) per query head and token, read mostly once.
const uint d = thread_position_in_grid.x, row = thread_position_in_grid.y;
const uint splits = partial_shape[2];
const device float* split = partial + size_t(row) * splits * (D + 2);
float m = split[D];
for (uint s = 1; s < splits; s++) m = max(m, split[s * (D + 2) + D]);
float acc = 0.0f, l = 0.0f;
for (uint s = 0; s < splits; s++) {
  const float alpha = fast::exp(split[s * (D + 2) + D] - m);
  acc += split[s * (D + 2) + d] * alpha;
  l += split[s * (D + 2) + D + 1] * alpha;
}
out[size_t(row) * D + d] = static_cast<O>(l == 0.0f ? 0.0f : acc / l);
