"""The header of a GGUF file: its metadata and the places of its tensors, read from bytes that are not trusted.

Layout, little-endian: "GGUF", version u32, tensor count u64, key count u64; per key its name, type u32, value; per
tensor its name, dimension count u32, dimensions u64 (row length first), type u32, offset u64 in the data section, which
begins at the next multiple of `general.alignment`. A string is its length u64 and UTF-8; an array its element type u32,
length u64, elements. Source: docs/gguf.md of github.com/ggml-org/ggml. Versions 2 and 3 differ in byte order only.

Nothing is allocated before its extent is checked against the file. A header takes at most MAX_HEADER bytes, and at most
some five times of that in memory.
"""

import itertools
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmrs.core.errors import ModelError
from llmrs.models.files.json_reader import short_repr
from llmrs.models.files.untrusted import MIB
from llmrs.quant.ggml import GGML_TYPES, GgmlType

MAGIC, VERSIONS = b"GGUF", (2, 3)
MAX_HEADER = 64 * MIB  # today's largest vocabularies and merges take 20
MAX_KEYS, MAX_TENSORS, MAX_STRINGS = 2**16, 2**16, 2**21
MAX_KEY, MAX_NAME = 2**16 - 1, 255  # bytes
MAX_DIMENSIONS = 4
ALIGNMENT, ALIGNMENTS = "general.alignment", [2**n for n in range(3, 21)]
BOOL, STRING, ARRAY, FLOATS = 7, 8, 9, (6, 12)
NUMBERS = {
    number: np.dtype(name)
    for number, name in enumerate(("u1", "i1", "<u2", "<i2", "<u4", "<i4", "<f4", "u1", "", "", "<u8", "<i8", "<f8"))
    if name
}  # by value type
OTHER_TYPES = {  # not of weights, or of no model's
    4: "q4_2", 5: "q4_3", 9: "q8_1", 15: "q8_k", 24: "i8", 25: "i16", 26: "i32", 27: "i64", 28: "f64", 31: "q4_0_4_4",
    32: "q4_0_4_8", 33: "q4_0_8_8", 36: "iq4_nl_4_4", 37: "iq4_nl_4_8", 38: "iq4_nl_8_8", 41: "q1_0",
}  # fmt: skip
COMPLETE = "is the file complete? download it again, or convert the model again"
OLD = "convert the model again, or download a newer file"
U32, U64 = struct.Struct("<I"), struct.Struct("<Q")
Buffer = bytes | mmap.mmap


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies."""

    name: str
    type: GgmlType
    shape: tuple[int, ...]  # rows first: the file's dimensions in reverse
    offset: int  # bytes from the start of the file
    nbytes: int
    file: Path


@dataclass(frozen=True)
class Header:
    """Values of `metadata`: bool, int, float, str, a list of str, or a NumPy array. No number is NaN."""

    version: int
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]


def read_header(file: Path, data: Buffer, size: int | None = None) -> Header:
    """The header of a file with these contents, or of one of `size` bytes that begins so. Raises ModelError."""
    return _Reader(file, data, len(data) if size is None else size).header()


def integer(file: Path, metadata: Mapping[str, Any], key: str, default: int) -> int:
    """An integer of the metadata. Raises ModelError for values of another type."""
    value = metadata.get(key, default)
    if type(value) is not int:
        raise ModelError(f"{file}: {key} is {short_repr(value)}; it must be a whole number", COMPLETE)
    return value


class _Reader:
    """Reads from `at` on."""

    def __init__(self, file: Path, data: Buffer, size: int) -> None:
        self.file, self.data, self.size, self.at = file, data, size, 0
        self.end = min(len(data), MAX_HEADER)
        self.strings = 0  # in arrays

    def error(self, problem: str, hint: str = COMPLETE) -> ModelError:
        return ModelError(f"{self.file}: {problem}", hint)

    def header(self) -> Header:
        version = self._version()
        tensors = self._count("tensors", MAX_TENSORS)
        metadata = self._metadata(self._count("keys", MAX_KEYS))
        places = dict(self._place() for _ in range(tensors))
        if len(places) != tensors:
            raise self.error(f"it declares {tensors} tensors, which have {len(places)} names", "write the file again")
        alignment = integer(self.file, metadata, ALIGNMENT, 32)
        if alignment not in ALIGNMENTS:
            allowed = f"a power of two from {ALIGNMENTS[0]} to {ALIGNMENTS[-1]}"
            raise self.error(f"{ALIGNMENT} is {alignment}; it must be {allowed}")
        return Header(version, metadata, self._tensors(places, alignment))

    def _version(self) -> int:
        if self.data[:4] != MAGIC:
            shown = f"it begins with {self.data[:4]!r}" if self.data[:4] else "it is empty"
            raise self.error(f"it is no GGUF file: {shown}", COMPLETE)
        self.at = 4
        version = self._u32("the version")
        if version and version & 0xFFFF == 0:
            raise self.error("it is big-endian", "little-endian files are read: convert the model again")
        if version not in VERSIONS:
            raise self.error(f"its GGUF version is {version}; versions 2 and 3 are read", OLD)
        return version

    def _take(self, size: int, what: str) -> int:
        """The place of the next `size` bytes."""
        begin, left = self.at, self.end - self.at
        if size > left:
            limit = "the file has" if self.end == len(self.data) else f"a header of {MAX_HEADER:,} has"
            raise self.error(f"{what} takes {size:,} bytes at byte {begin:,}, and {limit} {left:,} left")
        self.at = begin + size
        return begin

    def _u32(self, what: str) -> int:
        return int(U32.unpack_from(self.data, self._take(4, what))[0])

    def _u64(self, what: str) -> int:
        return int(U64.unpack_from(self.data, self._take(8, what))[0])

    def _count(self, what: str, limit: int) -> int:
        count = self._u64(f"the number of {what}")
        if count > limit:
            raise self.error(f"it declares {count} {what}; at most {limit} are read")
        return count

    def _name(self, what: str, limit: int) -> str:
        begin = self.at
        name = self._text(what)
        if not 0 < (size := self.at - begin - 8) <= limit:
            raise self.error(f"{what} has {size} bytes; 1 to {limit} are allowed")
        return name

    def _text(self, what: str) -> str:
        size = self._u64(f"the length of {what}")
        begin = self._take(size, what)
        try:
            return str(self.data[begin : self.at], "utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"{what} is not UTF-8: {error.reason}") from error

    def _metadata(self, count: int) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        for n in range(count):
            key = self._name(f"key {n}", MAX_KEY)
            if key in metadata:
                raise self.error(f"the key {short_repr(key)} is there twice", "write the file again")
            metadata[key] = self._value(short_repr(key))
        return metadata

    def _value(self, key: str) -> Any:
        kind = self._u32(f"the type of {key}")
        if kind == STRING:
            return self._text(key)
        if kind != ARRAY:
            return self._numbers(kind, 1, key)[0].item()
        kind, count = self._u32(f"the element type of {key}"), self._u64(f"the length of {key}")
        return self._texts(count, key) if kind == STRING else self._numbers(kind, count, key)

    def _numbers(self, kind: int, count: int, key: str) -> np.ndarray:
        if kind == ARRAY:
            raise self.error(f"{key} is an array of arrays, which no model has")
        if kind not in NUMBERS:
            raise self.error(f"{key} has the value type {kind}, which is unknown")
        dtype = NUMBERS[kind]
        begin = self._take(count * dtype.itemsize, key)
        if not count:
            return np.zeros(0, dtype)
        values = np.frombuffer(self.data, dtype, count, begin).copy()
        if kind in FLOATS and np.isnan(values).any():
            raise self.error(f"{key} holds NaN", "convert the model again")
        if kind != BOOL:
            return values
        if (values > 1).any():
            raise self.error(f"{key} holds the boolean {values.max()}; it must be 0 or 1")
        return values.view(np.bool_)

    def _texts(self, count: int, key: str) -> list[str]:
        """Inlined: vocabularies and merges have several 100,000."""
        data, at, end, texts = self.data, self.at, self.end, list[str]()
        self.strings += count
        if 8 * count > end - at:
            raise self.error(f"{key} has {count:,} strings, and the header {end - at:,} bytes left")
        if self.strings > MAX_STRINGS:
            raise self.error(f"{key} has {count:,} strings; all arrays may hold {MAX_STRINGS:,}")
        try:
            for _ in range(count):
                begin = at + 8
                at = begin + U64.unpack_from(data, at)[0]
                if at > end:
                    raise self.error(f"string {len(texts)} of {key} ends past the header's end")
                texts.append(str(data[begin:at], "utf-8"))
        except struct.error as error:
            raise self.error(f"{key} ends after {len(texts)} of {count} strings") from error
        except UnicodeDecodeError as error:
            raise self.error(f"string {len(texts)} of {key} is not UTF-8: {error.reason}") from error
        self.at = at
        return texts

    def _place(self) -> tuple[str, tuple[GgmlType, tuple[int, ...], int]]:
        """Name, type, shape, offset in the data section."""
        name = self._name("a tensor's name", MAX_NAME)
        shown, dimensions = short_repr(name), self._u32("a tensor's number of dimensions")
        if not 0 < dimensions <= MAX_DIMENSIONS:
            raise self.error(f"{shown} has {dimensions} dimensions; 1 to {MAX_DIMENSIONS} are allowed")
        shape = tuple(self._u64(f"the shape of {shown}") for _ in range(dimensions))[::-1]
        if 0 in shape:
            raise self.error(f"{shown} has the shape {shape}, and no elements")
        return name, (self._tensor_type(shown, shape), shape, self._u64(f"the offset of {shown}"))

    def _tensor_type(self, shown: str, shape: tuple[int, ...]) -> GgmlType:
        number = self._u32(f"the type of {shown}")
        if number not in GGML_TYPES:
            known = f" ({OTHER_TYPES[number]})" if number in OTHER_TYPES else ""
            hint = f"use a file with weights in {', '.join(t.name for t in GGML_TYPES.values())}"
            raise self.error(f"{shown} has the tensor type {number}{known}, which is not supported", hint)
        kind = GGML_TYPES[number]
        if shape[-1] % kind.block:
            raise self.error(f"{shown} has rows of {shape[-1]}, which blocks of {kind.block} ({kind.name}) don't fill")
        return kind

    def _tensors(
        self, places: dict[str, tuple[GgmlType, tuple[int, ...], int]], alignment: int
    ) -> dict[str, TensorInfo]:
        start, tensors = -(-self.at // alignment) * alignment, dict[str, TensorInfo]()
        for name, (kind, shape, offset) in places.items():
            t = TensorInfo(name, kind, shape, start + offset, kind.nbytes(shape), self.file)
            if offset % alignment:
                raise self.error(f"{short_repr(name)} begins at {offset}, which is no multiple of {alignment}")
            if t.offset + t.nbytes > self.size:
                extent = f"takes {t.nbytes:,} bytes from byte {t.offset:,} on"
                raise self.error(f"{short_repr(name)} {extent}, and the file has {self.size:,}")
            tensors[name] = t
        ordered = sorted(tensors.values(), key=lambda t: t.offset)
        for before, t in itertools.pairwise(ordered):
            if before.offset + before.nbytes > t.offset:
                raise self.error(f"{short_repr(t.name)} overlaps {short_repr(before.name)}", "write the file again")
        return tensors
