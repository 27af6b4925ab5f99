"""Checkpoint folders written as GGUF files, with the changes that llama.cpp's conversion makes.

Names of tensors and keys are those of the `gguf` package; the changes: conversion/{base,llama,gemma,qwen}.py of
github.com/ggml-org/llama.cpp.
"""

import json
import math
import re
from pathlib import Path

import gguf
import numpy as np
import safetensors.numpy
import tiny

ARCHITECTURES = {
    "llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "qwen3_moe": "qwen3moe",
    "gemma3_text": "gemma3",
}  # fmt: skip
INTERLEAVED = {"llama", "mistral3"}
EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.weight")
EOS = 2
# config.json says more than conversion keeps: other kinds of scaling and windows, dense layers between sparse ones
LOST = {"llama-dynamic", "qwen2-window", "qwen3-moe-window", "qwen3-moe-mixed", "qwen3-moe-dense-first"}
CONVERTED = [name for name in tiny.CHECKPOINTS if name not in LOST]


def write(folder: Path, path: Path, *, arch: str | None = None, kind: str = "f32", remove=(), **keys: object) -> Path:
    """`kind`: the type of matrices whose rows its blocks fill; `remove`: keys left out; `keys`: others to write.

    In names of keys, `__` stands for a dot; they are those of the architecture unless they begin with general.
    """
    config = json.loads((folder / "config.json").read_text())
    arch = arch or ARCHITECTURES[config["model_type"]]
    found = {f"{arch}.{k}": v for k, v in metadata(config, arch).items()}
    found |= bpe(folder) if (folder / "tokenizer.json").exists() else tokenizer(config["vocab_size"])
    names = {k: (k if k.startswith(("general__", "tokenizer__")) else f"{arch}.{k}").replace("__", ".") for k in keys}
    found |= {names[k]: v for k, v in keys.items()}
    writer = gguf.GGUFWriter(path, arch)
    for key, value in found.items():
        if key.removeprefix(f"{arch}.") not in remove:
            add(writer, key, value)
    for name, (data, type_) in tensors(folder, config, arch, kind).items():
        writer.add_tensor(name, data, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add(writer: gguf.GGUFWriter, key: str, value: object) -> None:
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
              list: writer.add_array}  # fmt: skip
    adders[type(value)](key, value)


def tokenizer(size: int) -> dict[str, object]:
    """A token for each id, and one merge."""
    tokens = [chr(0x100 + n) if n != EOS else "<|im_end|>" for n in range(size)]
    tokens[-1] = "Āā"
    types = [3 if n == EOS else 1 for n in range(size)]
    found = {"model": "gpt2", "pre": "qwen2", "tokens": tokens, "token_type": types, "merges": ["Ā ā"],
             "eos_token_id": EOS}  # fmt: skip
    return {f"tokenizer.ggml.{k}": v for k, v in found.items()}


def bpe(folder: Path) -> dict[str, object]:
    """Of a tokenizer.json like Qwen's, with its chat template."""
    data, settings = (json.loads((folder / n).read_text()) for n in ("tokenizer.json", "tokenizer_config.json"))
    special = {t["id"]: t for t in data["added_tokens"]}
    texts = {i: text for text, i in data["model"]["vocab"].items()} | {i: t["content"] for i, t in special.items()}
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    tokens = [texts.get(i, f"[PAD{i}]") for i in range(size)]
    types = [(3 if special[i]["special"] else 4) if i in special else 1 if i in texts else 5 for i in range(size)]
    merges = [m if isinstance(m, str) else " ".join(m) for m in data["model"]["merges"]]
    found = {"model": "gpt2", "pre": "qwen2", "tokens": tokens, "token_type": types, "merges": merges,
             "eos_token_id": tokens.index(settings["eos_token"]), "add_bos_token": False}  # fmt: skip
    template = folder / "chat_template.jinja"
    chat = template.read_text() if template.exists() else settings["chat_template"]
    return {f"tokenizer.ggml.{k}": v for k, v in found.items()} | {"tokenizer.chat_template": chat}


