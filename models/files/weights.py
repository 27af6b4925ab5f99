"""Finds each weight of a graph in a model's files, by the family's names, and checks that all fit."""

import dataclasses
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from llmrs.core.errors import ModelError
from llmrs.core.ir import Graph
from llmrs.models.arch.config import ModelConfig
from llmrs.quant.tensor import Tensor, WeightSource

HINT = "do config.json and the weights belong together?"
IGNORED = re.compile(r"(.*\.)?rotary_emb(_local)?\.inv_freq")  # old checkpoints carry what the config says anyway
PREFIX = "model."  # of the names of a decoder; a checkpoint of the decoder alone is without it
ROWS = 4096  # that are compared at a time


class Weights(Mapping[str, Tensor]):
    """Canonical name -> tensor, read from the source when asked for."""

    def __init__(self, graph: Graph, names: Mapping[str, str], source: WeightSource, *, tied: bool) -> None:
        """Raises ModelError that names what is missing, superfluous or of the wrong shape."""
        self.source = source
        self.wanted = {s.tensor: (s.rows, *w.columns) for w in graph.weights() for s in w.segments}
        expected = {canonical: _translate(canonical, names) for canonical in self.wanted}
        stored = _stored(source, {*expected.values(), names["lm_head"]})
        head = stored.pop(names["lm_head"], None) if tied else None
        if tied and head is not None:  # either name may hold the one matrix
            stored.setdefault(names["embed"], head)
        extra = {n for n in source.names() if not IGNORED.fullmatch(n)} - {*stored.values(), head}
        for problem, found in (("lacks", set(expected.values()) - stored.keys()), ("holds unexpected", extra)):
            if found:
                listed = ", ".join(sorted(found)[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
                raise ModelError(f"the checkpoint {problem} {listed}", HINT)
        self.names = {canonical: stored[name] for canonical, name in expected.items()}
        for canonical, name in self.names.items():
            shape, wanted = source.shape(name), self.wanted[canonical]
            if shape != wanted:
                raise ModelError(f"{name} has the shape {shape}; the config asks for {wanted}", HINT)

    def __getitem__(self, canonical: str) -> Tensor:
        return self.source.tensor(self.names[canonical])

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def with_stored_head(config: ModelConfig, names: Mapping[str, str], source: WeightSource) -> ModelConfig:
    """The config, without tying if the checkpoint holds a head that differs from the embeddings, as in transformers 5.

    Warns then. Raises ModelError for types that weights can't have.
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
    """Expected name -> name in the checkpoint, with or without PREFIX. Raises ModelError if a tensor is there twice."""
    there, found = set(source.names()), dict[str, str]()
    for name in expected:
        both = [n for n in (name, name.removeprefix(PREFIX), PREFIX + name) if n in there]
        if len(set(both)) > 1:
            raise ModelError(f"the checkpoint holds {both[0]} also as {both[-1]}", "write the checkpoint again")
        found |= {name: both[0]} if both else {}
    return found


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two matrices hold the same numbers."""

    def rows(t: Tensor, i: int) -> np.ndarray:
        part = t.data[i : i + ROWS]
        return Tensor(t.format, part.shape, part).float32()

    return a.shape == b.shape and all(np.array_equal(rows(a, i), rows(b, i)) for i in range(0, len(a.data), ROWS))


def parameters(graph: Graph) -> int:
    """Numbers in the weights; a weight that is used twice counts once."""
    return sum(math.prod(w.type.sizes) for w in set(graph.weights()))


def _translate(canonical: str, names: Mapping[str, str]) -> str:
    """The file's name; the first number in a name is the layer's, the second the expert's."""
    numbers = dict(zip(("{i}", "{e}"), re.findall(r"\d+", canonical), strict=False))
    for mark, number in numbers.items():
        canonical = canonical.replace(f".{number}.", f".{mark}.", 1)
    name = names[canonical]
    for mark, number in numbers.items():
        name = name.replace(mark, number)
    return name
