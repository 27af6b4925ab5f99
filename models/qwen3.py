"""Qwen3: Llama's layers, with queries and keys normalized per head before the rotation."""

from llmrs.core.ir import Graph
from llmrs.models.config import ModelConfig
from llmrs.models.layers import decoder, pre_norm_layer


def graph(c: ModelConfig) -> Graph:
    layer = pre_norm_layer(c, qk_norm=True)
    return decoder(c, "qwen3", lambda _: layer)
