// sum = x + y, and its RMS norm: sum / sqrt(mean(sum^2) + eps) * (weight + offset).
//
// Layouts (row-major): x, y T (rows, N); weight (N,), any type; eps, offset float, one number each.
// Outputs: total, normed T (rows, N). The norm is that of the rounded sum, as if the ops had run one after the other.
// Grid: threadgroups (1, rows) of SIMDS simdgroups; a threadgroup works on one row.
// Bytes: 4 * N * sizeof(T) per row, where the second reading of x and y is served by the cache.
// Formula: add and rms_norm of backends/reference/ops.py.
threadgroup float part[SIMDS];
const uint lane = thread_index_in_simdgroup, simd = simdgroup_index_in_threadgroup;
const size_t row = size_t(threadgroup_position_in_grid.y) * N;

float squares = 0.0f;
for (uint i = thread_index_in_threadgroup; i < N; i += 32 * SIMDS) {
  const T sum = static_cast<T>(float(x[row + i]) + float(y[row + i]));
  total[row + i] = sum;
  squares += float(sum) * float(sum);
}
squares = simd_sum(squares);
if (lane == 0) part[simd] = squares;
threadgroup_barrier(mem_flags::mem_threadgroup);
squares = simd_sum(lane < SIMDS ? part[lane] : 0.0f);
const float inverse = 1.0f / metal::precise::sqrt(squares / float(N) + eps);
for (uint i = thread_index_in_threadgroup; i < N; i += 32 * SIMDS) {
  const float sum = float(static_cast<T>(float(x[row + i]) + float(y[row + i])));
  normed[row + i] = static_cast<T>(sum * inverse * (float(weight[i]) + offset));
}
