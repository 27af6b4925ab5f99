"""Quantized matrices in MLX: by mx.quantized_matmul where it is exact and takes the form's planes as they are, else
by Metal kernels (metal_rows.py), or unpacked slice by slice when they are used, the definition of every form."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from llmrs.quant.arrays import FLOAT8
from llmrs.quant.form import Form, unpack
from llmrs.quant.tensor import AnyTensor, QuantTensor, Tensor

DTYPES = {"f16": mx.float16, "bf16": mx.bfloat16, "f32": mx.float32, "i8": mx.int8, "u8": mx.uint8}
SLICE_WEIGHTS = 2**24  # unpacked at once: 64 MiB
GATHERED_WEIGHTS = 2**24  # of experts, unpacked at once
AFFINE_BITS, AFFINE_GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)
# Forms of mx.quantized_matmul's other modes: (code, scale, group) -> mode and bits
MODES = {
    ("e2m1", "e8m0", 32): ("mxfp4", 4), ("e2m1", "e4m3", 16): ("nvfp4", 4), ("e4m3", "e8m0", 32): ("mxfp8", 8),
}  # fmt: skip


class MlxArrays:
    """`llmrs.quant.arrays.Arrays` of MLX."""

    def float32(self, x: mx.array, dtype: str) -> mx.array:
        if dtype in FLOAT8:
            return self.take(FLOAT8[dtype], x)
        return x.view(DTYPES[dtype]).astype(mx.float32)

    def view(self, x: mx.array, dtype: str) -> mx.array:
        return mx.contiguous(x).view(DTYPES[dtype])

    def stack(self, arrays: Sequence[mx.array], axis: int) -> mx.array:
        return mx.stack(list(arrays), axis)

    def concatenate(self, arrays: Sequence[mx.array], axis: int) -> mx.array:
        return mx.concatenate(list(arrays), axis)

    def take(self, table: np.ndarray, codes: mx.array) -> mx.array:
        return mx.array(table)[codes]


MLX = MlxArrays()


@dataclass(frozen=True)
class PackedRows:
    """Rows of a matrix in one form: planes (N, ...) of quant/form.py."""

    form: Form
    columns: int
    planes: dict[str, mx.array]

    def __len__(self) -> int:
        return self.planes["codes"].shape[0]

    def unpack(self, dtype: mx.Dtype) -> mx.array:
        """(N, K) of this dtype, rounded once."""
        return self.gather(slice(None), dtype)

    def gather(self, index: slice | mx.array, dtype: mx.Dtype) -> mx.array:
        """Rows by their numbers, (T, K) of this dtype, rounded once."""
        planes = {name: plane[index] for name, plane in self.planes.items()}
        return unpack(MLX, self.form, planes, self.columns).astype(dtype)

    def linear(self, x: mx.array) -> mx.array:
        """x w^T: (..., K) -> (..., N), unpacked slice by slice."""
        step = max(SLICE_WEIGHTS // self.columns, 1)
        outs = [x @ self.gather(slice(n, n + step), x.dtype).T for n in range(0, len(self), step)]
        return outs[0] if len(outs) == 1 else mx.concatenate(outs, -1)

    def gather_matmul(self, x: mx.array, count: int, experts: mx.array) -> mx.array:
        """x (T, k or 1, 1, K), experts (T, k): x w[expert]^T (T, k, 1, N / count), for experts stacked along the
        rows."""
        return gather_matmul(x, lambda index: self.gather(index, x.dtype), (len(self) // count, self.columns), experts)

    def native(self, dtype: mx.Dtype) -> "NativeMode | None":
        """The mode of mx.quantized_matmul that computes this form; None where it has none, or would convert the scales
        to another type than x's in each call."""
        form, planes = self.form, self.planes
        words = mx.contiguous(planes["codes"])
        if form.kind == "affine":
            same = dtype in (mx.float32, DTYPES.get(form.scale))
            fits = "biases" in planes and form.bits in AFFINE_BITS and form.group in AFFINE_GROUPS
            if not (same and fits):
                return None
            return NativeMode(
                (words.view(mx.uint32), planes["scales"], planes["biases"]), "affine", form.bits, form.group
            )
        mode, bits = MODES.get((form.code, form.scale, form.group), ("", 0))
        if not mode or planes.keys() != {"codes", "scales"}:
            return None
        return NativeMode((words.view(mx.uint32), planes["scales"], None), mode, bits, form.group)


@dataclass(frozen=True)
class NativeMode:
    """The arguments of mx.quantized_matmul: weight, scales, biases; mode, bits, group size."""

    arrays: tuple[mx.array, mx.array, mx.array | None]
    mode: str
    bits: int
    group: int

    def matmul(self, x: mx.array) -> mx.array:
        return mx.quantized_matmul(
            x, *self.arrays, transpose=True, group_size=self.group, bits=self.bits, mode=self.mode
        )

    def gather_matmul(self, x: mx.array, count: int, experts: mx.array) -> mx.array:
        """x (..., 1, K), experts (...): x w[expert]^T, for `count` experts stacked along the rows."""
        words, scales = (mx.unflatten(a, 0, (count, -1)) for a in self.arrays[:2])
        biases = None if self.arrays[2] is None else mx.unflatten(self.arrays[2], 0, (count, -1))
        return mx.gather_qmm(
            x, words, scales, biases, rhs_indices=experts, transpose=True, group_size=self.group, bits=self.bits,
            mode=self.mode,
        )  # fmt: skip


