"""From a graph to a list of calls: each equation becomes its op's function, with its weights bound."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any, NamedTuple

import mlx.core as mx

from llmrs.backends.linearize import call_params
from llmrs.backends.mlx.quant_matrix import Matrix, Pack, as_array, quant_matrix
from llmrs.core.ir import Equation, Function, Value, Weight
from llmrs.quant.tensor import AnyTensor, QuantTensor

OpsTable = Mapping[str, Callable[..., Callable[..., Any]]]


class Call(NamedTuple):
    """One lowered equation. Values are numbered within a program."""

    run: Callable[..., Any]
    take: Callable[[list[Any]], Sequence[Any]]  # its inputs of all values
    out: int | slice  # where its result goes, or its results


@dataclass
class Program:
    """A graph's calls, layer after layer; the number of values, and the number of the graph's first result."""

    calls: list[Call]
    size: int
    result: int

    def run(self, context: Any, inputs: list[Any]) -> mx.array:
        """The graph's first result. Nothing is computed: MLX notes what depends on what."""
        values = inputs + [None] * (self.size - len(inputs))
        for run, take, out in self.calls:  # hundreds, in each step
            values[out] = run(context, *take(values))
        return values[self.result]


@dataclass
class Lowering:
    """Turns equations into calls, and weights into arrays of one type."""

    ops_table: OpsTable
    dtype: mx.Dtype
    weights: Mapping[str, AnyTensor]
    progress: Callable[[int], None]
    tied: set[Weight]  # weights with several uses
    pack: Pack | None = None  # of quantized weights
    loaded: dict[Weight, Matrix] = field(default_factory=dict)

    def program(self, function: Function) -> Program:
        numbers = {v.name: n for n, v in enumerate(function.inputs)}
        calls = [self._call(e, numbers) for e in function.equations]
        return Program(calls, len(numbers), numbers[function.outs[0].name])

    def _call(self, e: Equation, numbers: dict[str, int]) -> Call:
        first, count = len(numbers), len(e.outs)
        numbers.update((v.name, first + n) for n, v in enumerate(e.outs))
        weights = [self._array(o) for o in e.inputs if isinstance(o, Weight)]
        inputs = tuple(numbers[o.name] for o in e.inputs if isinstance(o, Value))
        take = itemgetter(*inputs) if len(inputs) > 1 else itemgetter(slice(inputs[0], inputs[0] + 1))
        run = self.ops_table[e.op](*weights, **call_params(e))
        return Call(run, take, first if count == 1 else slice(first, first + count))

    def _array(self, weight: Weight) -> Matrix:
        if weight in self.loaded:
            return self.loaded[weight]
        tensors = [self.weights[s.tensor] for s in weight.segments]
        quantized = any(isinstance(t, QuantTensor) for t in tensors)
        matrix = quant_matrix(tensors, self.dtype, self.pack) if quantized else self._dense(tensors)
        mx.clear_cache()  # MLX would keep the freed parts
        self.progress(sum(t.nbytes for t in tensors))
        if weight in self.tied:
            self.loaded[weight] = matrix
        return matrix

    def _dense(self, tensors: Sequence[AnyTensor]) -> mx.array:
        parts = []
        for tensor in (t for t in tensors if not isinstance(t, QuantTensor)):
            parts.append(as_array(tensor).astype(self.dtype))
            mx.eval(parts[-1])  # frees the copy of the file's bytes before the next one is made
        array = parts[0] if len(parts) == 1 else mx.concatenate(parts)
        mx.eval(array)
        return array
