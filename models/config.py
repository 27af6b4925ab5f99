"""What a model's config.json says, read with care: a field that is wrong, or that would change the result and is
not implemented, is refused by name.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmrs.core.errors import ModelError

LARGE = 2**31  # no size in a config is larger


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder, in the terms that all families share."""

    architecture: str
    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    norm_eps: float
    rope_theta: float
    rope_scaling: Mapping[str, Any]  # its "rope_type" is "default" where positions are not scaled
    context: int  # positions that the model was trained for
    tied: bool  # the head is the embedding table
    attention_bias: bool
    mlp_bias: bool
    dtype: str  # of the checkpoint: bf16 | f16 | f32, or what it says


class Fields:
    """Typed access to a JSON object; every error names the file, the field, the value and what is allowed."""

    def __init__(self, path: Path, data: Mapping[str, Any]) -> None:
        self.path, self.data = path, data

    def error(self, name: str, allowed: str) -> ModelError:
        shown = repr(self.data.get(name))
        return ModelError(
            f"{self.path}: {name} is {shown if len(shown) <= 60 else shown[:57] + '...'}; it must be {allowed}",
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
            raise self.error(name, " or ".join(map(repr, allowed)) + ", the only kind that is implemented")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ModelError."""
    try:
        data = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ModelError(f"{path} can't be read: {error.strerror}", "is this a model folder?") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not JSON: {error}", "is the file complete?") from error
    if not isinstance(data, dict):
        raise ModelError(f"{path} holds no JSON object", "is the file complete?")
    return data


def architecture(folder: Path) -> str:
    """The first of config.json's architectures."""
    path = folder / "config.json"
    names = read_json(path).get("architectures")
    if not (isinstance(names, list) and names and isinstance(names[0], str)):
        raise ModelError(f"{path} names no architecture", 'it must have "architectures", such as ["Qwen3ForCausalLM"]')
    return names[0]


def read_config(folder: Path) -> ModelConfig:
    """config.json in the spelling of transformers 4 or 5."""
    path = folder / "config.json"
    f = Fields(path, read_json(path))
    if f.data.get("quantization_config") is not None:
        raise ModelError(
            f"{path}: quantization_config is set, and checkpoints quantized this way are not supported",
            "use the unquantized checkpoint",
        )
    f.must_be("hidden_act", "silu")
    f.must_be("use_sliding_window", False)
    f.must_be("partial_rotary_factor", 1, 1.0)
    f.must_be("pretraining_tp", 1)
    for kind in f.data.get("layer_types") or ():
        if kind != "full_attention":
            raise f.error("layer_types", "full_attention in every layer, the only kind that is implemented")
    hidden, heads = f.integer("hidden_size"), f.integer("num_attention_heads")
    rope = Fields(path, f.mapping("rope_parameters") or f.mapping("rope_scaling"))
    theta = rope.number("rope_theta", f.number("rope_theta", 10000.0))
    config = ModelConfig(
        architecture=architecture(folder),
        vocabulary=f.integer("vocab_size"),
        hidden=hidden,
        intermediate=f.integer("intermediate_size"),
        layers=f.integer("num_hidden_layers"),
        heads=heads,
        kv_heads=f.integer("num_key_value_heads", heads),
        head_size=f.integer("head_dim", hidden // heads),
        norm_eps=f.number("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling={"rope_type": rope.data.get("type", "default"), **rope.data},
        context=f.integer("max_position_embeddings", 2048),
        tied=f.boolean("tie_word_embeddings", False),
        attention_bias=f.boolean("attention_bias", False),
        mlp_bias=f.boolean("mlp_bias", False),
        dtype=str(f.data.get("dtype") or f.data.get("torch_dtype") or "unknown"),
    )
    if heads % config.kv_heads:
        raise f.error("num_key_value_heads", f"a divisor of num_attention_heads, {heads}")
    if config.head_size % 2:
        raise f.error("head_dim", "an even number")
    if config.layers > 1000:
        raise f.error("num_hidden_layers", "a whole number from 1 to 1000")
    return config
