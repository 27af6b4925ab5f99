"""From a config to what an engine runs: the model's text side, and a backend that holds its weights and KV cache."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llmrs.backends import base
from llmrs.core.blocks import BlockPool
from llmrs.core.config import EngineConfig, SamplingParams
from llmrs.core.engine import EngineCore
from llmrs.core.errors import ConfigError, LoadCancelledError, MemoryLimitError, ModelError
from llmrs.core.ir import Graph
from llmrs.models.config import ModelConfig
from llmrs.models.families import family, graph_of, read_config
from llmrs.models.generation import read_generation
from llmrs.models.locate import locate
from llmrs.models.safetensors import SafetensorsSource
from llmrs.models.template import ChatTemplate
from llmrs.models.tokenizer import Tokenizer
from llmrs.models.weights import Weights, parameters

DEFAULT_CONTEXT = 4096  # tokens of prompt and answer, where the user does not say and the model allows it
Progress = Callable[[int, int], object]  # bytes done, bytes of all; False ends the loading


def ignore_progress(done: int, total: int) -> None:
    """Nobody wants to know."""


@dataclass(frozen=True)
class Model:
    """A model folder as read: everything but its weights."""

    folder: Path
    config: ModelConfig
    graph: Graph
    tokenizer: Tokenizer
    template: ChatTemplate | None
    sampling: SamplingParams  # what its author recommends
    eos_ids: tuple[int, ...]


def read_model(config: EngineConfig, on_download: Progress = ignore_progress) -> Model:
    """Reads and checks the small files of a model, whose files are all downloaded before if need be.

    Raises ModelError, or LoadCancelledError where `on_download` returns False.
    """

    def advance(done: int, total: int) -> None:
        if on_download(done, total) is False:
            raise LoadCancelledError("the download of the model was cancelled", "the next one goes on where it was")

    folder = locate(config.model_path, config.revision, offline=config.offline, progress=advance)
    return read_folder(folder)


def read_folder(folder: Path) -> Model:
    """Reads and checks the small files of a model. Raises ModelError."""
    config = read_config(folder)
    graph = graph_of(config)
    tokenizer = Tokenizer.load(folder)
    generation = read_generation(folder, config.vocabulary, tokenizer.eos_ids)
    if not any(tokenizer.has(i) for i in generation.eos_ids):
        raise ModelError(
            f"{folder}: the tokenizer has no token for the end-of-sequence id {generation.eos_ids[0]}",
            "do tokenizer.json and config.json belong together?",
        )
    return Model(
        folder,
        config,
        graph,
        tokenizer,
        ChatTemplate.load(folder, tokenizer.specials),
        SamplingParams(**generation.sampling),
        generation.eos_ids,
    )


def context_length(config: EngineConfig, model: ModelConfig) -> int:
    """Tokens of prompt and answer together. Raises ConfigError when the user asks for more than the model has."""
    if config.max_model_len is None:
        return min(model.context, DEFAULT_CONTEXT)
    if config.max_model_len > model.context:
        raise ConfigError(
            f"max_model_len: {config.max_model_len} is more than the model's context of {model.context} tokens",
            f"use at most {model.context}",
        )
    return config.max_model_len


def make_backend(config: EngineConfig) -> base.Backend:
    """The backend on its device. Raises BackendError or ConfigError."""
    if config.quant is not None:
        raise ConfigError(f"quant: {config.quant!r} is not there yet", "leave it out to run the weights as they are")
    kind = base.find(base.choose(config.backend))
    kv_dtype = config.dtype if config.kv_cache_dtype == "auto" else config.kv_cache_dtype
    return kind(base.pick_device(kind, config.device), config.dtype, kv_dtype)


def load(backend: base.Backend, config: EngineConfig, model: Model, progress: Progress) -> EngineCore:
    """Weights and KV cache into the backend, and the core that steps it. Raises ModelError or MemoryLimitError."""
    needed = parameters(model.graph) * base.DTYPE_BYTES[backend.dtype]
    if needed > backend.free_memory():
        raise MemoryLimitError(
            f"the weights need {gigabytes(needed)} in {backend.dtype}, and {gigabytes(backend.free_memory())} are free",
            "use a smaller model or a smaller dtype",
        )
    source = SafetensorsSource(model.folder)
    names = family(model.config.architecture).names
    weights = Weights(model.graph, names, source, tied=model.config.tied)
    total = sum(w.nbytes for w in map(weights.__getitem__, weights))
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(min(done, total), total)

    backend.load(model.graph, weights, advance)
    pool, length = size_pool(backend, config, model)
    backend.allocate(pool.count, pool.size, config.max_num_seqs, length)
    return EngineCore(backend, config, model.config.vocabulary, length, pool)


def size_pool(backend: base.Backend, config: EngineConfig, model: Model) -> tuple[BlockPool, int]:
    """The KV cache's blocks and the context length that they allow.

    As many as max_num_seqs full contexts need, or as memory allows. A context that the user did not ask for is
    shortened to what fits; one that was asked for is refused.
    """
    size = config.block_size or backend.block_size
    length = context_length(config, model.config)
    each = -(-length // size)
    budget = config.kv_cache_memory or int(backend.free_memory() * config.memory_fraction)
    count = min(each * config.max_num_seqs, budget // (backend.token_bytes() * size))
    if count < each:
        fits = count * size
        if config.max_model_len is not None or fits < 2:
            raise MemoryLimitError(
                f"one sequence of {length} tokens needs {gigabytes(length * backend.token_bytes())} of KV cache, "
                f"and {gigabytes(budget)} may be used",
                f"max_model_len of at most {fits} fits" if fits >= 2 else "give the KV cache more memory",
            )
        length = fits
    return BlockPool(count, size, config.prefix_cache), length


def gigabytes(count: int) -> str:
    """Bytes in words."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


def require_template(model: Model) -> ChatTemplate:
    if model.template is None:
        raise ModelError(f"{model.folder} has no chat template", "complete plain text instead (chat: false)")
    return model.template
