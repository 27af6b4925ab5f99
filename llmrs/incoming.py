"""Weights for a backend: as their file has them, or quantized while they stream in, and kept in a file."""

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from llmrs.backends.base import DTYPE_BYTES
from llmrs.config import EngineConfig
from llmrs.core.errors import ConfigError
from llmrs.memory import format_bytes
from llmrs.model import Model
from llmrs.models.files.weights import Weights
from llmrs.quant.ggml import TYPES
from llmrs.quant.schemes import Scheme, find_scheme
from llmrs.quant.tensor import AnyTensor, Stored
from llmrs.quantizing import QuantizedWeights, plan_types, quantized
from llmrs.saving import save


@dataclass(frozen=True)
class IncomingWeights:
    """A model's weights, as a backend gets them. `file.source.close()` drops the files."""

    model: Model
    file: Weights
    before: Mapping[str, Stored]  # in the file
    after: Mapping[str, Stored]  # as they come: quantized in situ, where there is a scheme
    scheme: Scheme | None
    types: Mapping[str, str | None]  # of `plan_types`

    @staticmethod
    def of(model: Model, quant: str | None) -> "IncomingWeights":
        """Reads headers only. Raises ModelError, also for weights that are quantized already; ConfigError for `quant`.

        Warns of weights that can't be quantized so.
        """
        scheme = None if quant is None else find_scheme(quant)
        file = model.open_weights()
        before = file.stored()
        if scheme is None:
            return IncomingWeights(model, file, before, before, None, {})
        types = plan_types(scheme, model.config, before)
        return IncomingWeights(model, file, before, quantized(before, types), scheme, types)

    @contextmanager
    def opened(self, keep: str | None = None, device: str | None = None) -> Iterator[Mapping[str, AnyTensor]]:
        """The tensors, each of which is to be read once. `keep`: of save_quantized; `device`: of `convert`.

        Raises as `save`.
        """
        if self.scheme is None:
            yield self.file
        elif keep is None:
            yield QuantizedWeights(self.file, self.types, device=device)
        else:
            with save(Path(keep), self.scheme, self.model, self.before, self.types) as saver:
                yield QuantizedWeights(
                    self.file, self.types, on_tensor=lambda name, _, after: saver.put(name, after), device=device
                )

    def warn_of_expanded(self, dtype: str) -> None:
        """A warning of weights in formats that have no form, with the memory that they take."""
        expanded = [s for s in self.after.values() if s.expanded]
        if expanded:
            file = sum(TYPES[s.format].nbytes(s.shape) for s in expanded)
            memory = sum(math.prod(s.shape) for s in expanded) * DTYPE_BYTES[dtype]
            formats = ", ".join(sorted({s.format for s in expanded}))
            warnings.warn(
                f"{len(expanded)} tensors in {formats} are expanded at load: in {dtype} they take "
                f"{format_bytes(memory)} instead of {format_bytes(file)}",
                stacklevel=2,
            )


def check_save_quantized(config: EngineConfig) -> None:
    """Refuses a path that can't be written, before anything is read. Raises ConfigError."""
    if config.save_quantized is None:
        return
    path, option = Path(config.save_quantized), "save_quantized"
    if config.quant is None:
        raise ConfigError(f"{option}: the weights are not quantized", "add quant: q4k, for example")
    scheme = find_scheme(config.quant)
    if scheme.is_gguf != (path.suffix == ".gguf"):
        kind = "a file: give a path that ends in .gguf" if scheme.is_gguf else "a folder: leave out .gguf"
        raise ConfigError(f"{option}: {path} is no name for {scheme.name}", f"{scheme.name} is written as {kind}")
    if path.exists() or path.is_symlink():
        raise ConfigError(f"{option}: {path} exists", f"load it (model: {path}), or give another path")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"{option}: there is no folder {path.parent}", "create it first")
