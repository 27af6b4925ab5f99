"""What each equation of a decode step must move and compute, and which kernels do it: a floor for every kernel.

The floor of an equation is what it would take alone, with its inputs read from memory and its results written there.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from llmrs.backends.base import DTYPE_BYTES, KernelEvent
from llmrs.backends.linearize import inline
from llmrs.bench.roofline import Device, experts_of, met
from llmrs.core.ir import Equation, Graph, S, T, Type, Value, Weight
from llmrs.memory import token_bytes

LINEAR = ("linear", "merged_linear", "lm_head")
NORM = ("rms_norm", "fused_add_rms_norm")
# Kernels of cuBLAS, SDPA and oneDNN, and torch's ops on a CPU -> the ops that they compute; the first match counts.
# Of the kernels that share an op (split-K and its reduction) only one has the op.
VENDOR_KERNELS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"splitk.*reduce|reduce.*splitk|memcpy|memset", ()),
    (r"gemm|gemv|nvjet|cutlass|_linear_pointwise|aten::(linear|addmm|mm|matmul)$", LINEAR),
    (r"scaled_dot_product|flash", ("attend",)),
)


@dataclass(frozen=True)
class Cost:
    """An equation of a step: bytes that it must move, operations that it must do."""

    op: str
    label: str
    bytes: float
    operations: float = 0.0

    def floor(self, device: Device) -> float:
        """Seconds."""
        return max(self.bytes / device.bandwidth, self.operations / device.operations)


@dataclass(frozen=True)
class Kernel:
    """A kernel's part of a step; `floor` is None where it is not known which equation it computes."""

    name: str
    what: str
    count: float  # per step
    seconds: float  # per step
    floor: float | None = None


def costs(graph: Graph, dtypes: tuple[str, str], batch: int, context: int) -> list[Cost]:
    """Of a decode step of a lowered graph, in order, sampling last; `dtypes` are those of weights and of the cache."""
    elements = 2 * sum(math.prod(t.sizes) for t in graph.kv_types())
    each = DTYPE_BYTES[dtypes[0]], token_bytes(graph, dtypes[1]) / elements
    found = [_cost(e, each, batch, context) for e in inline(graph).equations]
    logits = graph.main.outs[0].type.sizes[0]
    return [*found, Cost("sample", "sample", batch * logits * each[0])]


def _cost(e: Equation, each: tuple[float, float], batch: int, context: int) -> Cost:
    """`each` are the bytes of an element of weights and values, and of the KV cache with what belongs to it."""
    own, cached = each
    weights = [o for o in e.inputs if isinstance(o, Weight)]
    moved = sum(_bytes(o.type, own, batch) for o in (*e.inputs, *e.outs) if isinstance(o, Value))
    stored = 2 * sum(math.prod(o.type.sizes) for o in e.outs if o.type.dtype == "kv")  # K and V of a token
    moved += batch * stored * cached
    if e.op == "embed":  # only the rows of the step's tokens are read
        return Cost(e.op, e.op, moved + batch * weights[0].type.sizes[1] * own)
    if e.op == "attend":
        q, cache = e.inputs[0].type.sizes, e.inputs[1].type.sizes
        keys = batch * min(context, e.params.get("window") or context)
        return Cost(e.op, e.op, moved + 2 * math.prod(cache) * keys * cached, 4 * math.prod(q) * keys)
    size = sum(math.prod(w.type.sizes) for w in weights)
    label = " ".join([e.op, *("x".join(map(str, w.type.sizes)) for w in weights[:1])])
    if e.op == "moe":
        experts, chosen = experts_of(e)
        read, through = (size - experts * (1 - part) for part in (met(chosen, batch), chosen))
        return Cost(e.op, label, moved + read * own, 2 * batch * through)
    return Cost(e.op, label, moved + size * own, 2 * batch * size if e.op in LINEAR else 0)


def _bytes(t: Type, own: float, batch: int) -> float:
    """Of a value of the step; a cache is none."""
    if t.dtype == "kv":
        return 0
    return (own if t.dtype == "act" else 4) * math.prod(batch if d in (T, S) else int(d) for d in t.shape)


def ops_of(name: str) -> tuple[str, ...]:
    """The ops that a kernel of this name computes; () if unknown."""
    if name.endswith("_kernel") and name in (own := _triton_kernels()):
        return own[name]
    return next((ops for pattern, ops in VENDOR_KERNELS if re.search(pattern, name, re.IGNORECASE)), ())


@cache
def _triton_kernels() -> dict[str, tuple[str, ...]]:
    try:
        from llmrs.backends.torch.triton_ops import KERNEL_OPS
    except ImportError:
        return {}
    return KERNEL_OPS


def joined(found: Sequence[Cost]) -> list[Cost]:
    """With each `add` and the norm right after it as one, which reads the sum from where it has just been made."""
    merged: list[Cost] = []
    for cost in found:
        if cost.op == "rms_norm" and merged and merged[-1].op == "add":
            merged[-1] = Cost(
                "fused_add_rms_norm",
                f"fused_add_rms_norm{cost.label.removeprefix('rms_norm')}",
                merged[-1].bytes * 4 / 3,
            )
        else:
            merged.append(cost)
    return merged


def kernels(ran: Sequence[KernelEvent], steps: int, found: Sequence[Cost], device: Device) -> list[Kernel]:
    """The kernels of so many equal steps, the longest first, each beside the floor of what it computes.

    Where a step has as many kernels of a kind (matrix products) as equations of it, the first is the first's, and so
    on; else the kind has one row, with the floors of all.
    """
    by_ops: dict[tuple[str, ...], list[KernelEvent]] = {}
    for r in ran:
        by_ops.setdefault(ops_of(r.name), []).append(r)
    if NORM in by_ops:  # our own kernels: they add and norm in one, between layers too
        found = joined(found)
    rows: list[Kernel] = []
    for ops, group in by_ops.items():
        due = [c for c in found if c.op in ops]
        if due and len(group) == steps * len(due):
            pairs = [(r.name, c.label, r, c.floor(device)) for r, c in zip(group, due * steps, strict=True)]
            rows += _rows(pairs, steps)
        elif due:
            rows.append(_together(group, due, steps, device))
        else:
            rows += _rows([(r.name, "", r, None) for r in group], steps)
    return sorted(rows, key=lambda k: -k.seconds)


def _rows(pairs: Sequence[tuple[str, str, KernelEvent, float | None]], steps: int) -> list[Kernel]:
    """One row for each name and label."""
    groups: dict[tuple[str, str], list[tuple[KernelEvent, float | None]]] = {}
    for name, label, r, floor in pairs:
        groups.setdefault((name, label), []).append((r, floor))
    found = []
    for (name, label), group in groups.items():
        floors = [floor for _, floor in group if floor is not None]
        seconds = sum(r.end - r.begin for r, _ in group)
        floor = sum(floors) / steps if floors else None
        found.append(Kernel(name, label, len(group) / steps, seconds / steps, floor))
    return found


def _together(group: Sequence[KernelEvent], due: Sequence[Cost], steps: int, device: Device) -> Kernel:
    names = list(dict.fromkeys(r.name for r in group))
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    seconds = sum(r.end - r.begin for r in group)
    what = ", ".join(dict.fromkeys(c.op for c in due))
    floor = sum(c.floor(device) for c in due)
    return Kernel(names[0] + more, what, len(group) / steps, seconds / steps, floor)
