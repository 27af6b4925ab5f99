"""Sampling on the GPU, as `llmrs.core.sampling` defines it, from logits that penalties and masks were applied to."""

import mlx.core as mx
import numpy as np

from llmrs.backends.mlx.kernels.launch import FLOATS, Kernel, Kernels, Template, check, require
from llmrs.core.sampling import SamplingArrays

SHARED = ("random",)
KEEP = Kernel("sample_keep", ("logits", "temperature", "top_k", "top_p"), ("edges",), SHARED, exact=True)
PART = Kernel("sample_part", ("logits", "temperature", "min_p", "keys", "edges"), ("scores", "ids"), SHARED, exact=True)
PICK = Kernel("sample_pick", ("scores", "ids"), ("tokens",), exact=True)

SIMDS = 8  # simdgroups of a threadgroup that looks at a part of the vocabulary
PART_TOKENS = 4096
LIST_TOKENS = 2048  # that sample_keep holds in threadgroup memory


def sample(kernels: Kernels, logits: mx.array, params: SamplingArrays, part: int = PART_TOKENS) -> mx.array:
    """Token ids int32 (S,) from logits (S, V), for parameters (S,) on the host. No row may hold a NaN.

    A threadgroup looks at `part` tokens. Raises BackendError for a shape or type that the kernels can't do.
    """
    require(PART, logits.ndim == 2, "logits are (S, V)")
    rows, vocabulary = logits.shape
    require(PART, rows > 0 and 8 <= vocabulary <= 2**24, f"{rows} rows of {vocabulary} tokens")
    check(PART, "logits", logits, (rows, vocabulary), FLOATS)
    temperature, min_p, keys = map(mx.array, (params.temperature, params.min_p, params.rng_key))
    filtered = cuts(params, vocabulary)
    edges = keep(kernels, logits, params) if filtered else keys  # which are not read
    parts = -(-vocabulary // part)
    template: Template = {
        "T": logits.dtype,
        "VOCAB": vocabulary,
        "PART": part,
        "SIMDS": SIMDS,
        "FILTER": filtered,
    }
    best = kernels.run(
        PART, (logits, temperature, min_p, keys, edges), template, (32 * SIMDS * parts, rows, 1), (32 * SIMDS, 1, 1),
        [((rows, parts), mx.float32), ((rows, parts), mx.int32)],
    )  # fmt: skip
    return kernels.run(PICK, best, {"VOCAB": vocabulary}, (32, rows, 1), (32, 1, 1), [((rows,), mx.int32)])[0]


def cuts(params: SamplingArrays, vocabulary: int) -> bool:
    """Whether top-k, top-p or min-p drop anything from a row that is drawn."""
    top_k = (params.top_k > 0) & (params.top_k < vocabulary)
    return bool(((params.temperature > 0) & (top_k | (params.top_p < 1) | (params.min_p > 0))).any())


def keep(kernels: Kernels, logits: mx.array, params: SamplingArrays, listed: int = LIST_TOKENS) -> mx.array:
    """What sample_keep finds, uint32 (S, 3); it searches up to `listed` tokens in fast memory."""
    rows, vocabulary = logits.shape
    simds = min(max(vocabulary // 256, 1), 32)  # eight tokens a thread, up to 1024 threads
    inputs = (logits, *map(mx.array, (params.temperature, params.top_k.astype(np.int32), params.top_p)))
    template: Template = {"T": logits.dtype, "VOCAB": vocabulary, "SIMDS": simds, "LIST": listed}
    grid, threadgroup = (32 * simds, rows, 1), (32 * simds, 1, 1)
    return kernels.run(KEEP, inputs, template, grid, threadgroup, [((rows, 3), mx.uint32)])[0]
