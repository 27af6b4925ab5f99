"""Gemma 3 (text): pre- and post-norms, interleaved sliding-window layers, scaled embeddings (arXiv 2503.19786).

Its RMS norms scale by 1 + weight.
"""

from functools import partial

from llmrs.core.ir import Function, Graph
from llmrs.models.arch import layers
from llmrs.models.arch.builder import Builder
from llmrs.models.arch.config import LayerKind, ModelConfig
from llmrs.models.arch.layers import LAYER, attention, decoder, gated_mlp, layer_inputs, norm

HF_NAMES = {
    **layers.HF_NAMES,
    "layers.{i}.attn_out_norm": "model.layers.{i}.post_attention_layernorm.weight",
    "layers.{i}.mlp_norm": "model.layers.{i}.pre_feedforward_layernorm.weight",
    "layers.{i}.mlp_out_norm": "model.layers.{i}.post_feedforward_layernorm.weight",
}
DEFAULTS = {
    "vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "attention_bias": False, "layer_types": None, "hidden_activation": "gelu_pytorch_tanh",
    "head_dim": 256, "query_pre_attn_scalar": 256, "num_key_value_heads": 4, "max_position_embeddings": 131072,
    "sliding_window": 4096, "sliding_window_pattern": 6, "rope_theta": 1e6, "rope_local_base_freq": 10000.0,
    "tie_word_embeddings": True,
}  # fmt: skip


def graph(c: ModelConfig) -> Graph:
    return decoder(c, partial(layer, c), embedding_scale=c.hidden_size**0.5, norm_offset=1.0)


def layer(c: ModelConfig, kind: LayerKind, name: str) -> Function:
    """x + norm(attention(norm(x))), then x + norm(mlp(norm(x)))."""
    b = Builder(name, **layer_inputs(c))
    x, positions, kv = b.inputs
    n = norm(b, x, LAYER + "attn_norm", c.norm_eps, to="n", offset=1.0)
    y, kv = attention(b, c, kind, n, positions, kv, qk_norm=True, norm_offset=1.0)
    x = b("add", x, norm(b, y, LAYER + "attn_out_norm", c.norm_eps, to="n", offset=1.0), to="x")
    n = norm(b, x, LAYER + "mlp_norm", c.norm_eps, to="n", offset=1.0)
    y = norm(b, gated_mlp(b, c, n), LAYER + "mlp_out_norm", c.norm_eps, to="n", offset=1.0)
    return b.done(b("add", x, y, to="x"), kv)
