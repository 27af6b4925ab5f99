"""Sampling kernels, as `llmrs.core.sampling` defines it, from logits after penalties, biases and masks."""

import mlx.core as mx
import numpy as np

from llmrs.backends.mlx.kernels.launch import FLOATS, Kernel, Kernels, Template, check, require
from llmrs.core.sampling import SamplingArrays

HEADERS = ("random",)
PARTIALS = ("partial_max", "partial_argmax")
SAMPLE_INPUTS = ("logits", "temperature", "min_p", "rng_keys", "thresholds")
THRESHOLDS = Kernel(
    "find_thresholds", ("logits", "temperature", "top_k", "top_p"), ("thresholds",), HEADERS, exact=True
)
SAMPLE = Kernel("sample_gumbel", SAMPLE_INPUTS, PARTIALS, HEADERS, exact=True)
REDUCE = Kernel("reduce_argmax", PARTIALS, ("tokens",), exact=True)

SIMDS = 8  # simdgroups per threadgroup of sample_gumbel
BLOCK_V = 4096  # tokens per threadgroup of sample_gumbel
MAX_CANDIDATES = 2048  # tokens that find_thresholds holds in threadgroup memory


def sample(kernels: Kernels, logits: mx.array, params: SamplingArrays, block_v: int = BLOCK_V) -> mx.array:
    """Token ids int32 (S,) from logits (S, V) without NaN, and host parameters (S,).

    Raises BackendError for unsupported shapes and dtypes.
    """
    require(SAMPLE, logits.ndim == 2, "logits are (S, V)")
    rows, vocabulary = logits.shape
    require(SAMPLE, rows > 0 and 8 <= vocabulary <= 2**24, f"{rows} rows of {vocabulary} tokens")
    check(SAMPLE, "logits", logits, (rows, vocabulary), FLOATS)
    temperature, min_p, rng_keys = map(mx.array, (params.temperature, params.min_p, params.rng_key))
    filtered = needs_filter(params, vocabulary)
    thresholds = find_thresholds(kernels, logits, params) if filtered else rng_keys  # a placeholder, not read
    blocks = -(-vocabulary // block_v)
    template: Template = {"T": logits.dtype, "VOCAB": vocabulary, "BLOCK_V": block_v, "SIMDS": SIMDS}
    inputs = (logits, temperature, min_p, rng_keys, thresholds)
    outputs = [((rows, blocks), mx.float32), ((rows, blocks), mx.int32)]
    grid, threadgroup = (32 * SIMDS * blocks, rows, 1), (32 * SIMDS, 1, 1)
    partials = kernels.run(SAMPLE, inputs, template | {"FILTER": filtered}, grid, threadgroup, outputs)
    return kernels.run(REDUCE, partials, {"VOCAB": vocabulary}, (32, rows, 1), (32, 1, 1), [((rows,), mx.int32)])[0]


def needs_filter(params: SamplingArrays, vocabulary: int) -> bool:
    """Whether top-k, top-p or min-p apply to any row that is not greedy."""
    top_k = (params.top_k > 0) & (params.top_k < vocabulary)
    return bool(((params.temperature > 0) & (top_k | (params.top_p < 1) | (params.min_p > 0))).any())


def find_thresholds(
    kernels: Kernels, logits: mx.array, params: SamplingArrays, max_candidates: int = MAX_CANDIDATES
) -> mx.array:
    """uint32 (S, 3), see find_thresholds.metal."""
    rows, vocabulary = logits.shape
    simds = min(max(vocabulary // 256, 1), 32)  # 8 tokens per thread, up to 1024 threads
    inputs = (logits, *map(mx.array, (params.temperature, params.top_k.astype(np.int32), params.top_p)))
    template: Template = {"T": logits.dtype, "VOCAB": vocabulary, "SIMDS": simds, "MAX_CANDIDATES": max_candidates}
    grid, threadgroup = (32 * simds, rows, 1), (32 * simds, 1, 1)
    return kernels.run(THRESHOLDS, inputs, template, grid, threadgroup, [((rows, 3), mx.uint32)])[0]
