"""Swap-AB GEMM with TMA loads and split-K, for M = 2 to 512 on sm_90+; `gemm.py` has formula and arguments.

    x (M, K), w (N, K) or with ACT (2 N, K), bias   -> out (M, N), or float32 (SPLIT_K, M, N): partial sums

The weights are the left operand, so that a small M leaves no part of an MMA idle: a CTA multiplies (BLOCK_N, BLOCK_K)
of w with (BLOCK_K, BLOCK_M) of x^T over `k_per_split` columns. One thread issues the loads of whole tiles, deep enough
(num_stages) that one CTA per SM keeps HBM busy; TMA fills out-of-range elements with zeros. Fused: bias, activation.

Where the output tiles are too few to fill the GPU, K is split. The norm kernel that follows reduces the partial sums
in order (`rms_norm.py`): results are deterministic, and no CTA waits for another.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from llmrs.backends.torch.kernels.epilogue import cache_line_ptrs, epilogue, prefetch_l2
from llmrs.backends.torch.kernels.launch import check, next_power_of_2

NAME = "gemm"
TMA_MAX_M = 512
NUM_SMS = 132  # of an H100; one CTA each, or two with half the shared memory
PREFETCH_LINES = 4  # cache lines of each row of w that are prefetched before x exists
MIN_K_PER_SPLIT = 256
MAX_STAGES = {64: 8, 128: 5}  # by BLOCK_K
SMEM_RESERVE = 8 * 1024  # bytes that no tile gets

# Cost model of an H100, fitted to GEMMs by themselves and in whole steps (docs/log.md)
HBM_BYTES_PER_US = 3e6
SM_BYTES_PER_US, SM_FLOPS_PER_US = 84e3, 4.4e6  # of a CTA alone on its SM
PAD_ROW_COST = 0.3  # of a padding row of an x tile, relative to a real one
TWO_CTA_SLOWDOWN = 1.4  # two CTAs that share an SM vs. one after the other
SPLITK_BYTES_PER_US = 1.4e6  # partial sums, written and read


@dataclass(frozen=True)
class TmaConfig:
    """Tile sizes, split-K and Triton's launch options."""

    block_n: int
    block_m: int
    block_k: int
    split_k: int = 1
    num_warps: int = 4
    num_stages: int = 4

    def num_ctas(self, m: int, n: int) -> int:
        return triton.cdiv(n, self.block_n) * triton.cdiv(m, self.block_m) * self.split_k


@lru_cache(maxsize=1024)
def tma_config(m: int, n: int, k: int, act: bool, splittable: bool, smem_bytes: int) -> TmaConfig:
    """The config with the lowest estimate that fits into `smem_bytes`; split-K only if partial sums are reduced later.

    `act`: two rows of w per output.
    """
    block_ms = [b for b in (16, 32, 64, 128, 256) if b <= next_power_of_2(m, 16) and 4 * b >= m]
    tiles = [*product((64,), block_ms), *product((128,), (b for b in block_ms if b >= 64))]
    # min takes the first of equals: the faster in tests
    tiles.sort(key=lambda tile: (tile[0] == 128) == (m % 128 == 0))
    splits = [s for s in (1, 2, 4, 6) if s == 1 or (splittable and k >= s * MIN_K_PER_SPLIT)]
    configs = [
        fit_to_smem(block_n, block_m, split, m, n, act, smem_bytes)
        for (block_n, block_m), split in product(tiles, splits)
        if block_n * block_m * (1 + act) <= (2**15 if m > 128 else 2**14) and block_n * block_m * split <= 2**15
    ]
    configs = [c for c in configs if c.num_stages > 1 and (c.split_k == 1 or c.num_ctas(m, n) <= 2 * NUM_SMS)]
    return min(configs, key=lambda c: estimate_us(c, m, n, k, act))


