"""The config of a GGUF file: llama.cpp's metadata, translated to the terms of config.json.

Keys: gguf-py/gguf/constants.py of github.com/ggml-org/llama.cpp; their meaning and defaults: its src/llama-model.cpp
and src/models.
"""

import dataclasses
import math
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmrs.core.errors import ModelError
from llmrs.models.arch.config import LAYER_TYPES, MAX_LAYERS, ORIGINAL_CONTEXT, ModelConfig, parse
from llmrs.models.arch.families import family, read_config
from llmrs.models.files.gguf import GGUFSource
from llmrs.models.files.json_reader import ConfigReader, short_repr
from llmrs.quant.tensor import WeightSource

LAYER = "blk.{i}."
ROPE_FACTORS = "rope_freqs.weight"
# Canonical weight name -> GGUF name; {e}: the expert's matrix of a stacked tensor `..._exps.weight`.
GGUF_NAMES = {
    "embed": "token_embd.weight", "final_norm": "output_norm.weight", "lm_head": "output.weight",
    **{f"layers.{{i}}.{ours}": f"{LAYER}{theirs}.weight" for ours, theirs in {
        "attn_norm": "attn_norm", "attn_out_norm": "post_attention_norm", "mlp_norm": "ffn_norm",
        "mlp_out_norm": "post_ffw_norm", "q_norm": "attn_q_norm", "k_norm": "attn_k_norm", "router": "ffn_gate_inp",
    }.items()},
    **{f"layers.{{i}}.{ours}{end}": f"{LAYER}{theirs}{end or '.weight'}" for end in ("", ".bias") for ours, theirs in {
        "q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output",
        "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down",
    }.items()},
    **{f"layers.{{i}}.experts.{{e}}.{n}": f"{LAYER}ffn_{n}_exps.{{e}}.weight" for n in ("gate", "up", "down")},
}  # fmt: skip


@dataclass(frozen=True)
class GgufFamily:
    """What llama.cpp's conversion did to the weights of an architecture."""

    architecture: str  # in config.json
    interleaved_rope: bool = False  # rows of q and k: rope rotates neighbours instead of halves of a head
    norm_offset: float = 0.0  # norms are stored with this added


GGUF_FAMILIES = {
    "llama": GgufFamily("LlamaForCausalLM", interleaved_rope=True),
    "mistral3": GgufFamily("MistralForCausalLM", interleaved_rope=True),
    "qwen2": GgufFamily("Qwen2ForCausalLM"),
    "qwen3": GgufFamily("Qwen3ForCausalLM"),
    "qwen3moe": GgufFamily("Qwen3MoeForCausalLM"),
    "gemma3": GgufFamily("Gemma3ForCausalLM", norm_offset=1.0),
}
INTEGERS = {  # config field -> key
    "hidden_size": "embedding_length", "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count", "max_position_embeddings": "context_length",
}  # fmt: skip
EXPERTS = {
    "num_experts": "expert_count", "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
}  # fmt: skip
# Keys of features that are not implemented -> values at which they have no effect.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,), "use_parallel_residual": (False,), "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1), "expert_gating_func": (0, 1), "rope.scaling.yarn_ext_factor": (-1, 1),
    # expert_gating_func 1: softmax; yarn_ext_factor -1: by the scaling type
    **dict.fromkeys(("expert_weights_scale", "logit_scale", "residual_scale", "embedding_scale"), (0, 1)),
    **dict.fromkeys((
        "pooling_type", "nextn_predict_layers", "leading_dense_block_count", "expert_shared_count",
        "expert_shared_feed_forward_length", "attention.max_alibi_bias", "attention.clamp_kqv",
        "attention.temperature_scale", "attention.shared_kv_layers", "attn_logit_softcapping",
        "final_logit_softcapping", "rope.scaling.yarn_log_multiplier",
    ), (0,)),
}  # fmt: skip
IGNORED = {
    "rope.scaling.finetuned",
    "tensor_data_layout",
    "attention.layer_norm_epsilon",
    "attention.temperature_length",
}
MIN_ATTENTION_SCALE = 1e-4
GEMMA3_LOCAL_BASE, GEMMA3_PERIOD, GEMMA3_27B_LAYERS = 10000.0, 6, 62


