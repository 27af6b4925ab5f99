"""What a model's config.json says, read with care: a field that is wrong, or that would change the result and is
not implemented, is refused by name.
"""

import json
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmrs.core.errors import ModelError
from llmrs.models.files import COMPLETE, JSON_LIMIT, read_text

LARGE = 2**31  # no size in a config is larger
MOST_LAYERS, MOST_EXPERTS = 1000, 4096
MOST_MATRICES = 2**17  # experts of all layers; those of today's largest models have a fifth
LARGEST_HEAD = 2**13


SHORT = reprlib.Repr()
SHORT.maxstring = SHORT.maxother = SHORT.maxlong = 60


@dataclass(frozen=True)
class Rope:
    """Rotary positions: the base of the frequencies, and how they are scaled for longer contexts."""

    theta: float
    scaling: Mapping[str, Any]  # its "rope_type" is "default" where they are not


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in place of the MLP of some layers."""

    count: int
    per_token: int
    intermediate: int
    normalize: bool  # the weights of a token's experts add up to 1


@dataclass(frozen=True)
class Kind:
    """What may differ from layer to layer. `window` is how many positions a token sees, 0 for all."""

    window: int = 0
    sparse: bool = False

    def __str__(self) -> str:
        return ("local_" if self.window else "global_") + ("sparse_layer" if self.sparse else "layer")


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder, in the terms that all families share."""

    architecture: str
    vocabulary: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    norm_eps: float
    rope: Rope
    local_rope: Rope  # of layers with a window
    kinds: tuple[Kind, ...]  # of each layer
    experts: Experts | None
    context: int  # positions that the model was trained for
    tied: bool  # the head is the embedding table
    attention_bias: bool  # of queries, keys and values
    output_bias: bool  # of attention's output
    mlp_bias: bool
    activation: str  # of the MLP's gate: silu | gelu_tanh
    attention_scale: float
    dtype: str  # of the checkpoint: bf16 | f16 | f32, or what it says

    @property
    def layers(self) -> int:
        return len(self.kinds)

    @property
    def name(self) -> str:
        """The family in a word, such as qwen3."""
        return self.architecture.removesuffix("ForCausalLM").lower()


