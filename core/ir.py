"""The IR: what a model computes in one step, described once and lowered by every backend.

    graph    ::= function* main
    function ::= name(value, ...) -> (value, ...) { equation* }     a kind of layer, called once per layer
    equation ::= value, ... = op[params](operand, ...)              single assignment
    operand  ::= value | weight                                     a weight is a list of row segments
    type     ::= dtype[dim, ...]     dtype ::= act | f32 | i32 | kv | weight
    dim      ::= int | T | S         T: tokens of the step, S: its logits rows, at least one per sequence

`act` is the dtype of computation. The KV cache of a layer is a value: `write_kv` takes one and
gives the next, so that order and effects are explicit. `write_kv`, `attend` and `gather_logits_rows`
also read the step's Batch (block tables, lengths). `backends/reference` defines what each op computes.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from llmrs.core.errors import GraphError

Dim = int | str
T, S = "T", "S"


@dataclass(frozen=True)
class Type:
    """A dtype and a shape. For `kv` the shape is (KV heads, head_dim); paging is up to the backend."""

    dtype: str
    shape: tuple[Dim, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """The shape without T and S."""
        return tuple(d for d in self.shape if isinstance(d, int))

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Value:
    """A named value, assigned once by an equation or the function's signature."""

    name: str
    type: Type

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Segment:
    """Rows of a weight that come from one tensor of the file, and so have one form.

    Those of other segments may have another: a Q4_K_M file has q and k in Q4_K, and v in Q6_K.
    """

    tensor: str  # canonical name; "{i}" stands for the layer's index
    rows: int


@dataclass(frozen=True)
class Weight:
    """A matrix (rows, columns) or a vector (rows,), as segments stacked along the rows."""

    segments: tuple[Segment, ...]
    columns: tuple[int, ...] = ()

    @property
    def type(self) -> Type:
        return Type("weight", (sum(s.rows for s in self.segments), *self.columns))

    def __str__(self) -> str:
        names = [s.tensor.removeprefix("layers.{i}.") for s in self.segments]
        shown = "+".join(names) if len(names) < 4 else f"{names[0]}..{names[-1]}"
        return f"@{shown}{list(self.type.shape)}".replace(" ", "")


Operand = Value | Weight


@dataclass(frozen=True)
class Equation:
    """`outs = op[params](inputs)`. The `body` of a fused op is the equations that it replaces: its definition."""

    op: str
    inputs: tuple[Operand, ...]
    outs: tuple[Value, ...]
    params: dict[str, Any] = field(default_factory=dict)
    body: tuple["Equation", ...] = ()

    def __str__(self) -> str:
        params = ", ".join(f"{k}={v}" for k, v in self.params.items())
        outs = ", ".join(f"{v}: {v.type}" for v in self.outs)
        return f"{outs} = {self.op}{f'[{params}]' if params else ''}({', '.join(map(str, self.inputs))})"


@dataclass(frozen=True)
class Function:
    """Equations with a signature."""

    name: str
    inputs: tuple[Value, ...]
    outs: tuple[Value, ...]
    equations: tuple[Equation, ...]

    def __str__(self) -> str:
        head = f"{self.name}({', '.join(f'{v}: {v.type}' for v in self.inputs)}) -> ({', '.join(map(str, self.outs))}):"
        return "\n  ".join([head, *map(str, self.equations)])


@dataclass(frozen=True)
class Graph:
    """A model: `main` calls a layer's function once per layer, with `index` and that layer's KV cache."""

    name: str
    functions: dict[str, Function]
    main: Function

    def weights(self) -> Iterator[Weight]:
        """Every weight with its layer index, in order of use; tied weights come twice."""
        for e in self.main.equations:
            body = self.functions[e.params["function"]].equations if e.op == "call" else (e,)
            for operand in (o for b in body for o in b.inputs if isinstance(o, Weight)):
                yield at_layer(operand, e.params.get("index", 0))

    def kv_types(self) -> list[Type]:
        """The type of each layer's KV cache."""
        return [v.type for v in self.main.inputs if v.type.dtype == "kv"]

    def __str__(self) -> str:
        inputs = tuple(v for v in self.main.inputs if v.type.dtype != "kv")
        lines = [str(Function("main", inputs, self.main.outs[:1], ()))]
        for _, group in itertools.groupby(self.main.equations, lambda e: e.params.get("function", id(e))):
            first, *rest = group
            lines.append(_call_line(first, rest[-1] if rest else first) if first.op == "call" else str(first))
        return "\n\n".join([*map(str, self.functions.values()), "\n  ".join(lines)])


