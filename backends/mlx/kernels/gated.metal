// y = act(gate) * up, for the gated feed-forward; act is SiLU, or GELU with tanh where GELU is true.
//
// Layouts (row-major): gate_up T (rows, 2, N): the gate's N elements of a row, then up's. Output: y T (rows, N).
// Grid: threads (N, rows, 1); a thread makes one element.
// Bytes: 3 * N * sizeof(T) per row.
// Formula: silu_mul and gelu_mul of backends/reference/ops.py. precise::tanh, because the fast one is NaN far
// from 0; exp may give infinity.
const uint i = thread_position_in_grid.x;
const size_t row = thread_position_in_grid.y;
const float g = float(gate_up[row * 2 * N + i]), u = float(gate_up[row * 2 * N + N + i]);
float act;
if (GELU) act = 0.5f * g * (1.0f + metal::precise::tanh(0.7978845608f * (g + 0.044715f * g * g * g)));
else act = g / (1.0f + metal::precise::exp(-g));
y[row * N + i] = static_cast<T>(act * u);
