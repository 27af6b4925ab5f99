"""rms_norm, and add + rms_norm, over rows.

Defined by `rms_norm` and `add` in backends/reference/ops.py; `fused_add_rms_norm` in backends/fusion.py. x, y (T, D),
any row strides; w (D,). y may come as float32 (P, T, D), the split-K partial sums of the GEMM before it. It and the
sum are rounded to x's type, as the equations by themselves would; the rest is float32. Bytes moved for each element: 2
rows read and 2 written (fused_add_rms_norm; of P ranges 1 + 2 P in bf16), 1 and 1 (rms_norm).
"""

import torch
import triton
import triton.language as tl

from llmrs.backends.torch.kernels.launch import chained, check_rows, power, require


@triton.jit
def _norm(
    x, y, w, total, n, x_row, y_row, y_part, eps, offset,
    D: tl.constexpr, DP: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row, d = tl.program_id(0).to(tl.int64), tl.arange(0, DP)
    mask = d < D
    weight = tl.load(w + d, mask=mask, other=0.0).to(tl.float32) + offset
    if PDL:
        tl.extra.cuda.gdc_wait()
    a = tl.load(x + row * x_row + d, mask=mask, other=0.0).to(tl.float32)
    if PARTS:
        b = tl.load(y + row * y_row + d, mask=mask, other=0.0).to(tl.float32)
        for part in tl.static_range(1, PARTS):
            b += tl.load(y + part * y_part + row * y_row + d, mask=mask, other=0.0)
        a += b.to(total.dtype.element_ty).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    if PARTS:
        a = a.to(total.dtype.element_ty)
        tl.store(total + row * D + d, a, mask=mask)
        a = a.to(tl.float32)
    scale = tl.rsqrt(tl.sum(a * a, 0) / D + eps)
    tl.store(n + row * D + d, (a * scale * weight).to(n.dtype.element_ty), mask=mask)


def rms_norm(x: torch.Tensor, w: torch.Tensor, *, eps: float, offset: float = 0.0) -> torch.Tensor:
    """x / rms(x) * (w + offset), (T, D)."""
    n = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, x, w, n, n, eps, offset, 0)
    return n


def fused_add_rms_norm(
    x: torch.Tensor, y: torch.Tensor, w: torch.Tensor, *, eps: float, offset: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """x + y, and rms_norm of it, (T, D) each; y (T, D), or (P, T, D) in float32 to be added up."""
    total, n = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    _launch(x, y, w, total, n, eps, offset, len(y) if y.ndim == 3 else 1)
    return total, n


def _launch(
    x: torch.Tensor, y: torch.Tensor, w: torch.Tensor, total: torch.Tensor, n: torch.Tensor, eps: float, offset: float,
    parts: int,
) -> None:  # fmt: skip
    check_rows("norm", x, *((y,) if parts < 2 else ()))
    require("norm", x.ndim == 2 and w.shape == x.shape[1:] and w.is_contiguous(), f"x {x.shape}, w {w.shape}")
    summed = y.shape[1:] == x.shape and y.dtype == torch.float32 and y.is_contiguous()
    require("norm", parts < 2 or summed, f"x {x.shape}, sums {y.shape} of {y.dtype}")
    padded, pdl = power(x.shape[1]), chained(x.device)
    _norm[(len(x),)](
        x, y, w, total, n, x.stride(0), y.stride(-2), y.stride(0), float(eps), float(offset), D=x.shape[1], DP=padded,
        PARTS=parts, PDL=pdl, num_warps=min(max(padded // 512, 1), 16), launch_pdl=pdl,
    )  # fmt: skip
