"""Small config.json contents."""

import json

import pytest

from llmrs.core.errors import ModelError
from llmrs.models.arch.families import graph_of, read_config

CLASSES = {
    **{f"{n}ForCausalLM": f"{n}Config" for n in ("Llama", "Mistral", "Qwen2", "Qwen3", "Qwen3Moe")},
    "Gemma3ForCausalLM": "Gemma3TextConfig",
}
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


def parsed(folder, data):
    (folder / "config.json").write_text(json.dumps(data), "utf-8")
    return read_config(folder)


def refused(folder, data, *words):
    with pytest.raises(ModelError) as caught:
        graph_of(parsed(folder, data))
    for word in words:
        assert word in caught.value.message
    assert caught.value.hint
