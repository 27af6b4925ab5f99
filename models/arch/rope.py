"""RoPE frequencies: theta ** (-2 i / head_dim), with the scaling methods for longer contexts."""

import math

from llmrs.core.errors import ModelError
from llmrs.core.ir import RopeFrequencies
from llmrs.models.arch.config import ORIGINAL_CONTEXT, ModelConfig, Rope
from llmrs.models.files.json_reader import ConfigReader, short_repr

HINT = "is config.json complete?"


def frequencies(rope: Rope, c: ModelConfig) -> RopeFrequencies:
    """The head_dim / 2 inverse frequencies. Raises ModelError for unsupported or invalid scaling."""
    try:
        scaled = _scaled(rope, c)
    except (ArithmeticError, ValueError) as error:
        raise ModelError(f"rope scaling gives no frequencies: {error}", HINT) from error
    if not all(map(math.isfinite, (*scaled.values, scaled.scale))):
        raise ModelError(f"rope scaling gives a frequency that is not finite ({scaled.label})", HINT)
    return scaled


def _scaled(rope: Rope, c: ModelConfig) -> RopeFrequencies:
    values = [rope.theta ** (-2 * i / c.head_dim) for i in range(c.head_dim // 2)]
    kind, label = rope.scaling["rope_type"], f"theta {rope.theta:g}"
    if rope.factors:
        values, label = [v / f for v, f in zip(values, rope.factors, strict=True)], f"{label}, factors"
    given = {name: v for name, v in rope.scaling.items() if v is not None or name == "truncate"}  # null: no truncation
    r = ConfigReader("rope scaling", given)
    if kind == "dynamic":  # rescales only beyond the trained context, which is the limit here
        r.number("factor")
    if kind in ("default", "dynamic"):
        return RopeFrequencies(label, tuple(values))
    if kind == "linear":
        factor = r.number("factor")
        return RopeFrequencies(f"{label}, linear {factor:g}", tuple(v / factor for v in values))
    if kind == "llama3":
        return RopeFrequencies(f"{label}, llama3", _llama3(values, r))
    if kind == "yarn":
        return _yarn(label, values, r, rope.theta, c)
    hint = "default, linear, dynamic, llama3 and yarn are"
    raise ModelError(f"rope_type {short_repr(kind)} is not implemented", hint)


def _llama3(values: list[float], r: ConfigReader) -> tuple[float, ...]:
    """Llama 3.1 (transformers' docs): keeps high frequencies, divides low ones by `factor`, interpolates in between."""
    factor, low, high = (r.number(n) for n in ("factor", "low_freq_factor", "high_freq_factor"))
    if high <= low:
        raise ModelError(f"rope scaling: high_freq_factor {high:g} is not above low_freq_factor", HINT)
    original = r.number(ORIGINAL_CONTEXT)

    def scaled(frequency: float) -> float:
        rotations = original * frequency / (2 * math.pi)  # within the original context
        kept = _clamp((rotations - low) / (high - low))
        return (1 - kept) * frequency / factor + kept * frequency

    return tuple(map(scaled, values))


def _yarn(label: str, values: list[float], r: ConfigReader, theta: float, c: ModelConfig) -> RopeFrequencies:
    """YaRN (arXiv 2309.00071): interpolates between beta_fast and beta_slow rotations in the original context."""
    original = r.number(ORIGINAL_CONTEXT)
    factor = r.number("factor", c.max_position_embeddings / original)
    fast, slow = r.number("beta_fast", 32.0), r.number("beta_slow", 1.0)  # transformers' defaults
    low, high = (c.head_dim * math.log(original / (n * 2 * math.pi)) / (2 * math.log(theta)) for n in (fast, slow))
    if r.data.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, c.head_dim - 1)
    width = high - low or 0.001
    ramp = [_clamp((i - low) / width) for i in range(len(values))]
    scaled = tuple(v / factor * p + v * (1 - p) for v, p in zip(values, ramp, strict=True))
    return RopeFrequencies(f"{label}, yarn {factor:g}", scaled, _yarn_scale(r, factor))


def _yarn_scale(r: ConfigReader, factor: float) -> float:
    """The multiplier of cos and sin (attention temperature).

    `attention_factor` sets it. `attn_factor`, which vLLM reads and transformers ignores, multiplies the default.
    """
    more = r.number("attn_factor", 1.0)
    if "attention_factor" in r.data:
        if more != 1:
            raise ModelError("rope scaling has both attn_factor and attention_factor", "keep attention_factor")
        return r.number("attention_factor")

    def mscale(times: float) -> float:
        return 0.1 * times * math.log(factor) + 1 if factor > 1 else 1.0

    if r.data.get("mscale") and r.data.get("mscale_all_dim"):
        return more * mscale(r.number("mscale")) / mscale(r.number("mscale_all_dim"))
    return more * mscale(1.0)


def _clamp(x: float) -> float:
    return min(max(x, 0.0), 1.0)
