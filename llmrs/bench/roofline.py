"""Roofline model: bytes and FLOPs of a step, and the least time that a device's peaks allow for them."""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmrs.core.ir import Equation, Graph, Weight
from llmrs.memory import kv_bytes_per_token

if TYPE_CHECKING:
    from llmrs.engine import Engine

# Bytes of a weight. Q8_0 and Q4_K are GGUF's blocks: 34 bytes for 32, 144 for 256.
WEIGHT_BYTES = {"f32": 4.0, "bf16": 2.0, "f16": 2.0, "q8_0": 34 / 32, "q4k": 144 / 256}


@dataclass(frozen=True)
class Device:
    """Peaks of a device: memory bandwidth in bytes/s, matrix units in half-precision FLOP/s."""

    name: str
    bandwidth: float
    flops: float

    @staticmethod
    def of(engine: "Engine") -> "Device":
        """Measures the peaks of an engine's device. Raises BackendError."""
        config, worker = engine.config, engine._worker
        return Device(f"{config.backend} {config.device}", *worker.run_on_device_thread(lambda b: b.measure_peak()))

    def roofline_time(self, nbytes: float, flops: float) -> float:
        """Seconds: the larger of memory and compute time."""
        return max(nbytes / self.bandwidth, flops / self.flops)


class Rates:
    """Rates that follow from a measurement."""

    tokens: int
    seconds: float
    roofline_time: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def fraction_of_roofline(self) -> float:
        return self.roofline_time / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Measurement(Rates):
    """One line of a table."""

    name: str
    tokens: int
    seconds: float
    roofline_time: float


@dataclass(frozen=True)
class ModelCost:
    """Cost of a token. A step reads all weights once, and the KV cache of each sequence; embeddings are looked up.

    MoE layers read the activated experts (`expected_active_fraction`).
    """

    num_weights: int  # elements, all experts included, embeddings only if tied
    kv_bytes_per_token: int
    attention_flops: int  # per query-key pair, all layers
    lm_head_weights: int = 0  # run for the last token of a prompt only
    windows: tuple[tuple[int, float], ...] = ((0, 1.0),)  # sliding window (0: full), fraction of the layers
    expert_weights: int = 0
    active_fraction: float = 1.0  # of the experts, for one token

    @staticmethod
    def of(graph: Graph, kv_dtype: str = "bf16") -> "ModelCost":
        """The cost of an unfused graph."""
        weights = [(op, math.prod(shape)) for op, shape in _weight_shapes(graph) if op != "embed"]
        layers = [graph.functions[e.params["function"]] for e in graph.main.equations if e.op == "call"]
        attends = [e for f in layers for e in f.equations if e.op == "attend"]
        windows = Counter(e.params.get("window", 0) for e in attends)
        moes = [moe_cost(e) for f in layers for e in f.equations if e.op == "moe"]
        expert_weights = sum(count for count, _ in moes)
        return ModelCost(
            num_weights=sum(count for _, count in weights),
            kv_bytes_per_token=kv_bytes_per_token(graph, kv_dtype),
            attention_flops=4 * sum(math.prod(e.inputs[0].type.sizes) for e in attends),
            lm_head_weights=sum(count for op, count in weights if op == "lm_head"),
            windows=tuple((window, count / len(attends)) for window, count in windows.items()),
            expert_weights=expert_weights,
            active_fraction=sum(count * part for count, part in moes) / expert_weights if moes else 1.0,
        )

    def decode_time(self, device: Device, dtype: str, num_seqs: int, context: int) -> float:
        """Roofline seconds of a decode step for sequences of `context` tokens."""
        return self.step_time(device, dtype, num_seqs, num_seqs * self.keys_seen(context))

    def step_time(self, device: Device, dtype: str, num_seqs: int, keys: float) -> float:
        """Roofline seconds of a decode step whose sequences attend to `keys` tokens in total."""
        nbytes = self._weights_read(num_seqs) * WEIGHT_BYTES[dtype] + keys * self.kv_bytes_per_token
        return device.roofline_time(nbytes, num_seqs * 2 * self._active_weights() + keys * self.attention_flops)

    def prefill_time(self, device: Device, dtype: str, *prompt_lens: int) -> float:
        """Roofline seconds of prefill: causal attention, and one logits row per prompt."""
        per_token = 2 * (self._active_weights() - self.lm_head_weights)
        flops = sum(
            n * per_token + 2 * self.lm_head_weights + self.causal_pairs(n) * self.attention_flops for n in prompt_lens
        )
        return device.roofline_time(self._weights_read(sum(prompt_lens)) * WEIGHT_BYTES[dtype], flops)

    def workload_time(self, device: Device, dtype: str, lengths: Sequence[tuple[int, int]]) -> float:
        """Roofline seconds of requests of (prompt, output) tokens that start at once and all run together.

        One prefill gives the first output tokens, one decode step each further one.
        """
        num_seqs: Counter[int] = Counter()  # by decode step
        keys: dict[int, float] = defaultdict(float)
        for prompt_len, output_len in lengths:
            for n in range(1, output_len):
                num_seqs[n] += 1
                keys[n] += self.keys_seen(prompt_len + n)
        prefill = self.prefill_time(device, dtype, *(prompt_len for prompt_len, _ in lengths))
        return prefill + sum(self.step_time(device, dtype, count, keys[n]) for n, count in num_seqs.items())

    def keys_seen(self, context: int) -> float:
        """Keys that a token attends to, the mean of all layers."""
        return sum(part * min(context, window or context) for window, part in self.windows)

    def causal_pairs(self, tokens: int) -> float:
        """Query-key pairs of a prompt, the mean of all layers."""
        reach = [(min(tokens, window or tokens), part) for window, part in self.windows]
        return sum(part * (near * tokens - near * near / 2) for near, part in reach)

    def _weights_read(self, tokens: int) -> float:
        return self.num_weights - self.expert_weights * (1 - expected_active_fraction(self.active_fraction, tokens))

    def _active_weights(self) -> float:
        """Weights that one token uses."""
        return self.num_weights - self.expert_weights * (1 - self.active_fraction)


def moe_cost(e: Equation) -> tuple[int, float]:
    """Weights of all experts, and the fraction of them that one token activates."""
    router, *stacks = (o.type.sizes for o in e.inputs if isinstance(o, Weight))
    return sum(map(math.prod, stacks)), e.params["top_k"] / router[0]


def expected_active_fraction(active_fraction: float, tokens: int) -> float:
    """The fraction of experts that `tokens` activate together, with uniform routing."""
    return 1 - (1 - active_fraction) ** tokens


def _weight_shapes(graph: Graph) -> list[tuple[str, tuple[int, ...]]]:
    """Op and shape of every weight of every layer."""
    shapes = []
    for e in graph.main.equations:
        body = graph.functions[e.params["function"]].equations if e.op == "call" else (e,)
        shapes += [(b.op, o.type.sizes) for b in body for o in b.inputs if o.type.dtype == "weight"]
    return shapes
