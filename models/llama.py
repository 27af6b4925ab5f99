"""Llama 3: pre-norm layers of grouped-query attention and a gated MLP."""

from llmrs.core.ir import Graph
from llmrs.models.config import ModelConfig
from llmrs.models.layers import decoder, pre_norm_layer


def graph(c: ModelConfig) -> Graph:
    layer = pre_norm_layer(c, qk_norm=False)
    return decoder(c, "llama", lambda _: layer)
