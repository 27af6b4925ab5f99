"""How quantized weights lie in memory: four forms, onto which every file format is mapped at load.

A form has planes, arrays of N rows each, so that rows of a weight can be cut, joined and gathered:

    plane          shape           dtype
    codes          (N, K * b / 8)  uint8   b bits a weight, a little-endian bit stream per row, lowest bits first
    scales         (N, K / group)  Form.scale
    biases         (N, K / group)  Form.scale          affine
    zeros          (N, K / group)  uint8               affine
    mins           (N, K / group)  uint8               k_quant
    super_scales   (N, K / 256)    f16                 k_quant, fp4
    super_mins     (N, K / 256)    f16                 k_quant
    row_scales     (N, 1)          f32                 fp4, fp8

    affine    w = (code - zero) * scale + bias         zero: of the form, or a plane
    k_quant   w = (code - zero) * (super_scale * scale) - super_min * min
    fp4       w = table[code] * scale                  scale: times super_scale or row_scale, if any
    fp8       w = e4m3(code) * scale

`dense` is the fifth: no planes but the values. All arithmetic is float32, in this order.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from llmrs.quant.arrays import FLOAT8, Array, Arrays

SUPER_BLOCK = 256  # weights per super-scale
# The 16 values of a 4-bit float (OCP Microscaling Formats 1.0), and of ggml's non-linear 4-bit codes.
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
TABLES = {"e2m1": E2M1, "double_e2m1": 2 * E2M1 + 0, "iq4": IQ4}
BITS = {**{f"u{b}": b for b in (2, 3, 4, 5, 6, 8)}, **dict.fromkeys(TABLES, 4), "e4m3": 8}
SCALE_DTYPES = ("f32", "f16", "bf16", "u8", "i8", "u4", *FLOAT8)
PLANES = ("codes", "scales", "biases", "zeros", "mins", "super_scales", "super_mins", "row_scales")


@dataclass(frozen=True)
class Form:
    """The static part of a form: kernels are chosen by it."""

    kind: str  # affine | k_quant | fp4 | fp8
    code: str  # u2 .. u8: integers of that many bits; a 4-bit index into one of TABLES; e4m3
    group: int  # columns per scale; it divides K
    scale: str  # dtype of scales: one of SCALE_DTYPES; u4: scale in the low half of a byte, min in the high one
    zero: int = 0

    @property
    def bits(self) -> int:
        return BITS[self.code]

    def __str__(self) -> str:
        return f"{self.kind}[{self.code}, {self.group}, {self.scale}]"


Planes = Mapping[str, Array]


def unpack(xp: Arrays, form: Form, planes: Planes, columns: int) -> Array:
    """The weights, float32 (N, K): the definition of every form."""
    scales, mins = planes["scales"], planes.get("mins")
    if form.scale == "u4":
        scales, mins = scales & 15, scales >> 4
    scale = xp.float32(scales, "u8" if form.scale == "u4" else form.scale)  # (N, K / group)
    rows, groups = scale.shape
    if "super_scales" in planes:
        scale = _by_super(xp.float32(planes["super_scales"], "f16"), scale)
    if "row_scales" in planes:
        scale = scale * xp.float32(planes["row_scales"], "f32")
    codes = unpack_codes(xp, planes["codes"], form.bits, columns).reshape(rows, groups, form.group)
    if form.code in TABLES:
        values = xp.take(TABLES[form.code], codes)
    else:
        values = xp.float32(codes, "e4m3" if form.code == "e4m3" else "u8")
        if form.zero:
            values = values - form.zero
        elif "zeros" in planes:
            values = values - xp.float32(planes["zeros"], "u8")[:, :, None]
    w = values * scale[:, :, None]
    if "biases" in planes:
        w = w + xp.float32(planes["biases"], form.scale)[:, :, None]
    if mins is not None:
        w = w - _by_super(xp.float32(planes["super_mins"], "f16"), xp.float32(mins, "u8"))[:, :, None]
    return w.reshape(rows, columns)


def _by_super(super_scales: Array, scales: Array) -> Array:
    """(N, K / 256) times (N, K / group)."""
    rows, groups = scales.shape
    return (scales.reshape(rows, super_scales.shape[1], -1) * super_scales[:, :, None]).reshape(rows, groups)


def unpack_codes(xp: Arrays, codes: Array, bits: int, columns: int) -> Array:
    """uint8 (N, K) from the bit stream (N, K * bits / 8)."""
    rows, mask = codes.shape[0], (1 << bits) - 1
    if bits == 8:
        return codes
    if bits in (2, 4):
        parts = [codes >> s & mask for s in range(0, 8, bits)]
    else:  # 8 codes in `bits` bytes
        data = codes.reshape(rows, -1, bits)
        parts = []
        for n in range(8):
            byte, shift = divmod(n * bits, 8)
            code = data[:, :, byte] >> shift
            if shift + bits > 8:
                code = code | data[:, :, byte + 1] << (8 - shift)
            parts.append(code & mask)
    return xp.stack(parts, -1).reshape(rows, columns)


def pack_codes(xp: Arrays, codes: Array, bits: int) -> Array:
    """The inverse of `unpack_codes`; K is a multiple of 8."""
    rows = codes.shape[0]
    if bits == 8:
        return codes
    if bits in (2, 4):
        per_byte = codes.reshape(rows, -1, 8 // bits)
        packed = per_byte[:, :, 0]
        for n in range(1, 8 // bits):
            packed = packed | per_byte[:, :, n] << (n * bits)
        return packed
    data, packed = codes.reshape(rows, -1, 8), list[Array]()
    for byte in range(bits):
        value = None
        for n in range(8):
            at = n * bits - 8 * byte  # where code n begins in this byte
            if -bits < at < 8:
                shifted = data[:, :, n] << at if at >= 0 else data[:, :, n] >> -at
                value = shifted if value is None else value | shifted
        packed.append(value)
    return xp.stack(packed, -1).reshape(rows, -1)
