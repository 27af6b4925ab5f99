"""Reads a model, without its weights: config, tokenizer and chat template of a folder or a GGUF file."""

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from llmrs.config import EngineConfig
from llmrs.core.errors import LoadCancelledError, ModelError
from llmrs.core.ir import Graph
from llmrs.core.options import SamplingParams
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
from llmrs.quant.tensor import WeightSource

Progress = Callable[[int, int], object]  # bytes done, bytes in total; False cancels the loading


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


def require_template(model: Model) -> ChatTemplate:
    if model.template is None:
        raise ModelError(f"{model.path} has no chat template", "complete plain text instead (chat: false)")
    if isinstance(model.template, ModelError):
        hint = f"{model.template.hint}, or complete plain text (chat: false)"
        raise ModelError(model.template.message, hint) from model.template
    return model.template
