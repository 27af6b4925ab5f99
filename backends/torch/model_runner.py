"""Runs steps with Triton kernels: inputs in one transfer, then a CUDA graph or an eager launch of each kernel.

Nothing here waits for the device. Tokens of a step that the host does not know yet are read there, by slot. A step goes

    launch    backend.py
    forward   StepShape -> GraphCache.find -> StepBuffers.fill -> replay, or Program.run -> triton_ops.py -> kernels/
    sample    replay, or top_k_top_p.py -> gumbel_argmax.py
"""

import gc
from collections.abc import Sequence

import numpy as np
import torch

from llmrs.backends.torch.attn_metadata import StepBuffers, StepShape, shape_of, target_ctas
from llmrs.backends.torch.cuda_graphs import GraphCache
from llmrs.backends.torch.kernel_configs import Device, prefill_q_tokens
from llmrs.backends.torch.kernels.gemm import MAX_FUSED_NORM_M, max_fused_m
from llmrs.backends.torch.kernels.gumbel_argmax import sample_gumbel
from llmrs.backends.torch.kernels.launch import has_tma, interpreted, supports_pdl
from llmrs.backends.torch.kernels.top_k_top_p import find_thresholds
from llmrs.backends.torch.kv_fp8 import unpack
from llmrs.backends.torch.ops import KV
from llmrs.backends.torch.program import NO_PROGRAMS, Program, Programs
from llmrs.backends.torch.sampling import Logits, SlotState, apply_logits_processors, needs_logits_processors
from llmrs.backends.torch.step_shapes import DECODE_BATCH_SIZES, bucket, covering_shapes, decode_shapes, kernel_shapes
from llmrs.backends.torch.triton_ops import CosSinCache, KernelContext
from llmrs.backends.torch.workspace import activation_bytes
from llmrs.core.batch import Batch
from llmrs.core.errors import BackendError
from llmrs.core.ir import Graph
from llmrs.core.sampling import SamplingArrays

BLOCK_SIZE = 64  # tokens of a KV block: a tile of keys lies in one block
PDL_MAX_TOKENS = 512  # tokens of a step up to which launch gaps matter
NOT_CAPTURABLE = {"moe"}  # ops that copy to the host
NUM_HOST_COPIES = 3  # of a step's inputs: two steps may be in flight while the third is written