class Fields:
    """Typed access to a JSON object; every error names the file, the field, the value and what is allowed."""

    def __init__(self, path: Path, data: Mapping[str, Any]) -> None:
        self.path, self.data = path, data

    def error(self, name: str, allowed: str) -> ModelError:
        return ModelError(
            f"{self.path}: {name} is {SHORT.repr(self.data.get(name))}; it must be {allowed}",
            "is the file complete, and of a model that llmrs supports?",
        )

    def integer(self, name: str, default: int | None = None, low: int = 1) -> int:
        value = self.data.get(name)
        value = default if value is None else value
        if type(value) is not int or not low <= value < LARGE:
            raise self.error(name, f"a whole number from {low}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self.data.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < LARGE:  # NaN fails
            raise self.error(name, "a positive number")
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        value = self.data.get(name)
        value = default if value is None else value
        if type(value) is not bool:
            raise self.error(name, "true or false")
        return value

    def mapping(self, name: str) -> Mapping[str, Any]:
        value = self.data.get(name)
        if value is not None and not isinstance(value, dict):
            raise self.error(name, "an object")
        return value or {}

    def must_be(self, name: str, *allowed: Any) -> None:
        """Refuses a field whose other values mean something that is not implemented."""
        if self.data.get(name) not in (None, *allowed):
            raise self.error(name, " or ".join(map(repr, allowed or (None,))) + ": the rest is not implemented")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ModelError."""
    try:
        data = json.loads(read_text(path, JSON_LIMIT))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not JSON: {error}", COMPLETE) from error
    if not isinstance(data, dict):
        raise ModelError(f"{path} holds no JSON object", COMPLETE)
    return data


def architecture(path: Path, data: Mapping[str, Any]) -> str:
    """The first of config.json's architectures. Raises ModelError where it names none."""
    names = data.get("architectures")
    if not (isinstance(names, list) and names and isinstance(names[0], str)):
        raise ModelError(f"{path} names no architecture", 'it must have "architectures", such as ["Qwen3ForCausalLM"]')
    return names[0]


# Fields that change the result where they have another value than these, which are all that is implemented.
ONLY: dict[str, tuple[Any, ...]] = {
    "partial_rotary_factor": (1, 1.0),
    "pretraining_tp": (1,),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "use_bidirectional_attention": (False,),
    "attention_chunk_size": (),
    "position_embedding_type": ("rope", "rotary", "absolute"),  # absolute: a default that old files carry along
    "alibi": (False,),
    "clip_qkv": (),
    "logits_scaling": (1, 1.0),
    "logit_scale": (1, 1.0),
    "embedding_multiplier": (1, 1.0),
    "residual_multiplier": (1, 1.0),
    "attention_multiplier": (),
    "shared_expert_intermediate_size": (0,),
    "n_shared_experts": (0,),
    "add_cross_attention": (False,),
    "is_encoder_decoder": (False,),
}
QUANTIZED = ("quantization_config", "quantization", "compression_config")  # the second as MLX writes it
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
SPELLINGS = {"num_local_experts": "num_experts"}  # as transformers 5 writes it
LAYER_TYPES = ("full_attention", "sliding_attention")


def parse(path: Path, data: Mapping[str, Any], defaults: Mapping[str, Any]) -> ModelConfig:
    """A config.json in the spelling of transformers 4 or 5; `defaults` stand for fields that it leaves out.

    Raises ModelError for fields that are missing or wrong, and for those that ask for what is not implemented.
    """
    f = Fields(path, {**defaults, **{SPELLINGS.get(name, name): value for name, value in data.items()}})
    _refuse(f)
    hidden, heads, layers = f.integer("hidden_size"), f.integer("num_attention_heads"), f.integer("num_hidden_layers")
    if layers > MOST_LAYERS:
        raise f.error("num_hidden_layers", f"a whole number from 1 to {MOST_LAYERS}")
    head_size = f.integer("head_dim", max(hidden // heads, 1))
    activation = "hidden_activation" if f.data.get("hidden_activation") is not None else "hidden_act"
    f.must_be(activation, *ACTIVATIONS)
    attention_bias = f.boolean("attention_bias", False)
    rope, local_rope = ropes(f)
    config = ModelConfig(
        architecture=architecture(path, data),
        vocabulary=f.integer("vocab_size"),
        hidden=hidden,
        intermediate=f.integer("intermediate_size"),
        heads=heads,
        kv_heads=f.integer("num_key_value_heads", heads),
        head_size=head_size,
        norm_eps=f.number("rms_norm_eps", 1e-6),
        rope=rope,
        local_rope=local_rope,
        kinds=tuple(map(Kind, windows(f, layers), sparse(f, layers))),
        experts=experts(f),
        context=max(f.integer("max_position_embeddings", 2048), extended(rope)),
        tied=f.boolean("tie_word_embeddings", False),
        attention_bias=attention_bias,
        output_bias=f.boolean("attention_output_bias", attention_bias),
        mlp_bias=f.boolean("mlp_bias", False),
        activation=ACTIVATIONS[f.data.get(activation) or "silu"],
        attention_scale=f.number("query_pre_attn_scalar", head_size) ** -0.5,
        dtype=str(f.data.get("dtype") or f.data.get("torch_dtype") or "unknown"),
    )
    if heads % config.kv_heads:
        raise f.error("num_key_value_heads", f"a divisor of num_attention_heads, {heads}")
    if config.head_size % 2 or config.head_size > LARGEST_HEAD:
        raise f.error("head_dim", f"an even number up to {LARGEST_HEAD}")
    if config.experts is not None and layers * config.experts.count > MOST_MATRICES:
        raise f.error("num_experts", f"at most {MOST_MATRICES // layers} in each of {layers} layers")
    return config


def _refuse(f: Fields) -> None:
    """Raises ModelError for what is not implemented."""
    for name in QUANTIZED:
        if f.data.get(name) is not None:
            raise ModelError(
                f"{f.path}: {name} is set, and checkpoints quantized this way ({_method(f.data[name])}) are not read",
                "use the checkpoint in bf16, f16 or f32",
            )
    for name, values in ONLY.items():
        f.must_be(name, *values)


def _method(quantization: Any) -> str:
    """What a checkpoint's quantization calls itself."""
    found = quantization.get("quant_method") or quantization.get("mode") if isinstance(quantization, dict) else None
    return found if isinstance(found, str) else "by a method without a name"


def ropes(f: Fields) -> tuple[Rope, Rope]:
    """The rotary positions of layers that see all positions, and of those with a window."""
    given = f.mapping("rope_parameters") or f.mapping("rope_scaling")
    if any(isinstance(given.get(kind), dict) for kind in LAYER_TYPES):  # one for each kind of layer
        everywhere, local = (Fields(f.path, given).mapping(kind) for kind in LAYER_TYPES)
        return _rope(f, everywhere, "rope_theta"), _rope(f, local, "rope_local_base_freq")
    rope = _rope(f, given, "rope_theta")
    local_theta = f.data.get("rope_local_base_freq") is not None
    return rope, _rope(f, {}, "rope_local_base_freq") if local_theta else rope


def extended(rope: Rope) -> int:
    """The context that YaRN gives, which max_position_embeddings may or may not say; 0 for other ways to scale."""
    original: Any
    factor: Any
    original, factor = (rope.scaling.get(n) for n in ("original_max_position_embeddings", "factor"))
    if rope.scaling["rope_type"] != "yarn" or not all(type(n) in (int, float) for n in (original, factor)):
        return 0
    return int(min(max(original * factor, 0), LARGE))


def _rope(f: Fields, given: Mapping[str, Any], theta: str) -> Rope:
    """`given` may hold the base; else the field `theta` does, where older files have it."""
    inner = Fields(f.path, given)
    inner.must_be("partial_rotary_factor", 1, 1.0)
    kind = next((given[name] for name in ("rope_type", "type") if given.get(name) is not None), "default")
    if not isinstance(kind, str):
        raise Fields(f.path, {"rope_type": kind}).error("rope_type", "the name of a way to scale")
    base = inner.number("rope_theta", f.number(theta, 10000.0))
    if base <= 1:
        raise f.error(theta, "a number above 1")
    trained = f.integer("max_position_embeddings", 2048)
    scaling = {name: value for name, value in given.items() if name not in ("type", "rope_theta")}
    return Rope(base, {"original_max_position_embeddings": trained, **scaling, "rope_type": kind})


def windows(f: Fields, layers: int) -> list[int]:
    """How many positions each layer sees, 0 for all. Families say which layers in one of several ways."""
    window = f.integer("sliding_window", 0, low=0)
    if not window or not f.boolean("use_sliding_window", True):
        return [0] * layers
    types = f.data.get("layer_types")
    if types is not None:
        if not isinstance(types, list) or len(types) != layers or any(t not in LAYER_TYPES for t in types):
            raise f.error("layer_types", f"a list of {layers}, each " + " or ".join(LAYER_TYPES))
        return [window if t == "sliding_attention" else 0 for t in types]
    every = f.integer("sliding_window_pattern", 0, low=0)  # each so-manieth layer sees all
    first = f.integer("max_window_layers", 0, low=0)  # the layers before see all
    return [0 if (every and (i + 1) % every == 0) or i < first else window for i in range(layers)]


def sparse(f: Fields, layers: int) -> list[bool]:
    """Which layers have experts."""
    step = f.integer("decoder_sparse_step", 1)
    given = f.data.get("mlp_only_layers")
    if given is not None and (not isinstance(given, list) or not all(type(i) is int for i in given)):
        raise f.error("mlp_only_layers", "a list of whole numbers")
    dense, there = set(given or ()), experts(f) is not None
    return [there and i not in dense and (i + 1) % step == 0 for i in range(layers)]


def experts(f: Fields) -> Experts | None:
    if f.data.get("num_experts") is None:
        return None
    count, per_token = f.integer("num_experts"), f.integer("num_experts_per_tok")
    if not per_token <= count <= MOST_EXPERTS:
        raise f.error("num_experts", f"a whole number from num_experts_per_tok, {per_token}, to {MOST_EXPERTS}")
    return Experts(count, per_token, f.integer("moe_intermediate_size"), f.boolean("norm_topk_prob", False))
