"""Supported architectures: graph, weight names and config defaults of each. A new one is an entry in FAMILIES."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmrs.core.errors import ModelError
from llmrs.core.ir import Graph, check
from llmrs.models.arch import gemma3, llama, qwen3
from llmrs.models.arch.config import Fixed, ModelConfig, architecture, parse
from llmrs.models.arch.layers import HF_NAMES
from llmrs.models.files.json_reader import read_json, short_repr
from llmrs.models.files.quant_config import read_quantization


@dataclass(frozen=True)
class Family:
    model_type: str
    graph: Callable[[ModelConfig], Graph]
    names: Mapping[str, str]  # canonical -> Hugging Face weight name
    defaults: Mapping[str, Any]  # of config fields


# Config defaults of transformers 5, where they differ from config.DEFAULTS.
LLAMA = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32,
}  # fmt: skip
MISTRAL = {
    **LLAMA, "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072,
    "sliding_window": 4096, "layer_types": None,
}  # fmt: skip
QWEN = {
    "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 32768,
    "use_sliding_window": False, "sliding_window": 4096,
}  # fmt: skip
QWEN_WINDOWS = {"max_window_layers": 28, "layer_types": None}
QWEN_MOE = {
    **QWEN, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 24, "num_key_value_heads": 4,
    "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": False,
    "decoder_sparse_step": 1, "mlp_only_layers": None,
}  # fmt: skip
BIAS = {"attention_bias": False}
QKV_BIAS = {"attention_bias": Fixed(True), "attention_output_bias": Fixed(False)}
FAMILIES = {
    "LlamaForCausalLM": Family("llama", llama.graph, HF_NAMES, {**LLAMA, **BIAS, "mlp_bias": False}),
    "MistralForCausalLM": Family("mistral", llama.graph, HF_NAMES, MISTRAL),
    "Qwen2ForCausalLM": Family("qwen2", llama.graph, HF_NAMES, {**QWEN, **QWEN_WINDOWS, **QKV_BIAS}),
    "Qwen3ForCausalLM": Family("qwen3", qwen3.graph, HF_NAMES, {**QWEN, **QWEN_WINDOWS, **BIAS, "head_dim": 128}),
    "Qwen3MoeForCausalLM": Family("qwen3_moe", qwen3.graph, HF_NAMES, {**QWEN_MOE, **BIAS}),
    "Gemma3ForCausalLM": Family("gemma3_text", gemma3.graph, gemma3.HF_NAMES, gemma3.DEFAULTS),
}


def family(name: str) -> Family:
    """Raises ModelError for an unsupported architecture."""
    if name not in FAMILIES:
        raise ModelError(f"architecture {short_repr(name)} is not supported", f"supported are {', '.join(FAMILIES)}")
    return FAMILIES[name]


def read_config(folder: Path) -> ModelConfig:
    """Parses a folder's config.json. Raises ModelError."""
    path = folder / "config.json"
    data = read_json(path)
    name = architecture(path, data)
    f, model_type = family(name), data.get("model_type")
    if model_type not in (None, f.model_type):
        problem = f"{path}: model_type is {short_repr(model_type)}, and architectures names {name}"
        raise ModelError(problem, f"the model_type of {name} is {f.model_type}")
    config = parse(path, data, f.defaults)
    read_quantization(path, data)  # refuses what is not supported
    return config


def graph_of(config: ModelConfig) -> Graph:
    """The model's graph, type-checked."""
    graph = family(config.architecture).graph(config)
    check(graph)
    return graph
