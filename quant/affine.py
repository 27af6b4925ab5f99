"""Grouped integers of safetensors files, as the affine form: MLX, compressed-tensors, GPTQ, AWQ.

With b bits a weight and groups of g columns a file holds

    MLX             weight u32 (N, K b/32)         scales (N, K/g)        biases (N, K/g)
    pack-quantized  weight_packed i32 (N, K b/32)  weight_scale (N, K/g)  weight_zero_point i32 (N b/32, K/g)
    GPTQ            qweight i32 (K b/32, N)        scales (K/g, N)        qzeros i32 (K/g, N b/32)
    AWQ             qweight i32 (K, N/8)           scales (K/g, N)        qzeros i32 (K/g, N/8)

MLX: w = q scale + bias; the others: w = (q - zero) scale. Without zero points (symmetric) the zero is 2^(b-1). Words
hold a bit stream, lowest bits first, along the dimension that they shorten; AWQ alone shuffles each eight columns.
Version 1 of GPTQ stores zero - 1, so that zeros are 1 to 2^b. Sources: MLX's mlx/ops.cpp (affine_quantize),
compressed-tensors' pack_quantized/helpers.py, AutoGPTQ's qlinear_cuda.py, AutoAWQ's packing_utils.py.
"""

import numpy as np

from llmrs.quant.form import Form
from llmrs.quant.tensor import QuantTensor, Tensor, of_planes

MLX_BITS, MLX_GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)
PACKED_BITS = (2, 3, 4, 5, 6, 8)
GPTQ_BITS = (2, 3, 4, 8)
AWQ_NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)  # the nibble of each of eight columns


def as_bytes(words: np.ndarray) -> np.ndarray:
    """(rows, n) of 32 bits -> uint8 (rows, 4 n), little-endian."""
    return np.ascontiguousarray(words).view(np.uint8)


def mlx_affine(weight: Tensor, scales: Tensor, biases: Tensor, bits: int, group: int) -> QuantTensor:
    """MLX's affine mode."""
    form = Form("affine", f"u{bits}", group, scales.format)
    planes = {"codes": as_bytes(weight.data), "scales": scales.data, "biases": biases.data}
    return of_planes(f"mlx{bits}_g{group}", form, planes)


def pack_quantized(packed: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, columns: int) -> QuantTensor:
    """compressed-tensors' int weights, in groups or with one scale a row. The last word of a row may be padded."""
    group = columns // scales.shape[1]
    planes = {"codes": as_bytes(packed.data)[:, : columns * bits // 8], "scales": scales.data}
    if zeros is not None:
        planes["zeros"] = np.ascontiguousarray(_unpacked(zeros.data.T, bits, len(scales.data)).T)
    form = Form("affine", f"u{bits}", group, scales.format, zero=1 << bits - 1 if zeros is None else 0)
    return of_planes(f"int{bits}" + (f"_g{group}" if group < columns else "_channel"), form, planes)


def gptq(qweight: Tensor, scales: Tensor, qzeros: Tensor, bits: int, group: int, version: int) -> QuantTensor:
    """GPTQ without activation order. Copies: the file packs along K, and has it first. Zeros are at most 255."""
    zeros = _unpacked(qzeros.data, bits, scales.shape[1])
    if version == 1:
        zeros = zeros + 1
    planes = {"codes": as_bytes(qweight.data.T), **_transposed(scales, zeros)}
    return of_planes(f"gptq{bits}_g{group}", Form("affine", f"u{bits}", group, scales.format), planes)


def awq(qweight: Tensor, scales: Tensor, qzeros: Tensor, group: int) -> QuantTensor:
    """AWQ's gemm layout, 4 bits. Copies: the file packs along N."""
    groups, words = qzeros.shape
    nibbles = _unpacked(qzeros.data, 4, 8 * words).reshape(groups, words, 8)
    zeros = nibbles[:, :, AWQ_NIBBLES].reshape(groups, -1)
    planes = {"codes": _awq_codes(qweight.data), **_transposed(scales, zeros)}
    return of_planes(f"awq4_g{group}", Form("affine", "u4", group, scales.format), planes)


def _awq_codes(qweight: np.ndarray) -> np.ndarray:
    """(K, N / 8) words -> (N, K / 2) bytes."""
    data = as_bytes(qweight)  # (K, N / 2)
    even, odd = data[::2], data[1::2]  # two columns of the weight become one byte
    nibbles = (even & 15 | odd << 4, even >> 4 | odd & 240)  # low, high; each (K / 2, N / 2)
    codes = np.empty((qweight.shape[1], 8, len(even)), np.uint8)
    for row, nibble in enumerate(AWQ_NIBBLES):
        codes[:, row] = nibbles[nibble % 2][:, nibble // 2 :: 4].T
    return codes.reshape(-1, len(even))


def _transposed(scales: Tensor, zeros: np.ndarray) -> dict[str, np.ndarray]:
    return {"scales": np.ascontiguousarray(scales.data.T), "zeros": np.ascontiguousarray(zeros.T)}


def _unpacked(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The first `count` codes of each row of words, uint8."""
    stream = np.unpackbits(as_bytes(words), axis=1, bitorder="little", count=count * bits)
    return np.packbits(stream.reshape(len(words), count, bits), axis=2, bitorder="little")[:, :, 0]
