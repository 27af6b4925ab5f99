"""A model as llama.cpp's files have it: metadata of its config, tensors of its weights.

Keys, names and conversions: gguf-py/gguf/constants.py and convert_hf_to_gguf.py of github.com/ggml-org/llama.cpp.
"""

import math
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from llmrs.core.errors import ModelError
from llmrs.core.ir import Graph
from llmrs.models.arch.config import ORIGINAL_CONTEXT, ModelConfig, Rope
from llmrs.models.arch.gguf import GGUF_FAMILIES, GGUF_NAMES, ROPE_FACTORS
from llmrs.models.arch.rope import frequencies
from llmrs.models.files.weights import stored_name
from llmrs.quant.tensor import AnyTensor, Tensor

ARCHITECTURES = {  # in config.json -> in GGUF files
    **{f.architecture: name for name, f in GGUF_FAMILIES.items()}, "MistralForCausalLM": "llama",
}  # fmt: skip
EXPERT = re.compile(r"layers\.\d+\.experts\.(\d+)\.\w+")
STACK = re.compile(r"_exps\.\d+\.")
HINT = "quantize to mlx4 or fp8, which are written as folders with a config.json"


@dataclass(frozen=True)
class ExportTensor:
    """A tensor of the file. `sources`: canonical names, several for stacked experts."""

    name: str
    sources: tuple[str, ...]
    shape: tuple[int, ...]


def metadata_of(c: ModelConfig) -> dict[str, Any]:
    """The keys of the architecture. Raises ModelError for what llama.cpp's has no key for."""
    arch = ARCHITECTURES[c.architecture]
    _check(c, arch)
    values: dict[str, Any] = {
        "block_count": len(c.layer_kinds), "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size, "feed_forward_length": c.intermediate_size,
        "attention.head_count": c.num_heads, "attention.head_count_kv": c.num_kv_heads,
        "attention.key_length": c.head_dim, "attention.value_length": c.head_dim,
        "attention.layer_norm_rms_epsilon": c.norm_eps, "rope.dimension_count": c.head_dim,
        "rope.freq_base": c.rope.theta, "vocab_size": c.vocab_size, **_rope_scaling(c),
    }  # fmt: skip
    if c.experts is not None:
        values |= {
            "expert_count": c.experts.num_experts, "expert_used_count": c.experts.num_experts_per_tok,
            "expert_feed_forward_length": c.experts.intermediate_size,
        }  # fmt: skip
    if arch == "llama" and _window(c):
        values["attention.sliding_window"] = _window(c)  # llmrs reads it
    if arch == "gemma3":
        values |= {"attention.sliding_window": _window(c), "attention.sliding_window_pattern": window_period(c)}
        values["rope.freq_base_swa"] = c.local_rope.theta
    return {"general.architecture": arch, **{f"{arch}.{key}": value for key, value in values.items()}}


def _window(c: ModelConfig) -> int:
    return max(kind.window for kind in c.layer_kinds)


def window_period(c: ModelConfig) -> int:
    """The distance between layers of full attention."""
    full = [i for i, kind in enumerate(c.layer_kinds) if not kind.window]
    return full[0] + 1 if full else len(c.layer_kinds) + 1


def _check(c: ModelConfig, arch: str) -> None:
    """Raises ModelError for variations that llama.cpp has no key for; warns of windows that it ignores."""

    def refuse(what: str) -> None:
        raise ModelError(f"GGUF files of {arch} can't express {what}", HINT)

    windows = [kind.window for kind in c.layer_kinds]
    if arch == "gemma3":
        period, scales = window_period(c), [c.head_dim**-0.5]
        if len(windows) == 62:  # the model of 27B parameters
            scales = [(c.hidden_size / c.num_heads) ** -0.5]
        if any((window == 0) != ((i + 1) % period == 0) for i, window in enumerate(windows)):
            refuse("layers of full attention in irregular places")
        if c.local_rope.scaling["rope_type"] != "default":
            refuse("rope scaling in sliding-window layers")
    else:
        scales = [c.head_dim**-0.5]
        if 0 < min(filter(None, windows), default=0) < c.max_position_embeddings:
            warnings.warn(f"GGUF files of {arch} have no sliding window: answers are right up to "
                          f"{min(filter(None, windows))} tokens", stacklevel=3)  # fmt: skip
    if "truncate" in c.rope.scaling and not c.rope.scaling["truncate"]:
        refuse("rope scaling without truncate")
    if not np.isclose(c.attention_scale, scales[0], rtol=1e-6):
        refuse(f"an attention scale of {c.attention_scale:g}")
    if arch in ("qwen3", "qwen3moe", "gemma3") and (c.attention_bias or c.output_bias):
        refuse("attention biases")
    if arch != "llama" and (c.mlp_bias or c.output_bias):
        refuse("biases of the MLP")
    if c.experts is not None and not (c.experts.norm_topk_prob and all(k.is_moe for k in c.layer_kinds)):
        refuse("experts in some layers only, or norm_topk_prob: false")


