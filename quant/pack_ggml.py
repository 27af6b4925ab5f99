"""Writes the blocks of GGUF's types: the inverse of quant/ggml.py, which has the layouts."""

from collections.abc import Callable
from dataclasses import dataclass

from llmrs.quant.arrays import Array
from llmrs.quant.form import IQ4, SUPER_BLOCK, pack_codes
from llmrs.quant.ggml import TYPES, GgmlType
from llmrs.quant.quantizer_ops import QuantizerOps, rounded
from llmrs.quant.scale_search import Fit, Groups, Levels, Store, Stored, extreme, inverse, refine, search
