"""The families: each architecture's graph and the names of its weights. A new one is a line here and its graph."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from llmrs.core.errors import ModelError
from llmrs.core.ir import Graph, check
from llmrs.models import llama, qwen3
from llmrs.models.config import ModelConfig
from llmrs.models.layers import HF_NAMES


@dataclass(frozen=True)
class Family:
    """How an architecture is described: its graph, and canonical -> Hugging Face weight names."""

    graph: Callable[[ModelConfig], Graph]
    names: Mapping[str, str]


FAMILIES = {
    "LlamaForCausalLM": Family(llama.graph, HF_NAMES),
    "Qwen3ForCausalLM": Family(qwen3.graph, HF_NAMES),
}


def family(architecture: str) -> Family:
    """Raises ModelError for an architecture that is not supported."""
    if architecture not in FAMILIES:
        raise ModelError(f"architecture {architecture!r} is not supported", f"supported are {', '.join(FAMILIES)}")
    return FAMILIES[architecture]


def graph_of(config: ModelConfig) -> Graph:
    """The checked graph of a model."""
    graph = family(config.architecture).graph(config)
    check(graph)
    return graph
