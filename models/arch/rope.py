"""Rotary frequencies: theta ** (-2 i / d), and the ways to scale them for longer contexts."""

import math
from collections.abc import Mapping
from typing import Any

from llmrs.core.errors import ModelError
from llmrs.core.ir import RopeFrequencies
from llmrs.models.arch.config import ORIGINAL, ModelConfig, Rope
from llmrs.models.files.json_reader import LARGE, SHORT

HINT = "is config.json complete?"


def frequencies(rope: Rope, c: ModelConfig) -> RopeFrequencies:
    """The head_size / 2 frequencies. Raises ModelError for a scaling that is not implemented or gives none."""
    try:
        found = _frequencies(rope, c)
    except (ArithmeticError, ValueError) as error:
        raise ModelError(f"rope scaling gives no frequencies: {error}", HINT) from error
    if not all(map(math.isfinite, (*found.values, found.scale))):
        raise ModelError(f"rope scaling gives a frequency that is not finite ({found.label})", HINT)
    return found


def _frequencies(rope: Rope, c: ModelConfig) -> RopeFrequencies:
    values = [rope.theta ** (-2 * i / c.head_dim) for i in range(c.head_dim // 2)]
    scaling = rope.scaling
    kind, label = scaling["rope_type"], f"theta {rope.theta:g}"
    if kind == "dynamic":  # changes frequencies only beyond the context that the model was trained for: the limit here
        _number(scaling, "factor")
    if kind in ("default", "dynamic"):
        return RopeFrequencies(label, tuple(values))
    if kind == "linear":
        factor = _number(scaling, "factor")
        return RopeFrequencies(f"{label}, linear {factor:g}", tuple(v / factor for v in values))
    if kind == "llama3":
        return RopeFrequencies(f"{label}, llama3", tuple(_llama3(v, scaling) for v in values))
    if kind == "yarn":
        return _yarn(label, values, scaling, rope.theta, c)
    raise ModelError(
        f"rope_type {SHORT.repr(kind)} is not implemented", "default, linear, dynamic, llama3 and yarn are"
    )


def _llama3(frequency: float, scaling: Mapping[str, Any]) -> float:
    """Llama 3.1's rule: short waves stay, long ones slow down by `factor`, and those between are interpolated.

    Source: transformers' documentation of rope_type "llama3".
    """
    factor, low, high = (_number(scaling, n) for n in ("factor", "low_freq_factor", "high_freq_factor"))
    if high <= low:
        raise ModelError(f"rope scaling: high_freq_factor {high:g} is not above low_freq_factor", HINT)
    turns = _number(scaling, ORIGINAL) * frequency / (2 * math.pi)  # within the old context
    part = min(max((turns - low) / (high - low), 0.0), 1.0)
    return (1 - part) * frequency / factor + part * frequency


def _yarn(label: str, values: list[float], scaling: Mapping[str, Any], theta: float, c: ModelConfig) -> RopeFrequencies:
    """YaRN: interpolates by how often a pair turns within the old context, from beta_fast down to beta_slow turns.

    Source: arXiv 2309.00071, with transformers' names and defaults.
    """
    original = _number(scaling, ORIGINAL)
    factor = _number(scaling, "factor", c.max_position_embeddings / original)
    fast, slow = (_number(scaling, n, d) for n, d in (("beta_fast", 32.0), ("beta_slow", 1.0)))
    low, high = (c.head_dim * math.log(original / (t * 2 * math.pi)) / (2 * math.log(theta)) for t in (fast, slow))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, c.head_dim - 1)
    width = high - low or 0.001
    parts = [min(max((i - low) / width, 0.0), 1.0) for i in range(len(values))]
    scaled = tuple(v / factor * p + v * (1 - p) for v, p in zip(values, parts, strict=True))
    return RopeFrequencies(f"{label}, yarn {factor:g}", scaled, _yarn_scale(scaling, factor))


def _yarn_scale(scaling: Mapping[str, Any], factor: float) -> float:
    """What cos and sin are multiplied by, which sharpens attention over longer contexts.

    `attention_factor` is this number. `attn_factor`, which vLLM reads and transformers does not, multiplies the number
    that follows from `factor`.
    """
    more = _number(scaling, "attn_factor", 1.0)
    if scaling.get("attention_factor") is not None:
        if more != 1:
            raise ModelError("rope scaling has both attn_factor and attention_factor", "keep attention_factor")
        return _number(scaling, "attention_factor")

    def magnitude(times: float) -> float:
        return 0.1 * times * math.log(factor) + 1 if factor > 1 else 1.0

    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return more * magnitude(_number(scaling, "mscale")) / magnitude(_number(scaling, "mscale_all_dim"))
    return more * magnitude(1.0)


def _number(scaling: Mapping[str, Any], name: str, default: float | None = None) -> float:
    value = scaling.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < LARGE:
        raise ModelError(f"rope scaling: {name} is {SHORT.repr(value)}; it must be a positive number", HINT)
    return float(value)
