"""Maps the weights of a graph to the tensors of a checkpoint, and checks names and shapes."""

import dataclasses
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from llmrs.core.errors import ModelError
from llmrs.core.ir import Graph
from llmrs.models.arch.config import ModelConfig
from llmrs.quant.tensor import AnyTensor, QuantTensor, Stored, WeightSource

HINT = "do config.json and the weights belong together?"
IGNORED = re.compile(r"(.*\.)?rotary_emb(_local)?\.inv_freq")  # buffers in old checkpoints
PREFIX = "model."  # missing in checkpoints of the decoder alone
COMPARED_ROWS = 4096  # at a time


class Weights(Mapping[str, AnyTensor]):
    """Canonical name -> tensor, read from the source on access."""

    def __init__(self, graph: Graph, names: Mapping[str, str], source: WeightSource, *, tied: bool) -> None:
        """Raises ModelError that names missing and unexpected tensors, and wrong shapes."""
        self.source = source
        shapes = {s.tensor: (s.rows, *w.columns) for w in graph.weights() for s in w.segments}
        expected = {canonical: stored_name(canonical, names) for canonical in shapes}
        stored = _stored(source, {*expected.values(), names["lm_head"]})
        head = stored.pop(names["lm_head"], None) if tied else None
        if tied and head is not None:  # the tied matrix may be stored under either name
            stored.setdefault(names["embed"], head)
        extra = {n for n in source.names() if not IGNORED.fullmatch(n)} - {*stored.values(), head}
        for problem, tensors in (("lacks", set(expected.values()) - stored.keys()), ("holds unexpected", extra)):
            if tensors:
                more = f" and {len(tensors) - 3} more" if len(tensors) > 3 else ""
                raise ModelError(f"the checkpoint {problem} {', '.join(sorted(tensors)[:3])}{more}", HINT)
        self.names = {canonical: stored[name] for canonical, name in expected.items()}
        for canonical, name in self.names.items():
            if (shape := source.shape(name)) != shapes[canonical]:
                raise ModelError(f"{name} has the shape {shape}; the config asks for {shapes[canonical]}", HINT)

    def __getitem__(self, canonical: str) -> AnyTensor:
        """Raises ModelError for unsupported types, such as a quantized vector."""
        name = self.names[canonical]
        tensor, shape = self.source.tensor(name), self.source.shape(name)
        if len(shape) == 1 and isinstance(tensor, QuantTensor):
            raise ModelError(f"{name} is quantized to {tensor.format}; norms and biases must be f32, f16 or bf16", HINT)
        return tensor

    def stored(self) -> dict[str, Stored]:
        """What is known of each without reading it. Raises ModelError for unsupported types."""
        return {canonical: self.source.stored(name) for canonical, name in self.names.items()}

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def untie_stored_head(config: ModelConfig, names: Mapping[str, str], source: WeightSource) -> ModelConfig:
    """Unties the config, with a warning, if the checkpoint stores an lm_head that differs from the embeddings.

    transformers 5 does the same. Raises ModelError for unsupported dtypes.
    """
    stored = _stored(source, {names["lm_head"], names["embed"]}) if config.tie_word_embeddings else {}
    if len(stored) < 2 or _equal(*(source.tensor(name) for name in stored.values())):
        return config
    head, embed = stored[names["lm_head"]], stored[names["embed"]]
    warnings.warn(
        f"config.json ties the head to the embeddings, and the checkpoint's {head} differs from {embed}: it is used; "
        "set tie_word_embeddings to false in config.json to silence this",
        stacklevel=2,
    )
    return dataclasses.replace(config, tie_word_embeddings=False)


def _stored(source: WeightSource, expected: Iterable[str]) -> dict[str, str]:
    """Expected name -> name in the checkpoint, with or without PREFIX. Raises ModelError if it has both."""
    names, stored = set(source.names()), dict[str, str]()
    for name in expected:
        matches = [n for n in (name, name.removeprefix(PREFIX), PREFIX + name) if n in names]
        if len(set(matches)) > 1:
            raise ModelError(f"the checkpoint holds {matches[0]} also as {matches[-1]}", "write the checkpoint again")
        if matches:
            stored[name] = matches[0]
    return stored


def _equal(a: AnyTensor, b: AnyTensor) -> bool:
    parts = [slice(i, i + COMPARED_ROWS) for i in range(0, a.shape[0], COMPARED_ROWS)]
    return a.shape == b.shape and all(np.array_equal(a.rows(p).float32(), b.rows(p).float32()) for p in parts)


def num_parameters(graph: Graph) -> int:
    """Elements of all weights; a weight in several places counts once."""
    return sum(math.prod(w.type.sizes) for w in set(graph.weights()))


def stored_name(canonical: str, names: Mapping[str, str]) -> str:
    """The name of a weight in checkpoints. The first number in a name is the layer, the second the expert."""
    numbers = dict(zip(("{i}", "{e}"), re.findall(r"\d+", canonical), strict=False))
    for placeholder, number in numbers.items():
        canonical = canonical.replace(f".{number}.", f".{placeholder}.", 1)
    name = names[canonical]
    for placeholder, number in numbers.items():
        name = name.replace(placeholder, number)
    return name
