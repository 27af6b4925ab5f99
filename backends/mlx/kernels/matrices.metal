// What kernels on 8x8 matrices need before their function. The line must end, or MLX's next one would join it.
#include <metal_simdgroup_matrix>

// Arrays of matrices live in registers only if every index is a constant.
#define UNROLLED _Pragma("clang loop unroll(full)") for
