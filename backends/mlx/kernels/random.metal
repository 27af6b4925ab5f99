// Functions that the sampling kernels share.

// mix and gumbel of core/sampling.py.
inline uint mix32(uint x) {
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}

// log(1 + x) where 1 + x loses digits of x (Metal has no log1p): log(u) * x / (u - 1) with u = 1 + x, rounded.
// Source: the HP-15C Advanced Functions Handbook (W. Kahan).
inline float log_one_plus(float x) {
  const float u = 1.0f + x;
  return u == 1.0f ? x : metal::precise::log(u) * x / (u - 1.0f);
}

inline float gumbel(uint rng_key, uint token) {
  const uint h = mix32(mix32(token) ^ rng_key);
  const float v = min((float(h) + 0.5f) / 4294967296.0f, 1.0f - 1.0f / 16777216.0f);
  return -metal::precise::log(-log_one_plus(-v));
}

// A float's bits as an unsigned integer with the same order; -0 equals 0.
inline uint ordered_bits(float x) {
  const uint bits = as_type<uint>(x == 0.0f ? 0.0f : x);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

inline float float_of(uint bits) { return as_type<float>(bits >> 31 ? bits ^ 0x80000000u : ~bits); }

// Threadgroup all-reduce sum of N values. `scratch` has N * SIMDS elements.
template <int N, int SIMDS>
inline void group_sum(thread float (&v)[N], threadgroup float* scratch, uint lane, uint simd) {
  for (int n = 0; n < N; n++) v[n] = simd_sum(v[n]);
  threadgroup_barrier(mem_flags::mem_threadgroup);  // all reads of `scratch` are done
  for (int n = 0; n < N; n++)
    if (lane == 0) scratch[n * SIMDS + simd] = v[n];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int n = 0; n < N; n++) v[n] = simd_sum(lane < SIMDS ? scratch[n * SIMDS + lane] : 0.0f);
}

// Threadgroup exclusive prefix sum. `scratch` has SIMDS elements.
template <int SIMDS>
inline uint group_prefix_sum(uint value, threadgroup float* scratch, uint lane, uint simd) {
  uint sum = simd_prefix_exclusive_sum(value);
  threadgroup_barrier(mem_flags::mem_threadgroup);  // all reads of `scratch` are done
  if (lane == 31) scratch[simd] = float(sum + value);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint g = 0; g < simd; g++) sum += uint(scratch[g]);
  return sum;
}
