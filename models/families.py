"""The families: each architecture's graph, the names of its weights, and what its config.json may leave out.

A new one is an entry here, and a graph where it is not one that is there.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmrs.core.errors import ModelError
from llmrs.core.ir import Graph, check
from llmrs.models import gemma3, llama, qwen3
from llmrs.models.config import SHORT, ModelConfig, architecture, parse, read_json
from llmrs.models.layers import HF_NAMES


@dataclass(frozen=True)
class Family:
    """How an architecture is described."""

    graph: Callable[[ModelConfig], Graph]
    names: Mapping[str, str]  # canonical -> Hugging Face weight name
    defaults: Mapping[str, Any] = field(default_factory=dict)  # of config fields, as transformers' classes have them


# Qwen2 and 3 carry the fields of a window also where they don't use it.
QWEN = {
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
}
FAMILIES = {
    "LlamaForCausalLM": Family(llama.graph, HF_NAMES),
    "MistralForCausalLM": Family(
        llama.graph,
        HF_NAMES,
        {"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131072},
    ),
    "Qwen2ForCausalLM": Family(
        llama.graph,
        HF_NAMES,
        {**QWEN, "max_window_layers": 28, "attention_bias": True, "attention_output_bias": False},
    ),
    "Qwen3ForCausalLM": Family(qwen3.graph, HF_NAMES, {**QWEN, "max_window_layers": 28, "head_dim": 128}),
    "Qwen3MoeForCausalLM": Family(
        qwen3.graph,
        HF_NAMES,
        {
            **QWEN,
            "num_key_value_heads": 4,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
        },
    ),
    "Gemma3ForCausalLM": Family(gemma3.graph, gemma3.HF_NAMES, gemma3.DEFAULTS),
}


def family(name: str) -> Family:
    """Raises ModelError for an architecture that is not supported."""
    if name not in FAMILIES:
        raise ModelError(f"architecture {SHORT.repr(name)} is not supported", f"supported are {', '.join(FAMILIES)}")
    return FAMILIES[name]


def read_config(folder: Path) -> ModelConfig:
    """A folder's config.json. Raises ModelError that names the field, or the architecture."""
    path = folder / "config.json"
    data = read_json(path)
    return parse(path, data, family(architecture(path, data)).defaults)


def graph_of(config: ModelConfig) -> Graph:
    """The checked graph of a model."""
    graph = family(config.architecture).graph(config)
    check(graph)
    return graph
