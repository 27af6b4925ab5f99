// y = x w^T for few rows of x and quantized weights w; also for one row of x per expert.
//
// Layouts (row-major): x T (M, K); planes of w as in quant_rows.metal; out T (M, N).
// GATHER: x T (X, K), experts (Z,) of any integer type: out[z] = x[z / SHARE] w[experts[z]]^T (Z, N), M = 1; the planes
// hold the experts one after the other, N rows each. `rows` is N.
//
// Grid: threadgroups (N / (SIMDS * ROWS), 1, Z or 1) of SIMDS simdgroups, ROWS rows of w each. A lane takes 32 columns
// of every 1,024: LOW * 4 bytes of codes, in loads of 16 bytes, which are decoded once for all rows of x.
// Bytes: the planes once (GATHER: of each z's expert); x stays in the cache. Sums are float, rounded once.
threadgroup float shared_table[16];
if (CODE == TABLE) {
  const uint tid = thread_index_in_threadgroup;
  if (tid < 16) shared_table[tid] = float(table[tid]);
  threadgroup_barrier(mem_flags::mem_threadgroup);
}
const uint lane = thread_index_in_simdgroup, z = threadgroup_position_in_grid.z;
const uint columns = codes_shape[1] * (32 / LOW), groups = scales_shape[1], count = rows;
const uint first = (threadgroup_position_in_grid.x * SIMDS + simdgroup_index_in_threadgroup) * ROWS;
const size_t stack = GATHER ? size_t(experts[z]) * count : 0;
const device T* xs = x + (GATHER ? size_t(z / SHARE) * columns : 0);

float acc[M * ROWS];
UNROLLED (int i = 0; i < M * ROWS; i++) acc[i] = 0.0f;
for (uint column = lane * 32; column < columns; column += 1024) {
  uint low[ROWS * LOW], tops[ROWS * (HIGH + 1)];
  UNROLLED (int r = 0; r < ROWS; r++) {
    const size_t at = (stack + min(first + r, count - 1)) * columns + column;  // rows past the last one: not stored
    load_words<LOW>(codes + at / (32 / LOW), low + r * LOW);
    if (HIGH) load_words<HIGH>(high + at * HIGH / 32, tops + r * (HIGH + 1));
  }
  UNROLLED (int piece = 0; piece < 2; piece++) {
    const uint begin = column + 16 * piece;
    float w[ROWS * 16];
    UNROLLED (int r = 0; r < ROWS; r++) {
      const size_t row = stack + min(first + r, count - 1), group = row * groups + (GROUP ? begin / GROUP : 0);
      float2 s = scale_and_offset<SCALE, PAIRS, SUPERS>(scales, supers, group, row * (columns / 256) + begin / 256);
      if (ROW_SCALES) s.x *= float(row_scales[row]);
      const uint bits = HIGH == 2 ? tops[r * (HIGH + 1) + piece] : HIGH == 1 ? tops[r * (HIGH + 1)] >> (8 * piece) : 0u;
      const float zero = ZEROS ? float(zeros[group]) : float(ZERO);
      decode<LOW, HIGH, CODE>(low + r * LOW + piece * (LOW / 2), bits, zero, s, shared_table, w + r * 16);
    }
    UNROLLED (int m = 0; m < M; m++) {
      UNROLLED (int part = 0; part < 4; part++) {
        const vec<T, 4> four = *reinterpret_cast<const device vec<T, 4>*>(xs + size_t(m) * columns + begin + 4 * part);
        UNROLLED (int i = 0; i < 4; i++) {
          UNROLLED (int r = 0; r < ROWS; r++) acc[m * ROWS + r] += float(four[i]) * w[r * 16 + 4 * part + i];
        }
      }
    }
  }
}
UNROLLED (int m = 0; m < M; m++) {
  UNROLLED (int r = 0; r < ROWS; r++) {
    const float sum = simd_sum(acc[m * ROWS + r]);
    if (lane == 0 && first + r < count) out[size_t(z + m) * count + first + r] = static_cast<T>(sum);
  }
}
