"""What happens at load: functions of the graph become programs, with weights bound once for all of them."""

from collections.abc import Callable, Collection, Hashable, Mapping
from typing import Any

import torch

from llmrs.backends.linearize import call_params
from llmrs.backends.torch.cpu_linear import Linear, make_linear
from llmrs.backends.torch.program import Call, Program
from llmrs.backends.torch.quant_matrix import Matrix, Pack, QuantMatrix, quant_matrix, to_dense
from llmrs.core.ir import Equation, Function, Value, Weight
from llmrs.quant.tensor import AnyTensor, QuantTensor

Bind = Callable[["Lowering", Equation], Any]  # gives what an op takes for its weights


class Lowering:
    """Lowers functions of one model for a device, a type and a table of ops; lives as long as the load."""

    def __init__(
        self, ops: Mapping[str, Callable[..., Any]], bind: Mapping[str, Bind], device: torch.device, dtype: torch.dtype,
        weights: Mapping[str, AnyTensor], progress: Callable[[int], None], tied: Collection[Weight] = (),
        make_linear: Callable[..., Linear] = make_linear, *, keep_quantized: bool = False, pack: Pack | None = None,
    ) -> None:  # fmt: skip
        """`bind`: for ops whose weights are not those of a linear map. `tied`: matrices with several uses.

        `keep_quantized`: quantized matrices stay so in memory, as `pack` makes them; else they are unpacked here.
        """
        self.ops, self.bind, self.device, self.dtype = ops, bind, device, dtype
        self.weights, self.progress, self.tied, self.make_linear = weights, progress, set(tied), make_linear
        self.keep_quantized, self.pack = keep_quantized, pack
        self.tables: dict[str, AnyTensor] = {}  # that the CPU reads row by row
        self.bound: dict[Hashable, Any] = {}  # by ids of weights, which the functions share and keep alive
        self.functions: list[Function] = []
        self.size = 0  # bytes of the weights

    def program(self, function: Function) -> Program:
        self.functions.append(function)
        numbers = {v.name: n for n, v in enumerate(function.inputs)}
        calls = []
        for e in function.equations:
            for v in e.outs:
                numbers[v.name] = len(numbers)
            inputs = [numbers[o.name] for o in e.inputs if isinstance(o, Value)]
            outs = [numbers[v.name] for v in e.outs]
            calls.append(Call(e.op, self.ops[e.op], inputs, outs, self._bound(e), call_params(e)))
        return Program(calls, len(numbers), [numbers[v.name] for v in function.outs])

    def _bound(self, e: Equation) -> tuple[Any, ...]:
        weights = weights_of(e)
        if not weights:
            return ()
        if e.op not in self.bind:
            return (self.linear(*weights),)
        key = e.op, *map(id, weights), *[b.op for b in e.body]
        return (self._once(key, lambda: self.bind[e.op](self, e)),)

    def linear(self, *weights: Weight) -> Linear:
        """y = x w^T (+ bias)."""
        made: Linear = self._once(tuple(map(id, weights)), lambda: self.make_linear(*map(self.matrix, weights)))
        return made

    def matrix(self, weight: Weight) -> Matrix:
        """A weight on the device. Kept for vectors and tied matrices only: a packed copy may take another's place."""
        if weight.columns and weight not in self.tied:
            return self._load(weight)
        matrix: Matrix = self._once(weight, lambda: self._load(weight))
        return matrix

    def table(self, name: str) -> AnyTensor:
        """A weight as it is given, for `embed` on the CPU. Where it is the head too, it is read once."""
        if name not in self.tables:
            self.tables[name] = self.weights[name]
        return self.tables[name]

    def tensor(self, weight: Weight) -> torch.Tensor:
        """A vector, or a matrix that no op takes quantized, as values."""
        matrix = self.matrix(weight)
        return matrix.dense() if isinstance(matrix, QuantMatrix) else matrix

    def _once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        if key not in self.bound:
            self.bound[key] = make()
        return self.bound[key]

    def _load(self, weight: Weight) -> Matrix:
        tensors = [self.tables.get(s.tensor) or self.weights[s.tensor] for s in weight.segments]
        matrix: Matrix
        if self.keep_quantized and any(isinstance(t, QuantTensor) for t in tensors):
            matrix = quant_matrix(tensors, self.device, self.dtype, self.pack)
        else:
            segments = [to_dense(t, self.device, self.dtype) for t in tensors]
            matrix = segments[0] if len(segments) == 1 else torch.cat(segments)
        self.progress(sum(t.nbytes for t in tensors))
        self.size += matrix.nbytes
        return matrix


def weights_of(e: Equation) -> tuple[Weight, ...]:
    return tuple([o for o in e.inputs if isinstance(o, Weight)])
