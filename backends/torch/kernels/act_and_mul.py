"""silu(gate) * up and gelu(gate) * up, with tanh's approximation of gelu.

Defined by `silu_and_mul` and `gelu_and_mul` in backends/reference/ops.py, computed in float32 and rounded once.
gate, up (T, I), any row strides: halves of one merged GEMM. Moved: 2 elements read and 1 written for each result.
"""

import torch
import triton
import triton.language as tl

from llmrs.backends.torch.kernels.launch import chained, check_rows, power

PART = 1024  # elements of a program


@triton.jit
def gate_times(g, u, GELU: tl.constexpr):
    """silu or gelu of g, times u; float32."""
    inner = g
    if GELU:  # 0.5 (1 + tanh(z)) = sigmoid(2 z)
        inner = 1.5957691216057308 * (g + 0.044715 * g * g * g)
    return g / (1 + tl.exp(-inner)) * u


@triton.jit
def _gated(gate, up, y, gate_row, up_row, N: tl.constexpr, PART: tl.constexpr, GELU: tl.constexpr, PDL: tl.constexpr):
    row, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * PART + tl.arange(0, PART)
    mask = i < N
    if PDL:
        tl.extra.cuda.gdc_wait()
    g = tl.load(gate + row * gate_row + i, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_row + i, mask=mask, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    tl.store(y + row * N + i, gate_times(g, u, GELU).to(y.dtype.element_ty), mask=mask)


def gated(gate: torch.Tensor, up: torch.Tensor, *, gelu: bool) -> torch.Tensor:
    """(T, I) of gate's type. Raises BackendError for shapes and types that differ."""
    check_rows("gated", gate, up)
    rows, width = gate.shape
    y = torch.empty(rows, width, dtype=gate.dtype, device=gate.device)
    part, pdl = min(PART, power(width)), chained(gate.device)
    grid = (rows, triton.cdiv(width, part))
    _gated[grid](
        gate, up, y, gate.stride(0), up.stride(0), N=width, PART=part, GELU=gelu, PDL=pdl, num_warps=4, launch_pdl=pdl
    )
    return y
