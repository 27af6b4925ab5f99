"""Fused skinny GEMM: out = [residual +] act(rms_norm(x) @ w^T + bias). Kernel choice, configs, launcher.

Defined by `linear`, `rms_norm`, `silu_and_mul`, `gelu_and_mul` and `add` in backends/reference/ops.py. Rounds to the
model's dtype wherever those ops do; accumulates in float32.

    x (M, K), any row stride   norm_weight (K,)   w (N, K), or with an activation (2 N, K): gate rows, then up rows
    bias (len(w),)   residual (M, N), any row stride   -> out (M, N)

    kernel             for                              fused
    gemv.py            M = 1; M to 4 for small K        norm (M = 1), bias, activation, residual
    gemm_tma.py        M of 2 to 512, sm_90+, 16-bit    bias, activation; split-K for the norm kernel to reduce
    gemm_small_m.py    M to 16, small N, elsewhere      bias, activation, residual

`select_gemm` chooses one of them or cuBLAS. Bytes moved: w once, and x from L2 for each CTA. With PDL (`launch.py`)
kernels request their weights before they wait for x.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton

from llmrs.backends.torch.kernels.gemm_small_m import gemm_small_m_kernel
from llmrs.backends.torch.kernels.gemm_tma import TMA_MAX_M, TmaConfig, gemm_tma, tma_compatible, tma_config
from llmrs.backends.torch.kernels.gemv import gemv_kernel
from llmrs.backends.torch.kernels.launch import check, check_tensors, dot_precision, has_tma, next_power_of_2

NAME = "gemm"
GEMV_MAX_M, SMALL_M_MAX = 4, 16
SMALL_N = 2048  # as of `o` and `down` of a small model
LM_HEAD_N = 2**15  # only an LM head has more outputs
REGISTER_ELEMS = 12288  # elements of x that the GEMV's registers hold; a single row may be longer
MAX_FUSED_NORM_M = 1  # every CTA repeats the norm: for two rows a launch of its own is cheaper
LARGE_WEIGHT_BYTES = 32 * 2**20
SMEM_BUDGET = 110 * 1024  # of a gemm_small_m CTA, so that two fit
MAX_PREFETCH_BYTES_PER_THREAD = 192  # of w, in the GEMV
ACTS = {"": 0, "silu_and_mul": 1, "gelu_and_mul": 2}


@dataclass(frozen=True)
class GemvConfig:
    """Outputs per warp, columns per tile, warps of a CTA."""

    rows_per_warp: int
    block_k: int
    num_warps: int = 4


@dataclass(frozen=True)
class SmallMConfig:
    """Outputs per CTA, columns per warp and tile, warps, stages."""

    block_n: int
    block_k: int
    num_warps: int = 4
    num_stages: int = 1


GemmConfig = GemvConfig | SmallMConfig | TmaConfig


def gemv_config(m: int, n: int, k: int, itemsize: int, act: bool) -> GemvConfig:
    """About 16 KB of w per CTA, a few of which an SM holds; large plain matrices of M = 1 as measured on an H200.

    More than one output per warp only where rows are short (M = 1: 4 KB): Triton 3.6 moves w between warps otherwise.
    """
    if m == 1 and not act and k >= 1024 and n >= LM_HEAD_N:
        return GemvConfig(1, 2048 // itemsize)
    if m == 1 and not act and 3072 < k <= 4096:
        return GemvConfig(2, 2048 // itemsize)
    columns = 256 if k <= 1024 else 512 if k <= 4096 or act else 1024
    padded = next_power_of_2(k)
    short = padded * itemsize * (1 + act) * (1 + (m > 2)) <= 2048
    rows = min(1024 // padded, 16) // (next_power_of_2(m) * (1 + act))
    min_rows = 2 if m == 1 and padded * itemsize <= 4096 else 1
    return GemvConfig(max(rows, min_rows), min(columns * 2 // itemsize, padded), 8 if short else 4)


def small_m_config(m: int, k: int, itemsize: int, act: bool) -> SmallMConfig:
    """Tiles of 16 outputs, as many stages as fit."""
    block_m, block_k = next_power_of_2(m, 8), min(max(next_power_of_2(k) // 4, 16), 128 // itemsize)
    stage_bytes = 4 * block_k * itemsize * (16 * (1 + act) + block_m)
    return SmallMConfig(16, block_k, num_stages=min(max(SMEM_BUDGET // stage_bytes, 3), 6))


def select_gemm(
    m: int, w: torch.Tensor, act: bool, followed_by_residual_norm: bool, smem_bytes: int
) -> GemmConfig | None:
    """The config, and by its type the kernel, for a GEMM of M rows; None: cuBLAS is faster.

    `followed_by_residual_norm`: partial sums can be reduced. `smem_bytes`: shared memory per CTA.
    """
    n, k, itemsize = len(w) // (1 + act), w.shape[1], w.element_size()
    if m == 1:
        return gemv_config(m, n, k, itemsize, act)
    if has_tma(w.device) and tma_compatible(w):
        small = w.nbytes <= LARGE_WEIGHT_BYTES // 2
        if m == 2 and not followed_by_residual_norm and small and fits_in_registers(m, k, act):
            return gemv_config(m, n, k, itemsize, act)
        if beats_cublas(m, w, followed_by_residual_norm):
            return tma_config(m, n, k, act, followed_by_residual_norm, smem_bytes)
        return None
    if m > SMALL_M_MAX or n > SMALL_N or w.nbytes > LARGE_WEIGHT_BYTES:
        return None
    return gemv_config(m, n, k, itemsize, act) if fits_in_registers(m, k, act) else small_m_config(m, k, itemsize, act)


def beats_cublas(m: int, w: torch.Tensor, followed_by_residual_norm: bool) -> bool:
    """Whether gemm_tma is faster in whole steps of an H100: docs/log.md has the times."""
    if m <= 64:
        return True
    if m <= 128:  # in between cuBLAS's tiles are full and ours are not
        return m > 104 or not (followed_by_residual_norm and w.shape[1] <= 2 * len(w))
    if min(w.shape) <= SMALL_N and len(w) <= LM_HEAD_N:
        return m <= (TMA_MAX_M if followed_by_residual_norm else 256)
    return followed_by_residual_norm and 224 < m <= 256  # large matrices: cuBLAS's larger tiles fill the GPU


def fits_in_registers(m: int, k: int, act: bool) -> bool:
    """Whether the GEMV can hold x."""
    return m == 1 or (m <= GEMV_MAX_M and next_power_of_2(m) * k * (1 + act) <= REGISTER_ELEMS)


def max_fused_m(dtype: torch.dtype, device: torch.device) -> int:
    """The largest M for which `select_gemm` may give a config."""
    return TMA_MAX_M if dtype.itemsize == 2 and has_tma(device) else SMALL_M_MAX


def can_fuse_norm(w: torch.Tensor) -> bool:
    """Whether CTAs may repeat the norm before: those of a large matrix are so many that a launch costs less."""
    return w.nbytes <= LARGE_WEIGHT_BYTES


def fused_linear(
    x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None, residual: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None, eps: float = 0.0, offset: float = 0.0, act: str = "",
    *, config: GemmConfig | None = None, pdl: bool = False,
) -> torch.Tensor:  # fmt: skip
    """(M, N) of x's dtype; with split-K partial sums float32 (SPLIT_K, M, N).

    `config` defaults to a GEMV or gemm_small_m; a TmaConfig takes neither residual nor norm. Raises BackendError for
    unsupported shapes and dtypes.
    """
    (m, k), n, itemsize, has_act = x.shape, len(w) // (2 if act else 1), x.element_size(), bool(act)
    _check(x, w, bias, residual, norm_weight, n, act)
    if config is None:
        gemv = fits_in_registers(m, k, has_act)
        config = gemv_config(m, n, k, itemsize, has_act) if gemv else small_m_config(m, k, itemsize, has_act)
    if isinstance(config, TmaConfig):
        check(NAME, residual is None and norm_weight is None, "TMA with a residual or a norm")
        return gemm_tma(x, w, bias, ACTS[act], config, pdl)
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    tensors = [x, w, _or(bias, x), _or(residual, out), out]  # absent ones are not read
    sizes = [m, n, x.stride(0), w.stride(0), _or(residual, out).stride(0), out.stride(0)]
    common = {
        "K": k, "ACT": ACTS[act], "HAS_BIAS": bias is not None, "HAS_RESIDUAL": residual is not None, "PDL": pdl,
        "num_warps": config.num_warps, "launch_pdl": pdl,
    }  # fmt: skip
    if isinstance(config, GemvConfig):
        constants = gemv_constexprs(config, m, k, itemsize, has_act) | {"FUSE_NORM": norm_weight is not None}
        grid = (triton.cdiv(n, config.rows_per_warp * config.num_warps),)
        gemv_kernel[grid](*tensors, _or(norm_weight, x), *sizes, float(eps), float(offset), **common, **constants)
    else:
        check(NAME, m <= SMALL_M_MAX, f"M = {m} without a TmaConfig")
        constants = small_m_constexprs(config, m, k, x.dtype) | {"num_stages": config.num_stages}
        gemm_small_m_kernel[(triton.cdiv(n, config.block_n),)](*tensors, *sizes, **common, **constants)
    return out


def gemv_constexprs(config: GemvConfig, m: int, k: int, itemsize: int, act: bool) -> dict[str, Any]:
    tiles = triton.cdiv(k, config.block_k)
    thread_bytes = config.rows_per_warp * config.block_k * itemsize * (1 + act) // 32  # of a k tile
    prefetched = min(tiles, max(MAX_PREFETCH_BYTES_PER_THREAD // max(thread_bytes, 1), 1))
    return {
        "BLOCK_K": config.block_k, "NUM_K_TILES": tiles, "PREFETCH_K_TILES": prefetched,
        "ROWS_PER_WARP": config.rows_per_warp, "WARPS": config.num_warps, "BLOCK_M": next_power_of_2(m),
    }  # fmt: skip


def small_m_constexprs(config: SmallMConfig, m: int, k: int, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "BLOCK_K": config.block_k, "BLOCK_N": config.block_n, "WARPS": config.num_warps,
        "BLOCK_M": next_power_of_2(m, 8), "PREFETCH_LINES": next_power_of_2(triton.cdiv(k * dtype.itemsize, 128)),
        "PRECISION": dot_precision(dtype),
    }  # fmt: skip


def _or(tensor: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    return other if tensor is None else tensor


def _check(
    x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None,
    norm_weight: torch.Tensor | None, n: int, act: str,
) -> None:  # fmt: skip
    check_tensors(NAME, x)
    check_tensors(NAME, w)
    check(NAME, x.ndim == w.ndim == 2 and x.shape[1] == w.shape[1], f"x {tuple(x.shape)}, w {tuple(w.shape)}")
    max_m = TMA_MAX_M if norm_weight is None else MAX_FUSED_NORM_M
    check(NAME, 0 < len(x) <= max_m and x.dtype == w.dtype, f"M = {len(x)} of {x.dtype}, w of {w.dtype}")
    check(NAME, not act or (act in ACTS and len(w) == 2 * n), f"activation {act!r}, w {tuple(w.shape)}")
    shapes = ("bias", bias, w.shape[:1]), ("residual", residual, (len(x), n)), ("norm", norm_weight, x.shape[1:])
    for name, t, shape in shapes:
        fits = t is None or (t.dtype == x.dtype and t.shape == shape and t.stride(-1) == 1)
        check(NAME, fits, f"{name} does not fit x {tuple(x.shape)} and w {tuple(w.shape)}")
