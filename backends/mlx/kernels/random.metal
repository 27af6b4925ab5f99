// Functions that the sampling kernels share.

// A bijection on 32 bits, and the noise of a token: core/sampling.py says what and why.
inline uint mixed(uint x) {
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

inline float gumbel(uint key, uint token) {
  const uint h = mixed(mixed(token) ^ key);
  const float v = min((float(h) + 0.5f) / 4294967296.0f, 1.0f - 1.0f / 16777216.0f);
  return -metal::precise::log(-log_one_plus(-v));
}

// A float's bits as an unsigned number that is ordered as the floats are; -0 is 0.
inline uint ordered(float x) {
  const uint bits = as_type<uint>(x == 0.0f ? 0.0f : x);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

inline float value_of(uint key) { return as_type<float>(key >> 31 ? key ^ 0x80000000u : ~key); }

// The sum over all threads of each of N numbers, for every thread. `scratch` holds N * SIMDS numbers.
template <int N, int SIMDS>
inline void sum_of_all(thread float (&v)[N], threadgroup float* scratch, uint lane, uint simd) {
  for (int n = 0; n < N; n++) v[n] = simd_sum(v[n]);
  threadgroup_barrier(mem_flags::mem_threadgroup);  // what was there before has been read
  for (int n = 0; n < N; n++)
    if (lane == 0) scratch[n * SIMDS + simd] = v[n];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int n = 0; n < N; n++) v[n] = simd_sum(lane < SIMDS ? scratch[n * SIMDS + lane] : 0.0f);
}

// The sum of `mine` over the threads before this one. `scratch` holds SIMDS numbers.
template <int SIMDS>
inline uint sum_before(uint mine, threadgroup float* scratch, uint lane, uint simd) {
  uint sum = simd_prefix_exclusive_sum(mine);
  threadgroup_barrier(mem_flags::mem_threadgroup);  // what was there before has been read
  if (lane == 31) scratch[simd] = float(sum + mine);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint g = 0; g < simd; g++) sum += uint(scratch[g]);
  return sum;
}
