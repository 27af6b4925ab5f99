"""Runs a model's graph with MLX: on a Mac's GPU, or on the CPU."""

import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from llmrs.backends.base import Backend, bench
from llmrs.backends.host_memory import trim_host_memory
from llmrs.backends.mlx import metal_ops, ops, streams
from llmrs.backends.mlx.attention import KV, Context
from llmrs.backends.mlx.compiled import MULTIPLE, CompiledSteps
from llmrs.backends.mlx.fusion import fuse
from llmrs.backends.mlx.kernels.launch import Kernels
from llmrs.backends.mlx.kv_fp8 import Scaled, arrays
from llmrs.backends.mlx.lowering import Lowering, Program
from llmrs.backends.mlx.sampling import SlotState, adjusted, draw, logprobs
from llmrs.core.batch import Batch
from llmrs.core.config import DTYPES as FLOATS
from llmrs.core.config import EngineConfig
from llmrs.core.errors import BackendError, MemoryLimitError
from llmrs.core.sampling import Logprobs
from llmrs.quant.tensor import Tensor

DTYPES = {"bf16": mx.bfloat16, "f16": mx.float16, "f32": mx.float32}


class MlxTicket:
    """A step whose tokens, and log probabilities where asked for, are being computed."""

    def __init__(self, stream: mx.Stream, tokens: mx.array, likely: tuple[mx.array, ...] | None) -> None:
        self.stream, self.result, self.likely = stream, tokens, likely

    def tokens(self) -> np.ndarray:
        with streams.using(self.stream):  # waiting, too, takes a stream
            mx.eval(self.result, *(self.likely or ()))
        return np.array(self.result)

    def logprobs(self) -> Logprobs | None:
        if self.likely is None:
            return None
        chosen, ids, top = map(np.array, self.likely)
        return Logprobs(chosen, ids.astype(np.int32), top)


