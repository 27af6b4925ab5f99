"""The tensor types of GGUF files: sizes, layouts, and how each maps onto a form.

Blocks lie along the columns. Source of the layouts: ggml/src/ggml-common.h of llama.cpp; each is tested bit for bit
against the `gguf` package. "Halves" of n bytes: the low nibbles are elements 0 .. n-1, the high ones n .. 2n-1.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from llmrs.core.errors import ModelError
from llmrs.quant.arrays import NUMPY, Array, Arrays
from llmrs.quant.form import Form, pack_codes
from llmrs.quant.tensor import AnyTensor, Format, QuantTensor, Stored, Tensor

MIB = 2**20


@dataclass(frozen=True)
class GgmlType:
    """A tensor type: `block` weights take `block_bytes`."""

    number: int  # in the file
    name: str
    block: int
    block_bytes: int
    format: Format | None = None  # None: dense, or expanded at load

    @property
    def is_dense(self) -> bool:
        return self.block == 1

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor; the last dimension is a multiple of `block`."""
        return math.prod(shape) // self.block * self.block_bytes


Blocks = Array  # uint8 (N, blocks of a row, block bytes)
Fields = Callable[[Arrays, Blocks], dict[str, Array]]


def _flat(x: Array) -> Array:
    """(N, blocks, n) -> (N, blocks * n)."""
    return x.reshape(x.shape[0], -1)


def _f16(xp: Arrays, b: Blocks, at: int) -> Array:
    return _flat(xp.view(b[:, :, at : at + 2], "f16"))


def _halves(xp: Arrays, x: Array) -> Array:
    """Nibbles of (..., n) bytes -> codes (..., 2n)."""
    return xp.concatenate([x & 15, x >> 4], -1)


def _bits(xp: Arrays, x: Array) -> Array:
    """Bits of (..., n) bytes, lowest first, as (..., 8n)."""
    return xp.stack([x >> n & 1 for n in range(8)], -1).reshape(*x.shape[:-1], -1)


def _codes(xp: Arrays, codes: Array, bits: int) -> Array:
    return pack_codes(xp, _flat(codes), bits)


def _four_bits(at: int, **halves: int) -> Fields:
    """Q4_0, Q4_1, IQ4_NL: f16 fields at their offsets, then 16 bytes of halves at `at`."""

    def fields(xp: Arrays, b: Blocks) -> dict[str, Array]:
        planes = {name: _f16(xp, b, offset) for name, offset in halves.items()}
        return {"codes": _codes(xp, _halves(xp, b[:, :, at:]), 4), **planes}

    return fields


def _five_bits(at: int, **halves: int) -> Fields:
    """Q5_0, Q5_1: the fifth bits as a u32 at `at`, then 16 bytes of halves."""

    def fields(xp: Arrays, b: Blocks) -> dict[str, Array]:
        high = _bits(xp, b[:, :, at : at + 4])
        codes = _halves(xp, b[:, :, at + 4 :]) | high << 4
        return {"codes": _codes(xp, codes, 5), **{name: _f16(xp, b, offset) for name, offset in halves.items()}}

    return fields


def _q8_0(xp: Arrays, b: Blocks) -> dict[str, Array]:
    return {"codes": _flat(b[:, :, 2:]) ^ 128, "scales": _f16(xp, b, 0)}


def _mxfp4(xp: Arrays, b: Blocks) -> dict[str, Array]:
    return {"codes": _codes(xp, _halves(xp, b[:, :, 1:]), 4), "scales": _flat(b[:, :, :1])}


def _two_bits(xp: Arrays, x: Array) -> Array:
    """Q2_K, Q3_K, the high bits of Q6_K: element 32 j + l of a half in bits 2 j of byte l. (N, B, n) -> (N, B, 4n)."""
    parts = x.reshape(*x.shape[:2], -1, 32)
    codes = xp.stack([parts >> s & 3 for s in (0, 2, 4, 6)], 3)  # (N, B, halves, 4, 32)
    return codes.reshape(*x.shape[:2], -1)


def _q2_k(xp: Arrays, b: Blocks) -> dict[str, Array]:
    codes = _two_bits(xp, b[:, :, 16:80])
    scales = {"scales": _flat(b[:, :, :16]), "super_scales": _f16(xp, b, 80), "super_mins": _f16(xp, b, 82)}
    return {"codes": _codes(xp, codes, 2), **scales}


