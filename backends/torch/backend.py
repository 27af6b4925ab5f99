"""Lowers a model's graph to a list of torch calls and runs it step by step, on the CPU or an NVIDIA GPU.

With plain torch ops; `runner.py` adds Triton kernels and CUDA graphs.
"""

import math
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from llmrs.backends.base import Backend, best_time
from llmrs.backends.cores import usable_cores
from llmrs.backends.fusion import FUSED_OPS
from llmrs.backends.host_memory import free_host_memory, keep_freed_memory, trim_host_memory, use_huge_pages
from llmrs.backends.linearize import hoist_logits_gather, inline, tied_weights
from llmrs.backends.torch.async_output import Outbox, Sent, TorchTicket
from llmrs.backends.torch.cpu_linear import Linear, prepare
from llmrs.backends.torch.fusion import CanFuseNorm, program_functions
from llmrs.backends.torch.kv_fp8 import CODES, Scaled, check_device
from llmrs.backends.torch.lowering import Bind, Lowering
from llmrs.backends.torch.ops import BIND, FUSED, KV, OPS
from llmrs.backends.torch.profiler import TorchProfiler
from llmrs.backends.torch.program import Program, Programs
from llmrs.backends.torch.sampling import SlotState, logprobs, sample
from llmrs.backends.torch.sdpa_attention import context, on_device
from llmrs.backends.torch.workspace import runner_memory, step_memory
from llmrs.core.batch import Batch
from llmrs.core.config import EngineConfig
from llmrs.core.errors import BackendError, ConfigError, MemoryLimitError
from llmrs.core.ir import Graph
from llmrs.quant.tensor import Tensor

if TYPE_CHECKING:  # Triton is not there on every system
    from llmrs.backends.torch.model_runner import KernelRunner

BF16_SINCE = 8  # compute capability; older GPUs have no arithmetic in bf16, and Triton refuses it
LARGE = 2**28  # bytes of weights from which huge pages pay
NO_PROGRAMS = Programs(*[Program([], 0, [])] * 3)
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


