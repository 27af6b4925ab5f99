"""Weights in safetensors files, memory-mapped: one file, or shards with an index.

A file is the length of a header (8 bytes, little-endian), the header (JSON: name -> dtype, shape, begin and end in
the data), and the data. Source: the README of github.com/huggingface/safetensors. The library checks the header
against the file; what it lets pass (names that come twice) is checked here.
"""

import json
import mmap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from llmrs.core.errors import ModelError
from llmrs.models.files.json_reader import read_json
from llmrs.models.files.untrusted import JSON_LIMIT, inside, regular
from llmrs.quant.tensor import FORMATS, Tensor

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
NAMES = {"F32": "f32", "F16": "f16", "BF16": "bf16"}  # the format's name -> ours
F64 = "F64"  # read as f32
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
CUT_OFF = "is the file complete? download it again"


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies."""

    file: "File"
    dtype: str  # as the header has it
    shape: tuple[int, ...]
    begin: int  # bytes from the beginning of the data


class SafetensorsSource:
    """The tensors of a model folder. Their data is read from disk when it is used, and shared with the page cache."""

    def __init__(self, folder: Path) -> None:
        """Raises ModelError for what is missing, cut off or not safetensors."""
        self.files: list[File] = []
        self.entries: dict[str, Entry] = {}
        if (folder / SINGLE).exists() or not (folder / INDEX).exists():
            self._add(_single(folder))
        else:
            for shard, names in sorted(read_index(folder).items()):
                self._add(inside(folder, shard), names)

    def names(self) -> Iterable[str]:
        return self.entries

    def shape(self, name: str) -> tuple[int, ...]:
        return self.entries[name].shape

    def tensor(self, name: str) -> Tensor:
        """A view of the file, or of float64 a copy in float32. Raises ModelError for a type that weights can't have."""
        e = self.entries[name]
        if e.dtype == F64:
            return _rounded(self._view(e, np.dtype(np.float64)))
        if e.dtype not in NAMES:
            raise ModelError(
                f"{e.file.path.name}: {name} has the type {e.dtype}, which is not supported",
                f"use a checkpoint in one of {', '.join((*NAMES, F64))}",
            )
        return Tensor(NAMES[e.dtype], e.shape, self._view(e, FORMATS[NAMES[e.dtype]]))

    def close(self) -> None:
        """Forgets the files; views that are still in use keep them open."""
        self.entries.clear()
        self.files.clear()

    def _view(self, e: Entry, dtype: np.dtype[Any]) -> np.ndarray:
        """An entry's numbers, in its shape."""
        count = int(np.prod(e.shape, dtype=np.int64))
        if not count:
            return np.zeros(e.shape, dtype)
        return np.frombuffer(e.file.data, dtype, count, e.file.start + e.begin).reshape(e.shape)

    def _add(self, path: Path, wanted: Iterable[str] | None = None) -> None:
        file = File(path)
        self.files.append(file)
        for name, (dtype, shape, begin) in file.header().items():
            if name in self.entries:
                raise ModelError(f"{name} is in {self.entries[name].file.path.name} and in {path.name}", CUT_OFF)
            self.entries[name] = Entry(file, dtype, shape, begin)
        for name in wanted or ():
            if name not in self.entries:
                raise ModelError(f"{path.name} lacks {name}, which the index says it holds", CUT_OFF)


def _rounded(data: np.ndarray) -> Tensor:
    """float64 as float32; what is too large becomes infinite, as in torch."""
    with np.errstate(over="ignore"):
        return Tensor("f32", data.shape, data.astype(np.float32))


def read_index(folder: Path) -> dict[str, list[str]]:
    """Shard -> the names of its tensors. Raises ModelError; the shards' names are not checked yet."""
    weight_map: Any = read_json(inside(folder, INDEX)).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise ModelError(f"{folder / INDEX}: weight_map is not a table of file names", CUT_OFF)
    shards: dict[str, list[str]] = {}
    for name, shard in weight_map.items():
        shards.setdefault(shard, []).append(name)
    return shards


class File:
    """One file, mapped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        regular(path)
        try:
            with safe_open(path, "numpy"):  # checks sizes, overlaps, holes and types
                pass
            with path.open("rb") as file:
                # private, so that arrays are writable in name: torch warns about others. Nobody writes.
                self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError, SafetensorError) as error:
            raise ModelError(f"{path} can't be read: {_reason(path, error)}", CUT_OFF) from error
        self.start = 8 + int.from_bytes(self.data[:8], "little")
        if self.start > JSON_LIMIT:
            raise ModelError(f"{path}: its header has {self.start - 8} bytes, over {JSON_LIMIT}", CUT_OFF)

    def header(self) -> dict[str, tuple[str, tuple[int, ...], int]]:
        """name -> type, shape, begin."""
        pairs = json.loads(self.data[8 : self.start], object_pairs_hook=self._unique)
        pairs.pop("__metadata__", None)
        return {n: (e["dtype"], tuple(e["shape"]), e["data_offsets"][0]) for n, e in pairs.items()}

    def _unique(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            names = [n for n, _ in pairs]
            twice = next(n for n in names if names.count(n) > 1)
            raise ModelError(f"{self.path} holds {twice!r} twice", "write the checkpoint again")
        return table


def _single(folder: Path) -> Path:
    """The only safetensors file of a folder. Raises ModelError that says what is there instead."""
    if (folder / SINGLE).exists():
        return inside(folder, SINGLE)
    found = sorted(p.name for p in folder.glob("*.safetensors"))
    if len(found) == 1:
        return inside(folder, found[0])
    if found:
        raise ModelError(
            f"{folder} holds {len(found)} safetensors files and no {INDEX}", "the index says what is where"
        )
    pickles = sorted(p.name for pattern in PICKLES for p in folder.glob(pattern))
    if pickles:
        raise ModelError(
            f"{folder} holds weights only as {pickles[0]}, a pickle, which is not loaded: it can run any program",
            "use the model's safetensors files, or convert them where you trust them",
        )
    raise ModelError(f"{folder} holds no weights", f"it should hold {SINGLE}")


def _reason(path: Path, error: Exception) -> str:
    """Why, in a few words."""
    if path.is_file() and path.stat().st_size == 0:
        return "it is empty"
    return getattr(error, "strerror", None) or str(error)