def metadata(c: dict, arch: str) -> dict[str, object]:
    """The keys of the architecture."""
    head_dim = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
    found = {
        "block_count": c["num_hidden_layers"], "context_length": c["max_position_embeddings"],
        "embedding_length": c["hidden_size"], "feed_forward_length": c["intermediate_size"],
        "attention.head_count": c["num_attention_heads"], "attention.head_count_kv": c["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": c["rms_norm_eps"], "attention.key_length": head_dim,
        "attention.value_length": head_dim,
    }  # fmt: skip
    if arch in INTERLEAVED:
        found |= {"vocab_size": c["vocab_size"], "rope.dimension_count": head_dim}
    if c.get("sliding_window") and c.get("use_sliding_window", True):
        found["attention.sliding_window"] = c["sliding_window"]
    if arch == "qwen3moe":
        experts = c.get("num_experts") or c["num_local_experts"]
        found |= {"expert_count": experts, "expert_used_count": c["num_experts_per_tok"],
                  "expert_feed_forward_length": c["moe_intermediate_size"]}  # fmt: skip
    if arch == "gemma3" and c["query_pre_attn_scalar"] != head_dim:
        found["attention.scale"] = c["query_pre_attn_scalar"] ** -0.5
    if "full_attention" in (rope := c["rope_parameters"]):
        found["rope.freq_base_swa"] = float(rope["sliding_attention"]["rope_theta"])
        rope = rope["full_attention"]
    return found | {"rope.freq_base": float(rope["rope_theta"])} | scaling(rope)


def scaling(rope: dict) -> dict[str, object]:
    """Linear and YaRN; `llama3` is a tensor."""
    if rope["rope_type"] not in ("linear", "yarn"):
        return {}
    found = {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": float(rope["factor"])}
    if rope["rope_type"] == "yarn":
        found["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
        found |= {f"rope.scaling.yarn_{k}": float(rope[k]) for k in ("beta_fast", "beta_slow") if rope.get(k)}
        if "mscale" in rope:  # conversion drops them; as attention_factor it would keep them
            parts = [0.1 * rope[k] * math.log(rope["factor"]) + 1 for k in ("mscale", "mscale_all_dim")]
            found["rope.scaling.yarn_attn_factor"] = parts[0] / parts[1]
    return found


def tensors(folder: Path, c: dict, arch: str, kind: str) -> dict[str, tuple[np.ndarray, gguf.GGMLQuantizationType]]:
    """Name -> bytes and type."""
    enum = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}[arch]
    names = gguf.get_tensor_name_map(enum, c["num_hidden_layers"])
    found, stacks = dict[str, np.ndarray](), dict[str, dict[int, np.ndarray]]()
    for name, value in safetensors.numpy.load_file(folder / "model.safetensors").items():
        if match := EXPERT.fullmatch(name):
            stacks.setdefault(f"{match[1]}.{match[3]}.weight", {})[int(match[2])] = value
        else:
            found[name] = value
    found |= {name: np.stack([stack[e] for e in range(len(stack))]) for name, stack in stacks.items()}
    heads = {"q_proj": c["num_attention_heads"], "k_proj": c["num_key_value_heads"]}
    for name, value in found.items():
        if arch == "gemma3" and name.endswith("norm.weight"):
            found[name] = value + 1
        if arch in INTERLEAVED and (part := name.split(".")[-2]) in heads:
            halves = value.reshape(heads[part], 2, -1, *value.shape[1:])
            found[name] = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(value.shape)
    packed = {names.get_name(name, (".weight", ".bias")): pack(value, kind) for name, value in found.items()}
    if c["rope_parameters"].get("rope_type") == "llama3":
        packed["rope_freqs.weight"] = pack(llama3_factors(c), "f32")
    return packed


def pack(value: np.ndarray, kind: str) -> tuple[np.ndarray, gguf.GGMLQuantizationType]:
    """Vectors and rows that no blocks fill stay float32, and so does the router."""
    type_ = gguf.GGMLQuantizationType[kind.upper()]
    block, _ = gguf.GGML_QUANT_SIZES[type_]
    router = value.ndim == 2 and value.shape[0] < 10
    if value.ndim == 1 or router or value.shape[-1] % block:
        return value.astype(np.float32), gguf.GGMLQuantizationType.F32
    return gguf.quants.quantize(np.ascontiguousarray(value, np.float32), type_), type_


def rounded(folder: Path, target: Path, kind: str) -> Path:
    """A folder with the values that its file of this type holds."""
    target.mkdir()
    (target / "config.json").write_text((folder / "config.json").read_text())
    values = {}
    for name, value in safetensors.numpy.load_file(folder / "model.safetensors").items():
        expert = EXPERT.fullmatch(name) is not None
        data, type_ = pack(value[None] if expert else value, kind)
        values[name] = gguf.quants.dequantize(data, type_).reshape(value.shape)
    safetensors.numpy.save_file(values, target / "model.safetensors", {"format": "pt"})
    return target


def llama3_factors(c: dict) -> np.ndarray:
    """By what Llama 3.1 divides each frequency: 1 for short waves, `factor` for long ones, in between smoothly."""
    rope, dim = c["rope_parameters"], c["head_dim"]
    turns = rope["original_max_position_embeddings"] * rope["rope_theta"] ** (-np.arange(0, dim, 2) / dim) / (2 * np.pi)
    smooth = (turns - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
    return 1 / ((1 - smooth.clip(0, 1)) / rope["factor"] + smooth.clip(0, 1))
