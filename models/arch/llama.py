"""Llama 2 and 3, Mistral, Qwen2: pre-norm layers of grouped-query attention and a gated MLP."""

from llmrs.core.ir import Graph
from llmrs.models.arch.config import ModelConfig
from llmrs.models.arch.layers import decoder, pre_norm_layer


def graph(c: ModelConfig) -> Graph:
    return decoder(c, lambda kind, name: pre_norm_layer(c, kind, name, qk_norm=False))
