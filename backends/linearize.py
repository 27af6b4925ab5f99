"""A graph as one function: the calls of layers inlined, every equation in order."""

from collections import Counter
from dataclasses import replace
from typing import Any

from llmrs.core.ir import Equation, Function, Graph, Operand, S, Type, Value, Weight, at_layer

TOKENWISE_OPS = {  # each token's row by itself
    *("linear", "merged_linear", "rms_norm", "add", "fused_add_rms_norm"),
    *("mul_scalar", "silu_and_mul", "gelu_and_mul", "moe"),
}


def inline(graph: Graph) -> Function:
    """The graph's main function with each layer's equations in place of its call.

    Values of layer i are called `name@i`; weights have their layer's index filled in, also in bodies of fused ops.
    """
    equations: list[Equation] = []
    known = {v.name: v for v in graph.main.inputs}
    outs = _inline(graph, graph.main, known, "", 0, equations)
    return replace(graph.main, outs=outs, equations=tuple(equations))


def _inline(
    graph: Graph, function: Function, known: dict[str, Value], suffix: str, layer: int, into: list[Equation]
) -> tuple[Value, ...]:
    weights: dict[int, Weight] = {}  # by id of the graph's own

    def operand(o: Operand) -> Operand:
        if isinstance(o, Value):
            return value(o)
        if id(o) not in weights:
            weights[id(o)] = at_layer(o, layer)
        return weights[id(o)]

    def value(v: Value) -> Value:
        if v.name not in known:
            known[v.name] = Value(v.name + suffix, v.type) if suffix else v
        return known[v.name]

    def placed(e: Equation) -> Equation:
        inputs, outs = tuple([operand(o) for o in e.inputs]), tuple([value(v) for v in e.outs])
        return Equation(e.op, inputs, outs, e.params, tuple([placed(b) for b in e.body]))

    for e in function.equations:
        if e.op == "call":
            callee, index = graph.functions[e.params["function"]], e.params["index"]
            given = {v.name: value(o) for v, o in zip(callee.inputs, e.inputs, strict=True) if isinstance(o, Value)}
            outs = _inline(graph, callee, given, f"@{index}", index, into)
            known.update((v.name, out) for v, out in zip(e.outs, outs, strict=True))
        else:
            into.append(placed(e))
    return tuple(value(v) for v in function.outs)


def tied_weights(function: Function) -> set[Weight]:
    """Weights with several uses."""
    uses = Counter(o for e in function.equations for o in e.inputs if isinstance(o, Weight))
    return {weight for weight, count in uses.items() if count > 1}


def hoist_logits_gather(function: Function) -> Function:
    """With `gather_logits_rows` right after the last attention: the ops after it skip a prefill chunk's other rows."""
    equations = function.equations
    at = next(n for n, e in enumerate(equations) if e.op == "gather_logits_rows")
    begin = at
    while begin and equations[begin - 1].op in TOKENWISE_OPS:
        begin -= 1
    gather, tail, rest = equations[at], equations[begin:at], equations[at + 1 :]
    made = {v.name: _gathered(v, v.name) for e in tail for v in e.outs}
    read = {o.name for e in rest for o in e.inputs if isinstance(o, Value)} | {v.name for v in function.outs}
    (x,) = gather.inputs
    if not isinstance(x, Value) or x.name not in made or made.keys() & read:
        return function
    taken = {o.name: o for e in tail for o in e.inputs if isinstance(o, Value) and o.name not in made}
    rows = {name: _gathered(v, f"{name}@rows") for name, v in taken.items()}
    new = {**made, **rows, gather.outs[0].name: made[x.name]}
    gathers = (Equation("gather_logits_rows", (v,), (rows[name],)) for name, v in taken.items())
    return replace(
        function,
        equations=(*equations[:begin], *gathers, *(_with_values(e, new) for e in (*tail, *rest))),
        outs=tuple(new.get(v.name, v) for v in function.outs),
    )


def _gathered(v: Value, name: str) -> Value:
    return Value(name, Type(v.type.dtype, (S, *v.type.shape[1:])))


def _with_values(e: Equation, new: dict[str, Value]) -> Equation:
    inputs = tuple(new.get(o.name, o) if isinstance(o, Value) else o for o in e.inputs)
    outs = tuple(new.get(v.name, v) for v in e.outs)
    return replace(e, inputs=inputs, outs=outs, body=tuple(_with_values(b, new) for b in e.body))


def call_params(e: Equation) -> dict[str, Any]:
    """What an equation's implementation takes: its params, and the widths of the linear maps that it is made of."""
    params = {k: v for k, v in e.params.items() if k != "shard"}  # one device
    if sizes := [b.outs[0].type.sizes[0] for b in e.body if b.op == "linear"]:
        params["split_sizes"] = sizes
    return params
