"""The reference backend: interprets a graph equation by equation."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from llmrs.backends.base import Backend
from llmrs.backends.host_memory import free_host_memory
from llmrs.backends.reference.kv_fp8 import QuantizedKV
from llmrs.backends.reference.ops import KV, OPS, Context
from llmrs.backends.reference.sampling import apply_penalties, logprobs, sample
from llmrs.core.batch import Batch, NewRequest
from llmrs.core.ir import Equation, Function, Value, at_layer
from llmrs.core.sampling import Logprobs
from llmrs.quant.tensor import AnyTensor


@dataclass(frozen=True)
class DoneTicket:
    """The result of a synchronous step."""

    _tokens: np.ndarray
    _logprobs: Logprobs | None

    def tokens(self) -> np.ndarray:
        return self._tokens

    def logprobs(self) -> Logprobs | None:
        return self._logprobs


class ReferenceBackend(Backend):
    """NumPy on the CPU, always in float32 (KV cache: float32 or fp8). Slow on purpose: it is the specification."""

    name = "reference"
    kv_dtypes = (*Backend.kv_dtypes, "fp8")
    block_size = 4  # small, so that short prompts span blocks in tests
    ops_table: Mapping[str, Callable[..., Any]] = OPS  # op -> function; subclasses may add fused ops

    def __init__(self, device: str, dtype: str, kv_dtype: str) -> None:
        super().__init__(device, dtype, kv_dtype)
        self.dtype, self.kv_dtype = "f32", "fp8" if kv_dtype == "fp8" else "f32"
        self.weights: dict[str, np.ndarray] = {}
        self.kv: list[KV] = []
        self.tokens = np.zeros((0, 0), np.int32)  # known tokens per request slot
        self.requests: dict[int, NewRequest] = {}  # by slot

    @classmethod
    def devices(cls) -> list[str]:
        return ["cpu"]

    @classmethod
    def ops(cls) -> frozenset[str]:
        return frozenset(cls.ops_table)

    def free_memory(self) -> int:
        return free_host_memory()

    def load_weights(self, weights: Mapping[str, AnyTensor], progress: Callable[[int], None]) -> None:
        for segment in (s for w in self.graph.weights() for s in w.segments):
            if segment.tensor not in self.weights:
                tensor = weights[segment.tensor]
                self.weights[segment.tensor] = tensor.float32()
                progress(tensor.nbytes)

    def allocate(
        self, num_blocks: int, block_size: int, max_num_seqs: int, max_model_len: int, max_num_batched_tokens: int = 0
    ) -> None:
        shapes = [(num_blocks, block_size, *t.sizes) for t in self.graph.kv_types()]
        zeros = QuantizedKV.zeros if self.kv_dtype == "fp8" else partial(np.zeros, dtype=np.float32)
        self.kv = [KV(zeros(s), zeros(s)) for s in shapes]
        self.block_size, self.tokens = block_size, np.zeros((max_num_seqs, max_model_len + 1), np.int32)

    def forward(self, batch: Batch) -> np.ndarray:
        known = batch.input_ids >= 0
        tokens = np.where(
            known, batch.input_ids, self.tokens[np.where(known, 0, -1 - batch.input_ids), batch.positions]
        )
        context = Context(batch, self.block_size)
        return self._run(self.graph.main, [tokens, batch.positions, *self.kv], context, 0)[0]

    def sample(self, logits: np.ndarray, batch: Batch, mask: np.ndarray | None = None) -> DoneTicket:
        for request in batch.new_requests:
            self.tokens[request.slot, : len(request.tokens)] = request.tokens
            self.requests[request.slot] = request
        tokens = sample(self._apply_logits_processors(logits, batch, mask), batch.sampling)
        self.tokens[batch.req_slots[batch.do_sample], batch.seq_lens[batch.do_sample]] = tokens[batch.do_sample]
        if batch.logprobs < 0:
            return DoneTicket(tokens, None)
        ids = np.concatenate([tokens, batch.prompt_logprob_ids])
        return DoneTicket(tokens, logprobs(logits, ids, batch.logprobs))

    def _apply_logits_processors(self, logits: np.ndarray, batch: Batch, mask: np.ndarray | None) -> np.ndarray:
        """(S, V) after penalties, biases, banned tokens and mask."""
        y = logits[: len(batch.req_slots)].copy()
        for s, (slot, length) in enumerate(zip(batch.req_slots.tolist(), batch.seq_lens, strict=True)):
            if batch.sampling.needs_history(s):
                y[s] = apply_penalties(y[s], self.tokens[slot, :length], batch.sampling, s)
            if slot in self.requests:
                y[s, self.requests[slot].bias_ids] += self.requests[slot].bias
            if batch.banned_ids is not None:
                y[s, batch.banned_ids[s][batch.banned_ids[s] >= 0]] = -np.inf
        return y if mask is None else np.where(allowed(mask, y.shape[1]), y, np.float32(-np.inf))

    def to_host(self, logits: np.ndarray) -> np.ndarray:
        return logits

    def to_device(self, logits: np.ndarray) -> np.ndarray:
        return logits

    def close(self) -> None:
        self.weights, self.kv = {}, []

    def _run(self, function: Function, inputs: list[Any], context: Context, layer: int) -> list[Any]:
        values = dict(zip(function.inputs, inputs, strict=True))
        for e in function.equations:
            for out, result in zip(e.outs, self._equation(e, values, context, layer), strict=True):
                values[out] = result
        return [values[v] for v in function.outs]

    def _equation(self, e: Equation, values: dict[Value, Any], context: Context, layer: int) -> list[Any]:
        inputs = [values[o] if isinstance(o, Value) else self._weight(at_layer(o, layer)) for o in e.inputs]
        if e.op == "call":
            return self._run(self.graph.functions[e.params["function"]], inputs, context, e.params["index"])
        result = self.ops_table[e.op](context, *inputs, **e.params)
        return [result] if len(e.outs) == 1 else list(result)

    def _weight(self, weight: Any) -> np.ndarray:
        tensors = [self.weights[s.tensor] for s in weight.segments]
        return tensors[0] if len(tensors) == 1 else np.concatenate(tensors)


def allowed(mask: np.ndarray, vocabulary: int) -> np.ndarray:
    """Bits uint32 (S, ceil(V / 32)), lowest bit of a word first -> bool (S, V)."""
    return np.unpackbits(mask.view(np.uint8), axis=-1, bitorder="little")[:, :vocabulary].astype(bool)
