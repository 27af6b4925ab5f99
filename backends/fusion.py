"""Rewrites of functions of a graph into fused ops: one engine for all backends, and the rules that they share.

A rule is a textual pattern. A fused equation keeps the equations that it replaces as its `body`, so a backend or a test
can always run the definition instead. Rules apply to a layer's function, or to the whole model as one (`linearize.py`).
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

from llmrs.core.errors import GraphError
from llmrs.core.ir import Equation, Function, Graph, Operand, Value, Weight, check

COMMUTATIVE = {"add", "fused_add_rms_norm"}  # in their first two operands
Bound = dict[str, Any]  # operands by their names in a pattern; tuples for those that stand for several
Make = Callable[[str, Sequence[Equation], tuple[Value, ...]], Equation | None]


class Line(NamedTuple):
    """One equation of a pattern."""

    results: tuple[str, ...]
    ops: frozenset[str]
    operands: tuple[str, ...]

    def bind(self, outs: tuple[Operand, ...], inputs: tuple[Operand, ...], bound: Bound) -> Bound | None:
        """`bound` and the names of this line; None where an equation does not fit."""
        new = bound.copy()
        for names, operands in ((self.results, outs), (self.operands, inputs)):
            count = len(names)
            if names and names[-1][0] == "*":
                count -= 1
                rest = operands[count:]
                if len(operands) < count or new.setdefault(names[-1], rest) != rest:
                    return None
            elif len(operands) != count:
                return None
            for name, operand in zip(names[:count], operands, strict=False):
                known = new.setdefault(name, operand)
                if known is not operand and known != operand:
                    return None
        return new


def fused(op: str, group: Sequence[Equation], outs: tuple[Value, ...]) -> Equation | None:
    """One equation for the group: inputs in order of first use, params of all. None where params differ."""
    params: dict[str, Any] = {}
    for e in group:
        for key, value in e.params.items():
            if params.setdefault(key, value) != value:
                return None
    return Equation(op, inputs_of(group), outs, params, definition(group))


def inputs_of(group: Iterable[Equation]) -> tuple[Operand, ...]:
    """What a group of equations takes, in order of first use."""
    seen, inputs = {v.name for e in group for v in e.outs}, list[Operand]()
    for o in [o for e in group for o in e.inputs]:
        if isinstance(o, Weight):
            inputs.append(o)
        elif o.name not in seen:
            inputs.append(o)
            seen.add(o.name)
    return tuple(inputs)


def merged(op: str, group: Sequence[Equation], outs: tuple[Value, ...]) -> Equation | None:
    """Linear maps of one input as one with stacked weights, all with a bias or all without."""
    first, second = group
    if len(first.inputs) != len(second.inputs) or first.params != second.params:
        return None
    pairs = zip(first.inputs[1:], second.inputs[1:], strict=True)
    weights = [
        Weight(a.segments + b.segments, a.columns) for a, b in pairs if isinstance(a, Weight) and isinstance(b, Weight)
    ]
    return Equation(op, (first.inputs[0], *weights), outs, first.params, definition(group))


@dataclass(frozen=True)
class Rule:
    """A fused op and the equations that it stands for.

    pattern ::= line (";" line)* "->" result*     line ::= result* "=" op ("|" op)* operand*

    Names bind to operands where they first appear; the last one of a list may be `*name`, for all that remain. Each
    line but the first makes or uses a value of those before. Other results than the pattern's must be used nowhere
    else. `make` gives the fused equation from the group, None to leave it.
    """

    op: str
    pattern: str
    make: Make = fused

    @cached_property
    def lines(self) -> tuple[Line, ...]:
        sides = (line.split("=") for line in self.pattern.split("->")[0].split(";"))
        words = ((left.split(), right.split()) for left, right in sides)
        return tuple(Line(tuple(left), frozenset(op.split("|")), tuple(rest)) for left, (op, *rest) in words)

    @cached_property
    def results(self) -> tuple[str, ...]:
        return tuple(self.pattern.split("->")[1].split())

    @cached_property
    def inputs(self) -> tuple[str, ...]:
        """Names of single operands that no line makes."""
        made = {name for line in self.lines for name in line.results}
        return tuple({n: None for line in self.lines for n in line.operands if n not in made and n[0] != "*"})

    @cached_property
    def plan(self) -> tuple[tuple[int, str, bool], ...]:
        """The lines after the first, each with the known name of a value that it makes (True) or uses."""
        known, left, steps = {*self.lines[0].results, *self.lines[0].operands}, {*range(1, len(self.lines))}, []
        while left:
            ways = [(n, name, True) for n in sorted(left) for name in self.lines[n].results if name in known]
            ways += [(n, name, False) for n in sorted(left) for name in self.lines[n].operands if name in known]
            step = next(way for way in ways if way[1][0] != "*")
            left.remove(step[0])
            known.update(self.lines[step[0]].results, self.lines[step[0]].operands)
            steps.append(step)
        return tuple(steps)


FUSED_ADD_RMS_NORM = Rule("fused_add_rms_norm", "s = add x y; n = rms_norm s w -> s n")
RULES = {rule.op: rule for rule in (
    Rule("merged_linear", "*y = linear|merged_linear x *w; z = linear x *v -> *y z", merged),
    FUSED_ADD_RMS_NORM,
    Rule("qk_norm_rope_write_kv",
         "qn = rms_norm q qw; qr = rope qn p; kn = rms_norm k kw; kr = rope kn p; c = write_kv kr v kv -> qr c"),
    Rule("rope_write_kv", "qr = rope q p; kr = rope k p; c = write_kv kr v kv -> qr c"),
)}  # fmt: skip
FUSED_OPS = tuple(RULES)


def fuse_graph(graph: Graph, ops: Collection[str], rules: Mapping[str, Rule] = RULES) -> Graph:
    """The graph with `ops` of `rules` fused in each function, in the table's order, and checked."""
    if unknown := set(ops) - set(rules):
        raise GraphError(f"unknown fused ops {sorted(unknown)}; known are {', '.join(rules)}")
    chosen = [rule for op, rule in rules.items() if op in ops]
    graph = replace(
        graph, functions={n: fuse(f, chosen) for n, f in graph.functions.items()}, main=fuse(graph.main, chosen)
    )
    check(graph)
    return graph