class QuantMatrix:
    """A matrix (N, K): segments of rows, quantized or dense, in the order of the rows."""

    def __init__(self, segments: Sequence[PackedRows | mx.array], dtype: mx.Dtype) -> None:
        """`dtype`: of activations."""
        self.segments, self.dtype = segments, dtype
        self.native = [s.native(dtype) if isinstance(s, PackedRows) else None for s in segments]

    @property
    def shape(self) -> tuple[int, int]:
        first = self.segments[0]
        return sum(map(len, self.segments)), first.columns if isinstance(first, PackedRows) else first.shape[1]

    def arrays(self) -> list[mx.array]:
        parts = [list(s.planes.values()) if isinstance(s, PackedRows) else [s] for s in self.segments]
        return [a for part in parts for a in part]

    def linear(self, x: mx.array) -> mx.array:
        """x w^T: (..., K) -> (..., N)."""
        outs = [_product(x, s, n) for s, n in zip(self.segments, self.native, strict=True)]
        return outs[0] if len(outs) == 1 else mx.concatenate(outs, -1)

    def gather(self, index: mx.array) -> mx.array:
        """Rows by their numbers, int (T,): (T, K)."""
        whole = self._whole()
        return whole.gather(index, self.dtype) if isinstance(whole, PackedRows) else whole[index]

    def gather_matmul(self, x: mx.array, count: int, experts: mx.array) -> mx.array:
        """x (T, k or 1, 1, K), experts (T, k): x w[expert]^T (T, k, 1, N / count), for experts stacked along the
        rows."""
        if len(self.native) == 1 and self.native[0]:
            return self.native[0].gather_matmul(x, count, experts)
        stack = self._whole()
        if isinstance(stack, PackedRows):
            return stack.gather_matmul(x, count, experts)
        return gather_matmul(x, stack.__getitem__, (self.shape[0] // count, self.shape[1]), experts)

    def _whole(self) -> PackedRows | mx.array:
        """The only segment; several are unpacked."""
        if len(self.segments) > 1:
            self.segments, self.native = [mx.concatenate([_dense(s, self.dtype) for s in self.segments])], [None]
        return self.segments[0]


Matrix = mx.array | QuantMatrix
Pack = Callable[[PackedRows, mx.Dtype], PackedRows]


def _product(x: mx.array, rows: PackedRows | mx.array, native: NativeMode | None) -> mx.array:
    if native:
        return native.matmul(x)
    return rows.linear(x) if isinstance(rows, PackedRows) else x @ rows.T


def gather_matmul(
    x: mx.array, gather: Callable[[mx.array], mx.array], expert: tuple[int, int], experts: mx.array
) -> mx.array:
    """`PackedRows.gather_matmul` with the rows that `gather` gives by their numbers; `expert`: its shape."""
    rows, columns = expert
    step = max(GATHERED_WEIGHTS // (rows * columns * experts.shape[1]), 1)  # tokens
    numbers, outs = mx.arange(rows), []
    for begin in range(0, experts.shape[0], step):
        chosen = experts[begin : begin + step]
        index = mx.flatten(chosen[:, :, None] * rows + numbers)
        w = gather(index).reshape(*chosen.shape, rows, columns)
        outs.append(x[begin : begin + step] @ mx.swapaxes(w, -1, -2))
    return mx.concatenate(outs) if len(outs) > 1 else outs[0]


def _dense(rows: PackedRows | mx.array, dtype: mx.Dtype) -> mx.array:
    return rows.unpack(dtype) if isinstance(rows, PackedRows) else rows


def quant_matrix(tensors: Sequence[AnyTensor], dtype: mx.Dtype, pack: Pack | None = None) -> QuantMatrix:
    """Copies on the device; neighbours of one form become one segment, which `pack` may lay out anew."""
    groups: list[list[PackedRows | mx.array]] = []
    for tensor in tensors:
        segment = packed_rows(tensor) if isinstance(tensor, QuantTensor) else as_array(tensor).astype(dtype)
        if groups and _alike(groups[-1][0], segment):
            groups[-1].append(segment)
        else:
            groups.append([segment])
    segments = [_joined(group) for group in groups]
    if pack:
        segments = [pack(s, dtype) if isinstance(s, PackedRows) else s for s in segments]
    return QuantMatrix(segments, dtype)


def _alike(a: PackedRows | mx.array, b: PackedRows | mx.array) -> bool:
    if isinstance(a, PackedRows) and isinstance(b, PackedRows):
        return a.form == b.form and a.planes.keys() == b.planes.keys()
    return type(a) is type(b)


def _joined(group: Sequence[PackedRows | mx.array]) -> PackedRows | mx.array:
    first, packed = group[0], [p for p in group if isinstance(p, PackedRows)]
    if len(group) == 1:
        return first
    if not isinstance(first, PackedRows):
        return mx.concatenate([p for p in group if not isinstance(p, PackedRows)])
    planes = {name: mx.concatenate([p.planes[name] for p in packed]) for name in first.planes}
    mx.eval(planes)
    return PackedRows(first.form, first.columns, planes)


def packed_rows(tensor: QuantTensor) -> PackedRows:
    """A copy on the device, in the tensor's form."""
    planes = tensor.planes(MLX, lambda array: mx.array(np.ascontiguousarray(array)))
    planes = {name: mx.contiguous(plane) for name, plane in planes.items()}
    if (dtype := DTYPES.get(tensor.form.scale)) is not None:
        typed = [name for name in ("scales", "biases") if name in planes]
        planes.update((name, planes[name].view(dtype)) for name in typed)
    mx.eval(planes)  # frees the copy of the file's bytes
    return PackedRows(tensor.form, tensor.shape[1], planes)


def as_array(tensor: Tensor) -> mx.array:
    """A copy of the file's bytes, in the file's type."""
    array = mx.array(np.ascontiguousarray(tensor.data))
    return array.view(mx.bfloat16) if tensor.format == "bf16" else array