def _q3_k(xp: Arrays, b: Blocks) -> dict[str, Array]:
    high = xp.stack([b[:, :, :32] >> n & 1 for n in range(8)], 2).reshape(*b.shape[:2], 256)
    codes = _two_bits(xp, b[:, :, 32:96]) | high << 2
    s, top = b[:, :, 96:104], b[:, :, 104:108]
    scales = _halves(xp, s) | xp.concatenate([top >> n & 3 for n in (0, 2, 4, 6)], -1) << 4  # six bits
    scales = xp.view(_flat(scales) - 32, "i8")  # wraps around
    return {"codes": _codes(xp, codes, 3), "scales": scales, "super_scales": _f16(xp, b, 108)}


def _six_bit_scales(xp: Arrays, s: Array) -> dict[str, Array]:
    """The eight scales and mins of Q4_K and Q5_K, from 12 bytes."""
    a, b, c = s[:, :, 0:4], s[:, :, 4:8], s[:, :, 8:12]
    scales = xp.concatenate([a & 63, c & 15 | (a >> 6) << 4], -1)
    mins = xp.concatenate([b & 63, c >> 4 | (b >> 6) << 4], -1)
    return {"scales": _flat(scales), "mins": _flat(mins)}


def _paired(xp: Arrays, q: Array) -> Array:
    """Q4_K, Q5_K: of every 32 bytes, the low nibbles are a group and the high ones the next."""
    return _halves(xp, q.reshape(*q.shape[:2], -1, 32)).reshape(*q.shape[:2], -1)


def _q4_k(xp: Arrays, b: Blocks) -> dict[str, Array]:
    supers = {"super_scales": _f16(xp, b, 0), "super_mins": _f16(xp, b, 2)}
    codes = _codes(xp, _paired(xp, b[:, :, 16:]), 4)
    return {"codes": codes, **_six_bit_scales(xp, b[:, :, 4:16]), **supers}


def _q5_k(xp: Arrays, b: Blocks) -> dict[str, Array]:
    supers = {"super_scales": _f16(xp, b, 0), "super_mins": _f16(xp, b, 2)}
    h = b[:, :, 16:48]
    high = xp.stack([h >> n & 1 for n in range(8)], 2).reshape(*b.shape[:2], 256)  # bit g of byte l: element 32 g + l
    codes = _paired(xp, b[:, :, 48:]) | high << 4
    return {"codes": _codes(xp, codes, 5), **_six_bit_scales(xp, b[:, :, 4:16]), **supers}


def _q6_k(xp: Arrays, b: Blocks) -> dict[str, Array]:
    low = b[:, :, :128].reshape(*b.shape[:2], 2, 64)
    codes = _halves(xp, low).reshape(*b.shape[:2], 256) | _two_bits(xp, b[:, :, 128:192]) << 4
    scales = xp.view(_flat(b[:, :, 192:208]), "i8")
    return {"codes": _codes(xp, codes, 6), "scales": scales, "super_scales": _f16(xp, b, 208)}


def _iq4_xs(xp: Arrays, b: Blocks) -> dict[str, Array]:
    top, low = b[:, :, 2:4], b[:, :, 4:8]
    high = xp.stack([top >> n & 3 for n in (0, 2, 4, 6)], -1).reshape(*b.shape[:2], 8)
    scales = xp.stack([low & 15, low >> 4], -1).reshape(*b.shape[:2], 8) | high << 4
    q = b[:, :, 8:].reshape(*b.shape[:2], 8, 16)
    codes = _halves(xp, q).reshape(*b.shape[:2], 256)
    scales = xp.view(_flat(scales) - 32, "i8")  # wraps around
    return {"codes": _codes(xp, codes, 4), "scales": scales, "super_scales": _f16(xp, b, 0)}


def _type(number: int, name: str, block: int, block_bytes: int, form: Form, fields: Fields) -> GgmlType:
    def convert(xp: Arrays, arrays: Mapping[str, Array]) -> dict[str, Array]:
        blocks = arrays["blocks"]
        return fields(xp, blocks.reshape(blocks.shape[0], -1, block_bytes))

    return GgmlType(number, name, block, block_bytes, Format(name, form, convert))


