"""Rows of quantized weights for the Metal kernels, in planes of their own: those of quant_rows.metal.

The bytes are those of quant/form.py. Codes of 3, 5 and 6 bits are split into their low 2 or 4 bits and the 1 or 2
above; scales and their mins or biases, super-scales and super-mins become pairs, which are loaded at once.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from llmrs.backends.mlx.kernels import quant
from llmrs.backends.mlx.kernels.launch import Kernels, Template
from llmrs.backends.mlx.quant_matrix import DTYPES, MLX, SLICE_WEIGHTS, Pack, PackedRows
from llmrs.quant.form import TABLES, Form, pack_codes, unpack_codes

SPLIT = {2: (2, 0), 3: (2, 1), 4: (4, 0), 5: (4, 1), 6: (4, 2), 8: (8, 0)}  # bits of a code -> LOW and HIGH
SCALES = {"u4": 1, "e8m0": 2, "half_e8m0": 3, "e4m3": 4}  # SCALE; others are numbers
# GGUF's MXFP4 has codes of twice the value and scales of half: MLX's mxfp4
SAME = {Form("fp4", "double_e2m1", 32, "half_e8m0"): Form("fp4", "e2m1", 32, "e8m0")}
MAX_GEMM_M = 256  # rows of x up to which quant_gemm runs; above, slices are unpacked for MLX's GEMM


def packer(kernels: Kernels) -> Pack:
    """Lays out rows for the kernels where MLX has none that reads the planes as they are and ours support the shape."""

    def pack(rows: PackedRows, dtype: mx.Dtype) -> PackedRows:
        rows = replace(rows, form=SAME.get(rows.form, rows.form))
        converts = rows.form.kind == "affine" and DTYPES.get(rows.form.scale) != dtype  # the scales, in each call
        native = rows.native(dtype) is not None and not converts
        return rows if native or not supports(rows) else metal_rows(rows, kernels)

    return pack


def supports(rows: PackedRows) -> bool:
    group = rows.form.group
    fits = rows.columns % 32 == 0 and (group == 16 or group % 32 == 0)
    return fits and all(p.size >= quant.MIN_SIZE for p in rows.planes.values())


@dataclass(frozen=True)
class MetalRows(PackedRows):
    """`PackedRows` in the planes of the kernels."""

    kernels: Kernels
    weight: quant.Weight

    def native(self, dtype: mx.Dtype) -> None:
        return None

    def gather(self, index: slice | mx.array, dtype: mx.Dtype) -> mx.array:
        numbers = mx.arange(*index.indices(len(self))) if isinstance(index, slice) else index
        return quant.embed(self.kernels, numbers, self.weight, dtype)

    def linear(self, x: mx.array) -> mx.array:
        rows = x if x.ndim == 2 else mx.flatten(x, 0, -2)
        if len(rows) > MAX_GEMM_M:
            return super().linear(x)
        multiply = quant.gemv if len(rows) <= quant.MAX_GEMV_M else quant.gemm
        y = multiply(self.kernels, rows, self.weight)
        return y if x.ndim == 2 else y.reshape(*x.shape[:-1], -1)

    def gather_matmul(self, x: mx.array, count: int, experts: mx.array) -> mx.array:
        multiply = quant.gather_gemv if experts.size <= quant.MAX_GEMV_M * count else quant.gather_gemm
        return mx.expand_dims(multiply(self.kernels, x[:, :, 0], self.weight, count, experts), 2)


def metal_rows(rows: PackedRows, kernels: Kernels) -> MetalRows:
    """`supports` must hold."""
    form, old = rows.form, rows.planes
    planes = {**_split_codes(rows), "scales": _paired(old, "scales", "biases", "mins")}
    if "super_scales" in old:
        planes["supers"] = _paired(old, "super_scales", "super_mins")
    planes.update((name, old[name]) for name in ("zeros", "row_scales") if name in old)
    if form.code in TABLES:
        planes["table"] = mx.array(TABLES[form.code])
    mx.eval(planes)
    weight = quant.Weight(planes, _template(form, planes, rows.columns), rows.columns)
    return MetalRows(form, rows.columns, planes, kernels, weight)


def _template(form: Form, planes: Mapping[str, mx.array], columns: int) -> Template:
    low, high = SPLIT[form.bits]
    return {
        "LOW": low, "HIGH": high, "CODE": 1 if form.code in TABLES else 2 if form.code == "e4m3" else 0,
        "GROUP": form.group if form.group < columns else 0, "SCALE": SCALES.get(form.scale, 0),
        "PAIRS": planes["scales"].ndim == 3, "SUPERS": planes["supers"].ndim - 1 if "supers" in planes else 0,
        "ZERO": form.zero, "ZEROS": "zeros" in planes, "ROW_SCALES": "row_scales" in planes,
    }  # fmt: skip


def _paired(planes: Mapping[str, mx.array], name: str, *partners: str) -> mx.array:
    """The plane, (N, n), or with one of its partners (N, n, 2)."""
    both = [planes[name], *(planes[p] for p in partners if p in planes)]
    return mx.stack(both, -1) if len(both) == 2 else both[0]


def _split_codes(rows: PackedRows) -> dict[str, mx.array]:
    low, high = SPLIT[rows.form.bits]
    codes, parts = rows.planes["codes"], list[dict[str, mx.array]]()
    if not high:
        return {"codes": _words(codes)}
    step = max(SLICE_WEIGHTS // rows.columns, 1)
    for n in range(0, len(rows), step):
        part = unpack_codes(MLX, codes[n : n + step], low + high, rows.columns)
        planes = {"codes": _words(pack_codes(MLX, part & ((1 << low) - 1), low)), "high": _high(part >> low, low, high)}
        mx.eval(planes)
        parts.append(planes)
    return {name: mx.concatenate([part[name] for part in parts]) for name in ("codes", "high")}


def _words(codes: mx.array) -> mx.array:
    """Bytes (N, n) -> little-endian words (N, n / 4)."""
    return mx.contiguous(codes).view(mx.uint32)


def _high(codes: mx.array, low: int, high: int) -> mx.array:
    """The plane `high`, words (N, K * high / 32), of the bits above the low ones, (N, K).

    `decode` reads the low bits of two codes that lie 16 bits apart, from a word or the word shifted by 8. It finds the
    high bits of those it reads at once at distances of `low` bits, so that one shift puts them above the low ones.
    """
    unit = 32 // high  # codes per word
    piece, i = np.divmod(np.arange(unit), 16)  # decoded at once
    word, i = np.divmod(i, 32 // low)
    half, i = np.divmod(i, 16 // low)
    shift, i = np.divmod(i, 8 // low)
    turn, part = np.divmod(2 * word + shift, low // high)
    at = 16 * half + 8 * (piece + turn) + high * part + low * i
    return mx.sum(codes.reshape(len(codes), -1, unit).astype(mx.uint32) << mx.array(at.astype(np.uint32)), -1)
