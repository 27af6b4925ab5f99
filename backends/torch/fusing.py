"""The program for steps of few rows: each matrix with what stands before and after it in one call, `rows`.

    linear, linears or head                     becomes  rows
    rows, and silu_mul or gelu_mul of its parts becomes  rows with a gate
    rows, and the sum with something else       becomes  rows that add        (add_norm: and a norm)
    rms_norm, and rows of it                    becomes  rows with a norm

It shares its weights with the program that it is made from, which defines it. A layer of Qwen3, Llama or Mistral is
left with four of them, and rope and attention between. This is not done to the graph, since a step's rows decide which
program runs, and since a layer's sum and the next one's norm are neighbours only here.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from llmrs.backends.torch.lowering import Call, Program

GATES = ("silu_mul", "gelu_mul")
MATRICES = ("linear", "linears", "head")
Rule = Callable[..., Any]
Merge = Callable[[Call, Call], list[Call] | None]


def fuse(program: Program, rules: dict[str, Rule]) -> Program:
    """`rules` has those of `rows` and `rms_norm`."""

    def with_sum(made: Call, call: Call) -> list[Call] | None:
        return _with_sum(made, call, rules["rms_norm"])

    calls = [_as_rows(c, rules["rows"]) if c.op in MATRICES else c for c in program.calls]
    for merge in (_with_gate, with_sum, _with_norm):
        calls = _merged(calls, program.results, merge)
    return Program(calls, program.count, program.results)


def _as_rows(call: Call, rule: Rule) -> Call:
    (matrix,), sizes = call.weights, call.params.get("rows", [])
    return Call("rows", rule, call.inputs, call.outs, ((matrix, None),), {"sizes": sizes})


def _merged(calls: Sequence[Call], results: Sequence[int], merge: Merge) -> list[Call]:
    """The calls, with `merge` of two where the second is all that sees what the first gives."""
    uses = Counter([n for c in calls for n in c.inputs] + list(results))
    makers = {n: c for c in calls for n in c.outs}
    found: list[Call] = []
    for call in calls:
        new = [call]
        for made in {id(m): m for n in call.inputs if (m := makers.get(n))}.values():
            seen = all(uses[n] == call.inputs.count(n) == 1 for n in made.outs)
            merged = merge(made, call) if seen else None
            if merged:
                found = [c for c in found if c is not made]
                new = merged
                uses.subtract([*made.inputs, *call.inputs])
                uses.update(n for c in new for n in c.inputs)
                break
        found += new
        makers.update({n: c for c in new for n in c.outs})
    return found


def _with_gate(made: Call, call: Call) -> list[Call] | None:
    if made.op != "rows" or call.op not in GATES or call.inputs != made.outs:
        return None
    return [replace(made, outs=call.outs, params={"gate": call.op})]


def _with_sum(made: Call, call: Call, norm: Rule) -> list[Call] | None:
    if made.op != "rows" or len(made.outs) != 1 or call.op not in ("add", "add_norm") or "gate" in made.params:
        return None
    (other,) = (n for n in call.inputs if n not in made.outs)
    total = replace(made, inputs=[*made.inputs, other], outs=call.outs[:1], params={})
    if call.op == "add":
        return [total]
    return [total, Call("rms_norm", norm, call.outs[:1], call.outs[1:], call.weights, call.params)]


def _with_norm(made: Call, call: Call) -> list[Call] | None:
    if made.op != "rms_norm" or call.op != "rows" or call.inputs[0] not in made.outs:
        return None
    (((matrix, _),), (weight,)) = call.weights, made.weights
    inputs = [*made.inputs, *call.inputs[1:]]
    return [replace(call, inputs=inputs, weights=((matrix, weight),), params={**call.params, **made.params})]
