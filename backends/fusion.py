"""Rewrites of a graph into the fused ops that a backend names.

Two kinds: PATTERNS fuse a chain of equations into one; `merged_linear` merges linear maps of one input into one matrix
with several results. Each fused equation keeps the equations that it replaces as its `body`, so a backend or a
test can always run the definition instead.
"""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace

from llmrs.core.errors import GraphError
from llmrs.core.ir import Equation, Function, Graph, Operand, Value, Weight, check

# pattern ::= line* "-> results";  line ::= result "=" op operand*. Names bind to operands where they first appear.
PATTERNS = {
    "fused_add_rms_norm": "s = add x y; n = rms_norm s w -> s n",
    "qk_norm_rope_write_kv": "qn = rms_norm q qw; qr = rope qn p; kn = rms_norm k kw; kr = rope kn p; "
    "c = write_kv kr v kv -> qr c",
    "rope_write_kv": "qr = rope q p; kr = rope k p; c = write_kv kr v kv -> qr c",
}
FUSED_OPS = ("merged_linear", *PATTERNS)

Line = tuple[str, str, list[str]]  # result, op, operands


def fuse(graph: Graph, ops: Collection[str]) -> Graph:
    """The graph with the fused ops in `ops` (names from FUSED_OPS), applied in FUSED_OPS' order, and checked."""
    if unknown := set(ops) - set(FUSED_OPS):
        raise GraphError(f"unknown fused ops {sorted(unknown)}; known are {', '.join(FUSED_OPS)}")
    for op in (op for op in FUSED_OPS if op in ops):
        functions = {n: _fuse_function(f, op) for n, f in graph.functions.items()}
        graph = Graph(graph.name, functions, _fuse_function(graph.main, op))
    check(graph)
    return graph


def expand(function: Function) -> Function:
    """The function with every fused equation replaced by its definition."""
    return replace(function, equations=tuple(b for e in function.equations for b in (e.body or (e,))))


def _fuse_function(function: Function, op: str) -> Function:
    while group := next(_linear_groups(function) if op == "merged_linear" else _matches(function, op), None):
        fused = _merged(group) if op == "merged_linear" else _fused(op, group)
        function = _replaced(function, group, fused)
    return function


def _linear_groups(function: Function) -> Iterator[list[Equation]]:
    """Linear equations that read the same value, two or more, all with a bias or all without."""
    for first in function.equations:
        alike = (first.inputs[0], len(first.inputs), first.params)
        merged_linear = (e for e in function.equations if e.op == "linear")
        same = [e for e in merged_linear if (e.inputs[0], len(e.inputs), e.params) == alike]
        if first.op == "linear" and len(same) > 1:
            yield same


def _merged(group: list[Equation]) -> Equation:
    def stacked(position: int) -> Weight:
        weights = [w for e in group if isinstance(w := e.inputs[position], Weight)]
        return Weight(tuple(s for w in weights for s in w.segments), weights[0].columns)

    weights = [stacked(n) for n in range(1, len(group[0].inputs))]
    outs = tuple(e.outs[0] for e in group)
    return Equation("merged_linear", (group[0].inputs[0], *weights), outs, group[0].params, tuple(group))


def _matches(function: Function, op: str) -> Iterator[list[Equation]]:
    """Each way to find the pattern's lines among the equations, with inner results used nowhere else."""
    lines, results = _parse(PATTERNS[op])
    for group in _search(function.equations, lines, {}):
        kept = {v for e, (name, _, _) in zip(group, lines, strict=True) for v in e.outs if name in results}
        outside = {o for e in function.equations if e not in group for o in e.inputs} | set(function.outs)
        if not ({v for e in group for v in e.outs} - kept) & outside:
            yield group


def _parse(text: str) -> tuple[list[Line], list[str]]:
    body, results = text.split("->")
    words = [line.replace("=", " ").split() for line in body.split(";")]
    return [(name, op, operands) for name, op, *operands in words], results.split()


def _search(equations: Iterable[Equation], lines: list[Line], bound: dict[str, Operand]) -> Iterator[list[Equation]]:
    if not lines:
        yield []
        return
    (result, op, names), rest = lines[0], lines[1:]
    for e in equations:
        if e.op == op and len(e.inputs) == len(names) and result not in bound:
            now = {**bound, result: e.outs[0]}
            if all(now.setdefault(n, o) == o for n, o in zip(names, e.inputs, strict=True)):
                yield from ([e, *tail] for tail in _search(equations, rest, now))


def _fused(op: str, group: list[Equation]) -> Equation:
    """One equation for the group: inputs in order of first use; params named after the op that they come from."""
    lines, results = _parse(PATTERNS[op])
    assigned = {v for e in group for v in e.outs}
    inputs = dict.fromkeys(o for e in group for o in e.inputs if o not in assigned)
    outs = tuple(e.outs[0] for name in results for e, line in zip(group, lines, strict=True) if line[0] == name)
    return Equation(op, tuple(inputs), outs, _params(group), tuple(group))


def _params(group: list[Equation]) -> dict[str, object]:
    params: dict[str, object] = {}
    for e in group:
        for key, value in e.params.items():
            if params.setdefault(key, value) != value:  # not seen in any family; a rule could not tell them apart
                raise GraphError(f"{e.op}: {key} differs within one fused op")
    return params


def _replaced(function: Function, group: list[Equation], fused: Equation) -> Function:
    """The fused equation in place of the group's last one, and what comes too early for that moved behind it."""
    last = max(function.equations.index(e) for e in group)
    before = [e for e in function.equations[:last] if e not in group]
    late: set[Operand] = set(fused.outs)
    moved: list[Equation] = []
    for e in before:
        if late & set(e.inputs):
            moved.append(e)
            late.update(e.outs)
    first = [e for e in before if e not in moved]
    if any(isinstance(o, Value) and o in late - set(fused.outs) for o in fused.inputs):
        raise GraphError(f"{fused.op} would need its own result")
    return replace(function, equations=(*first, fused, *moved, *function.equations[last + 1 :]))
