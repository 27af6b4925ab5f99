"""Fused ops of this backend alone: what takes all results of one merged linear takes the merged result instead.

    merged_linear -> heads, heads, heads -> (qk_norm_)rope_write_kv  becomes  qkv_(norm_)rope_write_kv
    merged_linear -> silu_and_mul or gelu_and_mul                    becomes  merged_linear_(silu|gelu)_and_mul

So queries and keys are normalized and rotated together, and a kernel finds gate and up beside each other in memory.
`join_layers` fuses what a graph can't say, since a layer is there once for all: a layer's last sum and the next norm.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace

from llmrs.backends.linearize import Placed
from llmrs.core.ir import Equation, Function, Graph, Value, Weight, check

STORES = ("qk_norm_rope_write_kv", "rope_write_kv")
PRODUCTS = ("silu_and_mul", "gelu_and_mul")


def fuse(graph: Graph) -> Graph:
    """The graph with these ops, checked."""
    graph = replace(graph, functions={name: _fused(f) for name, f in graph.functions.items()}, main=_fused(graph.main))
    check(graph)
    return graph


def join_layers(placed: Iterable[Placed]) -> list[Placed]:
    """Each `add` and the `rms_norm` of its result right behind it as one `fused_add_rms_norm`."""
    joined: list[Placed] = []
    for p in placed:
        before = joined[-1] if joined else None
        if before and (before.equation.op, p.equation.op) == ("add", "rms_norm") and p.inputs == before.outs:
            equation = replace(p.equation, op="fused_add_rms_norm")
            joined[-1] = replace(p, equation=equation, inputs=before.inputs, outs=before.outs + p.outs)
        else:
            joined.append(p)
    return joined


def _fused(function: Function) -> Function:
    for merged in [e for e in function.equations if e.op == "merged_linear"]:
        users = list(_users(function, merged.outs))
        if len(users) == 1 and users[0].op in PRODUCTS and users[0].inputs == merged.outs:
            function = _replaced(function, _product(merged, users[0]))
        elif len(users) == len(merged.outs) == 3 and all(e.op == "heads" for e in users):
            function = _with_store(function, merged, users)
    return function


def _product(merged: Equation, product: Equation) -> Equation:
    rows = {"rows": _rows(merged)}
    return Equation(f"merged_linear_{product.op}", merged.inputs, product.outs, rows, (merged, product))


def _with_store(function: Function, merged: Equation, heads: list[Equation]) -> Function:
    """The function with linear, heads and store as one, where nothing else sees what lies between."""
    q, k, v = (next(e.outs[0] for e in heads if e.inputs == (out,)) for out in merged.outs)
    stores = list(_users(function, (q, k, v)))
    if len(stores) != 1 or stores[0].op not in STORES or len({e.params["size"] for e in heads}) != 1:
        return function
    (store,) = stores
    values = [o for o in store.inputs if isinstance(o, Value)]  # q, positions, k, v, kv
    if [values[0], *values[2:4]] != [q, k, v]:
        return function
    norms = [o for o in store.inputs if isinstance(o, Weight)]
    params = {"rows": _rows(merged), "size": heads[0].params["size"], **store.params}
    inputs = (*merged.inputs, values[1], *norms, values[4])
    return _replaced(
        function, Equation(f"qkv_{store.op.removeprefix('qk_')}", inputs, store.outs, params, (merged, *heads, store))
    )


def _rows(merged: Equation) -> list[int]:
    return [v.type.sizes[0] for v in merged.outs]


def _users(function: Function, values: tuple[Value, ...]) -> Iterator[Equation]:
    if set(values) & set(function.outs):
        return
    yield from (e for e in function.equations if set(values) & set(e.inputs))


def _replaced(function: Function, fused: Equation) -> Function:
    """The fused equation in place of the last one of its body."""
    kept = (fused if e is fused.body[-1] else e for e in function.equations if e not in fused.body[:-1])
    return replace(function, equations=tuple(kept))
