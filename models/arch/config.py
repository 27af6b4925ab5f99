"""What a model's config.json says, read with care: a field that is wrong, or that would change the result and is
not implemented, is refused by name.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmrs.core.errors import ModelError
from llmrs.models.files.json_reader import LARGE, SHORT, Fields

MOST_LAYERS, MOST_EXPERTS = 1000, 4096
MOST_MATRICES = 2**17  # experts of all layers; those of today's largest models have a fifth
LARGEST_HEAD = 2**13
ORIGINAL = "original_max_position_embeddings"  # what the model was trained for before it was extended


@dataclass(frozen=True)
class Rope:
    """Rotary positions: the base of the frequencies, and how they are scaled for longer contexts."""

    theta: float
    scaling: Mapping[str, Any]  # its "rope_type" is "default" where they are not


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in place of the MLP of some layers."""

    num_experts: int
    num_experts_per_tok: int
    intermediate_size: int
    norm_topk_prob: bool  # the weights of a token's experts add up to 1


@dataclass(frozen=True)
class LayerKind:
    """What may differ from layer to layer. `window` is how many positions a token sees, 0 for all."""

    window: int = 0
    is_moe: bool = False

    def __str__(self) -> str:
        return ("local_" if self.window else "global_") + ("sparse_layer" if self.is_moe else "layer")


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder, in the terms that all families share."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope: Rope
    local_rope: Rope  # of layers with a window
    layer_kinds: tuple[LayerKind, ...]  # of each layer
    experts: Experts | None
    max_position_embeddings: int  # positions that the model was trained for
    tie_word_embeddings: bool  # the head is the embedding table
    attention_bias: bool  # of queries, keys and values
    output_bias: bool  # of attention's output
    mlp_bias: bool
    activation: str  # of the MLP's gate: silu | gelu_tanh
    attention_scale: float
    dtype: str  # of the checkpoint: bf16 | f16 | f32, or what it says

    @property
    def layers(self) -> int:
        return len(self.layer_kinds)

    @property
    def name(self) -> str:
        """The family in a word, such as qwen3."""
        return self.architecture.removesuffix("ForCausalLM").lower()


def architecture(path: Path, data: Mapping[str, Any]) -> str:
    """The first of config.json's architectures. Raises ModelError where it names none."""
    names = data.get("architectures")
    if not (isinstance(names, list) and names and isinstance(names[0], str)):
        raise ModelError(f"{path} names no architecture", 'it must have "architectures", such as ["Qwen3ForCausalLM"]')
    return names[0]


MODEL_TYPES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "Gemma3ForCausalLM": "gemma3_text",
}
# Fields that change the result where they have another value than these, which are all that is implemented.
ONLY: dict[str, tuple[Any, ...]] = {
    "text_config": (),  # the model is a part of another
    "transformers_weights": (),  # names the file to read
    "per_layer_config": (),
    "partial_rotary_factor": (1, 1.0),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "is_causal": (True,),
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
# Defaults of fields that all families have; families add their own, and may override these.
DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
# Fields that only some families have: in the config of another family they have no effect.
FAMILY_FIELDS = frozenset(
    "attention_bias attention_output_bias mlp_bias hidden_activation query_pre_attn_scalar rope_local_base_freq"
    " sliding_window use_sliding_window max_window_layers layer_types sliding_window_pattern"
    " num_experts num_experts_per_tok moe_intermediate_size norm_topk_prob decoder_sparse_step mlp_only_layers".split()
)
ROPE_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}  # of every rope_type; then those of each
SCALING_KEYS = {
    "default": set[str](),
    "linear": {"factor", ORIGINAL},
    "dynamic": {"factor", ORIGINAL},
    "llama3": {"factor", ORIGINAL, "low_freq_factor", "high_freq_factor"},
    "yarn": {"factor", ORIGINAL, "beta_fast", "beta_slow", "truncate", "finetuned"}
    | {"attention_factor", "attn_factor", "mscale", "mscale_all_dim"},
}


@dataclass(frozen=True)
class Fixed:
    """In a family's defaults: a value that config.json can't change."""

    value: Any


