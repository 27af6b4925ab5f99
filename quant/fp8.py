"""8-bit floats (e4m3) of safetensors files: one scale a tensor, a row, or a block of rows x columns; MXFP8.

The file holds the weight, e4m3 (N, K), and scales by which it is multiplied, also where they are named
`weight_scale_inv`: f32, f16, bf16, or e8m0 (powers of two), one per block, (ceil(N / rows), ceil(K / columns)).
Sources: DeepSeek-V3's weight dequantization, compressed-tensors' float-quantized, OCP Microscaling Formats 1.0.
"""

import math

import numpy as np

from llmrs.quant.form import Form
from llmrs.quant.tensor import QuantTensor, Tensor, of_planes


def scale_columns(columns: int, block: int) -> int:
    """Columns per scale in memory, which divide a row: fewer than a block's where the last block is narrower."""
    return math.gcd(columns, block) if columns > block else columns


def fp8(name: str, codes: np.ndarray, scales: Tensor, block: tuple[int, int]) -> QuantTensor:
    """Codes uint8 (N, K), and scales of blocks (rows, columns). Scales are repeated for the rows of a block."""
    (rows, columns), (n, k) = block, codes.shape
    group = scale_columns(k, columns)
    at = np.arange(n) // rows, np.arange(0, k, group) // columns
    form = Form("fp8", "e4m3", group, scales.format)
    return of_planes(name, form, {"codes": codes, "scales": scales.data[at[0]][:, at[1]]})
