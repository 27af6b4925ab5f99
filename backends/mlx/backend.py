"""The MLX backend: a Mac's GPU, or the CPU."""

import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from llmrs.backends.base import DTYPES as FLOATS
from llmrs.backends.base import Backend, BackendOptions, bench
from llmrs.backends.fusion import FUSED_ADD_RMS_NORM, fuse, fuse_graph
from llmrs.backends.host_memory import trim_host_memory
from llmrs.backends.linearize import inline, tied_weights
from llmrs.backends.mlx import metal_ops, ops, streams
from llmrs.backends.mlx.attention import KV, Context
from llmrs.backends.mlx.compiled import KEY_BUCKET, CompiledSteps
from llmrs.backends.mlx.fusion import RULES
from llmrs.backends.mlx.kernels.launch import Kernels
from llmrs.backends.mlx.kv_fp8 import QuantizedKV, unpack
from llmrs.backends.mlx.lowering import Lowering, Program
from llmrs.backends.mlx.metal_rows import packer
from llmrs.backends.mlx.quant_matrix import Pack
from llmrs.backends.mlx.sampling import SlotState, apply_logits_processors, logprobs, sample
from llmrs.core.batch import Batch
from llmrs.core.errors import BackendError, MemoryLimitError
from llmrs.core.sampling import Logprobs
from llmrs.quant.tensor import AnyTensor

DTYPES = {"bf16": mx.bfloat16, "f16": mx.float16, "f32": mx.float32}


class MlxTicket:
    """The tokens and log probabilities of a step in flight."""

    def __init__(self, stream: mx.Stream, tokens: mx.array, logprobs: tuple[mx.array, ...] | None) -> None:
        self.stream, self._tokens, self._logprobs = stream, tokens, logprobs

    def tokens(self) -> np.ndarray:
        with streams.use_stream(self.stream):
            mx.eval(self._tokens, *(self._logprobs or ()))
        return np.array(self._tokens)

    def logprobs(self) -> Logprobs | None:
        if self._logprobs is None:
            return None
        chosen, ids, top = map(np.array, self._logprobs)
        return Logprobs(chosen, ids.astype(np.int32), top)