def _call_line(first: Equation, last: Equation) -> str:
    """One line for consecutive calls of one function."""
    indices = f"{first.params['index']}..{last.params['index']}"
    inputs = ", ".join(map(str, first.inputs[:-1]))
    return f"{first.outs[0]} .. {last.outs[0]}, kv = {first.params['function']}[{indices}]({inputs}, kv)"


def at_layer(weight: Weight, index: int) -> Weight:
    """The weight with `{i}` in its tensors' names replaced by the layer's index."""
    return Weight(tuple(Segment(s.tensor.replace("{i}", str(index)), s.rows) for s in weight.segments), weight.columns)


# Type rules: from input types and params to result types.

Rule = Callable[..., tuple[Type, ...]]
RULES: dict[str, Rule] = {}


def rule(op: str) -> Callable[[Rule], Rule]:
    """Registers the type rule of an op."""
    return lambda function: RULES.setdefault(op, function)


def _expect(true: bool, message: str) -> None:
    if not true:
        raise GraphError(message)


@rule("embed")  # rows of the table: tokens i32[T], table (V, D) -> act[T, D]
def _embed(tokens: Type, table: Type) -> tuple[Type, ...]:
    _expect(tokens == Type("i32", (T,)), f"tokens are {tokens}, not i32[T]")
    return (Type("act", (T, table.shape[1])),)


@rule("linear")  # x w^T (+ bias): act[n, K], (N, K) -> act[n, N]; shard: how it may be split over devices
def _linear(x: Type, w: Type, bias: Type | None = None, *, shard: str) -> tuple[Type, ...]:
    _expect(shard in ("rows", "columns", "none"), f"shard={shard}")
    _expect(len(w.shape) == len(x.shape) == 2 and x.shape[1] == w.shape[1], f"{x} does not fit {w}")
    _expect(bias is None or bias.shape == w.shape[:1], f"bias {bias} does not fit {w}")
    return (Type("act", (x.shape[0], w.shape[0])),)


@rule("mul_scalar")  # x * by, with `by` rounded to the dtype of x
def _mul_scalar(x: Type, *, by: float) -> tuple[Type, ...]:
    _expect(by > 0, f"by={by}")
    return (x,)


@rule("rms_norm")  # x / rms(x) * (w + offset) over the last dimension, in float32
def _rms_norm(x: Type, w: Type, *, eps: float, offset: float = 0.0) -> tuple[Type, ...]:
    _expect(x.shape[-1:] == w.shape and eps > 0, f"{x} does not fit {w}")
    return (x,)


