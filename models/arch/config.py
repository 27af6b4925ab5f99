"""Parses config.json into a ModelConfig. Invalid fields, and fields that ask for unsupported features, are refused."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmrs.core.errors import ModelError
from llmrs.models.files.json_reader import MAX_INT, ConfigReader, short_repr

MAX_LAYERS, MAX_EXPERTS = 1000, 4096
MAX_EXPERT_WEIGHTS = 2**17  # experts of all layers; today's largest models have a fifth
MAX_HEAD_DIM = 2**13
ORIGINAL_CONTEXT = "original_max_position_embeddings"  # trained context length, before rope scaling


@dataclass(frozen=True)
class Rope:
    """RoPE base frequency and scaling for longer contexts."""

    theta: float
    scaling: Mapping[str, Any]  # rope_type "default": unscaled
    factors: tuple[float, ...] = ()  # divisors of the frequencies, before scaling


@dataclass(frozen=True)
class Experts:
    """The MoE block that replaces the MLP of some layers."""

    num_experts: int
    num_experts_per_tok: int
    intermediate_size: int
    norm_topk_prob: bool  # normalize the weights of the selected experts to sum 1


@dataclass(frozen=True)
class LayerKind:
    """The per-layer variation. `window`: sliding window in tokens, 0 for full attention."""

    window: int = 0
    is_moe: bool = False

    def __str__(self) -> str:
        return ("local_" if self.window else "global_") + ("sparse_layer" if self.is_moe else "layer")


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder, in terms that all families share."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope: Rope
    local_rope: Rope  # sliding-window layers
    layer_kinds: tuple[LayerKind, ...]
    experts: Experts | None
    max_position_embeddings: int  # after YaRN
    tie_word_embeddings: bool
    attention_bias: bool  # q, k, v
    output_bias: bool  # o
    mlp_bias: bool
    activation: str  # of the gated MLP: silu | gelu_tanh
    attention_scale: float

    @property
    def name(self) -> str:
        """Short family name, such as qwen3."""
        return self.architecture.removesuffix("ForCausalLM").lower()


def architecture(path: Path, data: Mapping[str, Any]) -> str:
    """The first entry of `architectures`. Raises ModelError without one."""
    names = data.get("architectures")
    if not (isinstance(names, list) and names and isinstance(names[0], str)):
        raise ModelError(f"{path} names no architecture", 'it must have "architectures", such as ["Qwen3ForCausalLM"]')
    return names[0]


# Fields of unsupported features -> values at which they have no effect.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "text_config": (), "transformers_weights": (),  # multimodal; names the weights file
    "per_layer_config": (), "attn_logit_softcapping": (), "final_logit_softcapping": (), "attention_chunk_size": (),
    "position_embedding_type": ("rope", "rotary", "absolute"),  # absolute: an unused default in old files
    "is_causal": (True,), "clip_qkv": (), "attention_multiplier": (),
    **dict.fromkeys(("shared_expert_intermediate_size", "n_shared_experts"), (0,)),
    **dict.fromkeys(("use_bidirectional_attention", "alibi", "add_cross_attention", "is_encoder_decoder"), (False,)),
    **dict.fromkeys(("partial_rotary_factor", "logits_scaling", "logit_scale"), (1, 1.0)),
    **dict.fromkeys(("embedding_multiplier", "residual_multiplier"), (1, 1.0)),
}  # fmt: skip
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
SPELLINGS = {"num_local_experts": "num_experts"}  # transformers 5 -> 4
LAYER_TYPES = ("full_attention", "sliding_attention")
# Defaults for all families; a family adds to them and may override them.
DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": None, "head_dim": None, "hidden_act": "silu", "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False,
}  # fmt: skip
# Family-specific fields: ignored in the config of a family without a default for them.
FAMILY_FIELDS = frozenset(
    "attention_bias attention_output_bias mlp_bias hidden_activation query_pre_attn_scalar rope_local_base_freq"
    " sliding_window use_sliding_window max_window_layers layer_types sliding_window_pattern"
    " num_experts num_experts_per_tok moe_intermediate_size norm_topk_prob decoder_sparse_step mlp_only_layers".split()
)
ROPE_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}  # valid for every rope_type
SCALING_KEYS = {
    "default": set[str](),
    "linear": {"factor", ORIGINAL_CONTEXT},
    "dynamic": {"factor", ORIGINAL_CONTEXT},
    "llama3": {"factor", ORIGINAL_CONTEXT, "low_freq_factor", "high_freq_factor"},
    "yarn": {"factor", ORIGINAL_CONTEXT, "beta_fast", "beta_slow", "truncate", "finetuned"}
    | {"attention_factor", "attn_factor", "mscale", "mscale_all_dim"},
}


@dataclass(frozen=True)
class Fixed:
    """A family default that config.json cannot override."""

    value: Any


def parse(path: Path, data: Mapping[str, Any], defaults: Mapping[str, Any]) -> ModelConfig:
    """Parses a config.json of transformers 4 or 5, with transformers' meaning of every field.

    `defaults` fill missing fields; fields of other families are ignored.
    Raises ModelError for missing or invalid fields and unsupported features.
    """
    r = ConfigReader(path, _with_defaults(data, {**DEFAULTS, **defaults}))
    _check_supported(r)
    hidden, heads, layers = r.integer("hidden_size"), r.integer("num_attention_heads"), r.integer("num_hidden_layers")
    if layers > MAX_LAYERS:
        raise r.error("num_hidden_layers", f"a whole number from 1 to {MAX_LAYERS}")
    derived = r.data["head_dim"] is None and defaults.get("head_dim") is None
    head_dim = max(hidden // heads, 1) if derived else r.integer("head_dim")
    kv_heads = heads if r.data["num_key_value_heads"] is None else r.integer("num_key_value_heads")
    attention_bias = r.boolean("attention_bias", False)
    rope, local_rope = _ropes(r)
    experts = _experts(r)
    if heads % kv_heads:
        raise r.error("num_key_value_heads", f"a divisor of num_attention_heads, {heads}")
    if head_dim % 2 or head_dim > MAX_HEAD_DIM:
        raise r.error("head_dim", f"an even number up to {MAX_HEAD_DIM}")
    if experts is not None and layers * experts.num_experts > MAX_EXPERT_WEIGHTS:
        raise r.error("num_experts", f"at most {MAX_EXPERT_WEIGHTS // layers} in each of {layers} layers")
    return ModelConfig(
        architecture=architecture(path, data),
        vocab_size=r.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=r.integer("intermediate_size"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        norm_eps=r.number("rms_norm_eps"),
        rope=rope,
        local_rope=local_rope,
        layer_kinds=tuple(map(LayerKind, _windows(r, layers), _moe_layers(r, layers, experts))),
        experts=experts,
        max_position_embeddings=max(r.integer("max_position_embeddings"), _yarn_context(rope)),
        tie_word_embeddings=r.boolean("tie_word_embeddings"),
        attention_bias=attention_bias,
        output_bias=r.boolean("attention_output_bias", attention_bias),
        mlp_bias=r.boolean("mlp_bias", False),
        activation=_activation(r),
        attention_scale=r.number("query_pre_attn_scalar", head_dim) ** -0.5,
    )


def _with_defaults(data: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that a family reads, under their transformers 4 names."""
    given = {**data, **{new: data[name] for name, new in SPELLINGS.items() if name in data}}
    fixed = {name: value.value for name, value in defaults.items() if isinstance(value, Fixed)}
    ignored = FAMILY_FIELDS - defaults.keys()
    return {**defaults, **{name: value for name, value in given.items() if name not in ignored}, **fixed}


