"""Steps of one shape are traced once and replayed: MLX then builds their graph without Python, and fuses what it can.

A trace costs several steps' worth of building, so it is made when a shape has come a few times in a row, and only for
steps of one token a sequence. The number of keys is part of the shape; it is rounded up so that it changes rarely.
"""

from collections.abc import Callable
from copy import copy
from typing import Any

import mlx.core as mx

from llmrs.backends.mlx.attention import KV, Arrays, Context, Key
from llmrs.backends.mlx.lowering import Program

MULTIPLE = 64  # keys
WORTH_IT = 4  # steps of one shape, in a row

Traced = Callable[[list[mx.array], list[mx.array], list[mx.array]], tuple[mx.array, list[mx.array]]]


class CompiledSteps:
    """Runs a program's steps of single tokens."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.shape: tuple[int, ...] = ()
        self.seen = 0
        self.traced: Traced | None = None
        self.names: list[list[Key]] = []  # of the arrays that the program asks for, by `_sources`

    def run(self, context: Context, inputs: list[Any]) -> mx.array:
        """What `Program.run` gives."""
        shape = (len(context.counts), context.longest)
        if shape != self.shape:
            self.shape, self.seen, self.traced = shape, 0, None
        self.seen += 1
        if self.seen < WORTH_IT:
            logits = self.program.run(context, inputs)
            self.names = [list(source.arrays) for source in _sources(context)]
            return logits
        kv: list[KV] = inputs[2:]
        if self.traced is None:
            self.traced = mx.compile(_tracer(self.program, context, self.names, kv))
        arrays = [s.array(*n) for s, names in zip(_sources(context), self.names, strict=True) for n in names]
        logits, written = self.traced(inputs[:2], arrays, [x for c in kv for x in c.arrays()])
        found = iter(written)
        for cache in kv:
            cache.replace(found)
        return logits


def _tracer(program: Program, like: Context, names: list[list[Key]], kv: list[KV]) -> Traced:
    """The program as a function of arrays alone, for steps that are shaped like this one."""
    batch, block_size, multiple = like.batch, like.block_size, like.multiple

    def run(tokens: list[mx.array], arrays: list[mx.array], pools: list[mx.array]) -> Any:
        context, left = Context(batch, block_size, multiple), iter(arrays)
        for source, wanted in zip(_sources(context), names, strict=True):
            source.arrays = {name: next(left) for name in wanted}
            source.given = True
        given = iter(pools)
        caches = [copy(c).replace(given) for c in kv]
        logits = program.run(context, [*tokens, *caches])
        return logits, [x for c in caches for x in c.arrays()]

    return run


def _sources(context: Context) -> list[Arrays]:
    (part,) = context.parts
    return [context, part]
