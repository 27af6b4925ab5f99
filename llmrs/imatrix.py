"""Importance matrices: mean squares of the inputs of each matrix, measured on a text, and read for a model."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmrs.backends.reference.backend import ReferenceBackend
from llmrs.backends.reference.ops import Context, silu_and_mul
from llmrs.core.errors import ModelError
from llmrs.core.ir import Equation, Graph, Value, Weight, at_layer
from llmrs.evaluation import CHUNK, MAX_BYTES, logits
from llmrs.model import Model
from llmrs.models.arch.gguf_export import EXPERT, gguf_name
from llmrs.models.files.imatrix import HINT, Sums, read_imatrix
from llmrs.models.files.untrusted import read_text
from llmrs.quant.tensor import AnyTensor

SHORTEST = 32  # tokens of a text


class MeasuringBackend(ReferenceBackend):
    """The reference, which also sums the squares of what each matrix is multiplied with."""

    def __init__(self) -> None:
        super().__init__("cpu", "f32", "f32")
        self.sums: dict[str, Sums] = {}  # by GGUF name

    def _equation(self, e: Equation, values: dict[Value, Any], context: Context, layer: int) -> list[Any]:
        if e.op in ("linear", "moe"):
            weights = [at_layer(o, layer) for o in e.inputs[1:] if isinstance(o, Weight)]
            x = values[e.inputs[0]]  # type: ignore[index]
            if e.op == "linear":
                for s in weights[0].segments:
                    self._add(gguf_name(s.tensor), x)
            else:
                self._add_experts(context, x, weights, e.params["top_k"])
        return super()._equation(e, values, context, layer)

    def _add(self, name: str, x: np.ndarray, matrix: int = 0, matrices: int = 1) -> None:
        if name not in self.sums:
            self.sums[name] = Sums(np.zeros((matrices, x.shape[1])), np.zeros(matrices, np.int64))
        self.sums[name].squares[matrix] += np.square(x, dtype=np.float64).sum(0)
        self.sums[name].tokens[matrix] += len(x)

    def _add_experts(self, context: Context, x: np.ndarray, weights: Sequence[Weight], top_k: int) -> None:
        router, *stacks = (self._weight(w) for w in weights)
        count = len(router)
        names = [gguf_name(w.segments[0].tensor) for w in weights[1:]]
        chosen = np.argsort(-(x @ router.T), axis=-1, kind="stable")[:, :top_k]
        gates, ups, _ = (w.reshape(count, -1, w.shape[1]) for w in stacks)
        for e in range(count):
            rows = x[(chosen == e).any(-1)]
            h = silu_and_mul(context, rows @ gates[e].T, rows @ ups[e].T)
            for name, inputs in zip(names, (rows, rows, h), strict=True):
                self._add(name, inputs, e, count)


def measure(
    graph: Graph, weights: Mapping[str, AnyTensor], tokens: Sequence[int], chunk: int,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> dict[str, Sums]:  # fmt: skip
    """Sums by GGUF name over chunks of the tokens; the rest of the last one is left out."""
    backend = MeasuringBackend()
    backend.load(graph, weights, lambda done: None)
    backend.allocate(-(-chunk // backend.block_size), backend.block_size, 1, chunk)
    chunks = len(tokens) // chunk
    for n in range(chunks):
        logits(backend, tokens[n * chunk : (n + 1) * chunk], np.array([chunk - 1]))
        progress(n + 1, chunks)
    return backend.sums


def read_text_tokens(path: Path, model: Model) -> tuple[list[int], int]:
    """A text's tokens, and how many are read at once. Raises ModelError."""
    tokens = model.tokenizer.encode(read_text(path, MAX_BYTES))
    if len(tokens) < SHORTEST:
        raise ModelError(f"{path} has {len(tokens)} tokens, and at least {SHORTEST} are needed", "give a longer text")
    return tokens, min(CHUNK, len(tokens), model.config.max_position_embeddings)


def read_importance(path: Path, graph: Graph) -> dict[str, np.ndarray]:
    """Canonical name -> importance of the columns, float32 (K,). Raises ModelError for another model's file."""
    means, found = read_imatrix(path), dict[str, np.ndarray]()
    for weight in graph.weights():
        for s in weight.segments:
            values = means.get(gguf_name(s.tensor)) if weight.columns else None
            if values is None:
                continue
            expert = EXPERT.fullmatch(s.tensor)
            row = int(expert[1]) if expert and len(values) > 1 else 0
            values = values.reshape(-1, weight.columns[0]) if values.size % weight.columns[0] == 0 else values
            if row >= len(values) or values.shape[1] != weight.columns[0]:
                problem = f"{path} is of another model: {gguf_name(s.tensor)} has the shape {values.shape}"
                raise ModelError(problem, f"its rows must have {weight.columns[0]} columns")
            if not np.isnan(values[row]).any():
                found[s.tensor] = values[row]
    if not found:
        raise ModelError(f"{path} is of another model: it holds none of its matrices", HINT)
    return found