@rule("heads")  # act[T, H*D] -> act[T, H, D], the same bytes
def _heads(x: Type, *, size: int) -> tuple[Type, ...]:
    _expect(len(x.shape) == 2 and len(x.sizes) == 1 and x.sizes[0] % size == 0, f"{x} has no heads of {size}")
    return (Type("act", (x.shape[0], x.sizes[0] // size, size)),)


@rule("rope")  # rotates the halves (x[d], x[d + D/2]) by positions * frequencies[d]
def _rope(x: Type, positions: Type, *, frequencies: "RopeFrequencies") -> tuple[Type, ...]:
    _expect(x.shape[-1] == 2 * len(frequencies.values), f"{x} does not fit {len(frequencies.values)} frequencies")
    _expect(positions == Type("i32", (T,)), f"positions are {positions}, not i32[T]")
    return (x,)


@rule("write_kv")  # writes keys and values act[T, H, D] of the step's tokens into the KV cache kv[H, D]
def _write_kv(k: Type, v: Type, kv: Type) -> tuple[Type, ...]:
    _expect(k == v and k.shape[1:] == kv.shape and kv.dtype == "kv", f"{k}, {v} do not fit {kv}")
    return (kv,)


@rule("attend")  # causal attention of act[T, Hq, D] over the last `window` tokens (0: all) -> act[T, Hq * D]
def _attend(q: Type, kv: Type, *, scale: float, window: int = 0) -> tuple[Type, ...]:
    _expect(window >= 0, f"window={window}")
    _expect(len(q.sizes) == 2 and q.sizes[1] == kv.sizes[1] and scale > 0, f"{q} does not fit {kv}")
    _expect(q.sizes[0] % kv.sizes[0] == 0, f"{q.sizes[0]} heads do not share {kv.sizes[0]} KV heads")
    return (Type("act", (q.shape[0], q.sizes[0] * q.sizes[1])),)


@rule("silu_and_mul")  # silu(gate) * up
@rule("gelu_and_mul")  # gelu(gate) * up, with tanh's approximation of gelu
def _gated(gate: Type, up: Type) -> tuple[Type, ...]:
    _expect(gate == up, f"{gate} is not {up}")
    return (gate,)


@rule("moe")  # each token through its top_k experts: router (E, D), gate, up (E*I, D), down (E*D, I)
def _moe(
    x: Type, router: Type, gate: Type, up: Type, down: Type, *, top_k: int, norm_topk_prob: bool
) -> tuple[Type, ...]:
    (count, width), inner = router.sizes, down.sizes[1]
    _expect(x.sizes == (width,) and 0 < top_k <= count, f"{x} does not fit router {router}")
    _expect(gate == up and gate.sizes == (count * inner, width), f"{gate}, {up} are not {count} experts")
    _expect(down.sizes[0] == count * width, f"{down} is not {count} experts")
    return (x,)


@rule("add")
def _add(x: Type, y: Type) -> tuple[Type, ...]:
    _expect(x == y, f"{x} is not {y}")
    return (x,)


@rule("gather_logits_rows")  # rows Batch.logits_indices: act[T, D] -> act[S, D]
def _gather_logits_rows(x: Type) -> tuple[Type, ...]:
    _expect(len(x.shape) == 2 and x.shape[0] == T, f"{x} is not act[T, D]")
    return (Type("act", (S, x.shape[1])),)


@rule("lm_head")  # logits: act[S, D], (V, D) -> f32[S, V]
def _lm_head(x: Type, w: Type) -> tuple[Type, ...]:
    _expect(len(x.shape) == 2 and x.shape[1] == w.shape[1], f"{x} does not fit {w}")
    return (Type("f32", (x.shape[0], w.shape[0])),)


@dataclass(frozen=True)
class RopeFrequencies:
    """RoPE frequencies in radians per position, one per pair of a head's elements; `scale` multiplies cos and sin."""

    label: str
    values: tuple[float, ...]
    scale: float = 1.0

    def __str__(self) -> str:
        return f"<{self.label}>"


def infer(e: Equation) -> tuple[Type, ...]:
    """The types of an equation's results. Raises GraphError for an unknown op or inputs that do not fit."""
    if e.body:  # a fused op: types of the values that its body assigns
        assigned = {v: t for b in e.body for v, t in zip(b.outs, infer(b), strict=True)}
        return tuple(assigned[v] for v in e.outs)
    _expect(e.op in RULES, f"unknown op {e.op!r}")
    try:
        return RULES[e.op](*(o.type for o in e.inputs), **e.params)
    except TypeError as error:
        raise GraphError(f"{e.op}: {error}") from error
    except GraphError as error:
        raise GraphError(f"{e.op}: {error.message}") from error


def check(graph: Graph) -> None:
    """Raises GraphError unless every value is assigned once, before its use, with the type that its rule gives."""
    for function in (*graph.functions.values(), graph.main):
        known = set(function.inputs)
        names = {v.name for v in function.inputs}
        _expect(len(names) == len(known) == len(function.inputs), f"{function.name}: two inputs have one name")
        for e in function.equations:
            unknown = [str(o) for o in e.inputs if isinstance(o, Value) and o not in known]
            _expect(not unknown, f"{function.name}: {', '.join(unknown)} used before it is assigned in: {e}")
            types = _check_call(graph, e) if e.op == "call" else infer(e)
            _expect(types == tuple(v.type for v in e.outs), f"{function.name}: wrong type in: {e}")
            _expect(not names & {v.name for v in e.outs}, f"{function.name}: assigned twice in: {e}")
            known.update(e.outs)
            names.update(v.name for v in e.outs)
        _expect(known >= set(function.outs), f"{function.name}: a result is never assigned")


def _check_call(graph: Graph, e: Equation) -> tuple[Type, ...]:
    function = graph.functions.get(e.params["function"])
    if function is None:
        raise GraphError(f"call of an unknown function: {e}")
    wanted, given = [v.type for v in function.inputs], [o.type for o in e.inputs]
    _expect(wanted == given, f"call does not fit the signature: {e}")
    return tuple(v.type for v in function.outs)