class MlxBackend(Backend):
    """MLX ops on any device, plus our Metal kernels on a GPU.

    MLX is lazy: `forward` and `sample` build graphs, which run on the engine's stream. The KV cache is written in place
    only if no running step reads it. `forward` therefore builds its graph while the previous step runs, waits for
    that step, and then starts.
    """

    name = "mlx"
    kv_dtypes: tuple[str, ...] = (*FLOATS, "fp8")
    fused_ops = frozenset(ops.FUSED)
    max_in_flight = 2

    def __init__(self, device: str, dtype: str, kv_dtype: str) -> None:
        """Raises BackendError for device "gpu" without Metal."""
        if device == "gpu":
            self.kv_dtypes = FLOATS  # Metal kernels and compiled steps do not support fp8
        super().__init__(device, dtype, kv_dtype)
        if device not in self.devices():
            raise BackendError(f"device {device!r} is not available: MLX has no Metal here", "device: cpu")
        self.mx_dtype = DTYPES[dtype]
        self.ops_table, self.sampler, self.use_compile = ops.COMMON, sample, False
        self.pack: Pack | None = None
        if device == "gpu" and mx.metal.is_available():
            self.use_metal(Kernels())
            self.use_compile = True  # on a CPU, mx.compile needs a C++ compiler
        self.step_tokens = 2048 if device == "gpu" else 256  # CPU attention materializes all scores
        self.program = Program([], 0, 0)
        self.compiled: CompiledSteps | None = None
        self.kv: list[KV] = []
        self.lease = streams.acquire(device)
        self.stream = self.lease.stream
        self._release = weakref.finalize(self, streams.release, self.lease)
        self._release.atexit = False
        self.slots: SlotState | None = None

    def configure(self, options: BackendOptions) -> None:
        """Raises BackendError, ConfigError for options that MLX does not support."""
        streams.set_budget(self.lease, options.memory_limit)
        self.refuse_threads(options)
        if options.kernels == "triton":
            raise BackendError("kernels: triton is not for the mlx backend", "auto or plain")
        if options.kernels == "plain" and self.use_compile:
            self.ops_table, self.sampler, self.pack = {**ops.COMMON, **ops.FAST}, sample, None

    def use_metal(self, kernels: Kernels) -> None:
        """Overrides mx ops with Metal kernels; call before `load`."""
        self.ops_table = {**ops.COMMON, **ops.FAST, **metal_ops.ops_table(kernels)}
        self.sampler = partial(metal_ops.sample, kernels)
        self.pack = packer(kernels)

    @classmethod
    def devices(cls) -> list[str]:
        return ["gpu", "cpu"] if mx.metal.is_available() else ["cpu"]

    @classmethod
    def ops(cls) -> frozenset[str]:
        return frozenset(ops.COMMON)

    @property
    def keeps_quantized(self) -> bool:
        return True

    def free_memory(self) -> int:
        return streams.free_memory()

    def load_weights(self, weights: Mapping[str, AnyTensor], progress: Callable[[int], None]) -> None:
        if self.fused_ops:
            self.graph = fuse_graph(self.graph, RULES, RULES)
        function = fuse(inline(self.graph), [FUSED_ADD_RMS_NORM] if self.fused_ops else [])
        lowering = Lowering(self.ops_table, self.mx_dtype, weights, progress, tied_weights(function), self.pack)
        try:
            with streams.use_stream(self.stream):
                self.program = lowering.program(function)
        finally:
            lowering.loaded.clear()  # a traceback must not hold the weights
        self.compiled = CompiledSteps(self.program) if self.use_compile else None
        mx.clear_cache()
        trim_host_memory()

    def allocate(
        self, num_blocks: int, block_size: int, max_num_seqs: int, max_model_len: int, max_num_batched_tokens: int = 0
    ) -> None:
        self.block_size = block_size
        self.kv = []
        with streams.use_stream(self.stream):
            for heads, size in (t.sizes for t in self.graph.kv_types()):
                shape = (num_blocks * block_size * heads, size)
                self.kv.append(KV(self._zeros(shape), self._zeros(shape), heads))
            self.slots = SlotState(max_num_seqs, max_model_len)
            try:
                mx.eval([x for kv in self.kv for pool in (kv.keys, kv.values) for x in unpack(pool)])
            except RuntimeError as error:
                self.kv = []
                message = f"no memory for {num_blocks} KV blocks: {error}"
                raise MemoryLimitError(message, "lower max_model_len") from error

    def _zeros(self, shape: tuple[int, ...]) -> Any:
        """In the KV cache's dtype."""
        return QuantizedKV(shape) if self.kv_dtype == "fp8" else mx.zeros(shape, DTYPES[self.kv_dtype])

    def forward(self, batch: Batch) -> mx.array:
        with streams.use_stream(self.stream):
            logits = self._build(batch)
            mx.synchronize(self.stream)  # if the previous step still read the KV cache, MLX would copy it
            mx.async_eval(logits)
        return logits

    def sample(self, logits: mx.array, batch: Batch, mask: np.ndarray | None = None) -> MlxTicket:
        assert self.slots is not None, "allocate comes first"
        with streams.use_stream(self.stream):
            self.slots.add_requests(batch.new_requests)
            processed = apply_logits_processors(logits[: len(batch.req_slots)], batch, self.slots, mask)
            tokens = self.sampler(processed, batch.sampling)
            self.slots.append(batch, tokens)
            log_p = None
            if batch.logprobs >= 0:
                ids = mx.concatenate([tokens, mx.array(batch.prompt_logprob_ids)])
                log_p = logprobs(logits, ids, batch.logprobs)
            mx.async_eval(tokens, self.slots.last_token, self.slots.tokens, *(log_p or ()))
        return MlxTicket(self.stream, tokens, log_p)

    def to_host(self, logits: mx.array) -> np.ndarray:
        with streams.use_stream(self.stream):
            mx.eval(logits)
        return np.array(logits)

    def to_device(self, logits: np.ndarray) -> mx.array:
        return mx.array(logits)

    def measure_peak(self) -> tuple[float, float]:
        side = 4096 if self.device == "gpu" else 256
        with streams.use_stream(self.stream):
            data, matrix = mx.ones(2**28 if self.device == "gpu" else 2**24), mx.ones((side, side), self.mx_dtype)
            mx.eval(data, matrix)
            reading = bench(lambda: mx.eval(mx.sum(data)), lambda: None)
            return data.nbytes / reading, 2 * side**3 / bench(lambda: mx.eval(matrix @ matrix), lambda: None)

    def close(self) -> None:
        if self._release.alive:
            mx.synchronize(self.stream)
            self.program, self.compiled, self.kv, self.slots = Program([], 0, 0), None, [], None
            self._release()
            trim_host_memory()

    def _build(self, batch: Batch) -> mx.array:
        """Builds the graph of a step: unevaluated logits."""
        inputs = self._inputs(batch)
        if self.compiled is not None:
            context = Context(batch, self.block_size, KEY_BUCKET)
            if context.is_decode_only:
                return self.compiled.run(context, inputs)
        return self.program.run(Context(batch, self.block_size), inputs)

    def _inputs(self, batch: Batch) -> list[mx.array | KV]:
        """Graph inputs: token ids int32 (T,), placeholders replaced by the slots' last tokens; positions; KV caches."""
        assert self.slots is not None, "allocate comes first"
        placeholder = batch.input_ids < 0
        if placeholder.all():
            tokens = self.slots.last_token[mx.array(-1 - batch.input_ids)]
        else:
            tokens = mx.array(batch.input_ids)
            if placeholder.any():
                last = self.slots.last_token[mx.array(np.maximum(-1 - batch.input_ids, 0))]
                tokens = mx.where(tokens < 0, last, tokens)
        return [tokens, mx.array(batch.positions), *self.kv]
