"""Rules of `fused_linear`: a linear map with what stands before and after it in one call.

    [rms_norm ->] linear | merged_linear | lm_head [-> silu_and_mul | gelu_and_mul] [-> add | fused_add_rms_norm]

The op decides what a call launches: one kernel, or what the equations would launch by themselves. A norm before it
(prologue) is for one row alone, where each CTA can do it; there the sum's own norm belongs to the next linear map.
"""

from collections.abc import Sequence

from llmrs.backends.fusion import FUSED_ADD_RMS_NORM, Rule, definition, fuse, inputs_of
from llmrs.core.ir import Equation, Function, Value

OP = "fused_linear"
ACTIVATIONS = ("silu_and_mul", "gelu_and_mul")


def program_functions(function: Function) -> tuple[Function, Function, Function]:
    """The functions of `Programs`, from that of a model without sums fused with norms."""
    full = fuse(function, [FUSED_ADD_RMS_NORM])
    return full, fuse(function, SINGLE_TOKEN_RULES), fuse(full, SMALL_BATCH_RULES)


def fused_linear(op: str, group: Sequence[Equation], outs: tuple[Value, ...]) -> Equation | None:
    """Inputs x and the residual, if any; None where both are one value."""
    body = definition(group)
    ops = [b.op for b in body]
    activations = [name for name in ops if name in ACTIVATIONS]
    inputs = inputs_of(group)
    if len([o for o in inputs if isinstance(o, Value)]) != 1 + ("add" in ops):
        return None
    return Equation(op, inputs, outs, {"activation": activations[0]} if activations else {}, body)


ACTIVATION = Rule(OP, f"g u = merged_linear x *w; h = {'|'.join(ACTIVATIONS)} g u -> h", fused_linear)
RESIDUAL = Rule(OP, "y = linear x *w; s = add r y -> s", fused_linear)
RESIDUAL_NORM = Rule(OP, "y = linear x *w; s *n = add|fused_add_rms_norm r y *v -> s *n", fused_linear)
SMALL_BATCH_RULES = (
    ACTIVATION,
    RESIDUAL_NORM,
    Rule(OP, "*y = linear|merged_linear|lm_head x *w -> *y", fused_linear),
)
# lm_head stays: its own op has launch configs for its size
SINGLE_TOKEN_RULES = (
    ACTIVATION,
    RESIDUAL,
    FUSED_ADD_RMS_NORM,
    Rule(OP, "n = rms_norm x v; *y = linear|merged_linear|fused_linear n *w -> *y", fused_linear),
    Rule(OP, "*y = linear|merged_linear x *w -> *y", fused_linear),
)
