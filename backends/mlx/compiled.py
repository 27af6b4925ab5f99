"""Decode steps of one shape are traced once and replayed: MLX then builds the graph without Python and fuses ops.

A trace costs several graph builds, so it is made only for decode-only steps whose shape repeats. The number of keys is
part of the shape; it is rounded up to KEY_BUCKET so that it changes rarely.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from llmrs.backends.mlx.attention import KV, ArrayKey, Context, LazyArrays
from llmrs.backends.mlx.lowering import Program

KEY_BUCKET = 64
TRACE_AFTER = 4  # consecutive steps of one shape

Pools = list[tuple[mx.array, mx.array]]  # keys and values of each layer
Traced = Callable[[list[mx.array], list[mx.array], Pools], tuple[mx.array, Pools]]


class CompiledSteps:
    """Runs the decode-only steps of a program."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.shape: tuple[int, ...] = ()
        self.repeats = 0
        self.traced: Traced | None = None
        self.keys: list[list[ArrayKey]] = []  # arrays that the program reads, per `_sources`

    def run(self, context: Context, inputs: list[Any]) -> mx.array:
        """Same result as `Program.run`."""
        shape = (len(context.query_lens), context.max_seq_len)
        if shape != self.shape:
            self.shape, self.repeats, self.traced = shape, 0, None
        self.repeats += 1
        if self.repeats < TRACE_AFTER:
            logits = self.program.run(context, inputs)
            self.keys = [list(source.arrays) for source in _sources(context)]
            return logits
        kv: list[KV] = inputs[2:]
        if self.traced is None:
            self.traced = mx.compile(_tracer(self.program, context, self.keys, [c.heads for c in kv]))
        arrays = [s.array(*key) for s, keys in zip(_sources(context), self.keys, strict=True) for key in keys]
        logits, written = self.traced(inputs[:2], arrays, [(c.keys, c.values) for c in kv])
        for cache, pools in zip(kv, written, strict=True):
            cache.keys, cache.values = pools
        return logits


def _tracer(program: Program, example: Context, keys: list[list[ArrayKey]], heads: list[int]) -> Traced:
    """The program as a function of arrays alone, for steps of the example's shape; `heads`: KV heads per layer."""
    batch, block_size, key_bucket = example.batch, example.block_size, example.key_bucket

    def run(tokens: list[mx.array], arrays: list[mx.array], pools: Pools) -> tuple[mx.array, Pools]:
        context, remaining = Context(batch, block_size, key_bucket), iter(arrays)
        for source, names in zip(_sources(context), keys, strict=True):
            source.arrays = {name: next(remaining) for name in names}
            source.frozen = True
        kv = [KV(*pair, n) for pair, n in zip(pools, heads, strict=True)]
        logits = program.run(context, [*tokens, *kv])
        return logits, [(c.keys, c.values) for c in kv]

    return run


def _sources(context: Context) -> list[LazyArrays]:
    (group,) = context.groups
    return [context, group]
