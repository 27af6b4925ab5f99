"""Quantizers that round to nearest: MLX's affine form, and FP8 in blocks."""

import numpy as np

from llmrs.quant.arrays import NUMPY
from llmrs.quant.form import Form, pack_codes
from llmrs.quant.tensor import QuantTensor, Tensor, of_planes

E4M3_MAX = 448.0
SMALLEST = 1e-7  # scale of a group of zeros


def to_format(x: np.ndarray, dtype: str) -> Tensor:
    """float32 rounded to f32, f16 or bf16, to nearest, ties to even."""
    if dtype == "bf16":
        bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
        rounded = bits + (np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1)))
        quiet = np.where(np.isnan(x), bits | np.uint32(1 << 22), rounded)  # a NaN stays one
        return Tensor("bf16", x.shape, (quiet >> np.uint32(16)).astype(np.uint16))
    with np.errstate(over="ignore"):
        return Tensor(dtype, x.shape, x.astype(np.float16 if dtype == "f16" else np.float32))


def quantize_mlx(x: np.ndarray, bits: int, group: int, dtype: str) -> QuantTensor:
    """MLX's affine mode of float32 (N, K): w = q scale + bias, scale and bias in `dtype`.

    The end of a group's range that is farther from zero is exact, and zero has a code, as in mlx.core.quantize. Codes
    are rounded with the scale and bias that are stored.
    """
    rows, columns = x.shape
    groups, levels = x.reshape(rows, -1, group), (1 << bits) - 1
    low, high = groups.min(-1), groups.max(-1)  # (N, K / group)
    negative = np.abs(low) > np.abs(high)
    edge = np.where(negative, low, high)
    scale = np.maximum((high - low) / levels, SMALLEST) * np.where(negative, 1, -1)
    steps = np.rint(edge / scale)  # from zero to the edge
    scale = np.where(steps != 0, edge / np.where(steps == 0, 1, steps), scale).astype(np.float32)
    bias = np.where(steps == 0, 0, edge).astype(np.float32)
    scales, biases = to_format(scale, dtype), to_format(bias, dtype)
    stored = scales.float32()
    usable = np.where(stored == 0, np.float32(1), stored)  # a scale below f16's range
    codes = np.rint((groups - biases.float32()[:, :, None]) / usable[:, :, None])
    packed = pack_codes(NUMPY, np.clip(codes, 0, levels).astype(np.uint8).reshape(rows, columns), bits)
    planes = {"codes": packed, "scales": scales.data, "biases": biases.data}
    return of_planes(f"mlx{bits}_g{group}", Form("affine", f"u{bits}", group, dtype), planes)


def quantize_fp8(x: np.ndarray, block: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """e4m3 codes uint8 (N, K), and scales float32 (ceil(N / block), ceil(K / block)): w = code * scale."""
    rows, columns = x.shape
    tall, wide = -(-rows // block), -(-columns // block)
    scales = np.empty((tall, wide), np.float32)
    codes = np.empty(x.shape, np.uint8)
    for i in range(tall):  # a band of rows at a time
        band = x[i * block : (i + 1) * block]
        largest = np.maximum.reduceat(np.abs(band).max(0), np.arange(0, columns, block))
        scales[i] = np.where(largest == 0, 1, largest / E4M3_MAX)
        codes[i * block : (i + 1) * block] = to_e4m3(band / np.repeat(scales[i], block)[:columns])
    return codes, scales


def to_e4m3(x: np.ndarray) -> np.ndarray:
    """Codes of float32 values, to nearest, ties to even; beyond 448 the largest."""
    size = np.minimum(np.abs(x), np.float32(E4M3_MAX))
    bits = size.view(np.uint32)
    rounded = bits + (np.uint32(0x7FFFF) + (bits >> np.uint32(20) & np.uint32(1)))  # to 3 bits of mantissa
    normal = (rounded >> np.uint32(20)) - np.uint32(120 << 3)  # exponent bias of 7 instead of 127
    codes = np.where(size < np.float32(2**-6), np.rint(size * 512).astype(np.uint32), normal)
    return (codes | np.signbit(x).astype(np.uint32) << np.uint32(7)).astype(np.uint8)
