"""Weight tensors in the format of their file: dense ones, and quantized matrices."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from llmrs.core.errors import ModelError
from llmrs.quant.arrays import NUMPY, Array, Arrays
from llmrs.quant.form import Form, unpack

FORMATS: dict[str, np.dtype[Any]] = {"f32": np.dtype("float32"), "f16": np.dtype("float16"), "bf16": np.dtype("uint16")}
UNPACKED_ROWS = 1024  # of a quantized matrix at a time


@dataclass(frozen=True)
class Tensor:
    """Read-only data in a file's format: f32, f16, or bf16 (stored as uint16, as NumPy has no bf16)."""

    format: str
    shape: tuple[int, ...]
    data: np.ndarray

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def float32(self) -> np.ndarray:
        """The values as float32, exactly."""
        if self.format not in FORMATS:
            raise ModelError(f"unknown format {self.format!r}", f"known are {', '.join(FORMATS)}")
        return NUMPY.float32(self.data, self.format)

    def rows(self, index: slice | np.ndarray) -> "Tensor":
        """Some of its rows; a slice is not copied."""
        data = self.data[index]
        return Tensor(self.format, data.shape, data)


Convert = Callable[[Arrays, Mapping[str, Array]], dict[str, Array]]


@dataclass(frozen=True)
class Format:
    """A file's format of quantized matrices (N, K).

    A file stores arrays by names that the format chooses, all with the rows first. `convert` makes the form's planes
    of them, on any framework.
    """

    name: str  # in messages and tables, such as q4_k
    form: Form
    convert: Convert


@dataclass(frozen=True)
class QuantTensor:
    """A quantized matrix (N, K) in its file's format, read-only."""

    kind: Format
    shape: tuple[int, int]
    arrays: Mapping[str, np.ndarray]  # each (N, ...)

    @property
    def format(self) -> str:
        return self.kind.name

    @property
    def form(self) -> Form:
        return self.kind.form

    @property
    def nbytes(self) -> int:
        """As in the file."""
        return sum(a.nbytes for a in self.arrays.values())

    def planes(
        self, xp: Arrays = NUMPY, upload: Callable[[np.ndarray], Array] = lambda array: array
    ) -> dict[str, Array]:
        """The planes of its form. `upload` copies an array to the framework of `xp`."""
        return self.kind.convert(xp, {name: upload(a) for name, a in self.arrays.items()})

    def float32(self) -> np.ndarray:
        """The weights, float32 (N, K)."""
        out = np.empty(self.shape, np.float32)
        for begin in range(0, self.shape[0], UNPACKED_ROWS):  # temporaries take ten times the result
            part = self.rows(slice(begin, begin + UNPACKED_ROWS))
            with np.errstate(over="ignore", invalid="ignore"):
                out[begin : begin + UNPACKED_ROWS] = unpack(NUMPY, self.form, part.planes(), self.shape[1])
        return out

    def rows(self, index: slice | np.ndarray) -> "QuantTensor":
        """Some of its rows; a slice is not copied."""
        arrays = {name: a[index] for name, a in self.arrays.items()}
        return replace(self, shape=(len(next(iter(arrays.values()))), self.shape[1]), arrays=arrays)


def as_planes(xp: Arrays, arrays: Mapping[str, Array]) -> dict[str, Array]:
    """`Format.convert` where the arrays are the planes of the form."""
    return dict(arrays)


def of_planes(name: str, form: Form, planes: Mapping[str, np.ndarray]) -> QuantTensor:
    """A quantized matrix from the planes of its form."""
    rows, groups = planes["scales"].shape
    return QuantTensor(Format(name, form, as_planes), (rows, groups * form.group), planes)


AnyTensor = Tensor | QuantTensor


@dataclass(frozen=True)
class Stored:
    """What is known of a tensor without reading it."""

    format: str  # of the file, such as q4_k
    shape: tuple[int, ...]
    nbytes: int  # of the tensor that `WeightSource.tensor` gives, quantized ones in the planes of their form
    expanded: bool = False  # whether that is in float32, and quantized in the file

    @property
    def is_dense(self) -> bool:
        return self.format in FORMATS


class WeightSource(Protocol):
    """Tensors by their name in the file."""

    def names(self) -> Iterable[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def stored(self, name: str) -> Stored: ...

    def tensor(self, name: str) -> AnyTensor: ...

    def close(self) -> None: ...
