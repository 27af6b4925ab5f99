"""Whether a model fits: the memory that its weights and its KV cache need, and what there is. Nothing is allocated."""

import math
from dataclasses import dataclass

from llmrs.backends.base import DTYPE_BYTES, SCALE_BYTES
from llmrs.config import EngineConfig
from llmrs.core.errors import ConfigError, MemoryLimitError
from llmrs.core.ir import Graph
from llmrs.models.files.weights import num_parameters

DEFAULT_CONTEXT = 4096  # tokens of prompt and answer, where the user does not say and the model allows it
SHORTEST = 2  # tokens of a context: one of a prompt, one of an answer


@dataclass(frozen=True)
class Fit:
    """What was asked for, what there is, and what becomes of it. Sizes are bytes, lengths are tokens."""

    dtype: str
    kv_dtype: str
    weights: int
    token: int  # of KV cache per token, all layers
    free: int  # on the device, before the weights are there
    usable: int  # for the KV cache
    block_size: int
    context: int  # that the model has
    wanted: int  # length of a context that was asked for, or the default
    fixed: bool  # it was asked for: it must not be shortened
    sequences: int  # max_num_seqs
    there: int = 0  # on the device, of which memory_limit may allow less
    needed: int = 0  # that would have to be free for one sequence of `wanted`; 0: kv_cache_memory decides

    @property
    def possible(self) -> int:
        """Blocks of KV cache that may be allocated."""
        return self.usable // (self.token * self.block_size)

    @property
    def longest(self) -> int:
        """The longest context that fits for one sequence."""
        return min(self.context, self.possible * self.block_size)

    @property
    def length(self) -> int:
        """The context that a request gets; 0 where it can't get what was asked for."""
        if self._each(self.wanted) <= self.possible:
            return self.wanted
        return 0 if self.fixed or self.longest < SHORTEST else self.longest

    @property
    def at_once(self) -> int:
        """Sequences of `length` that fit at once, whatever max_num_seqs is; of `wanted` where that is 0."""
        return self.possible // self._each(self.length or self.wanted)

    @property
    def blocks(self) -> int:
        """Blocks to allocate: what max_num_seqs full contexts need, or as many as may be."""
        return min(self._each(self.length) * self.sequences, self.possible)

    @property
    def complete(self) -> bool:
        """Whether all is as asked for: the weights, the context, and max_num_seqs such contexts at once."""
        whole = self.length == self.wanted and self.at_once >= self.sequences
        return whole and self.weights + self.blocks * self.block_size * self.token <= self.free

    def check(self) -> None:
        """Raises MemoryLimitError where the model can't run as asked."""
        hint = next(iter(self.advice()), "")
        if self.weights > self.free:
            room = f"memory_limit allows {size(self.free)}" if self._limited() else f"{size(self.free)} are free"
            needs = f"the weights need {size(self.weights)} in {self.dtype}, and {room}"
            whole = f"; {size(self.needed)} with a context of {self.wanted} tokens" if self.needed else ""
            raise MemoryLimitError(needs + whole, hint)
        if not self.length:
            needs = f"one sequence of {self.wanted} tokens needs {size(self.wanted * self.token)} of KV cache"
            raise MemoryLimitError(f"{needs}, and {size(self.usable)} may be used", hint)

    def advice(self) -> list[str]:
        """What would help, the best first; empty when all is as asked for."""
        if self.weights > self.free:
            return self._about_weights()
        found = []
        if self.length != self.wanted:
            found = self._about_length()
        elif self.at_once < self.sequences:
            found = self._about_sequences()
        if self.weights + self.usable > self.free and not self.complete:
            found.append(f"the weights leave {size(self.free - self.weights)} free")
        return found + self._about_limit() if not self.length else found

    def table(self) -> list[tuple[str, str]]:
        """Rows of a name and what is to be said."""
        rows = [
            ("weights", f"{size(self.weights)} in {self.dtype}"),
            ("KV cache", f"{size(1000 * self.token)} per 1,000 tokens in {self.kv_dtype}"),
            ("free", f"{size(self.free)}; {size(self.usable)} may be used for the KV cache"),
            ("longest", f"{self.longest:,} tokens for one sequence; the model has {self.context:,}"),
            (
                "at once",
                f"{self.at_once:,} of {self.length or self.wanted:,} tokens; max_num_seqs is {self.sequences:,}",
            ),
        ]
        return [*rows, *(("advice", line) for line in self.advice())]

    def _about_weights(self) -> list[str]:
        smaller = self.weights // DTYPE_BYTES[self.dtype] * DTYPE_BYTES["bf16"]
        if smaller <= self.free and smaller < self.weights:
            return [f"dtype: bf16 needs {size(smaller)}", *self._about_limit()]
        return self._about_limit() or ["use a smaller model"]

    def _about_limit(self) -> list[str]:
        fits = self._limited() and self.free < self.needed <= self.there
        return [f"memory_limit of at least {self.needed} has room for {self.wanted} tokens"] if fits else []

    def _limited(self) -> bool:
        return self.there > self.free

    def _about_length(self) -> list[str]:
        found = [f"max_model_len of at most {self.longest} fits"] if self.longest >= SHORTEST else []
        halved = self.token // DTYPE_BYTES[self.kv_dtype] * DTYPE_BYTES["bf16"]
        if halved < self.token and (longer := self.usable // (halved * self.block_size) * self.block_size) >= SHORTEST:
            found.append(f"kv_cache_dtype: bf16 makes room for {min(longer, self.context)} tokens")
        return found or ["give the KV cache more memory: kv_cache_memory, memory_fraction"]

    def _about_sequences(self) -> list[str]:
        found = [f"max_num_seqs of at most {self.at_once} has room for full contexts"]
        each = self.possible // self.sequences * self.block_size
        if each >= SHORTEST:
            found.append(f"max_model_len of at most {each} lets {self.sequences} run at once")
        return found

    def _each(self, length: int) -> int:
        """Blocks of one sequence."""
        return -(-length // self.block_size)


def fit(
    graph: Graph,
    config: EngineConfig,
    context: int,
    block_size: int,
    dtypes: tuple[str, str],
    free: int,
    reserve: int = 0,
) -> Fit:
    """How a model fits where `free` bytes are free. `dtypes` are those of the weights and the KV cache in the backend.

    `reserve` are the bytes that steps need for themselves.

    Raises ConfigError for a max_model_len beyond the model's `context`.
    """
    weights, token = num_parameters(graph) * DTYPE_BYTES[dtypes[0]], token_bytes(graph, dtypes[1])
    there, free = free, min(free, config.memory_limit or free)
    wanted = context_length(config, context)
    cache = -(-wanted // block_size) * block_size * token
    needed = weights + reserve + math.ceil(cache / config.memory_fraction) + 1  # which is rounded
    return Fit(
        dtype=dtypes[0],
        kv_dtype=dtypes[1],
        weights=weights,
        token=token,
        free=free,
        usable=config.kv_cache_memory or int(max(free - weights - reserve, 0) * config.memory_fraction),
        block_size=block_size,
        context=context,
        wanted=wanted,
        fixed=config.max_model_len is not None,
        sequences=config.max_num_seqs,
        there=there,
        needed=0 if config.kv_cache_memory else needed,
    )


def token_bytes(graph: Graph, dtype: str) -> int:
    """Bytes of KV cache per token, all layers."""
    scale = SCALE_BYTES if dtype == "fp8" else 0
    return 2 * sum(heads * (size * DTYPE_BYTES[dtype] + scale) for heads, size in (t.sizes for t in graph.kv_types()))


def context_length(config: EngineConfig, context: int) -> int:
    """Tokens of prompt and answer together. Raises ConfigError when the user asks for more than the model has."""
    if config.max_model_len is None:
        return min(context, DEFAULT_CONTEXT)
    if config.max_model_len > context:
        raise ConfigError(
            f"max_model_len: {config.max_model_len} is more than the model's context of {context} tokens",
            f"use at most {context}",
        )
    return config.max_model_len


def size(count: int) -> str:
    """Bytes in words."""
    if count >= 1e8:
        return f"{count / 1e9:.2f} GB"
    return f"{count / 1e6:.2f} MB" if count >= 1e5 else f"{count / 1e3:.2f} kB"