def fit_to_smem(block_n: int, block_m: int, split_k: int, m: int, n: int, act: bool, smem_bytes: int) -> TmaConfig:
    """As many stages as fit, of 128 columns unless those would be too few. Of more than one wave two CTAs share an
    SM."""
    columns = (smem_bytes - SMEM_RESERVE) // (2 * (block_n * (1 + act) + block_m))
    waves = TmaConfig(block_n, block_m, 64, split_k).num_ctas(m, n) > NUM_SMS
    two_ctas = block_m >= 64 and columns >= 6 * 64 and waves
    columns //= 1 + two_ctas
    block_k = 128 if columns // 128 >= 4 - two_ctas else 64
    warps = 8 if block_n * block_m * (1 + act) > 2**14 else 4
    return TmaConfig(block_n, block_m, block_k, split_k, warps, min(columns // block_k, MAX_STAGES[block_k]))


def estimate_us(c: TmaConfig, m: int, n: int, k: int, act: bool) -> float:
    """Microseconds: the CTAs of an SM or the memory, whichever is slower, and the partial sums."""
    num_ctas, w_rows = c.num_ctas(m, n), c.block_n * (1 + act)
    loaded_rows = w_rows + c.block_m + PAD_ROW_COST * (-m % c.block_m)
    cta_us = 2 * triton.cdiv(k, c.split_k) * max(loaded_rows / SM_BYTES_PER_US, w_rows * c.block_m / SM_FLOPS_PER_US)
    waves: float = 2 * triton.cdiv(num_ctas, 2 * NUM_SMS)
    if num_ctas <= 2 * NUM_SMS:
        waves = max(num_ctas, NUM_SMS) / NUM_SMS
    cta_us *= waves * (TWO_CTA_SLOWDOWN if waves > 1 else 1)
    split_us = c.split_k * m * n * 8 / SPLITK_BYTES_PER_US if c.split_k > 1 else 0
    return max(cta_us, 2 * n * (1 + act) * k / HBM_BYTES_PER_US) + cta_us / 2 + split_us


@triton.jit(do_not_specialize=["M"])
def gemm_tma_kernel(
    x_desc, w_desc, w, bias, out, M, N, K, stride_wn, stride_om, k_per_split,
    BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, PREFETCH_LINES: tl.constexpr,
    ACT: tl.constexpr, HAS_BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    start_m, start_n = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    start_k = tl.program_id(2) * k_per_split
    offs_m, offs_n = (start_m + tl.arange(0, BLOCK_M))[None, :], (start_n + tl.arange(0, BLOCK_N))[:, None]
    if PDL:
        clamped_n = tl.minimum(offs_n, N - 1)
        prefetch_l2(cache_line_ptrs(w + clamped_n.to(tl.int64) * stride_wn, start_k, K, PREFETCH_LINES))
        if ACT:
            prefetch_l2(cache_line_ptrs(w + (clamped_n + N).to(tl.int64) * stride_wn, start_k, K, PREFETCH_LINES))
        if HAS_BIAS:
            prefetch_l2(bias + clamped_n)
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    acc_up = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for k in range(start_k, tl.minimum(start_k + k_per_split, K), BLOCK_K):
        x_t = x_desc.load([start_m, k]).T  # (BLOCK_K, BLOCK_M)
        acc = tl.dot(w_desc.load([start_n, k]), x_t, acc)
        if ACT:
            acc_up = tl.dot(w_desc.load([start_n + N, k]), x_t, acc_up)
    out_ptrs = out + (tl.program_id(2) * M + offs_m) * stride_om + offs_n
    epilogue(acc, acc_up, offs_n, bias, 0.0, out_ptrs, (offs_n < N) & (offs_m < M), N, ACT, HAS_BIAS, False)


def gemm_tma(
    x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, act: int, config: TmaConfig, pdl: bool
) -> torch.Tensor:
    """(M, N) of x's dtype, or partial sums float32 (SPLIT_K, M, N)."""
    (m, k), n = x.shape, len(w) // (2 if act else 1)
    compatible = tma_compatible(x) and tma_compatible(w)
    check(NAME, compatible, f"x {x.shape}, {x.stride()}, w {w.shape}, {w.stride()} of {x.dtype}")
    k_per_split = triton.cdiv(triton.cdiv(k, config.block_k), config.split_k) * config.block_k
    split_k = triton.cdiv(k, k_per_split)  # no split is empty
    check(NAME, split_k == 1 or not (act or bias is not None), "split-K with an activation or a bias")
    shape, dtype = ((m, n), x.dtype) if split_k == 1 else ((split_k, m, n), torch.float32)
    out = torch.empty(shape, dtype=dtype, device=x.device)
    gemm_tma_kernel[triton.cdiv(m, config.block_m), triton.cdiv(n, config.block_n), split_k](
        _descriptor(x, config.block_m, config.block_k), _descriptor(w, config.block_n, config.block_k), w,
        bias if bias is not None else x, out, m, n, k, w.stride(0), n, k_per_split,
        BLOCK_K=config.block_k, BLOCK_N=config.block_n, BLOCK_M=config.block_m, PREFETCH_LINES=PREFETCH_LINES, ACT=act,
        HAS_BIAS=bias is not None, PDL=pdl, num_warps=config.num_warps, num_stages=config.num_stages, launch_pdl=pdl,
    )  # fmt: skip
    return out


def tma_compatible(t: torch.Tensor) -> bool:
    """Whether TMA can load its tiles for tensor cores: 16-bit elements, rows at multiples of 16 bytes."""
    aligned = t.data_ptr() % 16 == 0 and t.stride(0) * t.element_size() % 16 == 0
    return t.element_size() == 2 and t.stride(1) == 1 and aligned


def _descriptor(t: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor(t, list(t.shape), list(t.stride()), [rows, columns])
