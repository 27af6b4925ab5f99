"""The speed of a model on paper: bytes and operations of a step, and the time that a device takes for them at least."""

import math
from dataclasses import dataclass

from llmrs.core.ir import Graph
from llmrs.fit import token_bytes

# Bytes of a weight. Q8_0 and Q4_K are GGUF's blocks: 34 bytes for 32, 144 for 256.
WEIGHT_BYTES = {"f32": 4.0, "bf16": 2.0, "f16": 2.0, "q8_0": 34 / 32, "q4k": 144 / 256}


@dataclass(frozen=True)
class Device:
    """What a device can do: bytes read per second, and operations per second of its matrix units in half precision."""

    name: str
    bandwidth: float
    operations: float


@dataclass(frozen=True)
class Work:
    """What one token costs. A step reads all weights once, and each sequence's KV cache; embeddings are looked up."""

    weights: int  # numbers that a step reads
    token: int  # bytes of KV cache of a token
    attention: int  # operations for each token and each key that it sees, all layers

    @staticmethod
    def of(graph: Graph, kv_dtype: str = "bf16") -> "Work":
        """Mixtures of experts count whole: in a batch every expert has something to do."""
        used = [w for e, w in _weights(graph) if e != "embed"]
        calls = [graph.functions[e.params["function"]] for e in graph.main.equations if e.op == "call"]
        queries = [e.inputs[0].type.sizes for f in calls for e in f.equations if e.op == "attend"]
        attention = 4 * sum(math.prod(q) for q in queries)
        return Work(sum(math.prod(t) for t in used), token_bytes(graph, kv_dtype), attention)

    def decode(self, device: Device, dtype: str, batch: int, context: int) -> float:
        """Seconds of a step for `batch` answers of `context` tokens each: the larger of reading and computing."""
        read = self.weights * WEIGHT_BYTES[dtype] + batch * context * self.token
        computed = batch * (2 * self.weights + context * self.attention)
        return max(read / device.bandwidth, computed / device.operations)

    def prefill(self, device: Device, dtype: str, tokens: int) -> float:
        """Seconds for a prompt: every token through all weights, and half of all pairs of tokens; one row of logits."""
        computed = tokens * 2 * self.weights + tokens * tokens // 2 * self.attention
        return max(computed / device.operations, self.weights * WEIGHT_BYTES[dtype] / device.bandwidth)


def _weights(graph: Graph) -> list[tuple[str, tuple[int, ...]]]:
    """Op and shape of every weight, layers counted."""
    found = []
    for e in graph.main.equations:
        body = graph.functions[e.params["function"]].equations if e.op == "call" else (e,)
        found += [(b.op, o.type.sizes) for b in body for o in b.inputs if o.type.dtype == "weight"]
    return found