_NATIVE = (
    _type(2, "q4_0", 32, 18, Form("affine", "u4", 32, "f16", 8), _four_bits(2, scales=0)),
    _type(3, "q4_1", 32, 20, Form("affine", "u4", 32, "f16"), _four_bits(4, scales=0, biases=2)),
    _type(6, "q5_0", 32, 22, Form("affine", "u5", 32, "f16", 16), _five_bits(2, scales=0)),
    _type(7, "q5_1", 32, 24, Form("affine", "u5", 32, "f16"), _five_bits(4, scales=0, biases=2)),
    _type(8, "q8_0", 32, 34, Form("affine", "u8", 32, "f16", 128), _q8_0),
    _type(10, "q2_k", 256, 84, Form("k_quant", "u2", 16, "u4"), _q2_k),
    _type(11, "q3_k", 256, 110, Form("k_quant", "u3", 16, "i8", 4), _q3_k),
    _type(12, "q4_k", 256, 144, Form("k_quant", "u4", 32, "u8"), _q4_k),
    _type(13, "q5_k", 256, 176, Form("k_quant", "u5", 32, "u8"), _q5_k),
    _type(14, "q6_k", 256, 210, Form("k_quant", "u6", 16, "i8", 32), _q6_k),
    _type(20, "iq4_nl", 32, 18, Form("fp4", "iq4", 32, "f16"), _four_bits(2, scales=0)),
    _type(23, "iq4_xs", 256, 136, Form("fp4", "iq4", 32, "i8"), _iq4_xs),
    _type(39, "mxfp4", 32, 17, Form("fp4", "double_e2m1", 32, "half_e8m0"), _mxfp4),
)
_DENSE = (GgmlType(0, "f32", 1, 4), GgmlType(1, "f16", 1, 2), GgmlType(30, "bf16", 1, 2))
_EXPANDED = (  # to float32 at load
    GgmlType(16, "iq2_xxs", 256, 66), GgmlType(17, "iq2_xs", 256, 74), GgmlType(18, "iq3_xxs", 256, 98),
    GgmlType(19, "iq1_s", 256, 50), GgmlType(21, "iq3_s", 256, 110), GgmlType(22, "iq2_s", 256, 82),
    GgmlType(29, "iq1_m", 256, 56), GgmlType(34, "tq1_0", 256, 54), GgmlType(35, "tq2_0", 256, 66),
    GgmlType(40, "nvfp4", 64, 36),
)  # fmt: skip
GGML_TYPES: dict[int, GgmlType] = {t.number: t for t in (*_DENSE, *_NATIVE, *_EXPANDED)}
TYPES: dict[str, GgmlType] = {t.name: t for t in GGML_TYPES.values()}


def tensor(kind: GgmlType, shape: tuple[int, ...], data: np.ndarray) -> AnyTensor:
    """A tensor of a file. `shape`: (..., K), its rows are joined to (N, K) unless dense; `data`: its bytes, uint8.

    Codebook types are expanded to float32. Raises ModelError for a shape that no blocks of this type fill.
    """
    if shape[-1] % kind.block or data.nbytes != kind.nbytes(shape):
        problem = f"{data.nbytes} bytes of type {kind.name} are not a tensor of the shape {shape}"
        raise ModelError(problem, f"blocks of {kind.block} weights take {kind.block_bytes} bytes")
    if kind.is_dense:
        dtype: np.dtype[Any] = np.dtype({"f32": "<f4", "f16": "<f2", "bf16": "<u2"}[kind.name])
        return Tensor(kind.name, shape, data.view(dtype).reshape(shape))
    rows = math.prod(shape[:-1])
    if kind.format is None:
        return Tensor("f32", shape, expand(kind, data.reshape(rows, -1)).reshape(shape))
    return QuantTensor(kind.format, (rows, shape[-1]), {"blocks": data.reshape(rows, -1)})


def stored(kind: GgmlType, shape: tuple[int, ...]) -> Stored:
    """What `tensor` gives for such a tensor."""
    if kind.format is None:
        size = kind.block_bytes if kind.is_dense else 4
        return Stored(kind.name, shape, math.prod(shape) * size, expanded=not kind.is_dense)
    return Stored(kind.name, shape, math.prod(shape) // kind.block * _plane_bytes(kind.format, kind.block_bytes))


@cache
def _plane_bytes(kind: Format, block_bytes: int) -> int:
    """Of a block in the planes of its form."""
    planes = kind.convert(NUMPY, {"blocks": np.zeros((1, block_bytes), np.uint8)})
    return sum(p.nbytes for p in planes.values())


def expand(kind: GgmlType, blocks: np.ndarray) -> np.ndarray:
    """float32 (N, K) of blocks (N, row bytes), by the `gguf` package."""
    from gguf import GGMLQuantizationType, quants

    with np.errstate(all="ignore"):
        return np.concatenate(
            [quants.dequantize(part, GGMLQuantizationType(kind.number)) for part in _parts(blocks)]
        ).astype(np.float32, copy=False)


def _parts(blocks: np.ndarray) -> list[np.ndarray]:
    rows = max(MIB // max(blocks.shape[1], 1), 1)
    return [blocks[n : n + rows] for n in range(0, max(len(blocks), 1), rows)]
