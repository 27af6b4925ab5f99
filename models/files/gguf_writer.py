"""Writes GGUF files, version 3, little-endian (layout: docs/gguf.md of github.com/ggml-org/ggml).

magic, version, number of tensors, number of keys | keys | tensor infos | data, each tensor aligned
"""

import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from llmrs.models.files.output import new_file
from llmrs.quant.ggml import GgmlType

ALIGNMENT = 32
VERSION = 3
# numbers of the value types
SCALARS = {"u1": 0, "i1": 1, "u2": 2, "i2": 3, "u4": 4, "i4": 5, "f4": 6, "b1": 7, "u8": 10, "i8": 11, "f8": 12}
STRING, ARRAY = 8, 9
Value = Any  # bool, int, float, str, a NumPy array or scalar, or a list of one of these types


@dataclass(frozen=True)
class GgufTensor:
    """A tensor to write. `shape`: rows first, columns last."""

    name: str
    type: GgmlType
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.type.nbytes(self.shape)


class GgufFile:
    """A file that is being written. Tensors may come in any order, and in pieces."""

    def __init__(self, file: BinaryIO, metadata: Mapping[str, Value], tensors: Sequence[GgufTensor]) -> None:
        self.file, self.left = file, {t.name: t.nbytes for t in tensors}  # bytes that are not written yet
        header, self.begins = _header(metadata, tensors), dict[str, int]()
        self.size = len(header)
        for t in tensors:
            self.begins[t.name] = self.size
            self.size += _padded(t.nbytes)
        file.write(header)
        file.truncate(self.size)

    def write(self, name: str, data: np.ndarray, at: int = 0) -> int:
        """Bytes of a tensor, from the byte `at`; returns the end of them."""
        flat = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        self.file.seek(self.begins[name] + at)
        self.file.write(flat.data)
        self.left[name] -= flat.nbytes
        return at + flat.nbytes


@contextmanager
def open_gguf(
    path: Path, metadata: Mapping[str, Value], tensors: Sequence[GgufTensor], *, force: bool = False
) -> Iterator[GgufFile]:
    """A file that replaces `path` at the end of the block; errors are those of `new_file`.

    Integers become u32, or i32, i64, u64 where they do not fit, lists of them i32; floats f32.
    """
    size = len(_header(metadata, tensors)) + sum(_padded(t.nbytes) for t in tensors)
    with new_file(path, size, force=force) as file:
        written = GgufFile(file, metadata, tensors)
        yield written
        missing = [name for name, left in written.left.items() if left]
        assert not missing, f"not written in full: {missing[:3]}"


def _header(metadata: Mapping[str, Value], tensors: Sequence[GgufTensor]) -> bytes:
    parts = [struct.pack("<4sIQQ", b"GGUF", VERSION, len(tensors), len(metadata))]
    parts += [_string(key) + _value(value) for key, value in metadata.items()]
    offset = 0
    for t in tensors:
        dims = struct.pack(f"<I{len(t.shape)}Q", len(t.shape), *reversed(t.shape))
        parts.append(_string(t.name) + dims + struct.pack("<IQ", t.type.number, offset))
        offset += _padded(t.nbytes)
    header = b"".join(parts)
    return header + bytes(_padded(len(header)) - len(header))


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _string(text: str) -> bytes:
    data = text.encode("utf-8", "surrogateescape")  # token texts may be broken bytes
    return struct.pack("<Q", len(data)) + data


def _value(value: Value) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _string(value)
    if isinstance(value, list) and isinstance((*value, "")[0], str):  # an empty one is of texts
        return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(map(_string, value))
    array = _numbers(value)
    kind = SCALARS[array.dtype.str[1:]]
    prefix = struct.pack("<IIQ", ARRAY, kind, len(array)) if array.ndim else struct.pack("<I", kind)
    return prefix + array.astype(array.dtype.newbyteorder("<")).tobytes()


def _numbers(value: Value) -> np.ndarray:
    """A value, or a list of them, in the type of the file."""
    if isinstance(value, np.ndarray | np.generic):
        return np.asarray(value)
    array = np.array(value)
    if array.dtype.kind == "f":
        return array.astype(np.float32)
    if array.dtype.kind == "b":
        return array
    first = ("<i4",) if array.ndim else ("<u4", "<i4")
    kind = next(k for k in (*first, "<i8", "<u8") if np.all(array.astype(k).astype(object) == np.array(value, object)))
    return array.astype(kind)
