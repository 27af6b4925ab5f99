"""Builds the functions of a graph."""

import itertools
from typing import Any

from llmrs.core.ir import Equation, Function, Operand, Type, Value, infer


class Builder:
    """Appends equations to a function: `b("linear", x, w, shard="rows", to="q")` returns the value q."""

    def __init__(self, name: str, **inputs: Type) -> None:
        self.name = name
        self.names: set[str] = set()
        self.equations: list[Equation] = []
        self.inputs = tuple(Value(self._fresh(n), t) for n, t in inputs.items())

    def _fresh(self, name: str) -> str:
        fresh = next(n for i in itertools.count() if (n := f"{name}{i or ''}") not in self.names)
        self.names.add(fresh)
        return fresh

    def __call__(self, op: str, *operands: Operand, to: str, **params: Any) -> Value:
        types = infer(Equation(op, operands, (), params))
        out = Value(self._fresh(to), types[0])
        self.equations.append(Equation(op, operands, (out,), params))
        return out

    def call(self, function: Function, index: int, *operands: Operand) -> tuple[Value, ...]:
        """Calls a layer function."""
        outs = tuple(Value(self._fresh(v.name.rstrip("0123456789")), v.type) for v in function.outs)
        self.equations.append(Equation("call", operands, outs, {"function": function.name, "index": index}))
        return outs

    def done(self, *outs: Value) -> Function:
        return Function(self.name, self.inputs, outs, tuple(self.equations))
