"""Loads a model's weights into a backend and allocates the KV cache, within what memory allows."""

from collections.abc import Callable, Mapping
from contextlib import closing

from llmrs.backends import base
from llmrs.config import EngineConfig
from llmrs.core.blocks import BlockPool
from llmrs.core.engine import EngineCore
from llmrs.incoming import IncomingWeights
from llmrs.memory import MemoryPlan, WeightMemory, plan_memory
from llmrs.model import Model, Progress
from llmrs.quant.tensor import Stored
from llmrs.quantizing import smaller

OnMemoryPlan = Callable[[MemoryPlan], object]  # False cancels the loading


def make_backend(config: EngineConfig) -> base.Backend:
    """The backend on its device. Raises BackendError or ConfigError."""
    kind = base.load_backend(base.resolve(config.backend))
    kv_dtype = config.dtype if config.kv_cache_dtype == "auto" else config.kv_cache_dtype
    backend = kind(base.pick_device(kind, config.device), config.dtype, kv_dtype)
    backend.configure(config)
    return backend


def load(
    backend: base.Backend, config: EngineConfig, model: Model, progress: Progress, on_memory_plan: OnMemoryPlan
) -> tuple[EngineCore, MemoryPlan]:
    """Loads weights and allocates the KV cache. Raises ModelError, ConfigError, BackendError.

    `on_memory_plan` is called before anything is loaded, and again if less memory is left than expected.
    """
    weights = IncomingWeights.of(model, config.quant)
    with closing(weights.file.source):
        expected = _plan(backend, config, weights, backend.free_memory())
        on_memory_plan(expected)
        expected.check()
        weights.warn_of_expanded(backend.dtype)
        _load_weights(backend, weights, config.save_quantized, progress)
        final = _plan(backend, config, weights, backend.free_memory() + expected.weight_bytes)
    if final.max_model_len != expected.max_model_len:
        on_memory_plan(final)
    final.check()
    max_tokens = _max_num_batched_tokens(backend, config)
    backend.allocate(final.num_blocks, final.block_size, config.max_num_seqs, final.max_model_len, max_tokens)
    core = EngineCore(
        backend, BlockPool(final.num_blocks, final.block_size, config.prefix_cache), vocab_size=model.config.vocab_size,
        max_model_len=final.max_model_len, max_num_seqs=config.max_num_seqs, max_num_batched_tokens=max_tokens,
    )  # fmt: skip
    return core, final


def _max_num_batched_tokens(backend: base.Backend, config: EngineConfig) -> int:
    return config.max_num_batched_tokens or max(backend.step_tokens, config.max_num_seqs)


def plan(
    backend: base.Backend, config: EngineConfig, model: Model, weights: Mapping[str, Stored], device_free: int
) -> MemoryPlan:
    """The memory plan for `device_free` bytes before the weights are loaded. Raises ConfigError."""
    block_size, dtypes = config.block_size or backend.block_size, (backend.dtype, backend.kv_dtype)
    max_tokens = _max_num_batched_tokens(backend, config)
    workspace = backend.workspace_bytes(model.graph, config.max_num_seqs, max_tokens)
    memory = WeightMemory.of(
        weights.values(), backend.dtype, keeps_quantized=backend.keeps_quantized, in_situ=config.quant is not None
    )
    max_len = model.config.max_position_embeddings
    return plan_memory(model.graph, memory, config, max_len, block_size, dtypes, device_free, workspace)


def _plan(backend: base.Backend, config: EngineConfig, weights: IncomingWeights, device_free: int) -> MemoryPlan:
    """`plan`, with the quantization that would fit where the model does not."""
    found = plan(backend, config, weights.model, weights.after, device_free)
    if found.fits or not backend.keeps_quantized:
        return found
    after = smaller(weights.model.config, weights.before)
    return found.advising({name: plan(backend, config, weights.model, w, device_free) for name, w in after})


def _load_weights(backend: base.Backend, weights: IncomingWeights, keep: str | None, progress: Progress) -> None:
    total = sum(s.nbytes for s in weights.after.values())
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done = min(done + count, total)
        progress(done, total)

    with weights.opened(keep, backend.quantizer_device(backend.device)) as tensors:
        backend.load(weights.model.graph, tensors, advance)
    if done < total:  # planes are larger than the file's blocks, and not every backend reports what it leaves there
        progress(total, total)
