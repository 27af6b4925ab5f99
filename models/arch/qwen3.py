"""Qwen3 and Qwen3-MoE: Llama's layers, with queries and keys normalized per head before the rotation."""

from llmrs.core.ir import Graph
from llmrs.models.arch.config import ModelConfig
from llmrs.models.arch.layers import decoder, pre_norm_layer


def graph(c: ModelConfig) -> Graph:
    return decoder(c, lambda kind, name: pre_norm_layer(c, kind, name, qk_norm=True))
