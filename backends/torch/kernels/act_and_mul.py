"""silu(gate) * up and gelu(gate) * up, gelu with the tanh approximation.

Defined by `silu_and_mul` and `gelu_and_mul` in backends/reference/ops.py; float32, rounded once.

    gate, up (T, I), any row stride: the halves of a merged GEMM's output   -> out (T, I)

Bytes moved per output: 2 elements read, 1 written.
"""

import torch
import triton
import triton.language as tl

from llmrs.backends.torch.kernels.launch import check_tensors, next_power_of_2

BLOCK_N = 1024


@triton.jit
def apply_act(gate, up, GELU: tl.constexpr):
    """silu(gate) * up or gelu(gate) * up; float32."""
    inner = gate
    if GELU:  # 0.5 (1 + tanh(z)) = sigmoid(2 z)
        inner = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    return gate / (1 + tl.exp(-inner)) * up


@triton.jit
def act_and_mul_kernel(
    gate, up, out, stride_gm, stride_um, N: tl.constexpr, BLOCK_N: tl.constexpr, GELU: tl.constexpr, PDL: tl.constexpr
):
    row, offs_n = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = offs_n < N
    if PDL:
        tl.extra.cuda.gdc_wait()
    g = tl.load(gate + row * stride_gm + offs_n, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + row * stride_um + offs_n, mask=mask, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    tl.store(out + row * N + offs_n, apply_act(g, u, GELU).to(out.dtype.element_ty), mask=mask)


def act_and_mul(gate: torch.Tensor, up: torch.Tensor, *, gelu: bool, pdl: bool = False) -> torch.Tensor:
    """(T, I) of gate's dtype. Raises BackendError for shapes and dtypes that differ."""
    check_tensors("act_and_mul", gate, up)
    tokens, n = gate.shape
    out = torch.empty(tokens, n, dtype=gate.dtype, device=gate.device)
    block_n = min(BLOCK_N, next_power_of_2(n))
    act_and_mul_kernel[(tokens, triton.cdiv(n, block_n))](
        gate, up, out, gate.stride(0), up.stride(0),
        N=n, BLOCK_N=block_n, GELU=gelu, PDL=pdl, num_warps=4, launch_pdl=pdl,
    )  # fmt: skip
    return out
