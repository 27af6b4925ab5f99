// Header of kernels that use 8x8 matrices. The file must end with a newline, or MLX would append to its last line.
#include <metal_simdgroup_matrix>

// Arrays of matrices live in registers only if every index is a constant.
#define UNROLLED _Pragma("clang loop unroll(full)") for
