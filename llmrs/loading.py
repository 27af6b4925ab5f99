"""Loads a model: config and tokenizer from its folder, weights and KV cache into a backend."""

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from llmrs.backends import base
from llmrs.config import EngineConfig
from llmrs.core.blocks import BlockPool
from llmrs.core.engine import EngineCore
from llmrs.core.errors import LoadCancelledError, ModelError
from llmrs.core.ir import Graph
from llmrs.core.options import SamplingParams
from llmrs.incoming import IncomingWeights
from llmrs.memory import MemoryPlan, WeightMemory, plan_memory
from llmrs.models.arch.config import ModelConfig
from llmrs.models.arch.families import family, graph_of, read_config
from llmrs.models.arch.gguf import GGUF_NAMES, config_from_metadata
from llmrs.models.files.generation import gguf_sampling, read_generation
from llmrs.models.files.gguf import GGUFSource
from llmrs.models.files.gguf_weights import UnconvertedSource
from llmrs.models.files.quantized import open_weights
from llmrs.models.files.weights import Weights, untie_stored_head
from llmrs.models.hub.resolve import resolve_model
from llmrs.models.text.gguf_tokenizer import gguf_tokenizer
from llmrs.models.text.template import ChatTemplate
from llmrs.models.text.template_files import gguf_sources
from llmrs.models.text.tokenizer import Tokenizer
from llmrs.quant.tensor import Stored, WeightSource
from llmrs.quantizing import smaller

Progress = Callable[[int, int], object]  # bytes done, bytes in total; False cancels the loading
OnMemoryPlan = Callable[[MemoryPlan], object]  # False cancels the loading


def no_callback(*values: object) -> None:
    """The default of callbacks."""


@dataclass(frozen=True)
class Model:
    """A model folder or GGUF file without its weights."""

    path: Path
    config: ModelConfig
    graph: Graph
    tokenizer: Tokenizer
    template: ChatTemplate | ModelError | None  # the error of a broken one: plain text works without
    sampling: SamplingParams  # the author's defaults
    eos_ids: tuple[int, ...]
    weight_names: Mapping[str, str]  # canonical -> in the files
    open_source: Callable[[], WeightSource]

    def open_weights(self) -> Weights:
        """The weights, which are read on access; `weights.source.close()` drops the files. Raises ModelError."""
        return Weights(self.graph, self.weight_names, self.open_source(), tied=self.config.tie_word_embeddings)


def read_model(config: EngineConfig, on_download: Progress = no_callback) -> Model:
    """Downloads missing files of a Hub model, then reads it.

    Raises ModelError, or LoadCancelledError where `on_download` returns False.
    """

    def advance(done: int, total: int) -> None:
        if on_download(done, total) is False:
            raise LoadCancelledError("the download of the model was cancelled", "the next one resumes it")

    path = resolve_model(config.model_path, config.revision, offline=config.offline, progress=advance)
    return read_folder(path) if path.is_dir() else read_gguf(path)


def read_folder(folder: Path) -> Model:
    """Reads and checks config, tokenizer and templates. Raises ModelError."""
    config = read_config(folder)
    names, open_source = family(config.architecture).names, partial(open_weights, folder)
    if config.tie_word_embeddings:
        with closing(open_source()) as source:  # files with an lm_head untie the embeddings
            config = untie_stored_head(config, names, source)
    tokenizer = Tokenizer.load(folder)
    generation = read_generation(folder, config.vocab_size, tokenizer.eos_ids)
    if not any(tokenizer.has(i) for i in generation.eos_ids):
        problem = f"{folder}: the tokenizer has no token for the end-of-sequence id {generation.eos_ids[0]}"
        raise ModelError(problem, "do tokenizer.json and config.json belong together?")
    template, sampling = ChatTemplate.load(folder, tokenizer.special_tokens), SamplingParams(**generation.sampling)
    graph, eos_ids = graph_of(config), generation.eos_ids
    return Model(folder, config, graph, tokenizer, template, sampling, eos_ids, names, open_source)


def read_gguf(path: Path) -> Model:
    """The same of a GGUF file, or of any of a set of split files. Raises ModelError."""
    with closing(GGUFSource(path)) as source:
        metadata = source.metadata
        config = config_from_metadata(path, metadata, source)
    tokenizer, eos_ids = gguf_tokenizer(path, metadata)
    if not eos_ids:
        raise ModelError(f"{path} names no end-of-sequence token", "convert the model again")
    template = ChatTemplate.of(gguf_sources(path, metadata), tokenizer.special_tokens)
    sampling = SamplingParams(**gguf_sampling(path, metadata))

    def open_source() -> WeightSource:
        return UnconvertedSource(GGUFSource(path), config, path)

    return Model(path, config, graph_of(config), tokenizer, template, sampling, eos_ids, GGUF_NAMES, open_source)


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

    with weights.opened(keep) as tensors:
        backend.load(weights.model.graph, tensors, advance)
    if done < total:  # planes are larger than the file's blocks, and not every backend reports what it leaves there
        progress(total, total)


def require_template(model: Model) -> ChatTemplate:
    if model.template is None:
        raise ModelError(f"{model.path} has no chat template", "complete plain text instead (chat: false)")
    if isinstance(model.template, ModelError):
        hint = f"{model.template.hint}, or complete plain text (chat: false)"
        raise ModelError(model.template.message, hint) from model.template
    return model.template
