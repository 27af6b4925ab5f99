"""The tensors of a GGUF file with the changes of llama.cpp's conversion undone.

Source of the changes: conversion/llama.py and conversion/gemma.py of github.com/ggml-org/llama.cpp.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from llmrs.core.errors import ModelError
from llmrs.models.arch.config import ModelConfig
from llmrs.models.arch.gguf import ROPE_FACTORS, gguf_family
from llmrs.models.files.gguf import GGUFSource
from llmrs.quant import ggml
from llmrs.quant.tensor import AnyTensor, QuantTensor, Stored, Tensor

STACKED = re.compile(r"(blk\.\d+\.ffn_(?:gate|up|down)_exps)\.weight")
EXPERT = re.compile(r"(blk\.\d+\.ffn_(?:gate|up|down)_exps)\.(\d+)\.weight")
ROTATED = re.compile(r"blk\.\d+\.attn_([qk])\.(?:weight|bias)")


class UnconvertedSource:
    """A source of the tensors as transformers has them; of stacked experts E x (N, K) as E tensors `NAME.E.weight`.

    Quantized tensors stay packed: rows are moved only.
    """

    def __init__(self, source: GGUFSource, config: ModelConfig, path: Path) -> None:
        """`path`: in errors. Raises ModelError for stacks of another number of experts."""
        self.source, self.config = source, config
        self.family = gguf_family(path, source.metadata)[1]
        self.num_experts = config.experts.num_experts if config.experts is not None else 0
        for tensor in filter(STACKED.fullmatch, source.names()):
            shape = source.shape(tensor)
            if len(shape) != 3 or shape[0] != self.num_experts:
                problem = f"{path}: {tensor} has the shape {shape}; the config asks for {self.num_experts} experts"
                raise ModelError(problem, "is the file complete?")

    def names(self) -> Iterable[str]:
        return list(self._names())

    def _names(self) -> Iterator[str]:
        for name in self.source.names():
            if match := STACKED.fullmatch(name):
                yield from (f"{match[1]}.{e}.weight" for e in range(self.num_experts))
            elif name != ROPE_FACTORS or not self.family.interleaved_rope:  # else part of the config
                yield name

    def shape(self, name: str) -> tuple[int, ...]:
        if match := EXPERT.fullmatch(name):
            return self.source.shape(f"{match[1]}.weight")[1:]
        return self.source.shape(name)

    def stored(self, name: str) -> Stored:
        if match := EXPERT.fullmatch(name):
            return ggml.stored(self.source.tensors[f"{match[1]}.weight"].type, self.shape(name))
        return self.source.stored(name)

    def tensor(self, name: str) -> AnyTensor:
        if match := EXPERT.fullmatch(name):
            return self.source.expert(f"{match[1]}.weight", int(match[2]))
        tensor = self.source.tensor(name)
        if self.family.interleaved_rope and (match := ROTATED.fullmatch(name)):
            c = self.config
            return tensor.rows(half_rows(tensor.shape[0], c.num_heads if match[1] == "q" else c.num_kv_heads))
        if self.family.norm_offset and name.endswith("norm.weight") and not isinstance(tensor, QuantTensor):
            return Tensor("f32", tensor.shape, tensor.float32() - np.float32(self.family.norm_offset))
        return tensor

    def close(self) -> None:
        self.source.close()


def half_rows(rows: int, heads: int) -> np.ndarray:
    """The rows of q or k in the order of rope over halves of a head, from that of rope over pairs of rows.

    Row t d / 2 + j of a head of d rows (t: 0 or 1) is stored as row 2 j + t.
    """
    return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)
