"""Llama 2 and 3, Mistral, Qwen2: pre-norm layers of GQA and a gated MLP."""

from functools import partial

from llmrs.core.ir import Graph
from llmrs.models.arch.config import ModelConfig
from llmrs.models.arch.layers import decoder, pre_norm_layer


def graph(c: ModelConfig) -> Graph:
    return decoder(c, partial(pre_norm_layer, c, qk_norm=False))
