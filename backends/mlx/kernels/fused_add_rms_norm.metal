// residual_out = x + residual; out = RMSNorm(residual_out) = sum / sqrt(mean(sum^2) + eps) * (weight + offset).
//
// Layouts (row-major): x, residual, residual_out, out T (rows, N); weight (N,), any float type; eps, offset float scalars.
// The norm reads the rounded sum, as the unfused ops do.
// Grid: threadgroups (1, rows) of SIMDS simdgroups, one row each.
// Bytes: 4 * N * sizeof(T) per row; the second read of x and residual hits the cache.
// Formula: add and rms_norm of backends/reference/ops.py.
threadgroup float partial[SIMDS];
const uint lane = thread_index_in_simdgroup, simd = simdgroup_index_in_threadgroup;
const size_t row = size_t(threadgroup_position_in_grid.y) * N;

float squares = 0.0f;
for (uint i = thread_index_in_threadgroup; i < N; i += 32 * SIMDS) {
  const T sum = static_cast<T>(float(x[row + i]) + float(residual[row + i]));
  residual_out[row + i] = sum;
  squares += float(sum) * float(sum);
}
squares = simd_sum(squares);
if (lane == 0) partial[simd] = squares;
threadgroup_barrier(mem_flags::mem_threadgroup);
squares = simd_sum(lane < SIMDS ? partial[lane] : 0.0f);
const float rstd = 1.0f / metal::precise::sqrt(squares / float(N) + eps);
for (uint i = thread_index_in_threadgroup; i < N; i += 32 * SIMDS) {
  const float sum = float(static_cast<T>(float(x[row + i]) + float(residual[row + i])));
  out[row + i] = static_cast<T>(sum * rstd * (float(weight[i]) + offset));
}
