"""Fused GEMM for M up to 16 and small N on tensor cores, without TMA; `gemm.py` has formula, arguments and launcher.

A CTA computes BLOCK_N outputs for all M. Its warps split K: each multiplies BLOCK_K of every WARPS * BLOCK_K columns,
(WARPS, BLOCK_N, BLOCK_K) x (WARPS, BLOCK_K, BLOCK_M), and their accumulators are summed at the end. That shortens the
chain of dependent MMAs and needs no second kernel. 1.3 to 1.8 times as fast as cuBLAS and an add for M of 5 to 16.
"""

import triton
import triton.language as tl

from llmrs.backends.torch.kernels.epilogue import cache_line_ptrs, epilogue, load_k_tile, prefetch_l2


@triton.jit(do_not_specialize=["M"])
def gemm_small_m_kernel(
    x, w, bias, residual, out, M, N, stride_xm, stride_wn, stride_rm, stride_om,
    K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, WARPS: tl.constexpr, BLOCK_M: tl.constexpr,
    PREFETCH_LINES: tl.constexpr, ACT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    PDL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    K_STRIDE: tl.constexpr = WARPS * BLOCK_K
    offs_n, offs_m = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    offs_k = (tl.arange(0, WARPS)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :])[:, None, :]
    w_rows = w + tl.minimum(offs_n, N - 1).to(tl.int64) * stride_wn
    w_up_rows = w + (tl.minimum(offs_n, N - 1) + N).to(tl.int64) * stride_wn
    if PDL:
        prefetch_l2(cache_line_ptrs(w_rows[:, None], 0, K, PREFETCH_LINES))
        if ACT:
            prefetch_l2(cache_line_ptrs(w_up_rows[:, None], 0, K, PREFETCH_LINES))
        if HAS_BIAS:
            prefetch_l2(bias + tl.minimum(offs_n, N - 1))
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    x_rows = x + tl.minimum(offs_m, M - 1).to(tl.int64) * stride_xm
    w_ptrs, w_up_ptrs = w_rows[None, :, None] + offs_k, w_up_rows[None, :, None] + offs_k
    x_ptrs = x_rows[None, :, None] + offs_k
    offs_n, row = offs_n[:, None], tl.minimum(offs_m, M - 1).to(tl.int64)[None, :]
    mask, added = (offs_n < N) & (offs_m < M)[None, :], 0.0
    if HAS_RESIDUAL:
        added = tl.load(residual + row * stride_rm + offs_n, mask=mask, other=0.0)
    acc = tl.zeros([WARPS, BLOCK_N, BLOCK_M], tl.float32)
    acc_up = tl.zeros([WARPS, BLOCK_N, BLOCK_M], tl.float32)
    for k in range(0, K, K_STRIDE):
        value = tl.permute(load_k_tile(x_ptrs, offs_k >= 0, k, offs_k, K, K_STRIDE), (0, 2, 1))
        w_tile = load_k_tile(w_ptrs, offs_k >= 0, k, offs_k, K, K_STRIDE)
        acc = tl.dot(w_tile, value, acc, input_precision=PRECISION)
        if ACT:
            w_up = load_k_tile(w_up_ptrs, offs_k >= 0, k, offs_k, K, K_STRIDE)
            acc_up = tl.dot(w_up, value, acc_up, input_precision=PRECISION)
    epilogue(tl.sum(acc, 0), tl.sum(acc_up, 0), offs_n, bias, added, out + row * stride_om + offs_n, mask, N,
             ACT, HAS_BIAS, HAS_RESIDUAL)  # fmt: skip
