// y = act(gate) * up; act is SiLU, or tanh GELU if GELU.
//
// Layouts (row-major): gate_up T (rows, 2, N): gate, then up; y T (rows, N).
// Grid: threads (N, rows, 1), one element each.
// Bytes: 3 * N * sizeof(T) per row.
// Formula: silu_and_mul and gelu_and_mul of backends/reference/ops.py. precise::tanh, because fast::tanh is NaN far from
// 0; exp may overflow to infinity.
const uint i = thread_position_in_grid.x;
const size_t row = thread_position_in_grid.y;
const float g = float(gate_up[row * 2 * N + i]), u = float(gate_up[row * 2 * N + N + i]);
float act;
if (GELU) act = 0.5f * g * (1.0f + metal::precise::tanh(0.7978845608f * (g + 0.044715f * g * g * g)));
else act = g / (1.0f + metal::precise::exp(-g));
y[row * N + i] = static_cast<T>(act * u);
