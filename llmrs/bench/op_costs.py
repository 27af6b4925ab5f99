"""Bytes and FLOPs of each equation of a decode step, and the kernels that run it: a roofline time for every kernel.

An equation alone reads its inputs from memory and writes its results there.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from llmrs.backends.base import DTYPE_BYTES, KernelEvent
from llmrs.backends.linearize import inline
from llmrs.bench.roofline import Device, expected_active_fraction, moe_cost
from llmrs.core.ir import Equation, Graph, S, T, Type, Value, Weight
from llmrs.memory import kv_bytes_per_token

LINEAR = ("linear", "merged_linear", "lm_head")
NORM = ("rms_norm", "fused_add_rms_norm")
# Kernels of cuBLAS, SDPA and oneDNN, and torch's ops on a CPU -> the ops that they compute; the first match counts.
# Of the kernels that share an op (split-K and its reduction) only one has the op.
VENDOR_KERNELS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"splitk.*reduce|reduce.*splitk|memcpy|memset", ()),
    (r"gemm|gemv|nvjet|cutlass|_linear_pointwise|aten::(linear|addmm|mm|matmul)$", LINEAR),
    (r"scaled_dot_product|flash|llmrs_attend", ("attend",)),
    (r"llmrs_(linear|dense)", LINEAR),
    (r"llmrs_rms_norm", NORM),
    (r"llmrs_act_and_mul", ("silu_and_mul", "gelu_and_mul")),
    (r"llmrs_rope_write_kv", ("qk_norm_rope_write_kv", "rope_write_kv")),
)


@dataclass(frozen=True)
class OpCost:
    """An equation of a step: bytes moved and FLOPs."""

    op: str
    label: str
    bytes: float
    flops: float = 0.0


@dataclass(frozen=True)
class KernelStats:
    """A kernel's share of a step; `roofline_time` is None for an unknown op."""

    name: str
    what: str  # its equation
    count: float  # per step
    seconds: float  # per step
    roofline_time: float | None = None


def op_costs(graph: Graph, dtypes: tuple[str, str], num_seqs: int, context: int) -> list[OpCost]:
    """The equations of a decode step of a fused graph in order, then sampling; `dtypes` of weights and KV cache."""
    kv_elements = 2 * sum(math.prod(t.sizes) for t in graph.kv_types())
    itemsizes = DTYPE_BYTES[dtypes[0]], kv_bytes_per_token(graph, dtypes[1]) / kv_elements
    costs = [_op_cost(e, itemsizes, num_seqs, context) for e in inline(graph).equations]
    vocab_size = graph.main.outs[0].type.sizes[0]
    return [*costs, OpCost("sample", "sample", num_seqs * vocab_size * itemsizes[0])]


def _op_cost(e: Equation, itemsizes: tuple[float, float], num_seqs: int, context: int) -> OpCost:
    """`itemsizes` are bytes per element of weights and activations, and of the KV cache with its scales."""
    itemsize, kv_itemsize = itemsizes
    weights = [o for o in e.inputs if isinstance(o, Weight)]
    moved = sum(_bytes(o.type, itemsize, num_seqs) for o in (*e.inputs, *e.outs) if isinstance(o, Value))
    written = 2 * sum(math.prod(o.type.sizes) for o in e.outs if o.type.dtype == "kv")  # K and V of a token
    moved += num_seqs * written * kv_itemsize
    if e.op == "embed":  # reads the rows of the step's tokens
        return OpCost(e.op, e.op, moved + num_seqs * weights[0].type.sizes[1] * itemsize)
    if e.op == "attend":
        q, kv = e.inputs[0].type.sizes, e.inputs[1].type.sizes
        keys = num_seqs * min(context, e.params.get("window") or context)
        return OpCost(e.op, e.op, moved + 2 * math.prod(kv) * keys * kv_itemsize, 4 * math.prod(q) * keys)
    size = sum(math.prod(w.type.sizes) for w in weights)
    label = " ".join([e.op, *("x".join(map(str, w.type.sizes)) for w in weights[:1])])
    if e.op == "moe":
        experts, active = moe_cost(e)
        read, used = (size - experts * (1 - part) for part in (expected_active_fraction(active, num_seqs), active))
        return OpCost(e.op, label, moved + read * itemsize, 2 * num_seqs * used)
    return OpCost(e.op, label, moved + size * itemsize, 2 * num_seqs * size if e.op in LINEAR else 0)


def _bytes(t: Type, itemsize: float, num_seqs: int) -> float:
    """Of a value of the step, KV caches excluded."""
    if t.dtype == "kv":
        return 0
    return (itemsize if t.dtype == "act" else 4) * math.prod(num_seqs if d in (T, S) else int(d) for d in t.shape)


def ops_of(name: str) -> tuple[str, ...]:
    """The ops of a kernel of this name; empty if unknown."""
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


def merge_add_norms(costs: Sequence[OpCost]) -> list[OpCost]:
    """Merges each `add` with the norm after it, which then does not read the sum."""
    merged: list[OpCost] = []
    for cost in costs:
        if cost.op == "rms_norm" and merged and merged[-1].op == "add":
            label = f"fused_add_rms_norm{cost.label.removeprefix('rms_norm')}"
            merged[-1] = OpCost("fused_add_rms_norm", label, merged[-1].bytes * 4 / 3)
        else:
            merged.append(cost)
    return merged


def kernel_stats(
    events: Sequence[KernelEvent], steps: int, costs: Sequence[OpCost], device: Device
) -> list[KernelStats]:
    """The kernels of `steps` equal steps, the longest first, each with the roofline time of its ops.

    If a step has as many kernels of a kind (GEMMs) as equations of it, they are paired in order; otherwise the kind
    has one row with the sum of its roofline times.
    """
    by_ops: dict[tuple[str, ...], list[KernelEvent]] = {}
    for event in events:
        by_ops.setdefault(ops_of(event.name), []).append(event)
    if NORM in by_ops:  # our own kernels fuse add and norm, across layers too
        costs = merge_add_norms(costs)
    groups: dict[tuple[str, str], tuple[list[KernelEvent], list[OpCost]]] = {}  # by kernel and equation
    for ops, found in by_ops.items():
        own = [c for c in costs if c.op in ops]
        if own and len(found) != steps * len(own):
            names = list(dict.fromkeys(e.name for e in found))
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            groups[names[0] + more, ", ".join(dict.fromkeys(c.op for c in own))] = found, own * steps
            continue
        for n, event in enumerate(found):
            cost = own[n % len(own)] if own else None
            members, member_costs = groups.setdefault((event.name, cost.label if cost else ""), ([], []))
            members.append(event)
            member_costs += [cost] if cost else []
    rows = []
    for key, (members, member_costs) in groups.items():
        seconds = sum(e.end - e.begin for e in members) / steps
        roofline = sum(device.roofline_time(c.bytes, c.flops) for c in member_costs) / steps if member_costs else None
        rows.append(KernelStats(*key, len(members) / steps, seconds, roofline))
    return sorted(rows, key=lambda k: -k.seconds)
