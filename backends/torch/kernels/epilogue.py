# mypy: disable-error-code="assignment"
"""Device functions that the GEMM kernels share: L2 prefetch of weights, k tiles, epilogue."""

import triton
import triton.language as tl

from llmrs.backends.torch.kernels.act_and_mul import apply_act


@triton.jit
def prefetch_l2(ptrs):
    """Prefetches the 128 bytes at each address into L2."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [ptrs.to(tl.int64)], tl.int32, False, 1
    )


@triton.jit
def cache_line_ptrs(row_ptrs, k, K, LINES: tl.constexpr):
    """Addresses of LINES cache lines of each row, from column k on: (rows, 1) -> (rows, LINES)."""
    LINE: tl.constexpr = 1024 // row_ptrs.dtype.element_ty.primitive_bitwidth
    return row_ptrs + tl.minimum(k + tl.arange(0, LINES) * LINE, K - 1)[None, :]


@triton.jit
def load_k_tile(ptrs, mask, k, offs_k, K: tl.constexpr, K_STRIDE: tl.constexpr):
    """Loads columns k + offs_k, 0 from K on. `ptrs` include offs_k; k is a multiple of K_STRIDE."""
    if K % K_STRIDE == 0:
        return tl.load(ptrs + k, mask=mask, other=0.0)
    return tl.load(ptrs + k, mask=mask & (k + offs_k < K), other=0.0)


@triton.jit
def epilogue(
    acc, acc_up, offs_n, bias, residual, out_ptrs, mask, N,
    ACT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Stores [residual +] acc [+ bias], or with ACT (1 silu, 2 gelu) act(acc + bias) * (acc_up + bias of up).

    Rounds to the output's dtype after each op, as the unfused ops do.
    """
    dtype = out_ptrs.dtype.element_ty
    if HAS_BIAS:
        acc += tl.load(bias + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)
    acc = acc.to(dtype)
    if ACT:
        if HAS_BIAS:
            acc_up += tl.load(bias + N + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)
        acc = apply_act(acc.to(tl.float32), acc_up.to(dtype).to(tl.float32), ACT == 2).to(dtype)
    if HAS_RESIDUAL:
        acc = (residual.to(tl.float32) + acc.to(tl.float32)).to(dtype)
    tl.store(out_ptrs, acc, mask=mask)
