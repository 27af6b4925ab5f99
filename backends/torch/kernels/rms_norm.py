"""RMSNorm, and residual add + RMSNorm, which also reduces split-K partial sums.

Defined by `rms_norm` and `add` in backends/reference/ops.py; `fused_add_rms_norm` in backends/fusion.py.

    x (T, D), any row stride; or float32 (SPLIT_K, T, D), contiguous: partial sums of the GEMM before
    residual (T, D), any row stride   weight (D,)
    -> out = rms_norm(x + residual) * (weight + offset), residual_out = x + residual; (T, D)

The reduced x and residual_out are rounded to the model's dtype, as the unfused ops round them; all else is float32.
Bytes moved per element: 2 reads and 2 writes (rms_norm: 1 and 1; split-K: 1 + 2 * SPLIT_K reads in units of bf16).
"""

import torch
import triton
import triton.language as tl

from llmrs.backends.torch.kernels.launch import check, check_tensors, next_power_of_2

NAME = "rms_norm"


@triton.jit
def fused_add_rms_norm_kernel(
    x, residual, weight, residual_out, out, stride_xs, stride_xm, stride_rm, eps, weight_offset,
    D: tl.constexpr, BLOCK_D: tl.constexpr, SPLIT_K: tl.constexpr, HAS_RESIDUAL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row, offs_d = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_D)
    mask = offs_d < D
    scale = tl.load(weight + offs_d, mask=mask, other=0.0).to(tl.float32) + weight_offset
    if PDL:
        tl.extra.cuda.gdc_wait()
    acc = tl.load(x + row * stride_xm + offs_d, mask=mask, other=0.0).to(tl.float32)
    for s in tl.static_range(1, SPLIT_K):
        acc += tl.load(x + s * stride_xs + row * stride_xm + offs_d, mask=mask, other=0.0)
    if HAS_RESIDUAL:
        acc = acc.to(residual_out.dtype.element_ty).to(tl.float32)
        acc += tl.load(residual + row * stride_rm + offs_d, mask=mask, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    if HAS_RESIDUAL:
        total = acc.to(residual_out.dtype.element_ty)
        tl.store(residual_out + row * D + offs_d, total, mask=mask)
        acc = total.to(tl.float32)
    inverse_rms = tl.rsqrt(tl.sum(acc * acc, 0) / D + eps)
    tl.store(out + row * D + offs_d, (acc * inverse_rms * scale).to(out.dtype.element_ty), mask=mask)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, *, eps: float, offset: float = 0.0, pdl: bool = False
) -> torch.Tensor:
    """x / rms(x) * (weight + offset), (T, D)."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, None, weight, out, out, eps, offset, pdl)
    return out


def fused_add_rms_norm(
    residual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, *, eps: float, offset: float = 0.0,
    pdl: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """residual + x and its RMSNorm, (T, D) each; x (T, D), or split-K partial sums float32 (SPLIT_K, T, D)."""
    residual_out, out = (torch.empty(residual.shape, dtype=residual.dtype, device=residual.device) for _ in range(2))
    _launch(x, residual, weight, residual_out, out, eps, offset, pdl)
    return residual_out, out


def _launch(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, residual_out: torch.Tensor,
    out: torch.Tensor, eps: float, offset: float, pdl: bool,
) -> None:  # fmt: skip
    split_k = len(x) if x.ndim == 3 else 1
    rows = x if residual is None else residual
    check_tensors(NAME, rows, *((x,) if split_k == 1 and x.ndim == 2 else ()))
    check(NAME, rows.ndim == 2 and weight.shape == rows.shape[1:], f"x {rows.shape}, weight {weight.shape}")
    check(NAME, weight.is_contiguous(), f"weight strides {weight.stride()}")
    partial = x.shape[1:] == rows.shape and x.dtype == torch.float32 and x.is_contiguous()
    check(NAME, x.ndim == 2 or partial, f"residual {rows.shape}, partial sums {x.shape} of {x.dtype}")
    d = rows.shape[1]
    block_d = next_power_of_2(d)
    fused_add_rms_norm_kernel[(len(rows),)](
        x, rows, weight, residual_out, out, x.stride(0), x.stride(-2), rows.stride(0), float(eps), float(offset),
        D=d, BLOCK_D=block_d, SPLIT_K=split_k, HAS_RESIDUAL=residual is not None, PDL=pdl,
        num_warps=min(max(block_d // 512, 1), 16), launch_pdl=pdl,
    )  # fmt: skip
