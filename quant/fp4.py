"""4-bit floats (e2m1) of safetensors files: MXFP4 and NVFP4.

Two codes a byte, the even column in the low nibble. MXFP4: a scale e8m0 for 32 columns. NVFP4: a scale e4m3 for 16,
times one f32 for the whole matrix: modelopt stores it, compressed-tensors its inverse, MLX MLX_GLOBAL times it.
Sources: OCP Microscaling Formats 1.0; compressed-tensors' nvfp4/base.py; modelopt's nvfp4_tensor.py; MLX's fp_quantize.
"""

import numpy as np

from llmrs.quant.form import Form
from llmrs.quant.tensor import QuantTensor, Tensor, of_planes

MXFP4 = Form("fp4", "e2m1", 32, "e8m0")
NVFP4 = Form("fp4", "e2m1", 16, "e4m3")
MLX_GLOBAL = np.float32(6 * 448)  # the largest e2m1 times the largest e4m3


def mxfp4(codes: np.ndarray, scales: Tensor) -> QuantTensor:
    """Codes uint8 (N, K / 2), scales uint8 (N, K / 32)."""
    return of_planes("mxfp4", MXFP4, {"codes": codes, "scales": scales.data})


def nvfp4(codes: np.ndarray, scales: Tensor, factor: np.float32 | None = None) -> QuantTensor:
    """Codes uint8 (N, K / 2), scales uint8 (N, K / 16), and what all of them are multiplied by."""
    planes = {"codes": codes, "scales": scales.data}
    if factor is not None:
        planes["row_scales"] = np.full((len(codes), 1), factor, np.float32)
    return of_planes("nvfp4", NVFP4, planes)
