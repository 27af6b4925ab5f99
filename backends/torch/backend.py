"""Lowers a model's graph to a list of torch calls and runs it step by step, on the CPU or an NVIDIA GPU.

With plain torch ops; `model_runner.py` adds Triton kernels and CUDA graphs.
"""

import math
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from llmrs.backends.base import Backend, BackendOptions, bench
from llmrs.backends.cores import usable_cores
from llmrs.backends.fusion import FUSED_ADD_RMS_NORM, FUSED_OPS, fuse
from llmrs.backends.host_memory import free_host_memory, keep_freed_memory, trim_host_memory, use_huge_pages
from llmrs.backends.linearize import hoist_logits_gather, inline, tied_weights
from llmrs.backends.torch.async_output import CopiedOutput, OutputCopier, TorchOutput
from llmrs.backends.torch.cpu import native
from llmrs.backends.torch.cpu.library import Kernels
from llmrs.backends.torch.cpu.ops import CPUOps
from llmrs.backends.torch.cpu.recording import Recorder
from llmrs.backends.torch.cpu_linear import Linear, make_linear
from llmrs.backends.torch.fusion import program_functions
from llmrs.backends.torch.kv_fp8 import E4M3, QuantizedKV, check_device
from llmrs.backends.torch.lowering import Bind, Lowering
from llmrs.backends.torch.ops import BIND, FUSED, KV, OPS
from llmrs.backends.torch.profiler import TorchProfiler
from llmrs.backends.torch.program import NO_PROGRAMS, Programs
from llmrs.backends.torch.quant_matrix import Pack
from llmrs.backends.torch.sampling import Logits, SlotState, logprobs, sample
from llmrs.backends.torch.sdpa_attention import attn_metadata, on_device
from llmrs.backends.torch.workspace import activation_bytes, workspace_bytes
from llmrs.core.batch import Batch
from llmrs.core.errors import BackendError, ConfigError, MemoryLimitError
from llmrs.core.ir import Graph
from llmrs.quant.tensor import AnyTensor

if TYPE_CHECKING:  # Triton is not installed on every system
    from llmrs.backends.torch.model_runner import GPUModelRunner

BF16_MIN_CAPABILITY = 8  # compute capability; older GPUs have no arithmetic in bf16, and Triton refuses it
HUGE_PAGES_MIN_BYTES = 2**28  # bytes of weights from which huge pages pay
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


