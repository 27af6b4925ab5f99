"""Rules of `fused_linear`: a linear map with what stands before and after it in one call.

    [rms_norm ->] linear | merged_linear | lm_head [-> silu_and_mul | gelu_and_mul] [-> add | fused_add_rms_norm]

The op decides what a call launches: one kernel, or what the equations would launch by themselves. A norm before it
(prologue) is for one row alone, where each CTA can do it; there the sum's own norm belongs to the next linear map.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial

from llmrs.backends.fusion import FUSED_ADD_RMS_NORM, Rule, definition, fuse, inputs_of
from llmrs.core.ir import Equation, Function, Type, Value, Weight

OP = "fused_linear"
ACTIVATIONS = ("silu_and_mul", "gelu_and_mul")
CanFuseNorm = Callable[[Type], bool]  # whether the norm before a matrix of this type may be part of its call


def program_functions(function: Function, can_fuse_norm: CanFuseNorm) -> tuple[Function, Function, Function]:
    """The functions of `Programs`, from that of a model without sums fused with norms."""
    full = fuse(function, [FUSED_ADD_RMS_NORM])
    return full, fuse(function, single_token_rules(cache(can_fuse_norm))), fuse(full, SMALL_BATCH_RULES)


def fused_linear(op: str, group: Sequence[Equation], outs: tuple[Value, ...]) -> Equation | None:
    """Inputs x and the residual, if any; None where both are one value."""
    body = definition(group)
    ops = [b.op for b in body]
    activations = [name for name in ops if name in ACTIVATIONS]
    inputs = inputs_of(group)
    if len([o for o in inputs if isinstance(o, Value)]) != 1 + ("add" in ops):
        return None
    return Equation(op, inputs, outs, {"activation": activations[0]} if activations else {}, body)


def with_prologue(
    can_fuse_norm: CanFuseNorm, op: str, group: Sequence[Equation], outs: tuple[Value, ...]
) -> Equation | None:
    matrix = next(o for o in group[1].inputs if isinstance(o, Weight))
    return fused_linear(op, group, outs) if can_fuse_norm(matrix.type) else None


ACTIVATION = Rule(OP, f"g u = merged_linear x *w; h = {'|'.join(ACTIVATIONS)} g u -> h", fused_linear)
RESIDUAL = Rule(OP, "y = linear x *w; s = add r y -> s", fused_linear)
RESIDUAL_NORM = Rule(OP, "y = linear x *w; s *n = add|fused_add_rms_norm r y *v -> s *n", fused_linear)
PROLOGUE = Rule(OP, "n = rms_norm x v; *y = linear|merged_linear|fused_linear n *w -> *y")
SMALL_BATCH_RULES = (
    ACTIVATION,
    RESIDUAL_NORM,
    Rule(OP, "*y = linear|merged_linear|lm_head x *w -> *y", fused_linear),
)


def single_token_rules(can_fuse_norm: CanFuseNorm) -> tuple[Rule, ...]:
    """lm_head stays: its own op has launch configs for its size."""
    prologue = replace(PROLOGUE, make=partial(with_prologue, can_fuse_norm))
    rest = Rule(OP, "*y = linear|merged_linear x *w -> *y", fused_linear)
    return ACTIVATION, RESIDUAL, FUSED_ADD_RMS_NORM, prologue, rest