class MlxBackend(Backend):
    """MLX's own ops, and Metal kernels where there is Metal.

    MLX notes what is to be computed (`forward` and `sample` build a graph) and computes it on a stream of its own
    when told so. The KV cache is written in place as long as no step that reads it is under way. `forward` therefore
    builds its graph while the step before runs, then waits for that one, then starts.
    """

    name = "mlx"
    kv_dtypes: tuple[str, ...] = (*FLOATS, "fp8")
    fused_ops = frozenset(ops.FUSED)
    max_in_flight = 2

    def __init__(self, device: str, dtype: str, kv_dtype: str) -> None:
        """Raises BackendError for a GPU where there is no Metal."""
        if device == "gpu":
            self.kv_dtypes = FLOATS  # its Metal kernels, and the steps that are compiled, know no fp8
        super().__init__(device, dtype, kv_dtype)
        if device not in self.devices():
            raise BackendError(f"device {device!r} is not there: MLX has no Metal here", "device: cpu")
        self.type = DTYPES[dtype]
        self.rules, self.draw, self.compiles = ops.COMMON, draw, False
        self.joint = True  # keys and values of a layer in one array
        if device == "gpu" and mx.metal.is_available():
            self.use_metal(Kernels())
            self.compiles = True  # on a CPU, MLX would call a C++ compiler
        self.step_tokens = 2048 if device == "gpu" else 256  # a CPU holds the scores of all of them
        self.program = Program([], 0, 0)
        self.compiled: CompiledSteps | None = None
        self.kv: list[KV] = []
        self.loan = streams.borrow(device)
        self.stream = self.loan.stream
        self._end_loan = weakref.finalize(self, streams.give_back, self.loan)
        self._end_loan.atexit = False
        self.slots: SlotState | None = None

    def configure(self, config: EngineConfig) -> None:
        """Raises BackendError, ConfigError for kernels, attention, threads and tuning that MLX has no use for."""
        streams.bound(self.loan, config.memory_limit)
        if config.attention != "auto":
            raise BackendError(f"attention: {config.attention} is not for the mlx backend", "auto")
        self.refuse_threads(config)
        if config.tune:
            raise BackendError("tune: only Triton kernels are tuned", "leave it out")
        if config.kernels == "triton":
            raise BackendError("kernels: triton is not for the mlx backend", "auto or plain")
        if config.kernels == "plain" and self.compiles:
            self.rules, self.draw = {**ops.COMMON, **ops.FAST}, draw

    def use_metal(self, kernels: Kernels) -> None:
        """Has the rules of Metal win over those of mx ops, before `load`."""
        self.rules = {**ops.COMMON, **ops.FAST, **metal_ops.rules(kernels)}
        self.draw, self.joint = partial(metal_ops.draw, kernels), False

    @classmethod
    def devices(cls) -> list[str]:
        return ["gpu", "cpu"] if mx.metal.is_available() else ["cpu"]

    @classmethod
    def ops(cls) -> frozenset[str]:
        return frozenset(ops.COMMON)

    def free_memory(self) -> int:
        return streams.free_memory()

    def load_weights(self, weights: Mapping[str, Tensor], progress: Callable[[int], None]) -> None:
        if self.fused_ops:
            self.graph = fuse(self.graph)
        lowering = Lowering(self.graph, self.rules, self.type, weights, progress)
        try:
            with streams.using(self.stream):
                self.program = lowering.program(join=bool(self.fused_ops))
        finally:
            lowering.forget()  # a traceback must not hold the weights
        self.compiled = CompiledSteps(self.program) if self.compiles else None
        mx.clear_cache()
        trim_host_memory()

    def allocate(self, blocks: int, block_size: int, slots: int, max_tokens: int) -> None:
        self.block_size = block_size
        self.kv = []
        with streams.using(self.stream):
            for heads, size in (t.sizes for t in self.graph.kv_types()):
                shape = (blocks * block_size * heads * (2 if self.joint else 1), size)
                keys = self._zeros(shape)
                self.kv.append(KV(keys, keys if self.joint else self._zeros(shape), heads))
            self.slots = SlotState(slots, max_tokens)
            try:
                mx.eval([x for kv in self.kv for pool in kv.arrays() for x in arrays(pool)])
            except RuntimeError as error:
                self.kv = []
                raise MemoryLimitError(f"no memory for {blocks} KV blocks: {error}", "lower max_model_len") from error

    def _zeros(self, shape: tuple[int, ...]) -> Any:
        """Of the KV cache's type."""
        return Scaled(shape) if self.kv_dtype == "fp8" else mx.zeros(shape, DTYPES[self.kv_dtype])

    def forward(self, batch: Batch) -> mx.array:
        with streams.using(self.stream):
            logits = self._build(batch)
            mx.synchronize(self.stream)  # else the step before still reads the KV cache, and MLX would copy it
            mx.async_eval(logits)
        return logits

    def sample(self, logits: mx.array, batch: Batch, mask: np.ndarray | None = None) -> MlxTicket:
        assert self.slots is not None, "allocate comes first"
        with streams.using(self.stream):
            self.slots.begin(batch.new_requests)
            tokens = self.draw(adjusted(logits[: len(batch.req_slots)], batch, self.slots, mask), batch.sampling)
            self.slots.append(batch, tokens)
            likely = None
            if batch.logprobs >= 0:
                came = mx.concatenate([tokens, mx.array(batch.prompt_logprob_ids)])
                likely = logprobs(logits, came, batch.logprobs)
            mx.async_eval(tokens, self.slots.last_token, self.slots.tokens, *(likely or ()))
        return MlxTicket(self.stream, tokens, likely)

    def to_host(self, logits: mx.array) -> np.ndarray:
        with streams.using(self.stream):
            mx.eval(logits)
        return np.array(logits)

    def to_device(self, logits: np.ndarray) -> mx.array:
        return mx.array(logits)

    def measure_peak(self) -> tuple[float, float]:
        side = 4096 if self.device == "gpu" else 256
        with streams.using(self.stream):
            data, matrix = mx.ones(2**28 if self.device == "gpu" else 2**24), mx.ones((side, side), self.type)
            mx.eval(data, matrix)
            reading = bench(lambda: mx.eval(mx.sum(data)), lambda: None)
            return data.nbytes / reading, 2 * side**3 / bench(lambda: mx.eval(matrix @ matrix), lambda: None)

    def close(self) -> None:
        if self._end_loan.alive:
            mx.synchronize(self.stream)
            self.program, self.compiled, self.kv, self.slots = Program([], 0, 0), None, [], None
            self._end_loan()
            trim_host_memory()

    def _build(self, batch: Batch) -> mx.array:
        """The graph of a step: logits that are not computed yet."""
        inputs = self._inputs(batch)
        if self.compiled is not None:
            context = Context(batch, self.block_size, MULTIPLE)
            if context.rows_are_all:
                return self.compiled.run(context, inputs)
        return self.program.run(Context(batch, self.block_size), inputs)

    def _inputs(self, batch: Batch) -> list[mx.array | KV]:
        """What the graph takes: the tokens int32 (T,), with the slots' last ones filled in, positions, and the KV."""
        assert self.slots is not None, "allocate comes first"
        unknown = batch.input_ids < 0
        if unknown.all():
            tokens = self.slots.last_token[mx.array(-1 - batch.input_ids)]
        else:
            tokens = mx.array(batch.input_ids)
            if unknown.any():
                last = self.slots.last_token[mx.array(np.maximum(-1 - batch.input_ids, 0))]
                tokens = mx.where(tokens < 0, last, tokens)
        return [tokens, mx.array(batch.positions), *self.kv]