def gguf_family(path: Path, metadata: Mapping[str, Any]) -> tuple[str, GgufFamily]:
    """llama.cpp's name of the architecture, and its family. Raises ModelError for unsupported ones."""
    kind, name = metadata.get("general.type", "model"), metadata.get("general.architecture")
    if not isinstance(kind, str) or kind != "model":
        raise ModelError(f"{path}: general.type is {short_repr(kind)}: it holds no model", "use the model's own file")
    if not isinstance(name, str) or name not in GGUF_FAMILIES:
        problem = f"{path}: general.architecture is {short_repr(name)}, which is not supported"
        raise ModelError(problem, f"supported are {', '.join(GGUF_FAMILIES)}")
    return name, GGUF_FAMILIES[name]


def model_config(path: Path) -> ModelConfig:
    """The config of a model folder or a GGUF file. Raises ModelError."""
    if path.is_dir():
        return read_config(path)
    with closing(GGUFSource(path)) as source:
        return config_from_metadata(path, source.metadata, source)


def config_from_metadata(path: Path, metadata: Mapping[str, Any], source: WeightSource) -> ModelConfig:
    """The config of a GGUF file with these tensors.

    Raises ModelError for missing, invalid and contradicting values, and for keys of unsupported features.
    """
    arch, gguf = gguf_family(path, metadata)
    r = _Keys(path, metadata, arch)
    data, names = _data(r, gguf, source), family(gguf.architecture)
    if arch in ("llama", "mistral3") and data.get("sliding_window"):
        names = family("MistralForCausalLM")
    r.check_unread()
    # biases are known by their tensors: defaults that a family fixes must be overridden
    given = {name: data.pop(name) for name in ("attention_bias", "attention_output_bias", "mlp_bias")}
    config = parse(path, {**data, "architectures": [gguf.architecture]}, {**names.defaults, **given})
    if not gguf.interleaved_rope:
        return config
    rope = dataclasses.replace(config.rope, factors=_rope_factors(path, source, config))
    return dataclasses.replace(config, rope=rope, local_rope=rope)


