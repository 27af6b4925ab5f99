"""Writes GGUF files, version 3, little-endian (layout: docs/gguf.md of github.com/ggml-org/ggml).

    magic, version, number of tensors, number of keys | keys | tensor infos | data, each tensor aligned
"""

import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


Chunks = Iterable[np.ndarray]


def write_gguf(
    path: Path, metadata: Mapping[str, Value], tensors: Sequence[GgufTensor], data: Callable[[GgufTensor], Chunks],
    *, force: bool = False,
) -> int:  # fmt: skip
    """Writes a file and returns its size. `data` gives a tensor's bytes, piece by piece, when it is its turn.

    Integers become u32, or i32, i64, u64 where they do not fit, lists of them i32; floats f32.
    The file replaces `path` once it is complete; errors are those of `new_file`.
    """
    header = _header(metadata, tensors)
    size = len(header) + sum(_padded(t.nbytes) for t in tensors)
    with new_file(path, size, force=force) as file:
        file.write(header)
        for t in tensors:
            written = sum(file.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8)) for piece in data(t))
            assert written == t.nbytes, f"{t.name}: {written} bytes instead of {t.nbytes}"
            file.write(bytes(_padded(written) - written))
    return size


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
    if isinstance(value, list) and value and isinstance(value[0], str):
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