def _check_supported(r: ConfigReader) -> None:
    for name, values in UNSUPPORTED.items():
        r.must_be(name, *values)


def _activation(r: ConfigReader) -> str:
    field = "hidden_activation" if "hidden_activation" in r.data else "hidden_act"
    name = r.data.get(field)
    allowed = ["silu", "swish"] if r.data.get("num_experts") else list(ACTIVATIONS)  # MoE kernels have SiLU only
    if not isinstance(name, str) or name not in allowed:
        raise r.error(field, " or ".join(map(repr, allowed)) + ": others are not implemented")
    return ACTIVATIONS[name]


def _ropes(r: ConfigReader) -> tuple[Rope, Rope]:
    """RoPE of full-attention layers and of sliding-window layers."""
    scaling, parameters = r.mapping("rope_scaling"), r.mapping("rope_parameters")
    if "rope_local_base_freq" not in r.data:
        rope = _rope(r, scaling or parameters, "rope_theta", r.data.get(ORIGINAL_CONTEXT))
        return rope, rope
    _check_keys(r, "rope_parameters", parameters, set(LAYER_TYPES))
    full, local = (ConfigReader(r.path, parameters).mapping(kind) for kind in LAYER_TYPES)
    for given in (full := {**full, **scaling}), local:
        ConfigReader(r.path, given).must_be("truncate", True)  # transformers ignores it here
    return _rope(r, full, "rope_theta"), _rope(r, local, "rope_local_base_freq")


