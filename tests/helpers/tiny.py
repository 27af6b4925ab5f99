"""Tiny random checkpoints, written by transformers, and the engine core on them."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers

from llmrs.backends import testing
from llmrs.backends.base import Backend, load_backend
from llmrs.backends.testing import core_on, prefill_batch, prompts, request, run
from llmrs.models.arch.config import ModelConfig
from llmrs.models.arch.families import family, graph_of, read_config
from llmrs.models.files.quantized import open_weights
from llmrs.models.files.weights import Weights

__all__ = ["core_on", "prefill_batch", "prompts", "request", "run"]

# where tests run: backend, or backend:device
BACKENDS = ["reference", "torch"]
BACKENDS += ["torch:cuda"] if torch.cuda.is_available() else []
BACKENDS += ["mlx"] if find_spec("mlx") else []
SHAPE = {**testing.SHAPE, "initializer_range": 0.3}  # large, so that logits differ by more than rounding
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 500000.0,
}

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
GEMMA_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}
MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 16}

# name -> transformers' classes and what differs from SHAPE; windows are shorter than the tests' prompts
CHECKPOINTS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3-untied-bias": ("Qwen3", {"head_dim": 16, "attention_bias": True, "tie_word_embeddings": False}),
    "qwen3-yarn": ("Qwen3", {"head_dim": 32, "rope_parameters": YARN}),
    "chat": ("Qwen3", {"vocab_size": 320, "head_dim": 16, "tie_word_embeddings": True, "max_position_embeddings": 512}),
    "llama": ("Llama", {"tie_word_embeddings": False}),
    "llama-2": ("Llama", {"num_key_value_heads": 4, "rope_parameters": {"rope_type": "linear", "factor": 4.0}}),
    "llama-dynamic": ("Llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}),
    "llama-3.1-bias": ("Llama", {"rope_parameters": LLAMA3_ROPE, "attention_bias": True, "mlp_bias": True}),
    "llama-yarn": ("Llama", {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3, "beta_fast": 8.0}}),
    "mistral": ("Mistral", {"sliding_window": 9, "rms_norm_eps": 1e-5}),
    "mistral-nemo": ("Mistral", {"sliding_window": None, "head_dim": 32, "hidden_size": 80}),
    "mistral-small-3": ("Mistral", {"sliding_window": None, "num_key_value_heads": 1, "head_dim": 8}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    "qwen3-moe": ("Qwen3Moe", {**MOE, "norm_topk_prob": True}),
    "qwen3-moe-mixed": ("Qwen3Moe", {**MOE, "decoder_sparse_step": 2, "tie_word_embeddings": True}),
    "qwen3-moe-dense-first": ("Qwen3Moe", {**MOE, "mlp_only_layers": [0], "num_experts_per_tok": 5}),
    "qwen3-moe-window": ("Qwen3Moe", {**MOE, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    "gemma3": ("Gemma3Text", {"head_dim": 24, "query_pre_attn_scalar": 20, "sliding_window": 6, "layer_types": None}),
    "gemma3-linear": ("Gemma3Text", {"sliding_window": 6, "num_hidden_layers": 7, "rope_parameters": GEMMA_ROPE}),
    "gemma3-untied": ("Gemma3Text", {"tie_word_embeddings": False, "sliding_window": 6, "num_hidden_layers": 7}),
}
MODELS = {"Gemma3Text": "Gemma3"}  # whose model's class has another name than its config's


def write_checkpoint(name: str, folder: Path, **more: Any) -> Any:
    """Writes one of CHECKPOINTS in float32, with `more` fields of its config; returns transformers' model of it."""
    family_name, changes = CHECKPOINTS[name]
    return write_model(family_name, {**changes, **more}, folder)


def write_model(family_name: str, changes: dict[str, Any], folder: Path) -> Any:
    """The same of any config."""
    config = getattr(transformers, f"{family_name}Config")(**{**SHAPE, **changes})
    torch.manual_seed(0)
    model = getattr(transformers, f"{MODELS.get(family_name, family_name)}ForCausalLM")(config).float().eval()
    for parameter_name, parameter in model.named_parameters():  # else biases are 0 and norms are 1
        if parameter_name.endswith("bias") or "norm" in parameter_name:
            torch.nn.init.normal_(parameter, mean=float("norm" in parameter_name), std=0.2)
    model.save_pretrained(folder)
    return model


def empty_backend(name: str, dtype: str = "f32") -> Backend:
    """One of BACKENDS."""
    kind, _, device = name.partition(":")
    return load_backend(kind)(f"{device}:0" if device else "cpu", dtype, dtype)


def backend_on(name: str, folder: Path, dtype: str = "f32") -> tuple[Backend, ModelConfig]:
    """One of BACKENDS with a checkpoint's weights loaded."""
    config = read_config(folder)
    graph = graph_of(config)
    backend = empty_backend(name, dtype)
    source = open_weights(folder)
    backend.load(
        graph,
        Weights(graph, family(config.architecture).names, source, tied=config.tie_word_embeddings),
        lambda _: None,
    )
    return backend, config
