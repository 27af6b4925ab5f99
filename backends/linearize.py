"""A graph as one list of equations, layer after layer, with its values numbered: what backends lower to calls."""

from dataclasses import dataclass
from typing import Any

from llmrs.core.ir import Equation, Function, Graph, Value, Weight, at_layer


@dataclass(frozen=True)
class Placed:
    """An equation of one layer: the numbers of its values, its weights of that layer, and the params of its rule."""

    equation: Equation
    inputs: tuple[int, ...]
    outs: tuple[int, ...]
    weights: tuple[Weight, ...]
    params: dict[str, Any]


class Flat:
    """The equations in order; `count` numbers are in use, the first ones by the graph's inputs."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.placed: list[Placed] = []
        self.count = 0
        self.results = self._function(graph.main, {v: self._number() for v in graph.main.inputs}, 0)

    def _number(self) -> int:
        self.count += 1
        return self.count - 1

    def _function(self, function: Function, numbers: dict[Value, int], layer: int) -> list[int]:
        for e in function.equations:
            if e.op == "call":
                callee = self.graph.functions[e.params["function"]]
                inputs = {v: numbers[o] for v, o in zip(callee.inputs, e.inputs, strict=True) if isinstance(o, Value)}
                outs = self._function(callee, inputs, e.params["index"])
                numbers.update(zip(e.outs, outs, strict=True))
            else:
                numbers.update((v, self._number()) for v in e.outs)
                self.placed.append(_placed(e, numbers, layer))
        return [numbers[v] for v in function.outs]


def _placed(e: Equation, numbers: dict[Value, int], layer: int) -> Placed:
    values = tuple(numbers[o] for o in e.inputs if isinstance(o, Value))
    weights = tuple(at_layer(o, layer) for o in e.inputs if isinstance(o, Weight))
    params = {k: v for k, v in e.params.items() if k != "shard"}  # one device
    if e.op == "merged_linear":
        params["rows"] = [v.type.shape[1] for v in e.outs]
    return Placed(e, values, tuple(numbers[v] for v in e.outs), weights, params)
