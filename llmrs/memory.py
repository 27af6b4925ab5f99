"""The memory plan of a model: bytes of weights and KV cache against the device's memory. Nothing is allocated."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from llmrs.backends.base import DTYPE_BYTES, SCALE_BYTES
from llmrs.config import EngineConfig
from llmrs.core.errors import ConfigError, MemoryLimitError
from llmrs.core.ir import Graph
from llmrs.quant.ggml import TYPES
from llmrs.quant.tensor import FORMATS, Stored

DEFAULT_MAX_LEN = 4096  # tokens of prompt and answer without max_model_len
MIN_LEN = 2  # one token of prompt, one of answer


@dataclass(frozen=True)
class WeightMemory:
    """What the weights take in memory."""

    nbytes: int
    formats: str  # in memory, the largest first
    dense: int = 0  # weights that are held in the dtype of activations
    unpacked_from: str = ""  # size and formats before, where the backend unpacks them

    @staticmethod
    def of(stored: Iterable[Stored], dtype: str, *, keeps_quantized: bool, in_situ: bool = False) -> "WeightMemory":
        """`keeps_quantized`: of the backend. `in_situ`: whether they are quantized at load."""
        before, after, dense = Counter[str](), Counter[str](), 0
        for s in stored:
            count = math.prod(s.shape)
            before[s.format] += TYPES[s.format].nbytes(s.shape) if s.expanded else s.nbytes
            if s.is_dense or s.expanded or not keeps_quantized:
                dense += count
                after[dtype] += count * DTYPE_BYTES[dtype]
            else:
                after[s.format] += s.nbytes
        note = " (quantized at load)" if in_situ else ""
        if keeps_quantized or all(name in FORMATS for name in before):
            return WeightMemory(after.total(), _names(after) + note, dense)
        return WeightMemory(after.total(), dtype, dense, f"{format_bytes(before.total())} in {_names(before)}{note}")

    def in_16_bits(self, dtype: str) -> int:
        """Bytes with activations in bf16 instead of `dtype`."""
        return self.nbytes - self.dense * (DTYPE_BYTES[dtype] - DTYPE_BYTES["bf16"])


def _names(sizes: Counter[str]) -> str:
    return ", ".join(name for name, _ in sizes.most_common())


@dataclass(frozen=True)
class MemoryPlan:
    """What was requested, what is free, and what is allocated. Sizes are bytes, lengths are tokens."""

    dtype: str
    kv_dtype: str
    weights: WeightMemory
    kv_bytes_per_token: int  # all layers
    available: int  # before the weights are loaded: device_free, bounded by memory_limit
    kv_budget: int
    block_size: int
    model_max_len: int  # the model's max_position_embeddings
    requested_len: int  # max_model_len or the default
    explicit: bool  # max_model_len is set: it must not be shortened
    max_num_seqs: int
    device_free: int = 0
    required: int = 0  # free bytes that one sequence of requested_len takes; 0: kv_cache_memory decides
    quant_advice: str = ""  # where the model does not fit
    quant_fits: bool = False  # whether a quantization does

    @property
    def weight_bytes(self) -> int:
        return self.weights.nbytes

    @property
    def fits(self) -> bool:
        """Whether the weights, and a sequence as long as requested, or of any length, have room."""
        return self.weight_bytes <= self.available and self.max_model_len > 0

    @property
    def max_blocks(self) -> int:
        """KV blocks that fit into the budget."""
        return self.kv_budget // (self.kv_bytes_per_token * self.block_size)

    @property
    def max_len_one_seq(self) -> int:
        """The longest context that fits for one sequence."""
        return min(self.model_max_len, self.max_blocks * self.block_size)

    @property
    def max_model_len(self) -> int:
        """The context length of a request; 0 where the requested one does not fit."""
        if self._blocks_for(self.requested_len) <= self.max_blocks:
            return self.requested_len
        return 0 if self.explicit or self.max_len_one_seq < MIN_LEN else self.max_len_one_seq

    @property
    def max_concurrency(self) -> int:
        """Sequences of full length that fit together, regardless of max_num_seqs."""
        return self.max_blocks // self._blocks_for(self.max_model_len or self.requested_len)

    @property
    def num_blocks(self) -> int:
        """KV blocks to allocate: max_num_seqs full contexts, or as many as fit."""
        return min(self._blocks_for(self.max_model_len) * self.max_num_seqs, self.max_blocks)

    @property
    def complete(self) -> bool:
        """Whether weights, requested length and max_num_seqs full contexts all fit."""
        full = self.max_model_len == self.requested_len and self.max_concurrency >= self.max_num_seqs
        kv_bytes = self.num_blocks * self.block_size * self.kv_bytes_per_token
        return full and self.weight_bytes + kv_bytes <= self.available

    def check(self) -> None:
        """Raises MemoryLimitError where the model can't run as requested."""
        hint = next(iter(self.advice()), "")
        length = self.requested_len
        if self.weight_bytes > self.available:
            free = format_bytes(self.available)
            room = f"memory_limit allows {free}" if self._limited() else f"{free} are free"
            needs = f"the weights need {format_bytes(self.weight_bytes)} in {self.weights.formats}, and {room}"
            whole = f"; {format_bytes(self.required)} with a context of {length} tokens" if self.required else ""
            raise MemoryLimitError(needs + whole, hint)
        if not self.max_model_len:
            needs = f"one sequence of {length} tokens needs {format_bytes(length * self.kv_bytes_per_token)}"
            raise MemoryLimitError(f"{needs} of KV cache, and {format_bytes(self.kv_budget)} may be used", hint)

    def advice(self) -> list[str]:
        """Remedies, the best first; empty when the plan is complete."""
        if self.weight_bytes > self.available:
            return self._weight_advice()
        lines = []
        if self.max_model_len != self.requested_len:
            lines = self._length_advice()
        elif self.max_concurrency < self.max_num_seqs:
            lines = self._concurrency_advice()
        if self.weight_bytes + self.kv_budget > self.available and not self.complete:
            lines.append(f"the weights leave {format_bytes(self.available - self.weight_bytes)} free")
        if not self.max_model_len:
            lines += [*self._limit_advice(), *self._quant_advice()]
        return lines or ([] if self.complete else ["give the KV cache more memory: kv_cache_memory, memory_fraction"])

    def table(self) -> list[tuple[str, str]]:
        """Rows of title and text."""
        length, budget = self.max_model_len or self.requested_len, format_bytes(self.kv_budget)
        weights = f"{format_bytes(self.weight_bytes)} in {self.weights.formats}"
        if before := self.weights.unpacked_from:
            weights = f"{before}; unpacked to {self.dtype}: {format_bytes(self.weight_bytes)}"
        rows = [
            ("weights", weights),
            ("KV cache", f"{format_bytes(1000 * self.kv_bytes_per_token)} per 1,000 tokens in {self.kv_dtype}"),
            ("free", f"{format_bytes(self.available)}; {budget} may be used for the KV cache"),
            ("max length", f"{self.max_len_one_seq:,} tokens for one sequence; the model has {self.model_max_len:,}"),
            ("concurrency", f"{self.max_concurrency:,} of {length:,} tokens; max_num_seqs is {self.max_num_seqs:,}"),
        ]
        return [*rows, *(("advice", line) for line in self.advice())]

    def _weight_advice(self) -> list[str]:
        smaller = self.weights.in_16_bits(self.dtype)
        in_bf16 = smaller <= self.available and smaller < self.weight_bytes
        lines = [f"dtype: bf16 needs {format_bytes(smaller)}"] if in_bf16 else []
        quant, limit = self._quant_advice(), self._limit_advice()
        return [*lines, *(quant + limit if self.quant_fits else limit + quant)] or ["use a smaller model"]

    def advising(self, plans: Mapping[str, "MemoryPlan"]) -> "MemoryPlan":
        """This plan of a model that does not fit, with the name of a quantization with which it does.

        `plans`: those of quantizations by name, the most bits first.
        """
        smaller = {name: p for name, p in plans.items() if p.weight_bytes < self.weight_bytes}
        fitting = {name: p for name, p in smaller.items() if p.fits}
        full = [name for name, p in fitting.items() if p.max_model_len == p.requested_len]
        if name := next(iter([*full, *fitting]), ""):
            context = "" if full else f" with a context of {plans[name].max_model_len} tokens"
            size = format_bytes(plans[name].weight_bytes)
            advice = f"{name} would need {size} and fits{context}: --quant {name}"
            return replace(self, quant_advice=advice, quant_fits=True)
        if not smaller or self.weight_bytes <= self.available:
            return self
        name = min(smaller, key=lambda n: smaller[n].weight_bytes)
        size = format_bytes(smaller[name].weight_bytes)
        return replace(self, quant_advice=f"no quantization fits: even {name} would need {size}")

    def _quant_advice(self) -> list[str]:
        return [self.quant_advice] if self.quant_advice else []

    def _limit_advice(self) -> list[str]:
        fits = self._limited() and self.available < self.required <= self.device_free
        return [f"memory_limit of at least {self.required} has room for {self.requested_len} tokens"] if fits else []

    def _limited(self) -> bool:
        return self.device_free > self.available

    def _length_advice(self) -> list[str]:
        lines = [f"max_model_len of at most {self.max_len_one_seq} fits"] if self.max_len_one_seq >= MIN_LEN else []
        in_bf16 = self.kv_bytes_per_token // DTYPE_BYTES[self.kv_dtype] * DTYPE_BYTES["bf16"]
        longer = self.kv_budget // (in_bf16 * self.block_size) * self.block_size
        if in_bf16 < self.kv_bytes_per_token and longer >= MIN_LEN:
            lines.append(f"kv_cache_dtype: bf16 makes room for {min(longer, self.model_max_len)} tokens")
        return lines

    def _concurrency_advice(self) -> list[str]:
        lines = [f"max_num_seqs of at most {self.max_concurrency} has room for full contexts"]
        length = self.max_blocks // self.max_num_seqs * self.block_size
        if length >= MIN_LEN:
            lines.append(f"max_model_len of at most {length} lets {self.max_num_seqs} run at once")
        return lines

    def _blocks_for(self, length: int) -> int:
        return -(-length // self.block_size)


def plan_memory(
    graph: Graph, weights: WeightMemory, config: EngineConfig, model_max_len: int, block_size: int,
    dtypes: tuple[str, str], device_free: int, workspace: int = 0,
) -> MemoryPlan:  # fmt: skip
    """The plan for a device with `device_free` bytes, before the weights are loaded.

    `dtypes` are the backend's for activations and KV cache; `workspace` are bytes that steps need.
    Raises ConfigError for a max_model_len above `model_max_len`.
    """
    per_token = kv_bytes_per_token(graph, dtypes[1])
    available, length = min(device_free, config.memory_limit or device_free), requested_length(config, model_max_len)
    kv_bytes = -(-length // block_size) * block_size * per_token
    required = weights.nbytes + workspace + math.ceil(kv_bytes / config.memory_fraction) + 1  # the budget is rounded
    budget = int(max(available - weights.nbytes - workspace, 0) * config.memory_fraction)
    return MemoryPlan(
        *dtypes,
        weights=weights, kv_bytes_per_token=per_token, available=available,
        kv_budget=config.kv_cache_memory or budget, block_size=block_size, model_max_len=model_max_len,
        requested_len=length, explicit=config.max_model_len is not None, max_num_seqs=config.max_num_seqs,
        device_free=device_free, required=0 if config.kv_cache_memory else required,
    )  # fmt: skip


def kv_bytes_per_token(graph: Graph, dtype: str) -> int:
    """Bytes of KV cache per token, all layers."""
    scale = SCALE_BYTES if dtype == "fp8" else 0
    return 2 * sum(heads * (size * DTYPE_BYTES[dtype] + scale) for heads, size in (t.sizes for t in graph.kv_types()))


def requested_length(config: EngineConfig, model_max_len: int) -> int:
    """Tokens of prompt and answer together. Raises ConfigError for a max_model_len above the model's."""
    length = config.max_model_len or min(model_max_len, DEFAULT_MAX_LEN)
    if length > model_max_len:
        problem = f"max_model_len: {length} is more than the model's context of {model_max_len} tokens"
        raise ConfigError(problem, f"use at most {model_max_len}")
    return length


def format_bytes(count: int) -> str:
    if count >= 1e8:
        return f"{count / 1e9:.2f} GB"
    return f"{count / 1e6:.2f} MB" if count >= 1e5 else f"{count / 1e3:.2f} kB"
