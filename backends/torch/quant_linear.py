"""y = [residual +] act(norm(x) w^T + bias) for quantized weights on an NVIDIA GPU. Chooses the kernel of each segment.

    M                 weights
    1 to 4            GEMV on 16-bit integers (kernels/quant_gemv.py); not for float32 activations, nor FP8
    to GEMM_MAX_M     GEMM that unpacks in registers (kernels/quant_gemm.py)
    more              slices are dequantized, which stay in L2, and multiplied by cuBLAS

Forms without kernels, as `PackedRows`, are unpacked by torch at every M.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from llmrs.backends.torch.kernels.act_and_mul import act_and_mul
from llmrs.backends.torch.kernels.launch import has_async_mma
from llmrs.backends.torch.kernels.quant_gemm import quant_gemm, quant_gemm_config, reduce_splits
from llmrs.backends.torch.kernels.quant_gemv import MAX_M as GEMV_MAX_M
from llmrs.backends.torch.kernels.quant_gemv import quant_gemv
from llmrs.backends.torch.kernels.quantize_activations import quantize_activations
from llmrs.backends.torch.kernels.rms_norm import rms_norm
from llmrs.backends.torch.quant_matrix import PackedRows, QuantMatrix
from llmrs.backends.torch.triton_rows import TritonRows

GEMM_MAX_M = 256
FLOAT32_MAX_M = 16  # rows that float32 GEMMs take: they run on CUDA cores
SLICE_WEIGHTS = 2**24  # dequantized at once: 32 MiB


class Norm(NamedTuple):
    """RMSNorm before or after a linear map."""

    weight: torch.Tensor  # (K,)
    params: dict[str, float]  # eps, and offset if any


def quant_linear(
    x: torch.Tensor, weight: QuantMatrix, bias: torch.Tensor | None = None, residual: torch.Tensor | None = None,
    norm: Norm | None = None, act: str = "", *, splittable: bool = False, pdl: bool = False,
) -> torch.Tensor:  # fmt: skip
    """(M, N) of x's dtype. With `splittable` it may be float32 (SPLIT_K, M, N): partial sums."""
    m = len(x)
    integers = all(isinstance(s, TritonRows) and s.integers for s in weight.segments)
    if m <= GEMV_MAX_M and x.dtype != torch.float32 and integers:
        return _gemv(x, weight, bias, residual, norm, act, pdl)
    if norm:
        x = rms_norm(x, norm.weight, **norm.params, pdl=pdl)
    if m <= (FLOAT32_MAX_M if x.dtype == torch.float32 else GEMM_MAX_M):
        y = _gemm(x, weight, bias, act, splittable and residual is None, pdl)
    else:
        y = _activated(_dequantized(x, weight, bias), act, pdl)
    return y if residual is None else residual + y


def _gemv(
    x: torch.Tensor, weight: QuantMatrix, bias: torch.Tensor | None, residual: torch.Tensor | None, norm: Norm | None,
    act: str, pdl: bool,
) -> torch.Tensor:  # fmt: skip
    codes, scales = quantize_activations(x, norm.weight if norm else None, **(norm.params if norm else {}), pdl=pdl)
    n = weight.shape[0]
    fused = act if len(weight.segments) == 1 else ""
    out = torch.empty(len(x), n // 2 if fused else n, dtype=x.dtype, device=x.device)
    late = residual if act and not fused else None  # added after an activation of its own
    for rows, at in _segments(weight):
        part = slice(None) if fused else at
        assert isinstance(rows, TritonRows)
        quant_gemv(
            codes, scales, rows.arguments, rows.constants, out[:, part], None if bias is None else bias[at],
            residual[:, part] if residual is not None and late is None else None, fused, pdl=pdl,
        )  # fmt: skip
    if fused or not act:
        return out
    y = _activated(out, act, pdl)
    return y if late is None else late + y


def _gemm(
    x: torch.Tensor, weight: QuantMatrix, bias: torch.Tensor | None, act: str, splittable: bool, pdl: bool
) -> torch.Tensor:
    (m, k), n = x.shape, weight.shape[0]
    if not all(isinstance(s, TritonRows) for s in weight.segments):
        return _activated(_dequantized(x, weight, bias), act, pdl)
    config = quant_gemm_config(m, n, k, async_mma=has_async_mma(x.device))
    splits = config.splits(k)
    shape, dtype = ((m, n), x.dtype) if splits == 1 else ((splits, m, n), torch.float32)
    y = torch.empty(shape, dtype=dtype, device=x.device)
    early = bias if splits == 1 else None
    for rows, at in _segments(weight):
        assert isinstance(rows, TritonRows)
        b = None if early is None else early[at]
        quant_gemm(x, rows.arguments, rows.constants, y[..., at], b, config=config, pdl=pdl)
    if splits > 1 and (act or bias is not None or not splittable):
        y = reduce_splits(y, x.dtype, bias, pdl=pdl)
    return _activated(y, act, pdl)


def _dequantized(x: torch.Tensor, weight: QuantMatrix, bias: torch.Tensor | None) -> torch.Tensor:
    out = torch.empty(len(x), weight.shape[0], dtype=x.dtype, device=x.device)
    step = max(SLICE_WEIGHTS // x.shape[1] // 256, 1) * 256  # whole tiles of cuBLAS
    for rows, at in _segments(weight):
        for begin in range(0, len(rows), step) if isinstance(rows, PackedRows) else (0,):
            part = rows[begin : begin + step].unpack(x.dtype) if isinstance(rows, PackedRows) else rows
            torch.mm(x, part.t(), out=out[:, at.start + begin : at.start + begin + len(part)])
    return out if bias is None else out.add_(bias)


def _segments(weight: QuantMatrix) -> Iterator[tuple[PackedRows | torch.Tensor, slice]]:
    """Each with its rows."""
    begin = 0
    for rows in weight.segments:
        yield rows, slice(begin, begin + len(rows))
        begin += len(rows)


def _activated(y: torch.Tensor, act: str, pdl: bool) -> torch.Tensor:
    return act_and_mul(*y.chunk(2, dim=-1), gelu=act == "gelu_and_mul", pdl=pdl) if act else y