class TorchBackend(Backend):
    """Plain torch ops. On the CPU weights are packed for oneDNN; tied embeddings are read from the mapped file."""

    name = "torch"
    fused_ops = FUSED
    kv_dtypes = (*Backend.kv_dtypes, "fp8")

    def __init__(self, device: str, dtype: str, kv_dtype: str) -> None:
        super().__init__(device, dtype, kv_dtype)
        self.at = torch.device(device)
        self.type = DTYPES[dtype]
        if self.at.type == "cuda":
            self.max_in_flight = 2  # on the CPU a launch computes
        else:
            keep_freed_memory()
            self.step_tokens = 256  # as fast as more, with temporaries that the caches hold; and nobody waits long
        self.rules: Mapping[str, Callable[..., object]] = OPS
        self.bind: Mapping[str, Bind] = BIND
        self.can_fuse_norm: CanFuseNorm = lambda matrix: False
        self.make_linear: Callable[..., Linear] = prepare
        self.programs = NO_PROGRAMS
        self.kv: list[KV] = []
        self.slots = SlotState(0, 0, self.at)
        self.kernels: KernelRunner | None = None
        self.outbox: Outbox | None = None
        self.room, self.largest_step = 0, 0  # bytes of a step's results, and tokens

    def configure(self, config: EngineConfig) -> None:
        self.use_threads(config.threads)
        self.use_kernels(config.kernels, graphs=config.cuda_graphs, attention=config.attention, tune=config.tune)
        if config.tune and self.kernels is None:
            raise BackendError(f"tune: no Triton kernels run on {self.device}", "leave it out")

    def use_threads(self, count: int | None) -> None:
        """CPU threads of steps; None: as torch has it (OMP_NUM_THREADS), within the usable cores.

        Torch keeps the number for the process. Raises ConfigError where steps run on a GPU.
        """
        if self.at.type != "cpu":
            if count is not None:
                raise ConfigError(f"threads: steps run on {self.device}", "leave it out, or choose device: cpu")
            return
        count = count or min(torch.get_num_threads(), usable_cores())
        if count != torch.get_num_threads():
            torch.set_num_threads(count)

    def use_kernels(
        self, wanted: str, *, graphs: bool = True, attention: str = "auto", tune: bool | None = False
    ) -> None:
        """Triton kernels, before anything is loaded: "triton", "plain" (none), or "auto": where there is an NVIDIA GPU.

        `tune`: None finds the best cuts on a GPU of which none are stored. `attention` is what the option says; plain
        torch ops are "sdpa", or "auto". Raises BackendError where they are asked for and can't run, or can't do fp8;
        "auto" warns and does without a missing Triton.
        """
        if wanted == "plain" or (wanted == "auto" and self.at.type != "cuda"):
            if attention not in ("auto", "sdpa"):
                where = "without kernels" if wanted == "plain" else f"on {self.at}"
                raise BackendError(f"attention: {attention} is not there {where}", "attention: auto, or sdpa")
            return
        try:
            from llmrs.backends.torch import model_runner, triton_ops
        except ImportError as error:
            missing = BackendError(f"Triton can't be loaded: {error}", "pip install triton, or kernels: plain")
            if wanted != "auto" or attention not in ("auto", "sdpa"):
                raise missing from error
            warnings.warn(f"{missing}; plain torch runs in its place, at a tenth of the speed", stacklevel=2)
            return
        if self.kv_dtype == "fp8":
            check_device(self.at)
            if attention in ("sdpa", "flash"):
                raise BackendError(f"attention: {attention} does not go with kv_cache_dtype: fp8", "attention: auto")
        if self.at.type == "cuda":
            self._check_bf16()
            torch.cuda.set_device(self.at)  # of this thread: Triton launches on it
        self.kernels = model_runner.KernelRunner(self.at, graphs=graphs, attention=attention, tune=tune)
        self.rules, self.bind, self.fused_ops = triton_ops.TRITON, triton_ops.BIND, triton_ops.FUSED
        self.can_fuse_norm = partial(triton_ops.can_fuse_norm, dtype=self.type)
        self.make_linear = partial(triton_ops.Matrix, cuts=self.kernels.cuts)
        self.block_size = model_runner.BLOCK_SIZE

    def _check_bf16(self) -> None:
        """Raises BackendError where kernels would meet bf16 on a GPU that has none."""
        major, minor = torch.cuda.get_device_capability(self.at)
        option = "dtype" if self.dtype == "bf16" else "kv_cache_dtype"
        if major < BF16_SINCE and "bf16" in (self.dtype, self.kv_dtype):
            name = f"{torch.cuda.get_device_name(self.at)}, of compute capability {major}.{minor}"
            raise BackendError(
                f"{option}: bf16 needs compute capability {BF16_SINCE}.0 or later; here is {name}",
                f"{option}: f16 or f32; or kernels: plain, where torch emulates bf16, slowly",
            )

    @classmethod
    def devices(cls) -> list[str]:
        return [f"cuda:{n}" for n in range(torch.cuda.device_count())] + ["cpu"]

    @classmethod
    def ops(cls) -> frozenset[str]:
        return frozenset(OPS) | frozenset(FUSED_OPS)

    def free_memory(self) -> int:
        return torch.cuda.mem_get_info(self.at)[0] if self.at.type == "cuda" else free_host_memory()

    def reserve(self, graph: Graph, sequences: int, tokens: int) -> int:
        if self.at.type != "cuda":
            return 0
        self.room, self.largest_step = step_memory(graph, tokens, self.type.itemsize), tokens
        return runner_memory(graph, sequences, self.room, self.type.itemsize)

    # Loading: every equation becomes a call with its weights bound.

    def load_weights(self, weights: Mapping[str, Tensor], progress: Callable[[int], None]) -> None:
        if self.kernels:
            self.kernels.check(self.graph, self.type)
        function = inline(self.graph)
        tied = tied_weights(function)
        lowering = Lowering(self.rules, self.bind, self.at, self.type, weights, progress, tied, self.make_linear)
        if self.kernels:
            functions = program_functions(hoist_logits_gather(function), self.can_fuse_norm)
            self.programs = Programs(*map(lowering.program, functions))
        else:
            self.programs = Programs(*[lowering.program(function)] * 3)
        trim_host_memory()
        if self.at.type == "cpu" and lowering.size > LARGE:
            use_huge_pages()

    def allocate(self, blocks: int, block_size: int, slots: int, max_tokens: int) -> None:
        self.block_size = block_size
        try:
            self.kv = [self._pool(blocks, block_size, *t.sizes) for t in self.graph.kv_types()]
        except RuntimeError as error:  # torch.OutOfMemoryError, or the CPU allocator's own
            raise MemoryLimitError(f"no memory for {blocks} KV blocks: {error}", "lower max_model_len") from error
        self.slots = SlotState(slots, max_tokens, self.at)
        if self.kernels:
            sizes = {"room": self.room, "step_tokens": self.largest_step}
            self.kernels.begin(self.graph, self.programs, self.kv, self.slots, self.type, **sizes)
            self.outbox = Outbox(self.at, slots, self.max_in_flight + 1) if self.kernels.aside else None

    def _pool(self, blocks: int, block_size: int, heads: int, size: int) -> KV:
        """One layer's cache. For kernels a head's tokens lie together, K and V of a block side by side, and there is
        a block more, to which they write what nobody reads."""
        if self.kernels:
            both = self._zeros(blocks + 1, 2, heads, block_size, size)
            return KV(*(side.transpose(1, 2) for side in both.unbind(1)))
        return KV(*(self._zeros(blocks, block_size, heads, size) for _ in range(2)))

    def _zeros(self, *shape: int) -> torch.Tensor | Scaled:
        """Of the KV cache's type."""
        if self.kv_dtype == "fp8":
            return Scaled(zeros(shape, CODES, self.at), zeros(shape[:-1], torch.float32, self.at))
        return zeros(shape, DTYPES[self.kv_dtype], self.at)

    # Running

    @torch.inference_mode()
    def forward(self, batch: Batch) -> torch.Tensor:
        if self.kernels:
            return self.kernels.forward(batch)
        inputs = [self._tokens(batch), on_device(batch.positions, self.at), *self.kv]
        logits: torch.Tensor = self.programs.full.run(context(batch, self.block_size, self.at), inputs)[0]
        return logits

    @torch.inference_mode()
    def sample(self, logits: torch.Tensor, batch: Batch, mask: np.ndarray | None = None) -> TorchTicket | Sent:
        self.slots.begin(batch.new_requests)
        if self.outbox:
            self.outbox.hold()
        if self.kernels:
            tokens = self.kernels.sample(logits, batch, mask)
        else:
            tokens = sample(logits[: len(batch.req_slots)], batch, self.slots, mask)
            self.slots.append(batch, tokens)
        send = self.outbox.send if self.outbox else TorchTicket
        if batch.logprobs < 0:
            return send(tokens, None)
        came = torch.cat([tokens.long(), on_device(batch.prompt_logprob_ids.astype(np.int64), self.at)])
        return send(tokens, logprobs(logits.float(), came, batch.logprobs))

    def idle(self) -> bool:
        return self.kernels is not None and self.kernels.idle()

    def to_host(self, logits: torch.Tensor) -> np.ndarray:
        return logits.float().cpu().numpy()

    def to_device(self, logits: np.ndarray) -> torch.Tensor:
        return on_device(logits, self.at)

    @torch.inference_mode()
    def ceilings(self) -> tuple[float, float]:
        cuda = self.at.type == "cuda"
        side, wait = (8192, lambda: torch.cuda.synchronize(self.at)) if cuda else (1024, lambda: None)
        data = torch.ones(2**30 if cuda else 2**26, device=self.at)
        matrix = torch.randn(side, side, device=self.at).to(self.type)
        reading, product = (
            best_time(run, wait, together=10 if cuda else 1) for run in (data.sum, partial(torch.mm, matrix, matrix))
        )
        return data.nbytes / reading, 2 * side**3 / product

    def profiler(self) -> TorchProfiler:
        return TorchProfiler(self.at)

    def close(self) -> None:
        self.programs, self.kv = NO_PROGRAMS, []
        self.slots, self.outbox = SlotState(0, 0, self.at), None
        if self.kernels:
            self.kernels.end()
        if self.at.type == "cuda":
            torch.cuda.empty_cache()
        trim_host_memory()

    def _tokens(self, batch: Batch) -> torch.Tensor:
        """int64 (T,), with the slots' last tokens filled in."""
        tokens = on_device(batch.input_ids.astype(np.int64), self.at)
        if (batch.input_ids >= 0).all():
            return tokens
        return torch.where(tokens < 0, self.slots.last_token[(-1 - tokens).clamp(min=0)], tokens)


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """On a CPU memory that the system gives as zeros when it is first touched: `torch.zeros` writes all of it."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    raw = torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8))
    return raw.view(dtype).view(shape)
