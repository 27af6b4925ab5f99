"""From a graph to a list of calls: every equation becomes its rule's function, with its weights bound."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from llmrs.backends.linearize import Flat, Placed
from llmrs.backends.mlx.fusion import join_layers
from llmrs.core.ir import Graph, Weight
from llmrs.quant.tensor import Tensor

Rules = Mapping[str, Callable[..., Callable[..., Any]]]


class Call(NamedTuple):
    """One lowered equation. Values are numbered within a program."""

    run: Callable[..., Any]
    take: Callable[[list[Any]], Sequence[Any]]  # its inputs of all values
    out: int | slice  # where its result goes, or its results


class Program:
    """A graph's calls, layer after layer."""

    def __init__(self, calls: list[Call], size: int, result: int) -> None:
        self.calls, self.size, self.result = calls, size, result

    def run(self, context: Any, inputs: list[Any]) -> mx.array:
        """The graph's first result. Nothing is computed: MLX notes what depends on what."""
        values = inputs + [None] * (self.size - len(inputs))
        for run, take, out in self.calls:  # hundreds, in each step
            values[out] = run(context, *take(values))
        logits: mx.array = values[self.result]
        return logits


class Lowering:
    """Turns equations into calls, and weights into arrays of one type."""

    def __init__(
        self,
        graph: Graph,
        rules: Rules,
        dtype: mx.Dtype,
        weights: Mapping[str, Tensor],
        progress: Callable[[int], None],
    ) -> None:
        self.graph, self.rules, self.dtype, self.weights, self.progress = graph, rules, dtype, weights, progress
        self.shared = {w for w, uses in Counter(graph.weights()).items() if uses > 1}  # a tied head
        self.loaded: dict[Weight, mx.array] = {}

    def program(self, *, join: bool) -> Program:
        """`join`: sums at the end of layers in one call with the norm that follows."""
        flat = Flat(self.graph)
        placed = join_layers(flat.placed) if join else flat.placed
        return Program([self._call(p) for p in placed], flat.count, flat.results[0])

    def forget(self) -> None:
        """Lets go of what was loaded."""
        self.loaded.clear()

    def _call(self, placed: Placed) -> Call:
        weights = [self._array(w) for w in placed.weights]
        run = self.rules[placed.equation.op](*weights, **placed.params)
        first, count = placed.outs[0], len(placed.outs)  # which are numbered one after the other
        return Call(run, taker(placed.inputs), first if count == 1 else slice(first, first + count))

    def _array(self, weight: Weight) -> mx.array:
        if weight in self.loaded:
            return self.loaded[weight]
        tensors = [self.weights[s.tensor] for s in weight.segments]
        parts = [self._cast(t) for t in tensors]
        array = parts[0] if len(parts) == 1 else mx.concatenate(parts)
        mx.eval(array)
        parts.clear()
        mx.clear_cache()  # MLX would keep the freed parts
        self.progress(sum(t.nbytes for t in tensors))
        if weight in self.shared:
            self.loaded[weight] = array
        return array

    def _cast(self, tensor: Tensor) -> mx.array:
        array = as_array(tensor).astype(self.dtype)
        mx.eval(array)  # now, so that the copy of the file's bytes goes before the next one comes
        return array


def taker(numbers: tuple[int, ...]) -> Callable[[list[Any]], Sequence[Any]]:
    """What gives the values of these numbers."""
    return itemgetter(*numbers) if len(numbers) > 1 else itemgetter(slice(numbers[0], numbers[0] + 1))


def as_array(tensor: Tensor) -> mx.array:
    """A copy of the file's bytes, in the file's type."""
    array = mx.array(np.ascontiguousarray(tensor.data))
    return array.view(mx.bfloat16) if tensor.format == "bf16" else array
