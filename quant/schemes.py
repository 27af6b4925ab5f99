"""Recipes of quantization by name: the type that each weight gets.

    q4k, q8_0, ...      vllm.rs's: q, k, o, gate, up, down in that type, v in q8_0, embeddings and head as they are
    q4_k_m, q2_k, ...   llama.cpp's mixes (llama_tensor_get_type of its src/llama-quant.cpp)
    mlx4, mlx8, ...     MLX's affine form in groups of 64, embeddings and head too
    fp8                 e4m3 in blocks of 128 x 128
    f32, bf16, f16      not quantized: every matrix in that type

Weights have llmrs's canonical names: embed, lm_head, layers.3.q, layers.3.experts.7.up. Vectors and the router of
experts are never quantized.
"""

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from llmrs.core.errors import ConfigError, did_you_mean
from llmrs.quant.ggml import TYPES

MATRICES = ("q", "k", "v", "o", "gate", "up", "down")  # of a layer
TABLES = ("embed", "lm_head")
MLX_BITS = (2, 3, 4, 5, 6, 8)
MLX_GROUPS = (64, 32)  # the second where the first does not divide a row
FP8_BLOCK = 128
NAME = re.compile(r"(?:layers\.(\d+)\.)?(?:experts\.\d+\.)?(\w+)")


@dataclass(frozen=True)
class ModelShape:
    """What the mixes depend on."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    num_experts: int = 0
    tied: bool = False  # the head is the embedding table
    is_70b: bool = False  # llama.cpp's class of Llama and Qwen2 models with 80 layers


Choice = Callable[[str, int, ModelShape], str | None]  # (role, layer, model) -> type; None: as it is


@dataclass(frozen=True)
class Scheme:
    name: str
    kind: str  # recipe | mix | mlx | fp8 | dense
    type: str  # of most matrices: a name of quant/ggml.py, mlx4, fp8
    choose: Choice

    @property
    def is_gguf(self) -> bool:
        """Whether its types are those of GGUF files."""
        return self.kind in ("recipe", "mix", "dense")

    def type_of(self, name: str, columns: int, model: ModelShape) -> tuple[str | None, str | None]:
        """The type of a matrix by its canonical name, and the one that it would have if its rows could be divided.

        None: as it is.
        """
        match = NAME.fullmatch(name)
        role, layer = (match[2], int(match[1] or 0)) if match else ("", 0)
        if role not in (*MATRICES, *TABLES):
            return None, None
        wanted = self.choose(role, layer, model)
        return self._fitting(wanted, columns), wanted

    def _fitting(self, wanted: str | None, columns: int) -> str | None:
        if wanted is None:
            return None
        if self.kind == "mlx":
            groups = [g for g in MLX_GROUPS if columns % g == 0]
            return f"{wanted}_g{groups[0]}" if groups else None
        if self.kind == "fp8":
            return wanted if columns % FP8_BLOCK == 0 else None
        fallback = "q8_0" if self.kind == "recipe" else MIX_FALLBACK.get(wanted, "f16")
        for name in (wanted, fallback):
            if columns % TYPES[name].block == 0:
                return name
        return None if self.kind == "recipe" else "f16"


# llama.cpp's substitutes in blocks of 32
MIX_FALLBACK = {"q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}


def plan(scheme: Scheme, shapes: Mapping[str, tuple[int, ...]], model: ModelShape) -> dict[str, str | None]:
    """The type of each weight, None: as it is. Warns once where blocks do not divide the rows."""
    types: dict[str, str | None] = {}
    fallbacks: dict[tuple[int, str, str], list[str]] = {}
    for name, shape in shapes.items():
        types[name], wanted = scheme.type_of(name, shape[-1], model) if len(shape) > 1 else (None, None)
        if wanted is not None and not (types[name] or "").startswith(wanted):
            fallbacks.setdefault((shape[-1], wanted, types[name] or "not quantized"), []).append(name)
    if fallbacks:
        texts = [f"{_some(names)}: {found}, as {columns} columns are no whole blocks of {wanted}"
                 for (columns, wanted, found), names in fallbacks.items()]  # fmt: skip
        warnings.warn(f"{scheme.name}: {'; '.join(texts)}", stacklevel=2)
    return types


def _some(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _recipe(kind: str) -> Choice:
    def choose(role: str, layer: int, model: ModelShape) -> str | None:
        if role in TABLES:
            return None
        return "q8_0" if role == "v" else kind

    return choose


def _every(kind: str, roles: tuple[str, ...] = (*MATRICES, *TABLES)) -> Choice:
    return lambda role, layer, model: kind if role in roles else None


Rule = Callable[[int, ModelShape], str | None]  # (layer, model) -> type, None: that of most matrices


def _mix(base: str, eight_o: str = "q5_k", **rules: Rule) -> Choice:
    """llama.cpp's mix: `rules` by role, and what all mixes share. `eight_o`: type of o in models with 8 experts."""

    def choose(role: str, layer: int, model: ModelShape) -> str | None:
        if role == "lm_head" or (role == "embed" and model.tied):
            return "q6_k"
        if model.num_experts == 8 and role in ("k", "v", "o"):
            return eight_o if role == "o" else "q8_0"
        found = (rules[role](layer, model) if role in rules else None) or base
        return "q5_k" if role == "v" and model.is_70b and found in ("q3_k", "q4_k") else found

    return choose


