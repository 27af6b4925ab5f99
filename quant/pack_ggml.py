"""Writes the blocks of GGUF's types: the inverse of quant/ggml.py, which has the layouts.

Of B blocks: codes uint8 (B, block), from zero on; what else a block stores is float32 (B, n), exact in its type.
"""

import numpy as np

from llmrs.quant.form import IQ4

IQ4_INDEX = np.zeros(256, np.uint8)  # of IQ4 + 127
IQ4_INDEX[(IQ4 + 127).astype(int)] = np.arange(16)


def q4_0(codes: np.ndarray, *halves: np.ndarray) -> np.ndarray:
    """Q4_0 and Q4_1: f16 scale, and offset."""
    return _joined(*map(_f16, halves), _halves(codes))


def q5_0(codes: np.ndarray, *halves: np.ndarray) -> np.ndarray:
    """Q5_0 and Q5_1."""
    return _joined(*map(_f16, halves), np.packbits(codes >> 4, 1, "little"), _halves(codes & 15))


def q8_0(codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Codes are 127 more than in the file."""
    return _joined(_f16(scale), codes - np.uint8(127))


def q2_k(codes: np.ndarray, scales: np.ndarray, mins: np.ndarray, d: np.ndarray, dmin: np.ndarray) -> np.ndarray:
    return _joined(_u8(scales) | _u8(mins) << 4, _two_bits(codes), _f16(d), _f16(dmin))


def q3_k(codes: np.ndarray, scales: np.ndarray, d: np.ndarray) -> np.ndarray:
    s = _u8(scales + 32)
    top = s.reshape(-1, 4, 4) >> 4  # the high two bits of scale i + 4 j are bits 2 j of byte i
    top = top[:, 0] | top[:, 1] << 2 | top[:, 2] << 4 | top[:, 3] << 6
    return _joined(_by_group(codes >> 2), _two_bits(codes & 3), _halves(s & 15), top, _f16(d))


def q4_k(codes: np.ndarray, scales: np.ndarray, mins: np.ndarray, d: np.ndarray, dmin: np.ndarray) -> np.ndarray:
    return _joined(_f16(d), _f16(dmin), _six_bits(scales, mins), _paired(codes))


def q5_k(codes: np.ndarray, scales: np.ndarray, mins: np.ndarray, d: np.ndarray, dmin: np.ndarray) -> np.ndarray:
    high, low = _by_group(codes >> 4), _paired(codes & 15)
    return _joined(_f16(d), _f16(dmin), _six_bits(scales, mins), high, low)


def q6_k(codes: np.ndarray, scales: np.ndarray, d: np.ndarray) -> np.ndarray:
    low = _halves((codes & 15).reshape(-1, 2, 128)).reshape(-1, 128)
    return _joined(low, _two_bits(codes >> 4), scales.astype(np.int8).view(np.uint8), _f16(d))


def iq4_nl(codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return q4_0(IQ4_INDEX[codes], scale)


def iq4_xs(codes: np.ndarray, scales: np.ndarray, d: np.ndarray) -> np.ndarray:
    s = _u8(scales + 32)
    low, top = s & 15, (s >> 4).reshape(-1, 2, 4)
    top = top[:, :, 0] | top[:, :, 1] << 2 | top[:, :, 2] << 4 | top[:, :, 3] << 6
    q = _halves(IQ4_INDEX[codes].reshape(-1, 8, 32)).reshape(-1, 128)
    return _joined(_f16(d), top, low[:, ::2] | low[:, 1::2] << 4, q)


def _joined(*parts: np.ndarray) -> np.ndarray:
    return np.concatenate(parts, 1)


def _f16(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x, "<f2").view(np.uint8)


def _u8(x: np.ndarray) -> np.ndarray:
    return x.astype(np.uint8)


def _halves(codes: np.ndarray) -> np.ndarray:
    """Codes (..., 2n) below 16 -> nibbles (..., n)."""
    n = codes.shape[-1] // 2
    return codes[..., :n] | codes[..., n:] << 4


def _two_bits(codes: np.ndarray) -> np.ndarray:
    """(B, 256) below 4 -> (B, 64): element 32 j + l of a half in bits 2 j of byte l."""
    c = codes.reshape(-1, 2, 4, 32)
    return (c[:, :, 0] | c[:, :, 1] << 2 | c[:, :, 2] << 4 | c[:, :, 3] << 6).reshape(-1, 64)


def _by_group(bits: np.ndarray) -> np.ndarray:
    """(B, 256) of 0 or 1 -> (B, 32): element 32 j + l is bit j of byte l."""
    return np.packbits(bits.reshape(-1, 8, 32), 1, "little").reshape(-1, 32)


def _paired(codes: np.ndarray) -> np.ndarray:
    """(B, 256) below 16 -> (B, 128): the low nibbles of 32 bytes are a group, the high ones the next."""
    return _halves(codes.reshape(-1, 4, 64)).reshape(-1, 128)


def _six_bits(scales: np.ndarray, mins: np.ndarray) -> np.ndarray:
    """Eight scales and eight mins in 12 bytes."""
    s, m = _u8(scales), _u8(mins)
    last = s[:, 4:] & 15 | m[:, 4:] << 4
    return _joined(s[:, :4] | s[:, 4:] >> 4 << 6, m[:, :4] | m[:, 4:] >> 4 << 6, last)