class GPUModelRunner:
    """The steps of one model. Life: `begin`, any number of `forward` and `sample`, `end`."""

    def __init__(self, device: torch.device, *, graphs: bool) -> None:
        """Raises BackendError where Triton kernels can't run: they need an NVIDIA GPU, or Triton's interpreter."""
        if device.type != "cuda" and not interpreted():
            raise BackendError(f"Triton kernels don't run on {device}", "kernels: auto uses them where they do")
        self.device, self.use_graphs = device, graphs
        self.fuse_small_batches = True  # small batches run a program of fused GEMMs; see fusion.py
        self.use_pdl = supports_pdl(device)
        self.copy_output = device.type == "cuda"  # tokens are copied on a stream of their own; see async_output.py
        self.use_tma = has_tma(device)
        self.configs = Device.of(device)
        self.end()

    def end(self) -> None:
        """Frees everything."""
        self.programs, self.small_batch_max_m, self.kv = NO_PROGRAMS, 0, list[KV]()
        self.slots = SlotState(0, 0, self.device)
        self.tokens = torch.empty(0, dtype=torch.int32, device=self.device)  # of the last step, for OutputCopier
        self.graphs: GraphCache | None = None

    def begin(
        self, graph: Graph, programs: Programs, kv: Sequence[KV], slots: SlotState, dtype: torch.dtype,
        max_num_batched_tokens: int = 0,
    ) -> None:  # fmt: skip
        """`kv` has one block more than the block pool: the null block, where the KV of padding goes.

        Loads the kernels of steps of up to `max_num_batched_tokens` tokens, and captures the shapes that hold nearly
        every step.
        """
        self.end()
        self.programs, self.kv, self.slots = programs, list(kv), slots
        self.small_batch_max_m = max_fused_m(dtype, self.device) if self.fuse_small_batches else 0
        blocks, self.block_size = kv[0].keys.shape[:2]
        self.null_block = blocks - 1
        if blocks * self.block_size >= 2**31:
            raise BackendError(f"{blocks} KV blocks of {self.block_size} tokens are too many", "lower kv_cache_memory")
        self.max_model_len = slots.tokens.shape[1]
        self.tokens = torch.empty(max(len(slots.tokens), DECODE_BATCH_SIZES[-1]), dtype=torch.int32, device=self.device)
        self.cos_sin_cache = CosSinCache(self.max_model_len, self.device)
        self.ctas = target_ctas(self.device, *kv[0].keys.shape[2:])
        self.block_m_tokens = prefill_q_tokens(graph, dtype, unpack(kv[0].keys)[0].dtype, self.configs)
        if self.use_graphs and not NOT_CAPTURABLE & {c.op for c in programs.full.calls}:
            self.graphs = self.new_graph_cache(activation_bytes(graph, max_num_batched_tokens, dtype.itemsize))
        if self.device.type == "cuda":  # the interpreter compiles nothing, and takes minutes
            self._warm_up(max_num_batched_tokens)

    def new_graph_cache(self, pool_bytes: int = 0) -> GraphCache:
        """An empty one; `pool_bytes`: initial size of its memory pool."""
        null_slot = self.null_block * self.block_size
        return GraphCache(self.device, self._make_buffers, self._run, self._sample, null_slot, pool_bytes)

    def forward(self, batch: Batch) -> Logits:
        """Logits (R, V) in the dtype of computation, valid until the next step."""
        shape = shape_of(batch, self.block_m_tokens, self.ctas)
        padded = bucket(shape, self.block_m_tokens, self.ctas)
        if self.graphs is None or padded is None or len(batch.logits_indices) != len(batch.req_slots):
            buffers, graph = StepBuffers(shape, batch.block_tables.size, self.device), None
        else:
            step = self.graphs.find(padded)
            buffers, graph = step.buffers, step if step.forward else None
        buffers.fill(batch, self.block_size, self.null_block, self.block_m_tokens)
        values = graph.forward() if graph and graph.forward else self._run(buffers)
        return Logits(values[: len(batch.logits_indices)], buffers, graph)

    def sample(self, logits: Logits, batch: Batch, mask: np.ndarray | None) -> torch.Tensor:
        """Token ids int32 (S,), which also become the slots' last tokens."""
        count, filtered = len(batch.req_slots), _filters(batch.sampling)
        values, buffers = logits.values[:count], logits.buffers or self._sampling_buffers(batch)
        if needs_logits_processors(batch, self.slots, mask):
            values = apply_logits_processors(values, batch, self.slots, mask)
            tokens = self._sample(values, buffers, filtered)
            if batch.sampling.needs_history().any():
                self.slots.append(batch, tokens.long())
            return tokens
        if self.graphs and logits.graph:
            return self.graphs.sampler(logits.graph, filtered)()[:count]
        return self._sample(values, buffers, filtered)

    @torch.inference_mode()
    def idle(self) -> bool:
        """While no request runs: captures one more shape. True: there are more."""
        return self.graphs is not None and self.graphs.capture_next()

    @torch.inference_mode()
    def _warm_up(self, max_num_batched_tokens: int) -> None:
        """Loads all kernels, and captures a few shapes, so that no request waits for either."""
        sizes = len(self.slots.last_token), max_num_batched_tokens, self.block_m_tokens, self.ctas
        for shape in kernel_shapes(*sizes):
            buffers = self._make_buffers(shape, copies=1)
            buffers.fill_null(self.null_block * self.block_size)
            logits = self._run(buffers, once=True)
            for filtered in (False, True) if shape.is_decode_only else ():
                self._sample(logits, buffers, filtered)
        if self.graphs:
            self.graphs.capture_all(covering_shapes(*sizes))
            self.graphs.uncaptured = decode_shapes(sizes[0], self.ctas)
        gc.collect()  # now: a full collection takes 0.1 s, and the next is due when many more objects exist

    def _make_buffers(self, shape: StepShape, copies: int = NUM_HOST_COPIES) -> StepBuffers:
        table_size = shape.num_seqs * -(-self.max_model_len // self.block_size)
        return StepBuffers(shape, table_size, self.device, copies)

    def _sampling_buffers(self, batch: Batch) -> StepBuffers:
        """Of a step that is only sampled, as in tests."""
        buffers = StepBuffers(StepShape(0, len(batch.req_slots), 0, 0), 0, self.device)
        buffers.fill_sampling(batch)
        return buffers

    def _run(self, buffers: StepBuffers, *, once: bool = False) -> torch.Tensor:
        """Logits. `once`: skips equal calls of other layers: every kernel is loaded, the values mean nothing."""
        shape, f = buffers.shape, buffers.fields
        pdl = self.use_pdl and shape.num_tokens <= PDL_MAX_TOKENS
        context = KernelContext(
            shape, f, self.slots.last_token, self.cos_sin_cache, self.block_m_tokens, self.configs, self.use_tma, pdl
        )
        program = self._program(shape)
        run = program.run_once if once else program.run
        logits: torch.Tensor = run(context, [f.input_ids, f.positions, *self.kv])[0]
        return logits

    def _program(self, shape: StepShape) -> Program:
        """By tokens and logits rows: one token of a prompt may have two."""
        if shape.num_tokens > self.small_batch_max_m:
            return self.programs.full
        one_row = max(shape.num_tokens, shape.num_seqs) <= MAX_FUSED_NORM_M
        return self.programs.single_token if one_row else self.programs.small_batch

    def _sample(self, logits: torch.Tensor, buffers: StepBuffers, filtered: bool) -> torch.Tensor:
        """Token ids int32 (n,) of the step's first n sequences."""
        n, f, thresholds = len(logits), buffers.fields, None
        temperature, last_tokens = f.temperature[:n], self.slots.last_token
        pdl, out = self.use_pdl and n <= PDL_MAX_TOKENS, self.tokens[:n] if self.copy_output else None
        if filtered:
            thresholds = find_thresholds(logits, temperature, f.top_k[:n], f.top_p[:n], f.min_p[:n], pdl=pdl)
        rng_keys, slots = f.rng_keys[:n], f.req_slots[:n]
        return sample_gumbel(logits, temperature, rng_keys, slots, last_tokens, thresholds, out=out, pdl=pdl)


def _filters(params: SamplingArrays) -> bool:
    """Whether top-k, top-p or min-p applies to a sequence that is not greedy."""
    return bool(((params.temperature > 0) & ((params.top_k > 0) | (params.top_p < 1) | (params.min_p > 0))).any())
