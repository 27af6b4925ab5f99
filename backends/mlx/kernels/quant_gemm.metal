// y = x w^T for many rows of x and quantized weights w, in tiles of 32 rows of x and 64 of w; also for many rows of x
// per expert.
//
// Layouts (row-major): x T (M, K); planes of w (N rows) as in quant_rows.metal; out T (M, N). `rows` is N.
// GATHER: x T (X, K); order uint32 (Z,): numbers z by their experts, those of expert e from order[starts[e]] to
// order[starts[e + 1] - 1]; starts int32 (E + 1,); out[z] = x[z / SHARE] w[e]^T (Z, N); the planes hold the experts one
// after the other, N rows each.
//
// Grid: threadgroups (M / 32, or at most Z / 32 + E; N / 64) of 4 simdgroups, each for 16 rows of x and 32 of w. In
// each iteration 32 columns of x and of w, the latter decoded and rounded to T, are put into threadgroup memory, and
// multiplied as 8x8 matrices with float sums.
// FLOPs: 2 * M * N * K. Bytes: the planes M / 32 times and x N / 64 times, mostly from the cache.
constexpr uint BM = 32, BN = 64, BK = 32, STRIDE = BK + 8;  // rows apart by 8 elements: fewer conflicts of memory banks
threadgroup T x_tile[BM * STRIDE];
threadgroup T w_tile[BN * STRIDE];
threadgroup float patches[4 * 64];
threadgroup float shared_table[16];

const uint tid = thread_index_in_threadgroup, lane = thread_index_in_simdgroup, simd = simdgroup_index_in_threadgroup;
const uint columns = codes_shape[1] * (32 / LOW), groups = scales_shape[1], count = rows;
uint tile = threadgroup_position_in_grid.x, expert = 0, first_token = tile * BM, end = x_shape[0];
if (GATHER) {
  const uint experts = starts_shape[0] - 1;
  for (; expert < experts; expert++) {
    first_token = uint(starts[expert]) + tile * BM;
    end = uint(starts[expert + 1]);
    if (first_token < end) break;
    tile -= (end - uint(starts[expert]) + BM - 1) / BM;
  }
  if (expert == experts) return;  // there are fewer tiles than threadgroups
}
const uint first_row = threadgroup_position_in_grid.y * BN;
if (CODE == TABLE && tid < 16) shared_table[tid] = float(table[tid]);

// this thread loads 8 columns of a row of x, and 16 of a row of w; rows past the last one are not stored
const uint x_row = tid / 4, x_column = tid % 4 * 8, piece = tid % 2;
const uint token = min(first_token + x_row, end - 1);
const device T* xs = x + size_t(GATHER ? uint(order[token]) / SHARE : token) * columns + x_column;
const size_t row = size_t(expert) * count + min(first_row + tid / 2, count - 1);
const uint row_part = simd / 2 * 16, w_part = simd % 2 * 32;  // this simdgroup's part of the tile
simdgroup_matrix<float, 8, 8> acc[8];
UNROLLED (uint i = 0; i < 8; i++) acc[i] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);

for (uint k = 0; k < columns; k += BK) {
  threadgroup_barrier(mem_flags::mem_threadgroup);  // all reads of the tiles are done, and the table is complete
  UNROLLED (uint i = 0; i < 8; i += 4) {
    *reinterpret_cast<threadgroup vec<T, 4>*>(x_tile + x_row * STRIDE + x_column + i) =
        *reinterpret_cast<const device vec<T, 4>*>(xs + k + i);
  }
  const uint column = k + 16 * piece;
  const size_t at = row * columns + column, group = row * groups + (GROUP ? column / GROUP : 0);
  uint low[LOW / 2];
  load_words<LOW / 2>(codes + at / (32 / LOW), low);
  uint tops = 0;
  if (HIGH) tops = high[at * HIGH / 32] >> (HIGH == 1 ? piece * 8 : 0);
  float2 s = scale_and_offset<SCALE, PAIRS, SUPERS>(scales, supers, group, row * (columns / 256) + column / 256);
  if (ROW_SCALES) s.x *= float(row_scales[row]);
  float w[16];
  decode<LOW, HIGH, CODE>(low, tops, ZEROS ? float(zeros[group]) : float(ZERO), s, shared_table, w);
  UNROLLED (uint i = 0; i < 16; i += 4) {
    *reinterpret_cast<threadgroup vec<T, 4>*>(w_tile + tid / 2 * STRIDE + 16 * piece + i) =
        vec<T, 4>(T(w[i]), T(w[i + 1]), T(w[i + 2]), T(w[i + 3]));
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  UNROLLED (uint c = 0; c < BK; c += 8) {
    simdgroup_matrix<T, 8, 8> left[2], right[4];
    UNROLLED (uint i = 0; i < 2; i++) simdgroup_load(left[i], x_tile + (row_part + 8 * i) * STRIDE + c, STRIDE);
    UNROLLED (uint j = 0; j < 4; j++)
      simdgroup_load(right[j], w_tile + (w_part + 8 * j) * STRIDE + c, STRIDE, ulong2(0, 0), true);
    UNROLLED (uint i = 0; i < 8; i++) simdgroup_multiply_accumulate(acc[i], left[i / 4], right[i % 4], acc[i]);
  }
}

threadgroup float* patch = patches + simd * 64;
UNROLLED (uint i = 0; i < 8; i++) {
  simdgroup_barrier(mem_flags::mem_threadgroup);
  simdgroup_store(acc[i], patch, 8);
  simdgroup_barrier(mem_flags::mem_threadgroup);
  const uint m = first_token + row_part + i / 4 * 8 + lane / 4, n = first_row + w_part + i % 4 * 8 + lane % 4 * 2;
  if (m < end) {
    const size_t y = size_t(GATHER ? uint(order[m]) : m) * count;
    for (uint e = 0; e < 2; e++)
      if (n + e < count) out[y + n + e] = static_cast<T>(patch[2 * lane + e]);
  }
}
