"""Tiny random checkpoints, written by transformers, and the engine core on them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from llmrs.backends.base import Backend, find
from llmrs.core.batch import Batch
from llmrs.core.blocks import BlockPool
from llmrs.core.config import BUILT_IN, EngineConfig, SamplingParams
from llmrs.core.engine import EngineCore
from llmrs.core.request import Request
from llmrs.core.sampling import SamplingArrays
from llmrs.models.config import ModelConfig
from llmrs.models.families import family, graph_of, read_config
from llmrs.models.safetensors import SafetensorsSource
from llmrs.models.weights import Weights

# where tests run: backend, or backend:device
BACKENDS = ["reference", "torch", *(["torch:cuda"] if torch.cuda.is_available() else [])]
VOCABULARY = 211  # a prime: a multiple of nothing
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,  # large, so that logits differ by more than rounding
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 500000.0,
}

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
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
    "gemma3": ("Gemma3Text", {"head_dim": 24, "query_pre_attn_scalar": 20, "sliding_window": 6, "layer_types": None}),
    "gemma3-untied": ("Gemma3Text", {"tie_word_embeddings": False, "sliding_window": 6, "num_hidden_layers": 7}),
}
MODELS = {"Gemma3Text": "Gemma3"}  # whose model's class has another name than its config's


def write_checkpoint(name: str, folder: Path) -> Any:
    """Writes a checkpoint in float32 and returns transformers' model of it."""
    family_name, changes = CHECKPOINTS[name]
    config = getattr(transformers, f"{family_name}Config")(**{**SHAPE, **changes})
    torch.manual_seed(0)
    model = getattr(transformers, f"{MODELS.get(family_name, family_name)}ForCausalLM")(config).float().eval()
    for parameter_name, parameter in model.named_parameters():  # else biases are 0 and norms are 1
        if parameter_name.endswith("bias") or "norm" in parameter_name:
            torch.nn.init.normal_(parameter, mean=float("norm" in parameter_name), std=0.2)
    model.save_pretrained(folder)
    return model


def prompts(*lengths: int) -> list[list[int]]:
    """Random prompts, the same each time."""
    return [np.random.default_rng(n).integers(0, VOCABULARY, n).tolist() for n in lengths]


def empty_backend(name: str, dtype: str = "f32") -> Backend:
    """One of BACKENDS."""
    kind, _, device = name.partition(":")
    return find(kind)(f"{device}:0" if device else "cpu", dtype, dtype)


def backend_on(name: str, folder: Path, dtype: str = "f32") -> tuple[Backend, ModelConfig]:
    """One of BACKENDS with a checkpoint's weights loaded."""
    config = read_config(folder)
    graph = graph_of(config)
    backend = empty_backend(name, dtype)
    source = SafetensorsSource(folder)
    backend.load(graph, Weights(graph, family(config.architecture).names, source, tied=config.tied), lambda _: None)
    return backend, config


def core_on(backend: Backend, blocks: int = 200, block_size: int = 4, **config: Any) -> EngineCore:
    """An engine core with a pool of its own."""
    config = {"max_num_seqs": 8, "max_num_batched_tokens": 64, **config}
    pool = BlockPool(blocks, block_size, config.pop("prefix_cache", True))
    backend.allocate(blocks, block_size, config["max_num_seqs"])
    return EngineCore(backend, EngineConfig(**config), VOCABULARY, min(256, blocks * block_size), pool)


def request(prompt: Sequence[int], seed: int = 0, stops: Sequence[int] = (), **params: Any) -> Request:
    """A request; greedy unless told otherwise."""
    return Request(prompt, SamplingParams(**{"temperature": 0.0, **params}).over(BUILT_IN), seed, stops)


def run(core: EngineCore, requests: Sequence[Request]) -> list[list[int]]:
    """Submits all and steps until nothing is left; the answers."""
    for r in requests:
        core.submit(r)
    while not core.idle:
        core.step()
    assert all(r.error is None for r in requests), [r.error for r in requests]
    return [r.output for r in requests]


def prefill_batch(sequences: Sequence[Sequence[int]], block_size: int) -> Batch:
    """One step that computes whole sequences from nothing, each in blocks of its own."""
    counts = np.array([len(s) for s in sequences], np.int32)
    width = int(-(-counts.max() // block_size))
    blocks = np.arange(len(counts) * width, dtype=np.int32).reshape(len(counts), width)
    return Batch(
        tokens=np.concatenate([np.array(s, np.int32) for s in sequences]),
        positions=np.concatenate([np.arange(n, dtype=np.int32) for n in counts]),
        starts=np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
        lengths=counts,
        blocks=blocks,
        slots=np.arange(len(counts), dtype=np.int32),
        sampled=np.ones(len(counts), bool),
        sampling=SamplingArrays.zeros(len(counts)),
    )
