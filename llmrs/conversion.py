"""Quantizes a model into a file or folder, a tensor at a time."""

import math
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from llmrs.model import Model
from llmrs.models.arch.gguf_export import gguf_name
from llmrs.quant.schemes import Scheme
from llmrs.quant.tensor import AnyTensor
from llmrs.quantizing import Importance, QuantizedWeights, plan_types, squared_error
from llmrs.saving import save


@dataclass
class Converted:
    """A matrix, or all experts of a layer together: types before and after, and the error."""

    name: str  # of GGUF files, without `.weight`
    before: str
    after: str
    done: int = 0  # matrices of the model
    total: int = 0
    weights: int = 0
    squares: float = 0.0  # of a sample of the weights
    errors: float = 0.0  # of the same

    @property
    def error(self) -> float:
        """Root mean square of the error over that of the weights."""
        return math.sqrt(self.errors / self.squares) if self.squares else 0.0


@dataclass
class Summary:
    """Bytes and weights of a model before and after; how many weights of its matrices have each type."""

    bytes_before: int = 0
    bytes_after: int = 0
    weights: int = 0
    types: Counter[str] = field(default_factory=Counter)


def quantize_model(
    model: Model, scheme: Scheme, path: Path, *, importance: Importance | None = None, force: bool = False,
    on_matrix: Callable[[Converted], object] = lambda matrix: None, device: str | None = None,
) -> Summary:  # fmt: skip
    """Writes `path`, which appears when it is complete. `device`: of `convert`. Raises ConfigError, ModelError."""
    weights, summary = model.open_weights(), Summary()
    with closing(weights.source):
        stored = weights.stored()
        types = plan_types(scheme, model.config, stored)
        report = _Report(model, summary, on_matrix)
        quantized = QuantizedWeights(weights, types, importance, report.add, device)
        with save(path, scheme, model, stored, types, force=force) as saver:
            for name in quantized:
                saver.put(name, quantized[name])
        summary.bytes_after = saver.nbytes
    return summary


class _Report:
    """Counts weights, and calls `on_matrix` for each matrix, once all of its experts are there."""

    def __init__(self, model: Model, summary: Summary, on_matrix: Callable[[Converted], object]) -> None:
        self.summary, self.on_matrix = summary, on_matrix
        matrices = {s.tensor for w in model.graph.weights() if w.columns for s in w.segments}
        self.left = Counter(map(gguf_name, matrices))
        self.open: dict[str, Converted] = {}
        self.done, self.total = 0, len(self.left)

    def add(self, tensor: str, before: AnyTensor, after: AnyTensor) -> None:
        name, count = gguf_name(tensor), math.prod(before.shape)
        self.summary.weights += count
        self.summary.bytes_before += before.nbytes
        if name not in self.left:
            return
        self.summary.types[after.format] += count
        m = self.open.setdefault(name, Converted(name.removesuffix(".weight"), before.format, after.format))
        squares, errors = squared_error(before, after)
        m.weights, m.squares, m.errors = m.weights + count, m.squares + squares, m.errors + errors
        self.left[name] -= 1
        if not self.left[name]:
            self.done += 1
            m.done, m.total = self.done, self.total
            self.on_matrix(self.open.pop(name))
