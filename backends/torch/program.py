"""What runs in each step: a function of the graph as a list of calls, with weights bound and values numbered."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, is_dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch


@dataclass(frozen=True)
class Call:
    """One lowered equation: results at `outs` from the values at `inputs`. Values are numbered within a program."""

    op: str
    fn: Callable[..., Any]
    inputs: list[int]
    outs: list[int]
    weights: tuple[Any, ...] = ()  # at most one argument, after the values
    params: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Program:
    """Calls in their order; the first numbers are the inputs', `results` are the results'."""

    calls: list[Call]
    count: int
    results: list[int]

    def run(self, context: Any, inputs: Sequence[Any]) -> list[Any]:
        """The results for the graph's inputs. `context`: what ops need of a step besides their inputs."""
        values: list[Any] = [None] * self.count
        values[: len(inputs)] = inputs
        for call, dead in zip(self.calls, self.dead_after, strict=True):
            result = call.fn(context, *[values[n] for n in call.inputs], *call.weights, **call.params)
            if len(call.outs) == 1:
                values[call.outs[0]] = result
            else:
                for n, one in zip(call.outs, result, strict=True):
                    values[n] = one
            for n in dead:  # frees its memory
                values[n] = None
        return [values[n] for n in self.results]

    def run_once(self, context: Any, inputs: Sequence[Any]) -> list[Any]:
        """As `run`, but calls that differ only in their values, as in layers that are alike, run once.

        Compiles and loads kernels; the results mean nothing.
        """
        values: list[Any] = [None] * self.count
        values[: len(inputs)] = inputs
        made: dict[Hashable, Any] = {}
        for call, kind in zip(self.calls, self.kinds, strict=True):
            given = [values[n] for n in call.inputs]
            key = kind, tuple(getattr(x, "shape", None) for x in given)
            if key not in made:
                result = call.fn(context, *given, *call.weights, **call.params)
                made[key] = [result] if len(call.outs) == 1 else result
            for n, one in zip(call.outs, made[key], strict=True):
                values[n] = one
        return [values[n] for n in self.results]

    @cached_property
    def kinds(self) -> list[Hashable]:
        """For each call all that a kernel depends on but its values: function, params, shapes of weights."""
        return [(call.fn, _kind(call.weights), _kind(call.params)) for call in self.calls]

    @cached_property
    def dead_after(self) -> list[list[int]]:
        """For each call, the values that no later call reads."""
        last = {n: at for at, call in enumerate(self.calls) for n in (*call.outs, *call.inputs)}
        dead: list[list[int]] = [[] for _ in self.calls]
        for n, at in last.items():
            if n not in self.results:
                dead[at].append(n)
        return dead


class Programs(NamedTuple):
    """A model's programs: for any step, for one row, and for small batches."""

    full: Program
    single_token: Program
    small_batch: Program


NO_PROGRAMS = Programs(*[Program([], 0, [])] * 3)


def _kind(x: Any) -> Hashable:
    """Shapes, strides and types of tensors; all else by its value."""
    match x:
        case torch.Tensor():
            return x.shape, x.stride(), x.dtype
        case dict():
            return tuple((name, _kind(value)) for name, value in x.items())
        case list() | tuple():
            return tuple(map(_kind, x))
    return (type(x), _kind(vars(x))) if is_dataclass(x) else x
