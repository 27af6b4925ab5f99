"""Memory-mapped safetensors weights: one file, or shards with an index.

File layout: header length (8 bytes, little-endian), header (JSON: name -> dtype, shape, data_offsets), data. Source:
the README of github.com/huggingface/safetensors. `safe_open` checks the header against the file; duplicate names,
which it accepts, are refused here.
"""

import json
import math
import mmap
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from llmrs.core.errors import ModelError
from llmrs.models.files.json_reader import read_json
from llmrs.models.files.untrusted import JSON_LIMIT, error_text, inside, regular_size
from llmrs.quant.tensor import FORMATS, Stored, Tensor

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": "f32", "F16": "f16", "BF16": "bf16"}  # safetensors' name -> ours
F64 = "F64"  # read as f32
# Also of quantized weights: safetensors' name -> ours, and how NumPy holds it.
RAW = {
    **{name: (ours, FORMATS[ours]) for name, ours in DTYPES.items()},
    "F8_E4M3": ("e4m3", np.dtype("u1")), "F8_E8M0": ("e8m0", np.dtype("u1")), "U8": ("u8", np.dtype("u1")),
    "U32": ("u32", np.dtype("<u4")), "I32": ("i32", np.dtype("<i4")), "I64": ("i64", np.dtype("<i8")),
}  # fmt: skip
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
TRUNCATED = "is the file complete? download it again"


@dataclass(frozen=True)
class TensorInfo:
    file: "File"
    dtype: str  # safetensors' name
    shape: tuple[int, ...]
    begin: int  # byte offset in the data section


class SafetensorsSource:
    """The tensors of a model folder. Data is read from disk on first use, through the page cache."""

    def __init__(self, folder: Path) -> None:
        """Raises ModelError for missing, truncated or invalid files."""
        self.files: list[File] = []
        self.tensors: dict[str, TensorInfo] = {}
        if (folder / SINGLE).exists() or not (folder / INDEX).exists():
            self._add(_single(folder))
        else:
            for shard, names in sorted(read_index(folder).items()):
                self._add(inside(folder, shard), names)

    def names(self) -> Iterable[str]:
        return self.tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def tensor(self, name: str) -> Tensor:
        """A view of the file; float64 is copied to float32. Raises ModelError for other unsupported dtypes."""
        t, kind = self.tensors[name], self.stored(name).format
        if t.dtype == F64:
            with np.errstate(over="ignore"):  # to infinity, as in torch
                return Tensor(kind, t.shape, self._view(t, np.dtype(np.float64)).astype(np.float32))
        return Tensor(kind, t.shape, self._view(t, FORMATS[kind]))

    def stored(self, name: str) -> Stored:
        """Raises ModelError for unsupported dtypes."""
        t = self.tensors[name]
        if t.dtype not in (*DTYPES, F64):
            hint = f"use a checkpoint in one of {', '.join((*DTYPES, F64))}"
            raise ModelError(f"{t.file.path.name}: {name} has the type {t.dtype}, which is not supported", hint)
        kind = DTYPES.get(t.dtype, "f32")
        return Stored(kind, t.shape, math.prod(t.shape) * FORMATS[kind].itemsize)

    def format(self, name: str) -> str:
        """The name of a tensor's dtype in RAW, else safetensors'."""
        dtype = self.tensors[name].dtype
        return RAW[dtype][0] if dtype in RAW else dtype

    def raw(self, name: str) -> Tensor:
        """A view of the file, for every dtype of RAW."""
        t = self.tensors[name]
        return Tensor(self.format(name), t.shape, self._view(t, RAW[t.dtype][1]))

    def close(self) -> None:
        """Drops the files. A file stays mapped while a view of it is in use."""
        self.tensors.clear()
        self.files.clear()

    def _view(self, t: TensorInfo, dtype: np.dtype[Any]) -> np.ndarray:
        count = int(np.prod(t.shape, dtype=np.int64))
        if not count:
            return np.zeros(t.shape, dtype)
        return np.frombuffer(t.file.data, dtype, count, t.file.start + t.begin).reshape(t.shape)

    def _add(self, path: Path, expected: Iterable[str] = ()) -> None:
        file = File(path)
        self.files.append(file)
        for name, (dtype, shape, begin) in file.header().items():
            if name in self.tensors:
                raise ModelError(f"{name} is in {self.tensors[name].file.path.name} and in {path.name}", TRUNCATED)
            self.tensors[name] = TensorInfo(file, dtype, shape, begin)
        for name in expected:
            if name not in self.tensors:
                raise ModelError(f"{path.name} lacks {name}, which the index says it holds", TRUNCATED)


def read_index(folder: Path) -> dict[str, list[str]]:
    """Shard -> tensor names. Shard names are unchecked. Raises ModelError."""
    weight_map: Any = read_json(inside(folder, INDEX)).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise ModelError(f"{folder / INDEX}: weight_map is not a table of file names", TRUNCATED)
    shards: dict[str, list[str]] = {}
    for name, shard in weight_map.items():
        shards.setdefault(shard, []).append(name)
    return shards


class File:
    """One memory-mapped file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        size = regular_size(path)
        try:
            with safe_open(path, "numpy"):  # checks sizes, overlaps, holes and dtypes
                pass
            with path.open("rb") as file:
                # copy-on-write: torch warns about read-only arrays
                self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError, SafetensorError) as error:
            reason = error_text(error) if size else "it is empty"
            raise ModelError(f"{path} can't be read: {reason}", TRUNCATED) from error
        self.start = 8 + int.from_bytes(self.data[:8], "little")
        if self.start > JSON_LIMIT:
            raise ModelError(f"{path}: its header has {self.start - 8} bytes, over {JSON_LIMIT}", TRUNCATED)

    def header(self) -> dict[str, tuple[str, tuple[int, ...], int]]:
        """Name -> dtype, shape, begin."""
        tensors = json.loads(self.data[8 : self.start], object_pairs_hook=self._unique)
        tensors.pop("__metadata__", None)
        return {n: (t["dtype"], tuple(t["shape"]), t["data_offsets"][0]) for n, t in tensors.items()}

    def _unique(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            twice = Counter(n for n, _ in pairs).most_common(1)[0][0]
            raise ModelError(f"{self.path} holds {twice!r} twice", "write the checkpoint again")
        return table


def _single(folder: Path) -> Path:
    """The folder's only safetensors file. Raises ModelError that names what it has instead."""
    if (folder / SINGLE).exists():
        return inside(folder, SINGLE)
    files = sorted(p.name for p in folder.glob("*.safetensors"))
    if len(files) == 1:
        return inside(folder, files[0])
    if files:
        raise ModelError(f"{folder} holds {len(files)} safetensors files and no {INDEX}", f"add its {INDEX}")
    if pickles := sorted(p.name for pattern in PICKLES for p in folder.glob(pattern)):
        problem = f"{folder} holds weights only as {pickles[0]}, a pickle, which is not loaded: it can run any program"
        raise ModelError(problem, "use the model's safetensors files, or convert them where you trust them")
    raise ModelError(f"{folder} holds no weights", f"it should hold {SINGLE}")