def parse(path: Path, data: Mapping[str, Any], defaults: Mapping[str, Any]) -> ModelConfig:
    """A config.json in the spelling of transformers 4 or 5; `defaults` stand for fields that it leaves out.

    Fields mean what they mean in transformers. Those of other families have no effect.
    Raises ModelError for fields that are missing or wrong, and for those that ask for what is not implemented.
    """
    f = Fields(path, _fields(data, {**DEFAULTS, **defaults}))
    _refuse(f)
    hidden, heads, layers = f.integer("hidden_size"), f.integer("num_attention_heads"), f.integer("num_hidden_layers")
    if layers > MOST_LAYERS:
        raise f.error("num_hidden_layers", f"a whole number from 1 to {MOST_LAYERS}")
    head_size = max(hidden // heads, 1)
    if f.data["head_dim"] is not None or defaults.get("head_dim") is not None:
        head_size = f.integer("head_dim")
    kv_heads = heads if f.data["num_key_value_heads"] is None else f.integer("num_key_value_heads")
    attention_bias = f.boolean("attention_bias", False)
    rope, local_rope = ropes(f)
    config = ModelConfig(
        architecture=architecture(path, data),
        vocab_size=f.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=f.integer("intermediate_size"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_size,
        norm_eps=f.number("rms_norm_eps"),
        rope=rope,
        local_rope=local_rope,
        layer_kinds=tuple(map(LayerKind, windows(f, layers), sparse(f, layers))),
        experts=experts(f),
        max_position_embeddings=max(f.integer("max_position_embeddings"), extended(rope)),
        tie_word_embeddings=f.boolean("tie_word_embeddings"),
        attention_bias=attention_bias,
        output_bias=f.boolean("attention_output_bias", attention_bias),
        mlp_bias=f.boolean("mlp_bias", False),
        activation=activation(f),
        attention_scale=f.number("query_pre_attn_scalar", head_size) ** -0.5,
        dtype=str(f.data.get("dtype") or f.data.get("torch_dtype") or "unknown"),
    )
    if heads % kv_heads:
        raise f.error("num_key_value_heads", f"a divisor of num_attention_heads, {heads}")
    if head_size % 2 or head_size > LARGEST_HEAD:
        raise f.error("head_dim", f"an even number up to {LARGEST_HEAD}")
    if config.experts is not None and layers * config.experts.num_experts > MOST_MATRICES:
        raise f.error("num_experts", f"at most {MOST_MATRICES // layers} in each of {layers} layers")
    return config


def _fields(data: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that a family's class reads, under the names of transformers 4."""
    given = {**data, **{new: data[name] for name, new in SPELLINGS.items() if name in data}}
    fixed = {name for name, value in defaults.items() if isinstance(value, Fixed)}
    unread = (FAMILY_FIELDS - defaults.keys()) | fixed
    stated = {name: value for name, value in given.items() if name not in unread}
    return {**{n: v.value if isinstance(v, Fixed) else v for n, v in defaults.items()}, **stated}


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


def activation(f: Fields) -> str:
    """The gate's activation, by our name."""
    name = "hidden_activation" if "hidden_activation" in f.data else "hidden_act"
    found = f.data.get(name)
    allowed = ["silu", "swish"] if f.data.get("num_experts") else list(ACTIVATIONS)  # experts have no other yet
    if not isinstance(found, str) or found not in allowed:
        raise f.error(name, " or ".join(map(repr, allowed)) + ": the rest is not implemented")
    return ACTIVATIONS[found]


def ropes(f: Fields) -> tuple[Rope, Rope]:
    """The rotary positions of layers that see all positions, and of those with a window."""
    scaling, parameters = f.mapping("rope_scaling"), f.mapping("rope_parameters")
    if "rope_local_base_freq" not in f.data:
        rope = _rope(f, scaling or parameters, "rope_theta", f.data.get(ORIGINAL))
        return rope, rope
    _only_keys(f, "rope_parameters", parameters, set(LAYER_TYPES))
    everywhere, local = (Fields(f.path, parameters).mapping(kind) for kind in LAYER_TYPES)
    for given in (everywhere := {**everywhere, **scaling}), local:
        Fields(f.path, given).must_be("truncate", True)  # transformers ignores it here
    return _rope(f, everywhere, "rope_theta"), _rope(f, local, "rope_local_base_freq")


def _only_keys(f: Fields, name: str, given: Mapping[str, Any], known: set[str]) -> None:
    """Refuses keys that may change the result and are not implemented."""
    for key in sorted(key for key, value in given.items() if key not in known and value is not None):
        raise ModelError(
            f"{f.path}: {key[:60]} in {name} is {SHORT.repr(given[key])}, which is not implemented there",
            f"implemented are {', '.join(sorted(known))}",
        )


def extended(rope: Rope) -> int:
    """The context that YaRN gives, which max_position_embeddings may or may not say; 0 for other ways to scale."""
    original: Any
    factor: Any
    original, factor = (rope.scaling.get(n) for n in (ORIGINAL, "factor"))
    if rope.scaling["rope_type"] != "yarn" or not all(type(n) in (int, float) for n in (original, factor)):
        return 0
    return int(min(max(original * factor, 0), LARGE))


def _rope(f: Fields, given: Mapping[str, Any], theta: str, original: Any = None) -> Rope:
    """`given` may hold the base; else the field `theta` does, where older files have it.

    `original`, from the config's top level, overrides the context before scaling that `given` has.
    """
    inner = Fields(f.path, given)
    inner.must_be("partial_rotary_factor", 1, 1.0)
    kind = next((given[name] for name in ("rope_type", "type") if given.get(name) is not None), "default")
    if not isinstance(kind, str):
        raise Fields(f.path, {"rope_type": kind}).error("rope_type", "the name of a way to scale")
    if kind in SCALING_KEYS:
        _only_keys(f, f"the rope parameters of type {kind}", given, ROPE_KEYS | SCALING_KEYS[kind])
    base = f.number(theta) if given.get("rope_theta") is None else inner.number("rope_theta")
    if base <= 1:
        raise f.error(theta, "a number above 1")
    scaling = {name: value for name, value in given.items() if name not in ("type", "rope_theta")}
    outside = {} if original is None else {ORIGINAL: original}
    trained = f.integer("max_position_embeddings")
    return Rope(base, {ORIGINAL: trained, **scaling, **outside, "rope_type": kind})


def windows(f: Fields, layers: int) -> list[int]:
    """How many positions each layer sees, 0 for all. Families say which layers in one of several ways."""
    window = f.integer("sliding_window") if f.data.get("sliding_window") is not None else 0
    window = window if f.boolean("use_sliding_window", True) else 0
    types = f.data.get("layer_types")
    if types is None and "sliding_window_pattern" in f.data:  # one layer of so many sees all
        every = f.integer("sliding_window_pattern")
        types = [LAYER_TYPES[bool((i + 1) % every)] for i in range(layers)]
    if types is None:
        first = f.integer("max_window_layers", 0, low=0)  # the layers before see all
        return [0 if i < first else window for i in range(layers)]
    valid = isinstance(types, list) and all(t in LAYER_TYPES for t in types)
    if valid and not window and "sliding_attention" not in types:
        return [0] * layers
    if not valid or len(types) != layers:
        raise f.error("layer_types", f"a list of {layers}, each " + " or ".join(LAYER_TYPES))
    if not window:
        raise f.error("sliding_window", "a whole number from 1, and in use, for layers of type sliding_attention")
    return [window if t == "sliding_attention" else 0 for t in types]


def sparse(f: Fields, layers: int) -> list[bool]:
    """Which layers have experts."""
    step = f.integer("decoder_sparse_step", 1)
    given = f.data.get("mlp_only_layers")
    if given is not None and (not isinstance(given, list) or not all(type(i) is int for i in given)):
        raise f.error("mlp_only_layers", "a list of whole numbers")
    dense, there = set(given or ()), experts(f) is not None
    return [there and i not in dense and (i + 1) % step == 0 for i in range(layers)]


def experts(f: Fields) -> Experts | None:
    """None also where there are 0: then all layers are dense."""
    if not f.integer("num_experts", 0, low=0):
        return None
    count, per_token = f.integer("num_experts"), f.integer("num_experts_per_tok")
    if not per_token <= count <= MOST_EXPERTS:
        raise f.error("num_experts", f"a whole number from num_experts_per_tok, {per_token}, to {MOST_EXPERTS}")
    return Experts(count, per_token, f.integer("moe_intermediate_size"), f.boolean("norm_topk_prob"))
