"""Gumbel noise of sampling, and the argmax over partial argmaxes (`gumbel_argmax.py` computes those).

Defined by `gumbel` in backends/reference/sampling.py: a hash of (rng key, token id), reproduced bit by bit. The inner
logarithm is a series: the GPU's fast one is too inexact near 1, where the large values come from.
"""

import torch
import triton
import triton.language as tl

from llmrs.backends.torch.kernels.launch import next_power_of_2, pdl_wait

INVALID_ID = tl.constexpr(2**31 - 1)


@triton.jit
def _hash32(x):
    """`hash32` of core/sampling.py, on uint32."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _minus_log1p(v):
    """-log(1 - v) for v in (0, 1): twice the series of atanh(v / (2 - v)) up to 1/2, plain above."""
    s = v / (2.0 - v)
    z = s * s
    series = 1.0 / 15
    for n in tl.static_range(7):
        series = series * z + 1.0 / (13 - 2 * n)
    return tl.where(v <= 0.5, 2.0 * s * series, -tl.log(1.0 - v))


@triton.jit
def gumbel(rng_key, ids):
    h = _hash32(_hash32(ids.to(tl.uint32)) ^ rng_key)
    v = tl.minimum((h.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994)
    return -tl.log(_minus_log1p(v))


@triton.jit
def reduce_argmax_kernel(
    partial_max, partial_argmax, req_slots, last_tokens, tokens, num_parts, V, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    """The token with the largest score, the lowest id of equals; stored for the slot's next step too."""
    row, offs = tl.program_id(0), tl.arange(0, BLOCK)
    pdl_wait(PDL)
    scores = tl.load(partial_max + row * num_parts + offs, mask=offs < num_parts, other=-float("inf"))
    ids = tl.load(partial_argmax + row * num_parts + offs, mask=offs < num_parts, other=INVALID_ID)
    ids = tl.where(scores == tl.max(scores, 0), ids, INVALID_ID)
    token = tl.minimum(tl.min(ids, 0), V - 1)  # a row of NaN has no maximum
    tl.store(tokens + row, token)
    slot = tl.load(req_slots + row)
    if slot >= 0:
        tl.store(last_tokens + slot, token.to(tl.int64))


def reduce_argmax(
    partial_max: torch.Tensor, partial_argmax: torch.Tensor, req_slots: torch.Tensor, last_tokens: torch.Tensor,
    vocab_size: int, out: torch.Tensor | None = None, *, pdl: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Token ids int32 (S,) from the maxima float32 (S, P) of P parts of the vocabulary, and their ids int32 (S, P)."""
    rows, num_parts = partial_max.shape
    tokens = torch.empty(rows, dtype=torch.int32, device=partial_max.device) if out is None else out
    reduce_argmax_kernel[(rows,)](
        partial_max, partial_argmax, req_slots, last_tokens, tokens, num_parts, vocab_size,
        BLOCK=next_power_of_2(num_parts), PDL=pdl, num_warps=1, launch_pdl=pdl,
    )  # fmt: skip
    return tokens
