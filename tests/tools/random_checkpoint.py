"""A checkpoint with the exact shapes of a real model and random weights, which has the real one's speed.

python tests/tools/random_checkpoint.py qwen3-0.6b|qwen3-8b|llama-3.2-1b FOLDER
"""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
import texts
import torch
from safetensors.torch import save_file

from llmrs.models.arch.families import family, graph_of, read_config
from llmrs.models.files.weights import stored_name

QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "max_position_embeddings": 40960,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
    "eos_token_id": 2,
}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": {
        **QWEN3,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "tie_word_embeddings": True,
    },
    "qwen3-8b": {
        **QWEN3,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "tie_word_embeddings": False,
    },
    "llama-3.2-1b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "max_position_embeddings": 131072,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": True,
        "eos_token_id": 2,
    },
}
# The same models for tests: everything but what their layers are made of is small.
TINY = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
SHAPES |= {f"{name}-tiny": {**shape, **TINY, **HEADS} for name, shape in SHAPES.items()}


def write(name: str, folder: Path) -> Path:
    """Writes the folder in bf16, in one file, with a small tokenizer: prompts are token ids."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SHAPES[name]), "utf-8")
    texts.write_text_files(folder)
    config = read_config(folder)
    names, generator = family(config.architecture).names, torch.Generator().manual_seed(0)
    tensors = {}
    for weight in graph_of(config).weights():
        for s in weight.segments:
            values = torch.empty(s.rows, *weight.columns, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
            tensors[stored_name(s.tensor, names)] = values.fill_(1) if "norm" in s.tensor else values
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


if __name__ == "__main__":
    write(sys.argv[1], Path(sys.argv[2]))
