"""Finds each weight of a graph in a model's files, by the family's names, and checks that all fit."""

import math
import re
from collections.abc import Iterator, Mapping

from llmrs.core.errors import ModelError
from llmrs.core.ir import Graph
from llmrs.quant.tensor import Tensor, WeightSource

HINT = "do config.json and the weights belong together?"
IGNORED = re.compile(r".*\.rotary_emb\.inv_freq")  # old checkpoints carry what the config says anyway


class Weights(Mapping[str, Tensor]):
    """Canonical name -> tensor, read from the source when asked for."""

    def __init__(self, graph: Graph, names: Mapping[str, str], source: WeightSource, *, tied: bool) -> None:
        """Raises ModelError that names what is missing, superfluous or of the wrong shape."""
        self.source = source
        self.wanted = {s.tensor: (s.rows, *w.columns) for w in graph.weights() for s in w.segments}
        self.names = {canonical: _translate(canonical, names) for canonical in self.wanted}
        there, used = set(source.names()), set(self.names.values())
        extra = {n for n in there - used if not IGNORED.fullmatch(n)} - ({names["head"]} if tied else set())
        for problem, found in (("lacks", used - there), ("holds unexpected", extra)):
            if found:
                listed = ", ".join(sorted(found)[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
                raise ModelError(f"the checkpoint {problem} {listed}", HINT)
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
