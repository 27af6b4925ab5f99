// out[t] = row index[t] of quantized weights, in out's type.
//
// Layouts (row-major): index int (T,), any integer type; planes of N rows as in quant_rows.metal; out T (T, K).
// Grid: threads (K / 16, T, 1), 16 columns each.
// Bytes: a row of the planes and K * sizeof(T) per token.
// Formula: unpack of quant/form.py, rounded once.
threadgroup float shared_table[16];
if (CODE == TABLE) {
  for (uint i = thread_index_in_threadgroup; i < 16; i += threads_per_threadgroup.x * threads_per_threadgroup.y)
    shared_table[i] = float(table[i]);
  threadgroup_barrier(mem_flags::mem_threadgroup);
}
const uint piece = thread_position_in_grid.x, token = thread_position_in_grid.y, column = 16 * piece;
const uint columns = codes_shape[1] * (32 / LOW), groups = scales_shape[1];
const size_t row = index[token];
const size_t group = row * groups + (GROUP ? column / GROUP : 0);

uint low[LOW / 2];
load_words<LOW / 2>(codes + (row * columns + column) / (32 / LOW), low);
uint tops = 0;
if (HIGH) tops = high[(row * columns + column) * HIGH / 32] >> (HIGH == 1 ? piece % 2 * 8 : 0);
float2 s = scale_and_offset<SCALE, PAIRS, SUPERS>(scales, supers, group, row * (columns / 256) + column / 256);
if (ROW_SCALES) s.x *= float(row_scales[row]);
float w[16];
decode<LOW, HIGH, CODE>(low, tops, ZEROS ? float(zeros[group]) : float(ZERO), s, shared_table, w);
device T* y = out + size_t(token) * columns + column;
UNROLLED (int i = 0; i < 16; i++) y[i] = static_cast<T>(w[i]);