def _check_keys(r: ConfigReader, name: str, given: Mapping[str, Any], known: set[str]) -> None:
    """Refuses unknown keys, which may change the result."""
    for key in sorted(key for key, value in given.items() if key not in known and value is not None):
        problem = f"{r.path}: {key[:60]} in {name} is {short_repr(given[key])}, which is not implemented there"
        raise ModelError(problem, f"implemented are {', '.join(sorted(known))}")


def _yarn_context(rope: Rope) -> int:
    """The context length after YaRN, which max_position_embeddings may not include; 0 for other rope types."""
    given: list[Any] = [rope.scaling.get(n) for n in (ORIGINAL_CONTEXT, "factor")]
    if rope.scaling["rope_type"] != "yarn" or not all(type(n) in (int, float) for n in given):
        return 0
    return int(min(max(given[0] * given[1], 0), MAX_INT))


def _rope(r: ConfigReader, given: Mapping[str, Any], theta: str, original: Any = None) -> Rope:
    """One rope_parameters object; the base may also be the top-level field `theta`, as in older files.

    `original`, from the top level, overrides the original context length in `given`.
    """
    inner = ConfigReader(r.path, given)
    inner.must_be("partial_rotary_factor", 1, 1.0)
    kind = next((given[name] for name in ("rope_type", "type") if given.get(name) is not None), "default")
    if not isinstance(kind, str):
        raise ConfigReader(r.path, {"rope_type": kind}).error("rope_type", "the name of a scaling method")
    if kind in SCALING_KEYS:
        _check_keys(r, f"the rope parameters of type {kind}", given, ROPE_KEYS | SCALING_KEYS[kind])
    base = r.number(theta) if given.get("rope_theta") is None else inner.number("rope_theta")
    if base <= 1:
        raise r.error(theta, "a number above 1")
    scaling = {name: value for name, value in given.items() if name not in ("type", "rope_theta")}
    override = {} if original is None else {ORIGINAL_CONTEXT: original}
    trained = r.integer("max_position_embeddings")
    return Rope(base, {ORIGINAL_CONTEXT: trained, **scaling, **override, "rope_type": kind})


def _windows(r: ConfigReader, layers: int) -> list[int]:
    """The sliding window of each layer, 0 for full attention. Families specify the layers in different fields."""
    window = r.integer("sliding_window") if r.data.get("sliding_window") is not None else 0
    window = window if r.boolean("use_sliding_window", True) else 0
    types = r.data.get("layer_types")
    if types is None and "sliding_window_pattern" in r.data:  # every n-th layer has full attention
        every = r.integer("sliding_window_pattern")
        types = [LAYER_TYPES[bool((i + 1) % every)] for i in range(layers)]
    if types is None:
        first = r.integer("max_window_layers", 0, low=0)  # lower layers have full attention
        return [0 if i < first else window for i in range(layers)]
    valid = isinstance(types, list) and all(t in LAYER_TYPES for t in types)
    if valid and not window and "sliding_attention" not in types:
        return [0] * layers
    if not valid or len(types) != layers:
        raise r.error("layer_types", f"a list of {layers}, each " + " or ".join(LAYER_TYPES))
    if not window:
        raise r.error("sliding_window", "a whole number from 1, and in use, for layers of type sliding_attention")
    return [window if t == "sliding_attention" else 0 for t in types]


def _moe_layers(r: ConfigReader, layers: int, experts: Experts | None) -> list[bool]:
    """Whether each layer is MoE."""
    step = r.integer("decoder_sparse_step", 1)
    given = r.data.get("mlp_only_layers")
    if given is not None and (not isinstance(given, list) or not all(type(i) is int for i in given)):
        raise r.error("mlp_only_layers", "a list of whole numbers")
    dense = set(given or ())
    return [experts is not None and i not in dense and (i + 1) % step == 0 for i in range(layers)]


def _experts(r: ConfigReader) -> Experts | None:
    """None for a dense model."""
    if not r.integer("num_experts", 0, low=0):
        return None
    count, per_token = r.integer("num_experts"), r.integer("num_experts_per_tok")
    if not per_token <= count <= MAX_EXPERTS:
        raise r.error("num_experts", f"a whole number from num_experts_per_tok, {per_token}, to {MAX_EXPERTS}")
    return Experts(count, per_token, r.integer("moe_intermediate_size"), r.boolean("norm_topk_prob"))
