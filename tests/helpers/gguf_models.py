"""Whole GGUF models, written by the `gguf` package from a Qwen3 folder with a byte-level tokenizer."""

import json
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf import TokenType
from safetensors.torch import load_file

NAMES = {
    "embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    **{f"self_attn.{n}_proj": f"attn_{n}" for n in "qkv"}, "self_attn.o_proj": "attn_output",
    **{f"mlp.{n}_proj": f"ffn_{n}" for n in ("gate", "up", "down")},
}  # fmt: skip


def write(folder, path, kind="F32", *, file_type=None, change=lambda writer: None, **options):
    """A file, or a set of split files (`split_max_tensors`). `kind`: of the matrices; `change` may add keys."""
    writer, config = gguf.GGUFWriter(path, "qwen3", **options), json.loads((folder / "config.json").read_text())
    if file_type is not None:
        writer.add_file_type(file_type)
    _add_config(writer, config)
    _add_tokenizer(writer, folder, config["vocab_size"])
    change(writer)
    for name, tensor in load_file(folder / "model.safetensors").items():
        data = tensor.float().numpy()
        kept = Kind[kind] if data.ndim == 2 else Kind.F32
        writer.add_tensor(_name(name), gguf.quants.quantize(data, kept), raw_dtype=kept)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(path)


def _name(theirs):
    parts = theirs.removeprefix("model.").removesuffix(".weight").split(".")
    layer = f"blk.{parts[1]}." if parts[0] == "layers" else ""
    return f"{layer}{NAMES['.'.join(parts[2:] if layer else parts)]}.weight"


def _add_config(writer, config):
    rope = config.get("rope_parameters") or config
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope["rope_theta"])


def _add_tokenizer(writer, folder, vocab_size):
    data = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    settings = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    tokens, types = [f"[PAD{n}]" for n in range(vocab_size)], np.full(vocab_size, TokenType.UNUSED)
    for text, n in data["model"]["vocab"].items():
        tokens[n], types[n] = text, TokenType.NORMAL
    for added in data["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2" if data["pre_tokenizer"]["type"] == "ByteLevel" else "qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(types.tolist())
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in data["model"]["merges"]])
    writer.add_eos_token_id(tokens.index(settings["eos_token"]))
    template = folder / "chat_template.jinja"
    writer.add_chat_template(template.read_text("utf-8") if template.exists() else settings["chat_template"])