def _rope_scaling(c: ModelConfig) -> dict[str, Any]:
    """Factors of llama3 are a tensor, and dynamic scaling has no effect within the context."""
    given = c.rope.scaling
    kind = given["rope_type"]
    if kind not in ("linear", "yarn"):
        return {}
    values = {"type": kind, "factor": float(given.get("factor") or c.max_position_embeddings / given[ORIGINAL_CONTEXT])}
    if given.get(ORIGINAL_CONTEXT) is not None:
        values["original_context_length"] = int(given[ORIGINAL_CONTEXT])
    if kind == "yarn":
        values |= {f"yarn_{key}": float(given[key]) for key in ("beta_fast", "beta_slow") if given.get(key) is not None}
        usual = 0.1 * math.log(values["factor"]) + 1 if values["factor"] > 1 else 1.0
        if not math.isclose(temperature := frequencies(c.rope, c).scale / usual, 1):
            values["attn_factor"] = temperature
    return {f"rope.scaling.{key}": value for key, value in values.items()}


def export_tensors(c: ModelConfig, graph: Graph) -> list[ExportTensor]:
    """The tensors of the file, in the order in which the model uses them."""
    found: dict[str, ExportTensor] = {}
    for weight in graph.weights():
        for s in weight.segments:
            expert = EXPERT.fullmatch(s.tensor)
            name = gguf_name(s.tensor)
            old, shape = found.get(name), (s.rows, *weight.columns)
            if expert is None:
                found[name] = ExportTensor(name, (s.tensor,), shape)
            elif old is None:
                found[name] = ExportTensor(name, (s.tensor,), (1, *shape))
            elif s.tensor not in old.sources:
                sources = (*old.sources, s.tensor)
                found[name] = replace(old, sources=sources, shape=(len(sources), *shape))
    tensors = list(found.values())
    if c.rope.scaling["rope_type"] == "llama3" or c.rope.factors:
        tensors.append(ExportTensor(ROPE_FACTORS, (), (c.head_dim // 2,)))
    return tensors


def gguf_name(canonical: str) -> str:
    """The name in GGUF files; of all experts of a layer together."""
    return STACK.sub("_exps.", stored_name(canonical, GGUF_NAMES))


def exported(c: ModelConfig, weights: Mapping[str, AnyTensor], tensor: ExportTensor) -> Iterator[AnyTensor]:
    """A tensor's parts as the file has them: one after the other for stacked experts."""
    if tensor.name == ROPE_FACTORS:
        yield _rope_factors(c)
    changes = GGUF_FAMILIES[ARCHITECTURES[c.architecture]]
    for name in tensor.sources:
        w = weights[name]
        part = name.removesuffix(".bias").rpartition(".")[2]
        if changes.interleaved_rope and part in ("q", "k"):
            w = w.rows(interleaved_rows(w.shape[0], c.num_heads if part == "q" else c.num_kv_heads))
        if changes.norm_offset and name.endswith("norm"):
            w = Tensor("f32", w.shape, w.float32() + np.float32(changes.norm_offset))
        yield w


def interleaved_rows(rows: int, heads: int) -> np.ndarray:
    """Rows of q or k for rope over pairs of rows, from those over halves of a head: `half_rows` undoes it."""
    return np.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)


def _rope_factors(c: ModelConfig) -> Tensor:
    """Base frequencies over scaled ones, float32 (head_dim / 2,)."""
    if c.rope.factors:
        return Tensor("f32", (len(c.rope.factors),), np.array(c.rope.factors, np.float32))
    plain = frequencies(Rope(c.rope.theta, {"rope_type": "default"}), c)
    factors = np.array(plain.values / np.array(frequencies(c.rope, c).values), np.float32)
    return Tensor("f32", factors.shape, factors)
