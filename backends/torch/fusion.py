"""The programs for steps of few rows: each matrix with what stands before and after it in one call, `rows`.

    linear, merged_linear or head                     becomes  rows
    rows, and silu_and_mul or gelu_and_mul of its parts becomes  rows with a gate
    rows, and the sum with something else       becomes  rows that add        (fused_add_rms_norm: with a norm after it)

and for one row, where a product may do the norm before it too (`before`),

    rms_norm, and rows of it                    becomes  rows with a norm before it

They share their weights with the program that they are made from, which defines them. A layer of Qwen3, Llama or
Mistral is left with four of them, and rope and attention between. The rule decides what a call launches: one kernel, or
what the calls would have launched apart. This is not done to the graph, since a step's rows decide which program runs,
and since a layer's sum and the next one's norm are neighbours only here.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from llmrs.backends.torch.lowering import Call, Program

GATES = ("silu_and_mul", "gelu_and_mul")
MATRICES = ("linear", "merged_linear", "lm_head")
Rule = Callable[..., Any]
Merge = Callable[[Call, Call], list[Call] | None]


@dataclass(frozen=True)
class Norm:
    """rms_norm by a weight (K,), as it stands before or after a matrix."""

    weight: torch.Tensor
    params: dict[str, float]  # eps, and offset where there is one


def fuse(program: Program, rules: dict[str, Rule], before: Callable[[Any], bool] | None = None) -> Program:
    """`rules` has those of `rows` and `rms_norm`. `before`: whether the norm before a matrix is part of its call."""

    def with_sum(made: Call, call: Call) -> list[Call] | None:
        total = _with_sum(made, call)
        return _norm_apart(total[0], rules["rms_norm"]) if total and before else total

    def with_norm(made: Call, call: Call) -> list[Call] | None:
        return _with_norm(made, call) if before and call.op == "rows" and before(call.weights[0][0]) else None

    taken = [m for m in MATRICES if m != "lm_head" or not before]  # for one row the head's own rule is cut for its size
    calls = [_as_rows(c, rules["rows"]) if c.op in taken else c for c in program.calls]
    for merge in (_with_gate, with_sum, with_norm):
        calls = _merged(calls, program.results, merge)
    return Program(calls, program.count, program.results)


def _as_rows(call: Call, rule: Rule) -> Call:
    (matrix,), sizes = call.weights, call.params.get("rows", [])
    return Call("rows", rule, call.inputs, call.outs, ((matrix, None, None),), {"sizes": sizes})


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


def _with_sum(made: Call, call: Call) -> list[Call] | None:
    plain = made.op == "rows" and len(made.outs) == len(made.inputs) == 1 and "gate" not in made.params
    if not plain or call.op not in ("add", "fused_add_rms_norm"):
        return None
    (other,) = (n for n in call.inputs if n not in made.outs)
    after = Norm(call.weights[0], call.params) if call.op == "fused_add_rms_norm" else None
    weights = ((made.weights[0][0], None, after),)
    return [replace(made, inputs=[*made.inputs, other], outs=call.outs, weights=weights, params={})]


def _norm_apart(call: Call, norm: Rule) -> list[Call]:
    matrix, before, after = call.weights[0]
    if after is None:
        return [call]
    total, normed = call.outs
    rest = Call("rms_norm", norm, [total], [normed], (after.weight,), after.params)
    return [replace(call, outs=[total], weights=((matrix, before, None),)), rest]


def _with_norm(made: Call, call: Call) -> list[Call] | None:
    if made.op != "rms_norm" or call.inputs[0] not in made.outs:
        return None
    matrix, _, after = call.weights[0]
    norm = Norm(made.weights[0], made.params)
    return [replace(call, inputs=[*made.inputs, *call.inputs[1:]], weights=((matrix, norm, after),))]