def _always(kind: str) -> Rule:
    return lambda layer, model: kind


def _first(count: Callable[[ModelShape], int], then: str | None = None) -> Rule:
    """q5_k in the first layers, `then` in the others."""
    return lambda layer, model: "q5_k" if layer < count(model) else then


def _more_bits(layer: int, model: ModelShape) -> str | None:
    """q6_k in the layers at both ends, and in every third between."""
    eighth = model.num_layers // 8
    chosen = layer < eighth or layer >= 7 * model.num_layers // 8 or (layer - eighth) % 3 == 2
    return "q6_k" if chosen else None


def _grouped(layer: int, model: ModelShape) -> str:
    """More bits where at least four query heads share a matrix."""
    return "q4_k" if model.num_heads >= 4 * model.num_kv_heads else "q3_k"


_PLAIN = {name: name.replace("_k", "k") for name in TYPES if re.fullmatch(r"q[2-8]_[01k]", name)}
SCHEMES: dict[str, Scheme] = {
    s.name: s
    for s in (
        *(Scheme(name, "recipe", kind, _recipe(kind)) for kind, name in _PLAIN.items()),
        Scheme("q2_k", "mix", "q2_k", _mix("q2_k", v=_grouped, down=_always("q3_k"), o=_always("q3_k"))),
        Scheme("q3_k_s", "mix", "q3_k", _mix("q3_k")),
        Scheme("q3_k_m", "mix", "q3_k", _mix(
            "q3_k", v=_first(lambda m: 2, "q4_k"), down=_first(lambda m: m.num_layers // 16, "q4_k"),
            o=_always("q4_k"))),
        Scheme("q3_k_l", "mix", "q3_k", _mix("q3_k", "q3_k", **dict.fromkeys(("v", "down", "o"), _always("q5_k")))),
        Scheme("q4_k_s", "mix", "q4_k", _mix("q4_k", v=_first(lambda m: 4), down=_first(lambda m: m.num_layers // 8))),
        Scheme("q4_k_m", "mix", "q4_k", _mix("q4_k", v=_more_bits, down=_more_bits)),
        Scheme("q5_k_s", "mix", "q5_k", _mix("q5_k")),
        Scheme("q5_k_m", "mix", "q5_k", _mix("q5_k", v=_more_bits, down=_more_bits)),
        Scheme("q6_k", "mix", "q6_k", _mix("q6_k", "q6_k")),
        *(Scheme(f"mlx{b}", "mlx", f"mlx{b}", _every(f"mlx{b}")) for b in MLX_BITS),
        Scheme("fp8", "fp8", "fp8", _every("fp8", MATRICES)),
        *(Scheme(name, "dense", name, _every(name)) for name in ("f32", "bf16", "f16")),
    )
}  # fmt: skip
ALIASES = {"q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m"}  # as llama-quantize has them


def find_scheme(name: str) -> Scheme:
    """By name, in any case, with `-` or `_`. Raises ConfigError."""
    plain = name.strip().lower().replace("-", "_")
    short = {n.replace("_", ""): n for n in (*ALIASES, *SCHEMES)}  # q4km; q4k is itself
    found = ALIASES.get(plain, plain if plain in SCHEMES else short.get(plain, plain))
    if found not in SCHEMES:
        raise ConfigError(f"quant: unknown quantization {name[:60]!r}", did_you_mean(plain, SCHEMES))
    return SCHEMES[found]
