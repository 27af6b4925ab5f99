"""The speed of a model on paper: bytes and operations of a step, and the time that a device takes for them at least."""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmrs.core.ir import Equation, Graph, Weight
from llmrs.memory import token_bytes

if TYPE_CHECKING:
    from llmrs.engine import Engine

# Bytes of a weight. Q8_0 and Q4_K are GGUF's blocks: 34 bytes for 32, 144 for 256.
WEIGHT_BYTES = {"f32": 4.0, "bf16": 2.0, "f16": 2.0, "q8_0": 34 / 32, "q4k": 144 / 256}


@dataclass(frozen=True)
class Device:
    """What a device can do: bytes read per second, and operations per second of its matrix units in half precision."""

    name: str
    bandwidth: float
    operations: float

    @staticmethod
    def of(engine: "Engine") -> "Device":
        """What an engine's device can do, measured now. Raises BackendError."""
        config = engine.config
        return Device(f"{config.backend} {config.device}", *engine._worker.ask(lambda backend: backend.measure_peak()))


class Rated:
    """What a record of a measurement is by its rate, and by the least seconds that a device's ceilings allow."""

    tokens: int
    seconds: float
    floor: float

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds

    @property
    def share(self) -> float:
        """Of the ceiling that was reached."""
        return self.floor / self.seconds


@dataclass(frozen=True)
class Work:
    """What one token costs. A step reads all weights once, and each sequence's KV cache; embeddings are looked up.

    Of a mixture of experts it reads those that its tokens meet (`met`), and a token goes through `chosen` of them.
    """

    weights: int  # numbers that a step reads, all experts counted
    token: int  # bytes of KV cache of a token
    attention: int  # operations for each token and each key that it sees, all layers
    head: int = 0  # of the weights, those of logits: only the last token of a prompt goes through them
    windows: tuple[tuple[int, float], ...] = ((0, 1.0),)  # tokens that a layer sees (0: all), and the part of layers
    experts: int = 0  # of the weights, those of all experts
    chosen: float = 1.0  # the part of them that a token goes through

    @staticmethod
    def of(graph: Graph, kv_dtype: str = "bf16") -> "Work":
        """Of a plain graph, with a KV cache of this type."""
        used = [(op, math.prod(w)) for op, w in _weights(graph) if op != "embed"]
        calls = [graph.functions[e.params["function"]] for e in graph.main.equations if e.op == "call"]
        attends = [e for f in calls for e in f.equations if e.op == "attend"]
        attention = 4 * sum(math.prod(e.inputs[0].type.sizes) for e in attends)
        windows = Counter(e.params.get("window", 0) for e in attends)
        parts = tuple((window, count / len(attends)) for window, count in windows.items())
        head = sum(count for op, count in used if op == "lm_head")
        mixtures = [experts_of(e) for f in calls for e in f.equations if e.op == "moe"]
        experts = sum(count for count, _ in mixtures)
        chosen = sum(count * part for count, part in mixtures) / experts if experts else 1.0
        weights = sum(count for _, count in used)
        return Work(weights, token_bytes(graph, kv_dtype), attention, head, parts, experts, chosen)

    def decode(self, device: Device, dtype: str, batch: int, context: int) -> float:
        """Seconds of a step for `batch` answers of `context` tokens each: the larger of reading and computing."""
        return self.step(device, dtype, batch, batch * self.seen(context))

    def step(self, device: Device, dtype: str, answers: int, keys: float) -> float:
        """Seconds of a step of one token for each of some answers, which see `keys` tokens together."""
        read = self._read(answers) * WEIGHT_BYTES[dtype] + keys * self.token
        computed = answers * 2 * self._through() + keys * self.attention
        return max(read / device.bandwidth, computed / device.operations)

    def prefill(self, device: Device, dtype: str, *prompts: int) -> float:
        """Seconds for prompts of so many tokens: every token through all weights but the head's, which give one row of
        logits a prompt, and half of all pairs of tokens."""
        through = 2 * (self._through() - self.head)
        computed = sum(n * through + 2 * self.head + self.pairs(n) * self.attention for n in prompts)
        return max(computed / device.operations, self._read(sum(prompts)) * WEIGHT_BYTES[dtype] / device.bandwidth)

    def _read(self, tokens: int) -> float:
        """Weights that a step of so many tokens reads."""
        return self.weights - self.experts * (1 - met(self.chosen, tokens))

    def _through(self) -> float:
        """Weights that a token goes through."""
        return self.weights - self.experts * (1 - self.chosen)

    def answers(self, device: Device, dtype: str, asked: Sequence[tuple[int, int]]) -> float:
        """Seconds for requests of (prompt, new) tokens that begin at once and all run together.

        First the prompts, whose last tokens give the first new ones, then a step for each further one.
        """
        steps: Counter[int] = Counter()  # number of the step -> answers
        keys: dict[int, float] = defaultdict(float)  # that they see
        for prompt, new in asked:
            for n in range(1, new):
                steps[n] += 1
                keys[n] += self.seen(prompt + n)
        prompts = self.prefill(device, dtype, *(prompt for prompt, _ in asked))
        return prompts + sum(self.step(device, dtype, count, keys[n]) for n, count in steps.items())

    def seen(self, context: int) -> float:
        """Keys that a token sees, the mean of all layers."""
        return sum(part * min(context, window or context) for window, part in self.windows)

    def pairs(self, tokens: int) -> float:
        """Pairs of a prompt's tokens of which one sees the other, the mean of all layers."""
        reach = [(min(tokens, window or tokens), part) for window, part in self.windows]
        return sum(part * (near * tokens - near * near / 2) for near, part in reach)


def experts_of(e: Equation) -> tuple[int, float]:
    """Of a mixture: the numbers of all its experts, and the part of them that a token goes through."""
    router, *stacks = (o.type.sizes for o in e.inputs if isinstance(o, Weight))
    return sum(map(math.prod, stacks)), e.params["top_k"] / router[0]


def met(chosen: float, tokens: int) -> float:
    """The part of a mixture's experts that so many tokens go through together, if each chooses without preference."""
    return 1 - (1 - chosen) ** tokens


def _weights(graph: Graph) -> list[tuple[str, tuple[int, ...]]]:
    """Op and shape of every weight, layers counted."""
    found = []
    for e in graph.main.equations:
        body = graph.functions[e.params["function"]].equations if e.op == "call" else (e,)
        found += [(b.op, o.type.sizes) for b in body for o in b.inputs if o.type.dtype == "weight"]
    return found
