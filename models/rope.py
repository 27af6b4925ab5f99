"""Rotary frequencies: theta ** (-2 i / d), and the ways to scale them for longer contexts."""

import math
from collections.abc import Mapping
from typing import Any

from llmrs.core.errors import ModelError
from llmrs.core.ir import Frequencies
from llmrs.models.config import ModelConfig


def frequencies(c: ModelConfig) -> Frequencies:
    """The head_size / 2 frequencies of a config. Raises ModelError for a scaling that is not implemented."""
    values = [c.rope_theta ** (-2 * i / c.head_size) for i in range(c.head_size // 2)]
    kind, label = c.rope_scaling["rope_type"], f"theta {c.rope_theta:g}"
    if kind == "default":
        return Frequencies(label, tuple(values))
    if kind == "linear":
        factor = _number(c.rope_scaling, "factor")
        return Frequencies(f"{label}, linear {factor:g}", tuple(v / factor for v in values))
    if kind == "llama3":
        return Frequencies(f"{label}, llama3", tuple(_llama3(v, c.rope_scaling) for v in values))
    raise ModelError(f"rope_type {kind!r} is not implemented", "default, linear and llama3 are")


def _llama3(frequency: float, scaling: Mapping[str, Any]) -> float:
    """Llama 3.1's rule: short waves stay, long ones slow down by `factor`, and those between are interpolated.

    Source: transformers' documentation of rope_type "llama3".
    """
    factor, low, high = (_number(scaling, n) for n in ("factor", "low_freq_factor", "high_freq_factor"))
    turns = _number(scaling, "original_max_position_embeddings") * frequency / (2 * math.pi)  # within the old context
    part = min(max((turns - low) / (high - low), 0.0), 1.0)
    return (1 - part) * frequency / factor + part * frequency


def _number(scaling: Mapping[str, Any], name: str) -> float:
    value = scaling.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ModelError(f"rope scaling: {name} is {value!r}; it must be a positive number", "is config.json complete?")
    return float(value)
