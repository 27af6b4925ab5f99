"""y = x w^T on each kind of device: the weight is put into the form that runs fastest there, once, at load."""

from collections.abc import Callable

import torch

Linear = Callable[[torch.Tensor], torch.Tensor]

FULL = 4  # rows for which a packed weight is read at full speed
FEW_ROWS = 4  # up to here a CPU without bf16 instructions is faster on the bf16 weight than on an expanded copy


def prepare(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Linear:
    """A function of x (n, K) for weight (N, K) and bias (N,) or None, all of one dtype on one device."""
    if weight.device.type != "cpu" or weight.dtype == torch.float32:
        return lambda x: torch.nn.functional.linear(x, weight, bias)
    if _has_instructions(weight.dtype):
        return _packed(weight, bias)
    return _expanded(weight, bias)


def _has_instructions(dtype: torch.dtype) -> bool:
    ops = torch.ops.mkldnn
    supported = ops._is_mkldnn_bf16_supported if dtype == torch.bfloat16 else ops._is_mkldnn_fp16_supported
    return bool(supported())


def _packed(weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
    """oneDNN's own layout, which reads at the speed of the memory; a hint of 8 rows also suits 1 to 32.

    One row reads the weight a tenth slower than four do, so it is repeated.
    """
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 8)

    def run(x: torch.Tensor) -> torch.Tensor:
        rows = len(x)
        if rows == 1:
            x = x.expand(FULL, -1).contiguous()
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
        return y[:rows]

    return run


def _expanded(weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
    """Without instructions for the type, many rows are computed in float32 on a copy that is made each time."""

    def run(x: torch.Tensor) -> torch.Tensor:
        if len(x) <= FEW_ROWS:
            return torch.nn.functional.linear(x, weight, bias)
        wide = None if bias is None else bias.float()
        return torch.nn.functional.linear(x.float(), weight.float(), wide).to(x.dtype)

    return run
