"""From a config to what an engine runs: the model's text side, and a backend that holds its weights and KV cache."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llmrs.backends import base
from llmrs.config import EngineConfig
from llmrs.core.blocks import BlockPool
from llmrs.core.engine import EngineCore
from llmrs.core.errors import ConfigError, LoadCancelledError, ModelError
from llmrs.core.ir import Graph
from llmrs.core.options import SamplingParams
from llmrs.memory import Fit, fit
from llmrs.models.arch.config import ModelConfig
from llmrs.models.arch.families import family, graph_of, read_config
from llmrs.models.files.generation import read_generation
from llmrs.models.files.safetensors import SafetensorsSource
from llmrs.models.files.weights import Weights, untie_stored_head
from llmrs.models.hub.resolve import resolve_model
from llmrs.models.text.template import ChatTemplate
from llmrs.models.text.tokenizer import Tokenizer

Progress = Callable[[int, int], object]  # bytes done, bytes of all; False ends the loading
OnFit = Callable[[Fit], object]  # False ends the loading


def ignore_progress(done: int, total: int) -> None:
    """Nobody wants to know."""


def ignore_fit(fit: Fit) -> None:
    """Nobody wants to know."""


@dataclass(frozen=True)
class Model:
    """A model folder as read: everything but its weights."""

    folder: Path
    config: ModelConfig
    graph: Graph
    tokenizer: Tokenizer
    template: ChatTemplate | ModelError | None  # the error where it can't work: it stops conversations only
    sampling: SamplingParams  # what its author recommends
    eos_ids: tuple[int, ...]


def read_model(config: EngineConfig, on_download: Progress = ignore_progress) -> Model:
    """Reads and checks the small files of a model, whose files are all downloaded before if need be.

    Raises ModelError, or LoadCancelledError where `on_download` returns False.
    """

    def advance(done: int, total: int) -> None:
        if on_download(done, total) is False:
            raise LoadCancelledError("the download of the model was cancelled", "the next one goes on where it was")

    folder = resolve_model(config.model_path, config.revision, offline=config.offline, progress=advance)
    return read_folder(folder)


def read_folder(folder: Path) -> Model:
    """Reads and checks the small files of a model. Raises ModelError."""
    config = _with_stored_head(folder, read_config(folder))
    graph = graph_of(config)
    tokenizer = Tokenizer.load(folder)
    generation = read_generation(folder, config.vocab_size, tokenizer.eos_ids)
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
        ChatTemplate.load(folder, tokenizer.special_tokens),
        SamplingParams(**generation.sampling),
        generation.eos_ids,
    )


def _with_stored_head(folder: Path, config: ModelConfig) -> ModelConfig:
    """See `untie_stored_head`. The weights are opened only where they are to be tied."""
    if not config.tie_word_embeddings:
        return config
    source = SafetensorsSource(folder)
    found = untie_stored_head(config, family(config.architecture).names, source)
    source.close()
    return found


def make_backend(config: EngineConfig) -> base.Backend:
    """The backend on its device. Raises BackendError or ConfigError."""
    if config.quant is not None:
        raise ConfigError(f"quant: {config.quant!r} is not there yet", "leave it out to run the weights as they are")
    kind = base.load_backend(base.resolve(config.backend))
    kv_dtype = config.dtype if config.kv_cache_dtype == "auto" else config.kv_cache_dtype
    backend = kind(base.pick_device(kind, config.device), config.dtype, kv_dtype)
    backend.configure(config)
    return backend


def load(
    backend: base.Backend, config: EngineConfig, model: Model, progress: Progress, on_fit: OnFit
) -> tuple[EngineCore, Fit]:
    """Weights and KV cache into the backend; the core that steps it. Raises ModelError, ConfigError, BackendError.

    `on_fit` is called before anything is loaded, and again if there is room for less than was expected.
    """
    expected = measure(backend, config, model, backend.free_memory())
    on_fit(expected)
    expected.check()
    _load_weights(backend, model, progress)
    found = measure(backend, config, model, backend.free_memory() + expected.weights)
    if found.length != expected.length:
        on_fit(found)
    found.check()
    max_tokens = step_tokens(backend, config)
    backend.allocate(found.blocks, found.block_size, config.max_num_seqs, found.length, max_tokens)
    core = EngineCore(
        backend,
        BlockPool(found.blocks, found.block_size, config.prefix_cache),
        vocab_size=model.config.vocab_size,
        max_model_len=found.length,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=max_tokens,
    )
    return core, found


def step_tokens(backend: base.Backend, config: EngineConfig) -> int:
    """max_num_batched_tokens, or the backend's default."""
    return config.max_num_batched_tokens or max(backend.step_tokens, config.max_num_seqs)


def measure(backend: base.Backend, config: EngineConfig, model: Model, free: int) -> Fit:
    """How the model fits where `free` bytes are free before the weights are there. Raises ConfigError."""
    block_size, dtypes = config.block_size or backend.block_size, (backend.dtype, backend.kv_dtype)
    workspace = backend.workspace_bytes(model.graph, config.max_num_seqs, step_tokens(backend, config))
    return fit(model.graph, config, model.config.max_position_embeddings, block_size, dtypes, free, workspace)


def _load_weights(backend: base.Backend, model: Model, progress: Progress) -> None:
    source = SafetensorsSource(model.folder)
    names = family(model.config.architecture).names
    weights = Weights(model.graph, names, source, tied=model.config.tie_word_embeddings)
    total = sum(w.nbytes for w in map(weights.__getitem__, weights))
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(min(done, total), total)

    backend.load(model.graph, weights, advance)


def require_template(model: Model) -> ChatTemplate:
    if model.template is None:
        raise ModelError(f"{model.folder} has no chat template", "complete plain text instead (chat: false)")
    if isinstance(model.template, ModelError):
        hint = f"{model.template.hint}, or complete plain text (chat: false)"
        raise ModelError(model.template.message, hint) from model.template
    return model.template
