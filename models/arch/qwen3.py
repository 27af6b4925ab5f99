"""Qwen3 and Qwen3-MoE: Llama with per-head RMS norm of q and k before RoPE."""

from functools import partial

from llmrs.core.ir import Graph
from llmrs.models.arch.config import ModelConfig
from llmrs.models.arch.layers import decoder, pre_norm_layer


def graph(c: ModelConfig) -> Graph:
    return decoder(c, partial(pre_norm_layer, c, qk_norm=True))
