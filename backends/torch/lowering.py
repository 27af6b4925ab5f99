"""Turns a graph's equations into a list of calls with their weights bound, layer by layer."""

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from functools import cached_property
from typing import Any

import torch

from llmrs.backends.linearize import Flat, Placed
from llmrs.backends.torch import ops
from llmrs.backends.torch.cpu_linear import Linear, make_linear
from llmrs.core.ir import Equation, Graph, Weight
from llmrs.quant.tensor import Tensor

ROWWISE = {
    "linear",
    "merged_linear",
    "rms_norm",
    "add",
    "fused_add_rms_norm",
    "mul_scalar",
    "silu_and_mul",
    "gelu_and_mul",
    "moe",
}  # row by row
VECTORS = (
    "rms_norm",
    "fused_add_rms_norm",
    "qk_norm_rope_write_kv",
)  # ops whose weights are vectors, taken as they are


@dataclass(frozen=True)
class Call:
    """One lowered equation: results at `outs` from the values at `inputs`. Values are numbered within a program."""

    op: str
    rule: Callable[..., Any]
    inputs: list[int]
    outs: list[int]
    weights: tuple[Any, ...] = ()  # at most one: what the rule takes after its values
    params: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Program:
    """Calls in their order; `results` are the numbers of the graph's results."""

    calls: list[Call]
    count: int
    results: list[int]

    def run(self, context: Any, inputs: Sequence[Any]) -> list[Any]:
        """The results for the graph's inputs. `context` is what the rules know beside their inputs."""
        values: list[Any] = [None] * self.count
        values[: len(inputs)] = inputs
        for call, dead in zip(self.calls, self.dead, strict=True):
            result = call.rule(context, *[values[n] for n in call.inputs], *call.weights, **call.params)
            if len(call.outs) == 1:
                values[call.outs[0]] = result
            else:
                for n, one in zip(call.outs, result, strict=True):
                    values[n] = one
            for n in dead:  # its memory is the next ones'
                values[n] = None
        return [values[n] for n in self.results]

    def run_once(self, context: Any, inputs: Sequence[Any]) -> list[Any]:
        """As `run`, but of calls that differ in their values alone only the first is made: layers are alike. For what
        a call does beside its result: kernels are compiled and loaded, libraries choose theirs.
        """
        values: list[Any] = [None] * self.count
        values[: len(inputs)] = inputs
        made: dict[Hashable, Any] = {}
        for call, kind in zip(self.calls, self.kinds, strict=True):
            given = [values[n] for n in call.inputs]
            key = kind, tuple(getattr(x, "shape", None) for x in given)
            if key not in made:
                result = call.rule(context, *given, *call.weights, **call.params)
                made[key] = [result] if len(call.outs) == 1 else result
            for n, one in zip(call.outs, made[key], strict=True):
                values[n] = one
        return [values[n] for n in self.results]

    @cached_property
    def kinds(self) -> list[Hashable]:
        """For each call what it does, but for values: rule, parameters, shapes of weights."""
        return [(call.rule, _kind(call.weights), _kind(call.params)) for call in self.calls]

    @cached_property
    def dead(self) -> list[list[int]]:
        """For each call, the values that it is the last to read, or that nobody reads."""
        last = {n: at for at, call in enumerate(self.calls) for n in (*call.outs, *call.inputs)}
        found: list[list[int]] = [[] for _ in self.calls]
        for n, at in last.items():
            if n not in self.results:
                found[at].append(n)
        return found


def _kind(x: Any) -> Hashable:
    """What a kernel may depend on: shapes, strides and types of tensors, all else by its value."""
    match x:
        case torch.Tensor():
            return x.shape, x.stride(), x.dtype
        case dict():
            return tuple((name, _kind(value)) for name, value in x.items())
        case list() | tuple():
            return tuple(map(_kind, x))
    return (type(x), _kind(vars(x))) if is_dataclass(x) else x


def join_layers(program: Program, rules: Mapping[str, Callable[..., Any]]) -> Program:
    """With each `add` at the end of a layer and the norm at the beginning of the next one in one call.

    `backends/fusion.py` fuses within a layer only, since a layer is written once for all.
    """
    calls: list[Call] = []
    for call in program.calls:
        before = calls[-1] if calls else None
        if before and before.op == "add" and call.op == "rms_norm" and call.inputs == before.outs:
            outs = [*before.outs, *call.outs]
            calls[-1] = Call(
                "fused_add_rms_norm", rules["fused_add_rms_norm"], before.inputs, outs, call.weights, call.params
            )
        else:
            calls.append(call)
    return Program(calls, program.count, program.results)


