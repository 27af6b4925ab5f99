// Per-head RMSNorm (if NORM) and RoPE of q and k; v is copied. Input of write_kv and attend.
//
// Layouts (row-major): qkv T (tokens, HQ + 2 HK, D): query, key, value heads; positions int32 (tokens,); inv_freq float
// (D / 2,), radians per position; q_weight, k_weight (D,), any float type, not read without NORM; eps, offset, rope_scale
// float scalars. Norm: x / sqrt(mean(x^2) + eps) * (weight + offset). RoPE rotates the pairs (x[i], x[i + D / 2]) by
// position * inv_freq[i], scaled by rope_scale.
// Outputs: q T (tokens, HQ, D); k, v K (tokens, HK, D), K: dtype of the KV cache. The caller scatters k and v into the
// cache, because a kernel can't update an MLX array in place.
//
// Grid: threads (32, HQ + 2 HK, tokens); a simdgroup per head and token. No synchronization between simdgroups.
// Bytes: 2 * (HQ + 2 HK) * D * sizeof(T) per token.
// Formula: rms_norm and rope of backends/reference/ops.py, in float32 until the result.
constexpr uint HALF = D / 2;
const uint lane = thread_index_in_simdgroup;
const uint head = thread_position_in_grid.y, token = thread_position_in_grid.z;
const device T* x = qkv + (size_t(token) * (HQ + 2 * HK) + head) * D;

if (head >= HQ + HK) {
  device K* y = v + (size_t(token) * HK + head - HQ - HK) * D;
  for (uint i = lane; i < D; i += 32) y[i] = static_cast<K>(float(x[i]));
  return;
}

const bool query = head < HQ;
float rstd = 1.0f;
if (NORM) {
  float squares = 0.0f;
  for (uint i = lane; i < D; i += 32) squares += float(x[i]) * float(x[i]);
  rstd = 1.0f / metal::precise::sqrt(simd_sum(squares) / float(D) + eps);
}
for (uint i = lane; i < HALF; i += 32) {
  float a = float(x[i]), b = float(x[i + HALF]);
  if (NORM) {
    a *= rstd * (float(query ? q_weight[i] : k_weight[i]) + offset);
    b *= rstd * (float(query ? q_weight[i + HALF] : k_weight[i + HALF]) + offset);
  }
  const float angle = float(positions[token]) * inv_freq[i];
  const float c = metal::precise::cos(angle) * rope_scale, s = metal::precise::sin(angle) * rope_scale;
  const float left = a * c - b * s, right = b * c + a * s;
  if (query) {
    device T* y = q + (size_t(token) * HQ + head) * D;
    y[i] = static_cast<T>(left);
    y[i + HALF] = static_cast<T>(right);
  } else {
    device K* y = k + (size_t(token) * HK + head - HQ) * D;
    y[i] = static_cast<K>(left);
    y[i + HALF] = static_cast<K>(right);
  }
}
