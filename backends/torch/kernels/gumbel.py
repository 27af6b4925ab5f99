"""The noise of sampling, and the choice among the best of parts of the vocabulary; `bounds.py` finds those.

Defined by `sample` in core/sampling.py. The noise is the hash of (key, token id) that it has, bit by bit. Its inner
logarithm is a series, since the GPU's fast one is off by too much near 1, where the large values come from.
"""

import torch
import triton
import triton.language as tl

from llmrs.backends.torch.kernels.launch import FLOATS, chained, power, require

NAME = "sampling"
NOWHERE = tl.constexpr(2**31 - 1)


@triton.jit
def _mix(x):
    """`mix` of core/sampling.py on uint32."""
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
def gumbel(key, ids):
    h = _mix(_mix(ids.to(tl.uint32)) ^ key)
    v = tl.minimum((h.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994)
    return -tl.log(_minus_log1p(v))


@triton.jit
def pick(scores, ids, slots, last, tokens, parts, V, PARTS: tl.constexpr, PDL: tl.constexpr):
    """The best part's token, kept for the slot's next step."""
    row, p = tl.program_id(0), tl.arange(0, PARTS)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    score = tl.load(scores + row * parts + p, mask=p < parts, other=-float("inf"))
    at = tl.load(ids + row * parts + p, mask=p < parts, other=NOWHERE)
    best = tl.max(score, 0)
    token = tl.minimum(tl.min(tl.where(score == best, at, NOWHERE), 0), V - 1)  # a row of NaN has no best
    tl.store(tokens + row, token)
    slot = tl.load(slots + row)
    if slot >= 0:
        tl.store(last + slot, token.to(tl.int64))


def check(logits: torch.Tensor, temperature: torch.Tensor, keys: torch.Tensor, slots: torch.Tensor) -> None:
    """Raises BackendError for what `draw` can't do."""
    require(NAME, logits.ndim == 2 and logits.dtype in FLOATS and logits.stride(1) == 1, f"logits {logits.shape}")
    require(NAME, {len(t) for t in (temperature, keys, slots)} == {len(logits)}, "one value a sequence")
    require(NAME, temperature.dtype == torch.float32 and keys.dtype == slots.dtype == torch.int32, "types")


def picked(
    scores: torch.Tensor,
    ids: torch.Tensor,
    slots: torch.Tensor,
    last: torch.Tensor,
    vocabulary: int,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Token ids int32 (S,) from the largest scores float32 (S, P) of parts and the ids int32 (S, P) that have them."""
    (rows, parts), pdl = scores.shape, chained(scores.device)
    tokens = torch.empty(rows, dtype=torch.int32, device=scores.device) if out is None else out
    pick[(rows,)](
        scores, ids, slots, last, tokens, parts, vocabulary, PARTS=power(parts), PDL=pdl, num_warps=1, launch_pdl=pdl
    )
    return tokens