def _data(r: "_Keys", gguf: GgufFamily, source: WeightSource) -> dict[str, Any]:
    """The fields of config.json."""
    layers, names = r.layers, set(source.names())
    data: dict[str, Any] = {field: r.integer(key) for field, key in INTEGERS.items()}
    heads, derived = data["num_attention_heads"], max(data["hidden_size"] // data["num_attention_heads"], 1)
    head_dim = r.integer("attention.key_length", derived)
    for key in ("attention.value_length", "rope.dimension_count"):
        r.must_equal(key, head_dim, "attention.key_length")
    data |= {
        "num_hidden_layers": layers, "num_key_value_heads": r.integer("attention.head_count_kv", heads),
        "head_dim": head_dim, "rms_norm_eps": r.number("attention.layer_norm_rms_epsilon"),
        "vocab_size": _vocab_size(r, source), "tie_word_embeddings": "output.weight" not in names,
        "attention_bias": "blk.0.attn_q.bias" in names, "attention_output_bias": "blk.0.attn_output.bias" in names,
        "mlp_bias": "blk.0.ffn_gate.bias" in names,
    }  # fmt: skip
    theta, scaling = r.number("rope.freq_base", 10000.0), _rope_scaling(r)
    if gguf.architecture == "Gemma3ForCausalLM":
        return data | _gemma3(r, data, theta, scaling)
    if not math.isclose(r.number("attention.scale", head_dim**-0.5), head_dim**-0.5, rel_tol=1e-5):
        raise r.error("attention.scale", f"{head_dim**-0.5:g}: others are not implemented")
    if gguf.architecture == "Qwen3MoeForCausalLM":
        data |= {field: r.integer(key) for field, key in EXPERTS.items()}
        data["norm_topk_prob"] = r.boolean("expert_weights_norm", True)
        data["mlp_only_layers"] = [i for i in range(layers) if f"blk.{i}.ffn_gate_inp.weight" not in names]
    window = gguf.interleaved_rope and r.has("attention.sliding_window")  # llama.cpp ignores it
    data["sliding_window"] = r.integer("attention.sliding_window") if window else None
    return {**data, "rope_parameters": {**scaling, "rope_theta": theta}}


def _gemma3(r: "_Keys", data: Mapping[str, Any], theta: float, scaling: Mapping[str, Any]) -> dict[str, Any]:
    """Windows, attention scale and both ropes."""
    layers, heads = r.layers, data["num_attention_heads"]
    scalar = data["hidden_size"] / heads if layers == GEMMA3_27B_LAYERS else data["head_dim"]
    if r.has("attention.scale"):
        scale = r.number("attention.scale")
        if scale < MIN_ATTENTION_SCALE:
            raise r.error("attention.scale", f"at least {MIN_ATTENTION_SCALE:g}")
        scalar = scale**-2
    window = r.integer("attention.sliding_window") if r.has("attention.sliding_window") else None
    return {
        "query_pre_attn_scalar": scalar, "sliding_window": window,
        "layer_types": [LAYER_TYPES[window is not None and local] for local in _local_layers(r)],
        "rope_theta": theta, "rope_local_base_freq": r.number("rope.freq_base_swa", GEMMA3_LOCAL_BASE),
        "rope_parameters": {"full_attention": dict(scaling), "sliding_attention": {"rope_type": "default"}},
    }  # fmt: skip


def _local_layers(r: "_Keys") -> list[bool]:
    """Whether each layer has a sliding window: by a list, or all but every n-th."""
    key = "attention.sliding_window_pattern"
    given = r.metadata.get(r.prefix + key)
    if not isinstance(given, np.ndarray):
        period = r.integer(key, GEMMA3_PERIOD)
        return [bool((i + 1) % period) for i in range(r.layers)]
    r.read.add(key)
    if given.shape != (r.layers,) or not np.isin(given, (0, 1)).all():
        raise r.error(key, f"a whole number, or {r.layers} of true or false")
    return [bool(local) for local in given]


def _rope_scaling(r: "_Keys") -> dict[str, Any]:
    """rope_parameters without the base. A factor of 0 is none; without a type it is linear.

    llama.cpp ignores the betas and yarn_attn_factor in these architectures. They are from config.json, and mean here
    what they mean there. The last is its attention_factor; 1 is llama.cpp's default, which changes nothing.
    """
    kind = r.optional("rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn"):
        raise r.error("rope.scaling.type", "none, linear or yarn: others are not implemented")
    keys = {
        "beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow", ORIGINAL_CONTEXT: "original_context_length",
        "attn_factor": "attn_factor", "attention_factor": "yarn_attn_factor",
    }  # fmt: skip
    yarn = {name: r.number(f"rope.scaling.{key}") for name, key in keys.items() if r.has(f"rope.scaling.{key}")}
    if yarn.get("attention_factor") == 1:
        del yarn["attention_factor"]
    key = "rope.scaling.factor" if r.has("rope.scaling.factor") else "rope.scale_linear"
    scaled = kind != "none" and r.optional(key, 0) != 0
    if scaled and kind == "yarn":
        return {"rope_type": "yarn", "factor": r.number(key), **yarn}
    for name in ("attn_factor", "attention_factor"):
        if yarn.get(name, 1) != 1:
            raise r.error(f"rope.scaling.{keys[name]}", "1, unless rope.scaling.type is yarn")
    return {"rope_type": "linear", "factor": r.number(key)} if scaled else {"rope_type": "default"}


def _vocab_size(r: "_Keys", source: WeightSource) -> int:
    """The rows of the embeddings; those after the last token are padding."""
    tokens, embed = r.metadata.get("tokenizer.ggml.tokens"), GGUF_NAMES["embed"]
    count = len(tokens) if isinstance(tokens, list) else 0
    rows = source.shape(embed)[0] if embed in source.names() else count
    if count > rows:
        problem = f"{r.path}: {embed} has {rows} rows for {count} tokenizer.ggml.tokens"
        raise ModelError(problem, "convert the model again")
    r.must_equal("vocab_size", rows, f"the rows of {embed}")
    return rows


def _rope_factors(path: Path, source: WeightSource, config: ModelConfig) -> tuple[float, ...]:
    """The divisors of the RoPE frequencies; empty if the file has none."""
    if ROPE_FACTORS not in source.names():
        return ()
    shape, count = source.shape(ROPE_FACTORS), config.head_dim // 2
    if shape != (count,):
        problem = f"{path}: {ROPE_FACTORS} has the shape {shape}; the config asks for ({count},)"
        raise ModelError(problem, "convert the model again")
    values = source.tensor(ROPE_FACTORS).float32().reshape(-1)
    if not np.all(np.isfinite(values) & (values > 0)):
        raise ModelError(f"{path}: {ROPE_FACTORS} must hold positive numbers", "convert the model again")
    return tuple(map(float, values))


class _Keys(ConfigReader):
    """The keys of one architecture, without its name in front. Remembers which were read."""

    def __init__(self, path: Path, metadata: Mapping[str, Any], arch: str) -> None:
        prefix = f"{arch}."
        found = {key.removeprefix(prefix): _plain(v) for key, v in metadata.items() if key.startswith(prefix)}
        super().__init__(path, found)
        self.metadata, self.prefix, self.read = metadata, prefix, set[str]()
        self.layers = self.integer("block_count")
        if self.layers > MAX_LAYERS:
            raise self.error("block_count", f"a whole number from 1 to {MAX_LAYERS}")

    def error(self, name: str, allowed: str) -> ModelError:
        problem = f"{self.path}: {self.prefix}{name} is {short_repr(self.data.get(name))}; it must be {allowed}"
        return ModelError(problem, "is the file complete, and of a model that llmrs supports?")

    def has(self, name: str) -> bool:
        self.read.add(name)
        return name in self.data

    def optional(self, name: str, default: Any) -> Any:
        self.read.add(name)
        return self.data.get(name, default)

    def integer(self, name: str, default: int | None = None, low: int = 1) -> int:
        self.read.add(name)
        return super().integer(name, default, low)

    def number(self, name: str, default: float | None = None) -> float:
        self.read.add(name)
        return super().number(name, default)

    def boolean(self, name: str, default: bool | None = None) -> bool:
        self.read.add(name)
        return super().boolean(name, default)

    def must_equal(self, name: str, expected: int, of: str) -> None:
        """Refuses another value; it may be missing."""
        if self.integer(name, expected) != expected:
            raise self.error(name, f"{expected}, as {of}")

    def check_unread(self) -> None:
        """Refuses keys that are not understood, which may change the result."""
        for name in sorted(self.data.keys() - self.read - IGNORED):
            allowed = NEUTRAL.get(name, (0,) if name in EXPERTS.values() else ())
            if self.data[name] not in allowed:
                shown = f"{self.path}: {self.prefix}{name[:60]} is {short_repr(self.data[name])}"
                raise ModelError(f"{shown}, which is not implemented", "use a model of another architecture")


def _plain(value: Any) -> Any:
    """A Python value; an array of equal numbers, one for each layer, is that number."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list) and value and type(value[0]) in (int, float) and all(v == value[0] for v in value):
        return value[0]
    return value
