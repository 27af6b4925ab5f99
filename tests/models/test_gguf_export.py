"""Models written as GGUF give llama.cpp's logits: names, metadata and conversions of every family."""

from pathlib import Path

import numpy as np
import pytest
from llama_cpp import logits, require_llama_cpp

from llmrs.backends.base import load_backend
from llmrs.core.errors import ModelError
from llmrs.models.arch.config import parse
from llmrs.models.arch.families import family
from llmrs.models.arch.gguf_export import export_tensors, exported, metadata_of
from llmrs.models.files.gguf_writer import GgufTensor, open_gguf
from llmrs.quant.ggml import TYPES
from llmrs.random_model import MODELS, SHAPE, RandomModel, prefill_batch, prompts

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64, "rope_theta": 500000.0}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}
FULL = {"use_sliding_window": False}
CASES = {
    "llama": ("llama", {}),
    "llama3 rope": ("llama", {"rope_scaling": LLAMA3}),
    "linear rope": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", FULL),
    "qwen3": ("qwen3", {}),
    "qwen3 yarn": ("qwen3", {"rope_scaling": YARN}),
    "qwen3-moe": ("qwen3-moe", {"norm_topk_prob": True}),
    "gemma3": ("gemma3", {"query_pre_attn_scalar": 24}),
}


def config_of(name, changes):
    architecture, fields = MODELS[name]
    data = {**SHAPE, **fields, **changes, "architectures": [architecture]}
    return parse(Path(name), data, family(architecture).defaults)


def write(path, c, model):
    """In float32, without a tokenizer."""
    tensors = {t.name: t for t in export_tensors(c, model.graph)}
    entries = [GgufTensor(t.name, TYPES["f32"], t.shape) for t in tensors.values()]
    with open_gguf(path, {**metadata_of(c), "tokenizer.ggml.model": "none"}, entries) as file:
        for t in tensors.values():
            at = 0
            for part in exported(c, model.weights, t):
                at = file.write(t.name, part.float32(), at)


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_computes_the_same_logits(case, tmp_path):
    require_llama_cpp()
    name, changes = CASES[case]
    model = RandomModel.of(name, **changes)
    write(tmp_path / "x.gguf", config_of(name, changes), model)
    (tokens,) = prompts(40)
    backend = model.on(load_backend("reference")("cpu", "f32", "f32"))
    backend.allocate(20, 4, 1, 64)
    batch = prefill_batch([tokens])
    ours = backend.forward(batch.__class__(**{**vars(batch), "logits_indices": np.arange(40, dtype=np.int32)}))
    theirs = np.array(logits(tmp_path / "x.gguf", tokens), np.float32)
    assert np.abs(ours - theirs).max() < 2e-3 * np.abs(theirs).max()


@pytest.mark.parametrize(
    ("name", "changes", "what"),
    [("gemma3", {}, "attention scale"), ("qwen3", {"attention_bias": True}, "attention biases"),
     ("qwen3-moe", {"norm_topk_prob": False}, "norm_topk_prob"),
     ("qwen3-moe", {"norm_topk_prob": True, "mlp_only_layers": [0]}, "some layers"),
     ("gemma3", {"query_pre_attn_scalar": 24, "layer_types": ["full_attention"] * 2 + ["sliding_attention"] * 5},
      "irregular")],
)  # fmt: skip
def test_what_has_no_key_is_refused(name, changes, what):
    with pytest.raises(ModelError, match=what):
        metadata_of(config_of(name, changes))


def test_a_window_that_llama_cpp_ignores_is_warned_of():
    with pytest.warns(UserWarning, match="right up to 9 tokens"):
        metadata_of(config_of("mistral", {}))
