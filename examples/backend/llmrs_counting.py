"""A backend in an external package: the reference backend, counting the operations of each op.

pip install ./examples/backend
llmrs run --backend counting --prompts "Hello" --max-tokens 8
"""

import sys
from collections import Counter
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import numpy as np

from llmrs.backends.reference.backend import ReferenceBackend
from llmrs.backends.reference.ops import OPS, Context

operations: Counter[str] = Counter()  # floating-point operations by op, of all engines of this process


def fused_add_rms_norm(
    c: Context, x: np.ndarray, y: np.ndarray, w: np.ndarray, **params: Any
) -> tuple[np.ndarray, np.ndarray]:
    """A fused op; its definition is in llmrs.backends.fusion."""
    total = OPS["add"](c, x, y)
    return total, OPS["rms_norm"](c, total, w, **params)


def counted(op: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps an op's function to count operations: 2 M N K for a GEMM, else one per element."""

    @wraps(function)
    def run(context: Context, x: np.ndarray, *rest: Any, **params: Any) -> Any:
        operations[op] += 2 * len(x) * rest[0].size if op in ("linear", "lm_head") else x.size
        return function(context, x, *rest, **params)

    return run


class CountingBackend(ReferenceBackend):
    """Adds one fused op to the reference backend, and wraps every function of the table."""

    name = "counting"
    fused_ops = frozenset({"fused_add_rms_norm"})
    ops_table: Mapping[str, Callable[..., Any]] = {
        op: counted(op, f) for op, f in {**OPS, "fused_add_rms_norm": fused_add_rms_norm}.items()
    }

    def close(self) -> None:
        super().close()
        for op, count in operations.most_common():
            print(f"{op:10}{count:>16,} operations", file=sys.stderr)
        operations.clear()
