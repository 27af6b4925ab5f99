"""Writes a safetensors file (layout: the README of github.com/huggingface/safetensors)."""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from llmrs.models.files.output import new_file

BYTES = {"F32": 4, "U32": 4, "BF16": 2, "F16": 2, "U8": 1, "F8_E4M3": 1}
Infos = Mapping[str, tuple[str, tuple[int, ...]]]  # name -> dtype, shape


class SafetensorsFile:
    """A file that is being written. Tensors may come in any order, and in pieces."""

    def __init__(self, file: BinaryIO, infos: Infos) -> None:
        header, begin = header_of(infos), 0
        self.file, self.begins, self.left = file, dict[str, int](), dict[str, int]()
        for name, info in infos.items():
            self.begins[name], self.left[name] = len(header) + begin, nbytes(info)
            begin += nbytes(info)
        file.write(header)
        file.truncate(len(header) + begin)

    def write(self, name: str, data: np.ndarray, at: int = 0) -> None:
        """Bytes of a tensor, from the byte `at`."""
        flat = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        self.file.seek(self.begins[name] + at)
        self.file.write(flat.data)
        self.left[name] -= flat.nbytes


@contextmanager
def open_safetensors(path: Path, infos: Infos) -> Iterator[SafetensorsFile]:
    """A file that appears at the end of the block; errors are those of `new_file`."""
    with new_file(path, size_of(infos)) as file:
        written = SafetensorsFile(file, infos)
        yield written
        missing = [name for name, left in written.left.items() if left]
        assert not missing, f"not written in full: {missing[:3]}"


def size_of(infos: Infos) -> int:
    return len(header_of(infos)) + sum(map(nbytes, infos.values()))


def nbytes(info: tuple[str, tuple[int, ...]]) -> int:
    return BYTES[info[0]] * math.prod(info[1])


def header_of(infos: Infos) -> bytes:
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, (dtype, shape) in infos.items():
        end = begin + nbytes((dtype, shape))
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
