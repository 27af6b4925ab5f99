# mypy: disable-error-code="assignment"
# ruff: noqa: RUF005 - Triton adds tuples, and can't unpack them
"""Fused GEMV for M = 1 to 4 on CUDA cores; `gemm.py` has formula, arguments and launcher.

A library's GEMV and the norm, activation and sum around it are four launches; here they are one. A warp computes
ROWS_PER_WARP outputs for all M: it reads whole rows of w, BLOCK_K columns at a time, and x from L1. Warps never wait
for each other. The first PREFETCH_K_TILES tiles of w are loaded before `gdc_wait`, so before x exists. Bytes moved:
w once, N * K elements.
"""

import triton
import triton.language as tl

from llmrs.backends.torch.kernels.epilogue import epilogue, load_k_tile, prefetch_l2


@triton.jit
def _inverse_rms(x_ptrs, offs_k, eps, K: tl.constexpr, NUM_K_TILES: tl.constexpr, BLOCK_K: tl.constexpr,
                 RELOAD: tl.constexpr):  # fmt: skip
    """1 / rms of one row at x_ptrs (1, WARPS, BLOCK_K), (1, WARPS, 1). RELOAD: loaded with a cache modifier, so that
    the compiler does not keep the row in registers until the GEMV needs it."""
    squares = tl.zeros(x_ptrs.shape, tl.float32)
    for tile in tl.static_range(NUM_K_TILES):
        k = tile * BLOCK_K
        if RELOAD:
            x = tl.load(x_ptrs + k, mask=k + offs_k < K, other=0.0, cache_modifier=".ca").to(tl.float32)
        else:
            x = load_k_tile(x_ptrs, offs_k >= 0, k, offs_k, K, BLOCK_K).to(tl.float32)
        squares += x * x
    return tl.rsqrt(tl.sum(squares, 2) / K + eps)[:, :, None]


@triton.jit(do_not_specialize=["M"])
def gemv_kernel(
    x, w, bias, residual, out, norm_weight, M, N, stride_xm, stride_wn, stride_rm, stride_om, eps, weight_offset,
    K: tl.constexpr, BLOCK_K: tl.constexpr, NUM_K_TILES: tl.constexpr, PREFETCH_K_TILES: tl.constexpr,
    ROWS_PER_WARP: tl.constexpr, WARPS: tl.constexpr, BLOCK_M: tl.constexpr, FUSE_NORM: tl.constexpr,
    ACT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    offs_n = (tl.program_id(0) * ROWS_PER_WARP + tl.arange(0, ROWS_PER_WARP)[:, None]) * WARPS
    offs_n += tl.arange(0, WARPS)[None, :]
    mask_n, offs_k = (offs_n < N)[:, :, None], tl.arange(0, BLOCK_K)[None, None, :]
    w_ptrs = w + offs_n.to(tl.int64)[:, :, None] * stride_wn + offs_k  # (ROWS_PER_WARP, WARPS, BLOCK_K)
    w_up_ptrs = w + (offs_n + N).to(tl.int64)[:, :, None] * stride_wn + offs_k
    warp_k = offs_k + tl.zeros([1, WARPS, 1], tl.int32)  # in the layout of a w tile, so that nothing moves across warps
    norm_ptrs, all_k = norm_weight + warp_k, warp_k >= 0
    w_tiles, w_up_tiles, norm_tiles = (), (), ()
    for tile in tl.static_range(PREFETCH_K_TILES):
        w_tiles = w_tiles + (load_k_tile(w_ptrs, mask_n, tile * BLOCK_K, offs_k, K, BLOCK_K),)
        if ACT:
            w_up_tiles = w_up_tiles + (load_k_tile(w_up_ptrs, mask_n, tile * BLOCK_K, offs_k, K, BLOCK_K),)
        if FUSE_NORM:
            norm_tiles = norm_tiles + (load_k_tile(norm_ptrs, all_k, tile * BLOCK_K, warp_k, K, BLOCK_K),)
    if PDL:
        if HAS_BIAS:
            prefetch_l2(bias + tl.minimum(offs_n, N - 1))
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    # x, residual and 1 / rms of each row; rows from M on repeat the last
    x_ptrs, inverse_rms, residuals, acc, acc_up = (), (), (), (), ()
    for m in tl.static_range(BLOCK_M):
        row = tl.minimum(m, M - 1).to(tl.int64)
        x_ptrs = x_ptrs + (x + row * stride_xm + warp_k,)
        if HAS_RESIDUAL:
            residuals = residuals + (tl.load(residual + row * stride_rm + offs_n, mask=offs_n < N, other=0.0),)
        if FUSE_NORM:
            rms = _inverse_rms(x_ptrs[m], warp_k, eps, K, NUM_K_TILES, BLOCK_K, BLOCK_M * K > 2048)
            inverse_rms = inverse_rms + (rms,)
        acc = acc + (tl.zeros([ROWS_PER_WARP, WARPS, BLOCK_K], tl.float32),)
        acc_up = acc_up + (tl.zeros([ROWS_PER_WARP, WARPS, BLOCK_K], tl.float32),)
    for tile in tl.static_range(NUM_K_TILES):
        k = tile * BLOCK_K
        w_tile = w_tiles[tile] if tile < PREFETCH_K_TILES else load_k_tile(w_ptrs, mask_n, k, warp_k, K, BLOCK_K)
        if ACT:
            w_up = (
                w_up_tiles[tile] if tile < PREFETCH_K_TILES else load_k_tile(w_up_ptrs, mask_n, k, warp_k, K, BLOCK_K)
            )
        if FUSE_NORM:
            norm = norm_tiles[tile] if tile < PREFETCH_K_TILES else load_k_tile(norm_ptrs, all_k, k, warp_k, K, BLOCK_K)
        new_acc, new_up = (), ()
        for m in tl.static_range(BLOCK_M):
            value = load_k_tile(x_ptrs[m], all_k, k, warp_k, K, BLOCK_K)
            if FUSE_NORM:
                scale = norm.to(tl.float32) + weight_offset
                value = (value.to(tl.float32) * inverse_rms[m] * scale).to(value.dtype)
            new_acc = new_acc + (acc[m] + w_tile.to(tl.float32) * value.to(tl.float32),)
            new_up = new_up + (acc_up[m] + w_up.to(tl.float32) * value.to(tl.float32) if ACT else acc_up[m],)
        acc, acc_up = new_acc, new_up

    for m in tl.static_range(BLOCK_M):
        out_ptrs = out + tl.minimum(m, M - 1).to(tl.int64) * stride_om + offs_n
        epilogue(tl.sum(acc[m], 2), tl.sum(acc_up[m], 2), offs_n, bias, residuals[m] if HAS_RESIDUAL else 0.0,
                 out_ptrs, (offs_n < N) & (m < M), N, ACT, HAS_BIAS, HAS_RESIDUAL)  # fmt: skip
