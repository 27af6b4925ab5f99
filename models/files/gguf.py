"""Memory-mapped GGUF weights: one file, or a set of split files `name-00001-of-0000N.gguf`."""

import mmap
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from llmrs.core.errors import ModelError
from llmrs.models.files.gguf_header import COMPLETE, Buffer, Header, TensorInfo, integer, read_header
from llmrs.models.files.json_reader import short_repr
from llmrs.models.files.untrusted import error_text, inside, regular_size
from llmrs.quant import ggml
from llmrs.quant.tensor import AnyTensor, Stored

SUFFIX = ".gguf"
PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.ASCII | re.DOTALL)
MAX_PARTS = 2000


class TensorTable:
    """Names, shapes and formats of a file's tensors, without their data."""

    def __init__(self, tensors: dict[str, TensorInfo]) -> None:
        self.tensors = tensors

    def names(self) -> Iterable[str]:
        return self.tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """Rows first; (E, N, K) for the joined matrices of E experts."""
        return self.tensors[name].shape

    def stored(self, name: str) -> Stored:
        return ggml.stored(self.tensors[name].type, self.tensors[name].shape)

    def close(self) -> None:
        self.tensors.clear()


class GGUFSource(TensorTable):
    """The tensors of a GGUF model. Data is read from disk on first use, through the page cache.

    `metadata` is that of the (first) file; its values are described at `Header`.
    """

    def __init__(self, path: Path) -> None:
        """`path`: the file, or any of a set of split files. Raises ModelError for missing, cut or invalid files."""
        names = part_names(path.name)
        self.files = [path.parent / name for name in names]
        self._data: dict[Path, Buffer] = {}
        super().__init__({})
        headers = [self._open(file) for file in self.files]
        self.metadata: dict[str, Any] = headers[0].metadata
        for number, (file, header) in enumerate(zip(self.files, headers, strict=True)):
            _check_part(file, header, number, len(names))
            if twice := self.tensors.keys() & header.tensors:
                problem = f"{file}: {short_repr(min(twice))} is in another file of the set too"
                raise ModelError(problem, "write the set again")
            self.tensors |= header.tensors
        declared = integer(self.files[0], self.metadata, "split.tensors.count", len(self.tensors))
        if len(names) > 1 and declared != len(self.tensors):
            problem = f"{self.files[0]}: split.tensors.count is {declared}; the files hold {len(self.tensors)} tensors"
            raise ModelError(problem, COMPLETE)

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the model's architecture. Raises ModelError where the file holds none."""
        name = self.metadata.get("general.architecture")
        if not isinstance(name, str) or not name:
            problem = f"{self.files[0]}: general.architecture is {short_repr(name)}; it must be a name"
            raise ModelError(problem, "is this the file of a model?")
        return name

    def tensor(self, name: str) -> AnyTensor:
        """A view of the file. Rows of quantized tensors are joined: experts (E, N, K) are a matrix (E * N, K)."""
        t = self.tensors[name]
        return read_tensor(t, self._data[t.file])

    def expert(self, name: str, index: int) -> AnyTensor:
        """One expert's matrix (N, K) of a tensor (E, N, K), a view of the file."""
        t = self.tensors[name]
        assert 0 <= index < t.shape[0]
        size = t.nbytes // t.shape[0]
        part = TensorInfo(name, t.type, t.shape[1:], t.offset + index * size, size, t.file)
        return read_tensor(part, self._data[t.file])

    def close(self) -> None:
        """Drops the files. A file stays mapped while a view of it is in use."""
        super().close()
        self._data.clear()

    def _open(self, path: Path) -> Header:
        inside(path.parent, path.name)
        size = regular_size(path)
        try:
            with path.open("rb") as file:
                # copy-on-write: torch warns about read-only arrays
                self._data[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            reason = error_text(error) if size else "it is empty"
            raise ModelError(f"{path} can't be read: {reason}", COMPLETE) from error
        return read_header(path, self._data[path])


def read_tensor(t: TensorInfo, data: Buffer) -> AnyTensor:
    """A tensor of a file with these contents, in which it lies (`read_header` has checked that)."""
    return ggml.tensor(t.type, t.shape, np.frombuffer(data, np.uint8, t.nbytes, t.offset))


def part_names(name: str) -> list[str]:
    """The names of all files of the split set that `name` belongs to; only itself where it is whole.

    Raises ModelError for numbers that make no sense.
    """
    match = PART.fullmatch(name)
    if not match:
        return [name]
    number, count = int(match[2]), int(match[3])
    if not 1 <= number <= count <= MAX_PARTS:
        problem = f"{short_repr(name)} is file {number} of {count}; sets of 1 to {MAX_PARTS} files are read"
        raise ModelError(problem, "did someone rename it?")
    return [f"{match[1]}-{n:05d}-of-{count:05d}{SUFFIX}" for n in range(1, count + 1)]


def _check_part(file: Path, header: Header, number: int, count: int) -> None:
    """Whether the file is what its name says. Raises ModelError."""
    part = integer(file, header.metadata, "split.no", 0)
    parts = integer(file, header.metadata, "split.count", 1) or 1  # 0 where a set was merged
    if (part, parts) != (number, count):
        name = f"file {number + 1} of {count}" if count > 1 else "a whole one"
        problem = f"{file}: it is file {part + 1} of {parts}, and its name is that of {name}"
        raise ModelError(problem, f"sets are named name-00001-of-00003{SUFFIX}: give it its first name again")