def fuse(function: Function, rules: Iterable[Rule]) -> Function:
    """The function after each rule in turn, wherever it matches."""
    rewriter = _Rewriter(function)
    for rule in rules:
        rewriter.apply(rule)
    return replace(function, equations=tuple(e for slot in rewriter.slots for e in slot))


def definition(equations: Iterable[Equation]) -> tuple[Equation, ...]:
    """The equations with each fused one replaced by its body."""
    return tuple([b for e in equations for b in (e.body or (e,))])


def expand(function: Function) -> Function:
    """The function with every fused equation replaced by its definition."""
    return replace(function, equations=definition(function.equations))


class _Rewriter:
    """A function's equations in their order, with the maker and the users of each value by its name.

    A slot holds what stands in the place of one equation: none, itself, or a fused one and what moved behind that.
    """

    def __init__(self, function: Function) -> None:
        self.slots = [[e] for e in function.equations]
        self.slot_of: dict[int, int] = {}  # by id
        self.maker: dict[str, Equation] = {}
        self.users: dict[str, list[Equation]] = defaultdict(list)
        self.results = {v.name for v in function.outs}
        for n, e in enumerate(function.equations):
            self._add(e, n)

    def apply(self, rule: Rule) -> None:
        ops = rule.lines[0].ops
        for n in range(len(self.slots)):
            for e in self.slots[n]:
                anchor: Equation | None = e
                while anchor and anchor.op in ops and id(anchor) in self.slot_of:
                    anchor = self._match(rule, {}, {}, 0, [anchor])

    def _match(
        self, rule: Rule, group: dict[int, Equation], bound: Bound, n: int, candidates: Sequence[Equation]
    ) -> Equation | None:
        """The new equation where line n is one of the candidates, and the lines that follow in the plan are found."""
        line, rest = rule.lines[n], rule.plan[len(group) :]
        for e in candidates:
            if e.op not in line.ops or (group and any(e is other for other in group.values())):
                continue
            for inputs in _orders(e):
                new, now = line.bind(e.outs, inputs, bound), {**group, n: e}
                if new is None:
                    continue
                if rest:
                    number, name, makes = rest[0]
                    found = self._match(rule, now, new, number, self._candidates(new[name], makes))
                else:
                    found = self._fuse(rule, [now[i] for i in range(len(now))], new)
                if found:
                    return found
        return None

    def _candidates(self, value: Any, makes: bool) -> Sequence[Equation]:
        if not isinstance(value, Value):
            return ()
        return self.users[value.name] if not makes else [self.maker[value.name]] if value.name in self.maker else ()

    def _fuse(self, rule: Rule, group: list[Equation], bound: Bound) -> Equation | None:
        """The new equation in the group's place, unless others use what it does not give."""
        outs: list[Value] = []
        for name in rule.results:
            outs += bound[name] if name[0] == "*" else (bound[name],)
        kept, members = {v.name for v in outs}, {id(e) for e in group}
        for v in [v for e in group for v in e.outs if v.name not in kept]:
            if v.name in self.results or not members.issuperset(map(id, self.users[v.name])):
                return None
        for o in [bound[name] for name in rule.inputs]:
            if isinstance(o, Value) and id(self.maker.get(o.name)) in members:
                return None
        equation = rule.make(rule.op, group, tuple(outs))
        return equation if equation and self._replace(group, equation) else None

    def _replace(self, group: list[Equation], equation: Equation) -> bool:
        """The new equation in place of the group's last one, and what comes too early for it moved behind it.

        False where it would need its own result.
        """
        members = {id(e) for e in group}
        at = [self.slot_of[n] for n in members]
        begin, end = min(at), max(at)
        last = max(n for n, e in enumerate(self.slots[end]) if id(e) in members)
        head, tail = self.slots[end][:last], self.slots[end][last + 1 :]
        late, moved = {v.name for v in equation.outs}, []
        for e in [e for slot in (*self.slots[begin:end], head) for e in slot if id(e) not in members]:
            if not late.isdisjoint(_values(e)):
                moved.append(e)
                late.update([v.name for v in e.outs])
        if not late.isdisjoint(_values(equation)):
            return False
        gone = members | {id(e) for e in moved}
        self.slots[begin:end] = [[e for e in slot if id(e) not in gone] for slot in self.slots[begin:end]]
        self.slots[end] = [*(e for e in head if id(e) not in gone), equation, *moved, *tail]
        self.slot_of.update((id(e), end) for e in moved)
        for e in group:
            del self.slot_of[id(e)]
            for name in _values(e):
                self.users[name] = [user for user in self.users[name] if user is not e]
        self._add(equation, end)
        return True

    def _add(self, e: Equation, slot: int) -> None:
        self.slot_of[id(e)] = slot
        for v in e.outs:
            self.maker[v.name] = e
        for name in _values(e):
            self.users[name].append(e)


def _values(e: Equation) -> list[str]:
    return [o.name for o in e.inputs if isinstance(o, Value)]


def _orders(e: Equation) -> Sequence[tuple[Operand, ...]]:
    return (e.inputs, (e.inputs[1], e.inputs[0], *e.inputs[2:])) if e.op in COMMUTATIVE else (e.inputs,)
