"""Quantized matrices on a device. They are unpacked slice by slice when they are used: the definition of every form."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from llmrs.quant.arrays import FLOAT8
from llmrs.quant.form import Form, unpack
from llmrs.quant.tensor import AnyTensor, QuantTensor, Tensor

VIEWS = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32, "i8": torch.int8, "u8": torch.uint8}
SLICE_WEIGHTS = {"cpu": 2**20, "cuda": 2**23}  # unpacked at once: in the L3 cache; 32 MiB and few launches


class TorchArrays:
    """`llmrs.quant.arrays.Arrays` of Torch."""

    def float32(self, x: torch.Tensor, dtype: str) -> torch.Tensor:
        if dtype == "e4m3":
            return x.view(torch.float8_e4m3fn).float()
        if dtype in FLOAT8:
            return self.take(FLOAT8[dtype], x)
        return x.view(VIEWS[dtype]).float()

    def view(self, x: torch.Tensor, dtype: str) -> torch.Tensor:
        return x.contiguous().view(VIEWS[dtype])

    def stack(self, arrays: Sequence[torch.Tensor], axis: int) -> torch.Tensor:
        return torch.stack(tuple(arrays), axis)

    def concatenate(self, arrays: Sequence[torch.Tensor], axis: int) -> torch.Tensor:
        return torch.cat(tuple(arrays), axis)

    def take(self, table: np.ndarray, codes: torch.Tensor) -> torch.Tensor:
        return _on_device(table.tobytes(), codes.device)[codes.int()]


TORCH = TorchArrays()


@cache
def _on_device(table: bytes, device: torch.device) -> torch.Tensor:
    return torch.tensor(np.frombuffer(table, np.float32), device=device)


@dataclass(frozen=True)
class PackedRows:
    """Rows of a matrix in one form: planes (N, ...) of quant/form.py."""

    form: Form
    columns: int
    planes: dict[str, torch.Tensor]

    def __len__(self) -> int:
        return len(self.planes["codes"])

    def __getitem__(self, index: slice | torch.Tensor) -> "PackedRows":
        return PackedRows(self.form, self.columns, {name: plane[index] for name, plane in self.planes.items()})

    def unpack(self, dtype: torch.dtype) -> torch.Tensor:
        """(N, K) of this dtype, rounded once."""
        out = torch.empty(len(self), self.columns, dtype=dtype, device=self.planes["codes"].device)
        rows = max(SLICE_WEIGHTS[out.device.type] // self.columns, 1)
        for begin in range(0, len(self), rows):
            part = self[begin : begin + rows]
            out[begin : begin + rows] = unpack(TORCH, self.form, part.planes, self.columns)
        return out

    def gather(self, index: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Rows by their numbers, int64 (T,): (T, K)."""
        return self[index].unpack(dtype)

    def linear(self, x: torch.Tensor) -> torch.Tensor:
        """x w^T: (M, K) -> (M, N), unpacked slice by slice."""
        step = max(SLICE_WEIGHTS[x.device.type] // x.shape[1], 1)
        parts = (self[n : n + step] for n in range(0, len(self), step))
        outs = [torch.nn.functional.linear(x, part.unpack(x.dtype)) for part in parts]
        return outs[0] if len(outs) == 1 else torch.cat(outs, -1)


@dataclass(frozen=True)
class QuantMatrix:
    """A matrix (N, K): segments of rows, quantized or dense, in the order of the rows."""

    segments: tuple[PackedRows | torch.Tensor, ...]
    dtype: torch.dtype  # of activations

    @property
    def shape(self) -> tuple[int, int]:
        first = self.segments[0]
        return sum(map(len, self.segments)), first.columns if isinstance(first, PackedRows) else first.shape[1]

    @property
    def nbytes(self) -> int:
        parts = [s.planes.values() if isinstance(s, PackedRows) else (s,) for s in self.segments]
        return sum(t.nbytes for part in parts for t in part)

    def linear(self, x: torch.Tensor) -> torch.Tensor:
        """x w^T: (M, K) -> (M, N)."""
        outs = [s.linear(x) if isinstance(s, PackedRows) else torch.nn.functional.linear(x, s) for s in self.segments]
        return outs[0] if len(outs) == 1 else torch.cat(outs, -1)

    def gather(self, index: torch.Tensor) -> torch.Tensor:
        """Rows by their numbers, int (T,): (T, K). A table is one segment."""
        (table,) = self.segments
        return table.gather(index.long(), self.dtype) if isinstance(table, PackedRows) else table[index.long()]

    def dense(self) -> torch.Tensor:
        return torch.cat([_dense(s, self.dtype) for s in self.segments])

    def split(self, rows: int) -> list["QuantMatrix"]:
        """Matrices of `rows` rows each; segments hold whole ones."""
        parts = [s[n : n + rows] for s in self.segments for n in range(0, len(s), rows)]
        return [QuantMatrix((part,), self.dtype) for part in parts]


Matrix = torch.Tensor | QuantMatrix
Pack = Callable[[PackedRows, torch.dtype], PackedRows | torch.Tensor]


def _dense(rows: PackedRows | torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return rows.unpack(dtype) if isinstance(rows, PackedRows) else rows


def packed_rows(tensor: QuantTensor, device: torch.device) -> PackedRows:
    """A copy on the device, in the tensor's form."""
    planes = tensor.planes(TORCH, lambda array: from_numpy(array).to(device))
    # flat in between: torch takes any stride of a dimension of size 1 for contiguous
    planes = {name: plane.contiguous().flatten().view(plane.shape) for name, plane in planes.items()}
    for name, plane in planes.items():
        if plane.dtype == torch.uint16:  # NumPy's bf16; a GPU gathers no rows of uint16
            planes[name] = plane.view(torch.bfloat16)
    return PackedRows(tensor.form, tensor.shape[1], planes)


def quant_matrix(
    tensors: Sequence[AnyTensor], device: torch.device, dtype: torch.dtype, pack: Pack | None = None
) -> QuantMatrix:
    """Neighbours of one form become one segment, which `pack` may change."""
    segments: list[PackedRows | torch.Tensor] = []
    for tensor in tensors:
        segment = packed_rows(tensor, device) if isinstance(tensor, QuantTensor) else to_dense(tensor, device, dtype)
        if segments and (joined := _joined(segments[-1], segment)) is not None:
            segments[-1] = joined
        else:
            segments.append(segment)
    if pack:
        segments = [pack(s, dtype) if isinstance(s, PackedRows) else s for s in segments]
    return QuantMatrix(tuple(segments), dtype)


def _joined(a: PackedRows | torch.Tensor, b: PackedRows | torch.Tensor) -> PackedRows | torch.Tensor | None:
    if (
        isinstance(a, PackedRows)
        and isinstance(b, PackedRows)
        and (a.form, a.planes.keys()) == (b.form, b.planes.keys())
    ):
        return PackedRows(a.form, a.columns, {name: torch.cat([a.planes[name], b.planes[name]]) for name in a.planes})
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return torch.cat([a, b])
    return None


def to_dense(tensor: AnyTensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """A tensor in this dtype on the device; on the CPU the file's own memory, where the dtype is the file's."""
    if isinstance(tensor, QuantTensor):
        out = torch.empty(tensor.shape, dtype=dtype, device=device)
        rows = max(SLICE_WEIGHTS[device.type] // tensor.shape[1], 1)
        for begin in range(0, tensor.shape[0], rows):
            out[begin : begin + rows] = packed_rows(tensor.rows(slice(begin, begin + rows)), device).unpack(dtype)
        return out
    return torch_view(tensor).to(device, dtype)


def torch_view(tensor: Tensor) -> torch.Tensor:
    """The file's own memory as a torch tensor."""
    data = from_numpy(tensor.data)
    return data.view(torch.bfloat16) if tensor.format == "bf16" else data


def from_numpy(array: np.ndarray) -> torch.Tensor:
    """Without a copy, unless the array is not contiguous or read-only (torch would warn)."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())