def last_early(program: Program) -> Program:
    """With `gather_logits_rows` right after the last attention, so that the ops after it skip a prompt's other rows."""
    at = next(n for n, call in enumerate(program.calls) if call.op == "gather_logits_rows")
    begin = at
    while begin and program.calls[begin - 1].op in ROWWISE:
        begin -= 1
    (last, *rest), rows = program.calls[at:], program.calls[begin:at]
    made = {n for call in rows for n in call.outs}
    read = {n for call in rest for n in call.inputs} | set(program.results)
    if last.inputs[0] not in made or made & read:
        return program
    taken = dict.fromkeys(n for call in rows for n in call.inputs if n not in made)
    new = dict(zip(taken, range(program.count, program.count + len(taken)), strict=True))
    new[last.outs[0]] = last.inputs[0]
    calls = [
        *program.calls[:begin],
        *(Call("gather_logits_rows", last.rule, [n], [new[n]]) for n in taken),
        *(replace(call, inputs=[new.get(n, n) for n in call.inputs]) for call in (*rows, *rest)),
    ]
    return Program(calls, program.count + len(taken), program.results)


class Lowering:
    """Lowers one graph for a device, a type and a table of rules."""

    def __init__(
        self,
        graph: Graph,
        rules: Mapping[str, Callable[..., Any]],
        device: torch.device,
        dtype: torch.dtype,
        weights: Mapping[str, Tensor],
        progress: Callable[[int], None],
        prepare: Callable[..., Linear] = make_linear,
    ) -> None:
        """`prepare` makes what computes a linear map from its weight and bias."""
        self.graph, self.rules, self.device, self.dtype = graph, rules, device, dtype
        self.weights, self.progress, self.prepare = weights, progress, prepare
        # a tied head shares the embeddings; the rest must not be kept, since a packed copy takes its place
        self.shared = {w for w, uses in Counter(graph.weights()).items() if uses > 1}
        self.loaded: dict[Weight, torch.Tensor] = {}
        self.size = 0  # bytes of the weights

    def program(self) -> Program:
        flat = Flat(self.graph)
        calls = [self._call(placed) for placed in flat.placed]
        self.loaded.clear()
        return Program(calls, flat.count, flat.results)

    def _call(self, placed: Placed) -> Call:
        bound = (self._bound(placed.equation, placed.weights),) if placed.weights else ()
        op = placed.equation.op
        return Call(op, self.rules[op], list(placed.inputs), list(placed.outs), bound, placed.params)

    def _bound(self, e: Equation, weights: Sequence[Weight]) -> Any:
        """What an equation's rule takes for its weights: functions for matrices and tables, tensors for vectors."""
        op, rule = e.op, self.rules[e.op]
        if op == "embed":
            return self._table(weights[0])
        if op == "moe":
            return self._experts(*weights)
        tensors = [self._tensor(w) for w in weights]
        if rule is ops.rms_norm:
            return ops.Norm.of(tensors[0])
        if rule is ops.qk_norm_rope_write_kv:
            heads = [o.type.sizes[0] for o in (e.inputs[0], e.inputs[3])]  # of q and k
            return ops.head_norms(tensors, heads, e.params.get("offset", 0.0))
        if op in VECTORS:
            return tensors[0] if len(tensors) == 1 else tuple(tensors)
        return self.prepare(tensors[0], *tensors[1:])

    def _table(self, weight: Weight) -> Any:
        """A function to rows from token ids, or the tensor for a kernel.

        On the CPU rows are read from the file, so that a packed head needs no second copy.
        """
        kernel = self.rules["embed"] is not ops.embed
        if self.device.type == "cpu" and len(weight.segments) == 1 and not kernel:
            rows, dtype = _torch_view(self.weights[weight.segments[0].tensor]), self.dtype
            return lambda tokens: rows[tokens].to(dtype)
        table = self._tensor(weight)
        return table if kernel else lambda tokens: table[tokens]

    def _experts(self, router: Weight, *stacks: Weight) -> ops.Experts:
        """Every expert's matrices by themselves; a segment holds one expert, or several."""
        count = router.type.sizes[0]
        split = [[m for w in _segments(s) for m in self._tensor(w).split(s.type.sizes[0] // count)] for s in stacks]
        return ops.Experts(
            self._tensor(router),
            [(make_linear(g), make_linear(u), make_linear(d)) for g, u, d in zip(*split, strict=True)],
        )

    def _tensor(self, weight: Weight) -> torch.Tensor:
        if weight in self.loaded:
            return self.loaded[weight]
        found = [self.weights[s.tensor] for s in weight.segments]
        parts = [_torch_view(t).to(self.device, self.dtype) for t in found]
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
        self.progress(sum(t.nbytes for t in found))
        self.size += tensor.nbytes
        if weight in self.shared:
            self.loaded[weight] = tensor
        return tensor


def _segments(weight: Weight) -> list[Weight]:
    return [Weight((segment,), weight.columns) for segment in weight.segments]


def _torch_view(tensor: Tensor) -> torch.Tensor:
    """The file's own memory as a torch tensor."""
    data = torch.from_numpy(tensor.data)
    return data.view(torch.bfloat16) if tensor.format == "bf16" else data
