"""Weight tensors in the format of their file."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from llmrs.core.errors import ModelError

FORMATS: dict[str, np.dtype[Any]] = {"f32": np.dtype("float32"), "f16": np.dtype("float16"), "bf16": np.dtype("uint16")}


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
        if self.format == "bf16":  # the upper half of a float32
            return (self.data.astype(np.uint32) << np.uint32(16)).view(np.float32)
        if self.format not in FORMATS:
            raise ModelError(f"unknown format {self.format!r}", f"known are {', '.join(FORMATS)}")
        return self.data.astype(np.float32)


class WeightSource(Protocol):
    """Tensors by their name in the file."""

    def names(self) -> Iterable[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def tensor(self, name: str) -> Tensor: ...

    def close(self) -> None: ...