class TorchBackend(Backend):
    """Plain torch ops. On the CPU weights are packed for oneDNN; tied embeddings are read from the mapped file."""

    name = "torch"
    fused_ops = FUSED
    kv_dtypes = (*Backend.kv_dtypes, "fp8")

    def __init__(self, device: str, dtype: str, kv_dtype: str) -> None:
        super().__init__(device, dtype, kv_dtype)
        self.torch_device = torch.device(device)
        self.torch_dtype = DTYPES[dtype]
        if self.torch_device.type == "cuda":
            self.max_in_flight = 2  # on the CPU a launch computes
        else:
            keep_freed_memory()
            self.step_tokens = 256  # as fast as more, and temporaries fit the caches
        self.ops_table: Mapping[str, Callable[..., object]] = OPS
        self.make_linear: Callable[..., Linear] = make_linear
        self.bind: Mapping[str, Bind] = BIND
        self.programs = NO_PROGRAMS
        self.kv: list[KV] = []
        self.slots = SlotState(0, 0, self.torch_device)
        self.runner: GPUModelRunner | None = None  # with Triton kernels
        self.kernels: Kernels | None = None  # on a CPU
        self.pack: Pack | None = None  # of quantized weights for kernels
        self.recorder: Recorder | None = None  # of steps made of them
        self.profiled = False
        self.output_copier: OutputCopier | None = None

    def configure(self, options: BackendOptions) -> None:
        self.use_threads(options.threads)
        self.use_kernels(options.kernels, graphs=options.cuda_graphs)

    def use_threads(self, count: int | None) -> None:
        """CPU threads of steps; None: as torch has it (OMP_NUM_THREADS), within the usable cores.

        Torch keeps the number for the process. Raises ConfigError where steps run on a GPU.
        """
        if self.torch_device.type != "cpu":
            if count is not None:
                raise ConfigError(f"threads: steps run on {self.device}", "leave it out, or choose device: cpu")
            return
        count = count or min(torch.get_num_threads(), usable_cores())
        if count != torch.get_num_threads():
            torch.set_num_threads(count)

    def use_kernels(self, kernels: str, *, graphs: bool = True) -> None:
        """The kernel set, before anything is loaded: "triton", "plain", or "auto": Triton on an NVIDIA GPU.

        Raises BackendError if Triton is asked for and can't run, or can't do fp8; "auto" warns and falls back to plain
        torch ops if Triton is missing.
        """
        if kernels == "auto" and self.torch_device.type == "cpu" and (library := native.kernels()):
            self.pack, self.ops_table, self.kernels = native.packer(library), CPUOps(library).table(), library
            self.make_linear = partial(native.make_linear, kernels=library)
        if kernels == "plain" or (kernels == "auto" and self.torch_device.type != "cuda"):
            return
        try:
            from llmrs.backends.torch import model_runner, triton_ops, triton_rows
        except ImportError as error:
            missing = BackendError(f"Triton can't be loaded: {error}", "pip install triton, or kernels: plain")
            if kernels != "auto":
                raise missing from error
            warnings.warn(f"{missing}; plain torch ops run instead, at a tenth of the speed", stacklevel=2)
            return
        if self.kv_dtype == "fp8":
            check_device(self.torch_device)
        if self.torch_device.type == "cuda":
            self._check_bf16()
            torch.cuda.set_device(self.torch_device)  # of this thread: Triton launches on it
        self.runner = model_runner.GPUModelRunner(self.torch_device, graphs=graphs)
        self.ops_table, self.bind, self.fused_ops = triton_ops.TRITON, triton_ops.BIND, triton_ops.FUSED
        self.make_linear, self.pack = triton_ops.Linear, triton_rows.pack
        self.block_size = model_runner.BLOCK_SIZE

    def _check_bf16(self) -> None:
        """Raises BackendError where kernels would meet bf16 on a GPU that has none."""
        major, minor = torch.cuda.get_device_capability(self.torch_device)
        option = "dtype" if self.dtype == "bf16" else "kv_cache_dtype"
        if major < BF16_MIN_CAPABILITY and "bf16" in (self.dtype, self.kv_dtype):
            name = f"{torch.cuda.get_device_name(self.torch_device)}, of compute capability {major}.{minor}"
            raise BackendError(
                f"{option}: bf16 needs compute capability {BF16_MIN_CAPABILITY}.0 or later; here is {name}",
                f"{option}: f16 or f32; or kernels: plain, where torch emulates bf16, slowly",
            )

    @property
    def keeps_quantized(self) -> bool:
        """On a CPU where our kernels were compiled. With Triton a CPU stands for a GPU."""
        return self.torch_device.type != "cpu" or self.runner is not None or self.pack is not None

    @classmethod
    def devices(cls) -> list[str]:
        return [f"cuda:{n}" for n in range(torch.cuda.device_count())] + ["cpu"]

    @classmethod
    def quantizer_device(cls, device: str) -> str | None:
        return None if device == "cpu" else device

    @classmethod
    def ops(cls) -> frozenset[str]:
        return frozenset(OPS) | frozenset(FUSED_OPS)

    def free_memory(self) -> int:
        return torch.cuda.mem_get_info(self.torch_device)[0] if self.torch_device.type == "cuda" else free_host_memory()

    def workspace_bytes(self, graph: Graph, max_num_seqs: int, max_num_batched_tokens: int) -> int:
        if self.torch_device.type != "cuda":
            return 0
        itemsize = self.torch_dtype.itemsize
        return workspace_bytes(graph, max_num_seqs, activation_bytes(graph, max_num_batched_tokens, itemsize), itemsize)

    def load_weights(self, weights: Mapping[str, AnyTensor], progress: Callable[[int], None]) -> None:
        function = inline(self.graph)
        tied, ops_table = tied_weights(function), self.ops_table
        device, dtype = self.torch_device, self.torch_dtype
        lowering = Lowering(
            ops_table, self.bind, device, dtype, weights, progress, tied, self.make_linear,
            keep_quantized=self.keeps_quantized, pack=self.pack,
        )  # fmt: skip
        if self.runner:
            functions = program_functions(hoist_logits_gather(function))
            self.programs = Programs(*map(lowering.program, functions))
        else:
            function = fuse(hoist_logits_gather(function), [FUSED_ADD_RMS_NORM])
            self.programs = Programs(*[lowering.program(function)] * 3)
        trim_host_memory()
        if self.torch_device.type == "cuda":
            torch.cuda.empty_cache()  # of temporaries: the KV cache takes what is free
        if self.torch_device.type == "cpu" and lowering.size > HUGE_PAGES_MIN_BYTES:
            use_huge_pages()
            trim_host_memory()  # again: they fill the holes between planes of quantized weights

    def allocate(
        self, num_blocks: int, block_size: int, max_num_seqs: int, max_model_len: int, max_num_batched_tokens: int = 0
    ) -> None:
        self.block_size = block_size
        try:
            self.kv = [self._pool(num_blocks, block_size, *t.sizes) for t in self.graph.kv_types()]
        except RuntimeError as error:  # torch.OutOfMemoryError, or the CPU allocator's own
            raise MemoryLimitError(f"no memory for {num_blocks} KV blocks: {error}", "lower max_model_len") from error
        self.slots = SlotState(max_num_seqs, max_model_len, self.torch_device)
        if self.kernels:
            max_blocks = -(-max_model_len // block_size)
            self.recorder = Recorder(self.kernels, self.programs.full, self.kv, block_size, max_blocks)
        if self.runner:
            dtype, size = self.torch_dtype, max_num_batched_tokens
            self.runner.begin(self.graph, self.programs, self.kv, self.slots, dtype, size)
            copier = OutputCopier(self.torch_device, max_num_seqs, self.max_in_flight + 1)
            self.output_copier = copier if self.runner.copy_output else None

    def _pool(self, blocks: int, block_size: int, heads: int, size: int) -> KV:
        """One layer's cache. For kernels K and V of a block are adjacent, and the null block is added."""
        if self.runner:
            both = self._zeros(blocks + 1, 2, heads, block_size, size)
            return KV(*(side.transpose(1, 2) for side in both.unbind(1)))
        return KV(*(self._zeros(blocks, block_size, heads, size) for _ in range(2)))

    def _zeros(self, *shape: int) -> torch.Tensor | QuantizedKV:
        """In the KV cache's dtype."""
        if self.kv_dtype == "fp8":
            return QuantizedKV(
                zeros(shape, E4M3, self.torch_device), zeros(shape[:-1], torch.float32, self.torch_device)
            )
        return zeros(shape, DTYPES[self.kv_dtype], self.torch_device)

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Logits:
        if self.runner:
            return self.runner.forward(batch)
        tokens = self._input_ids(batch)
        if self.recorder and not self.profiled and (logits := self.recorder.run(batch, tokens)) is not None:
            return Logits(logits)
        inputs = [tokens, on_device(batch.positions, self.torch_device), *self.kv]
        return Logits(self.programs.full.run(attn_metadata(batch, self.block_size, self.torch_device), inputs)[0])

    @torch.inference_mode()
    def sample(self, logits: Logits, batch: Batch, mask: np.ndarray | None = None) -> TorchOutput | CopiedOutput:
        self.slots.begin(batch.new_requests)
        if self.output_copier:
            self.output_copier.wait_for_copy()
        if self.runner:
            tokens = self.runner.sample(logits, batch, mask)
        else:
            tokens = sample(logits.values[: len(batch.req_slots)], batch, self.slots, mask)
            self.slots.append(batch, tokens)
        send = self.output_copier.send if self.output_copier else TorchOutput
        if batch.logprobs < 0:
            return send(tokens, None)
        prompt_ids = on_device(batch.prompt_logprob_ids.astype(np.int64), self.torch_device)
        return send(tokens, logprobs(logits.values.float(), torch.cat([tokens.long(), prompt_ids]), batch.logprobs))

    def idle(self) -> bool:
        return self.runner is not None and self.runner.idle()

    def to_host(self, logits: Logits) -> np.ndarray:
        return logits.values.float().cpu().numpy()

    def to_device(self, logits: np.ndarray) -> Logits:
        return Logits(on_device(logits, self.torch_device))

    @torch.inference_mode()
    def measure_peak(self) -> tuple[float, float]:
        cuda = self.torch_device.type == "cuda"
        side, wait = (8192, lambda: torch.cuda.synchronize(self.torch_device)) if cuda else (1024, lambda: None)
        data = torch.ones(2**30 if cuda else 2**26, device=self.torch_device)
        matrix = torch.randn(side, side, device=self.torch_device).to(self.torch_dtype)
        reading, product = (
            bench(run, wait, together=10 if cuda else 1) for run in (data.sum, partial(torch.mm, matrix, matrix))
        )
        return data.nbytes / reading, 2 * side**3 / product

    def profiler(self) -> TorchProfiler:
        return TorchProfiler(self.torch_device, self._watch)

    def _watch(self, on: bool) -> None:
        self.profiled = on
        if self.kernels:
            self.kernels.profiled = on

    def close(self) -> None:
        self.programs, self.kv, self.recorder = NO_PROGRAMS, [], None
        self.slots, self.output_copier = SlotState(0, 0, self.torch_device), None
        if self.runner:
            self.runner.end()
        if self.torch_device.type == "cuda":
            torch.cuda.empty_cache()
        trim_host_memory()

    def _input_ids(self, batch: Batch) -> torch.Tensor:
        """int64 (T,), with the slots' last tokens filled in."""
        tokens = on_device(batch.input_ids.astype(np.int64), self.torch_device)
        if (batch.input_ids >= 0).all():
            return tokens
        return torch.where(tokens < 0, self.slots.last_token[(-1 - tokens).clamp(min=0)], tokens)


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """On a CPU memory that the system gives as zeros when it is first touched: `torch.zeros` writes all of it."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    raw = torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8))
    return raw.view(dtype).view(shape)
