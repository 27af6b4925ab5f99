"""Thresholds of top-k, top-p and min-p for each row of logits, without a sort.

Defined by `filter_logits` in backends/reference/sampling.py: of the tokens by falling logit (ties by id) the first m
are kept. So there is a lowest kept logit, the threshold, and an id from which on its ties are dropped.

    logits (S, V), any row stride   temperature, top_p, min_p float32 (S,)   top_k int32 (S,)
    -> thresholds int32 (S, 2): bits of the threshold (of logits / temperature, float32), first dropped tie id

A CTA handles a row. float32 values become int32 in the same order (`ordered_bits`), and each pass over the row splits a
bracket around the threshold in four: how many tokens, or how much probability, lie above each pivot? First by count
for top-k, then by probability for top-p among what top-k keeps. A search ends early when the bracket holds one value,
or when exactly k tokens are above it. Bytes moved: the row once, then about ten times from the caches per search.
"""

import torch
import triton
import triton.language as tl

from llmrs.backends.torch.kernels.launch import FLOATS, check, pdl_wait

NAME = "find_thresholds"
BLOCK_V = 4096
LOWEST = tl.constexpr(-(2**31))  # below the ordered bits of every float32
HIGHEST = tl.constexpr(2**31 - 1)
MINUS_INF = tl.constexpr(-2139095041)  # the ordered bits of -inf


@triton.jit
def _ordered_bits(x):
    """int32 in the order of float32 values, 0 for both zeros."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _from_ordered_bits(bits):
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit
def _load_block(row_ptr, start, temperature, V, BLOCK_V: tl.constexpr):
    """Logits / temperature, their ordered bits (LOWEST from V on), and ids."""
    ids = start + tl.arange(0, BLOCK_V)
    x = tl.load(row_ptr + ids, mask=ids < V, other=-float("inf")).to(tl.float32)
    x = tl.div_rn(x, tl.zeros_like(x) + temperature)
    return x, tl.where(ids < V, _ordered_bits(x), LOWEST), ids


@triton.jit
def _count_and_mass_above(row_ptr, temperature, top, pivot, V, BLOCK_V: tl.constexpr):
    """Number and mass exp(x - top) of the tokens above a pivot, and the number of those equal to it."""
    count, mass = tl.zeros([BLOCK_V], tl.int32), tl.zeros([BLOCK_V], tl.float32)
    ties = tl.zeros([BLOCK_V], tl.int32)
    for start in range(0, V, BLOCK_V):
        x, bits, _ = _load_block(row_ptr, start, temperature, V, BLOCK_V)
        count += (bits > pivot).to(tl.int32)
        mass += tl.where(bits > pivot, tl.exp(x - top), 0.0)
        ties += (bits == pivot).to(tl.int32)
    return tl.sum(count, 0), tl.sum(mass, 0), tl.sum(ties, 0)


@triton.jit
def _search_threshold(row_ptr, temperature, top, floor, target, V, BY_COUNT: tl.constexpr, BLOCK_V: tl.constexpr):
    """The highest ordered bits, from `floor` on, at or above which the tokens' number or mass reaches the target.

    By count it may also lie between two tokens, with exactly `target` tokens above.
    """
    low, high = floor.to(tl.int64), _ordered_bits(top).to(tl.int64) + 1
    pivot1 = tl.maximum(_ordered_bits(top - 20.0), low).to(tl.int64)  # the threshold is near the top, mostly
    pivot2 = tl.maximum(_ordered_bits(top - 8.0), low).to(tl.int64)
    pivot3 = tl.maximum(_ordered_bits(top - 3.0), low).to(tl.int64)
    while high - low > 1:
        sum1, sum2 = tl.zeros([BLOCK_V], tl.float32), tl.zeros([BLOCK_V], tl.float32)
        sum3 = tl.zeros([BLOCK_V], tl.float32)
        least, most = tl.full([BLOCK_V], HIGHEST, tl.int32), tl.full([BLOCK_V], LOWEST, tl.int32)
        for start in range(0, V, BLOCK_V):
            x, bits, _ = _load_block(row_ptr, start, temperature, V, BLOCK_V)
            value = tl.where(bits >= floor, 1.0, 0.0) if BY_COUNT else tl.where(bits >= floor, tl.exp(x - top), 0.0)
            sum1 += tl.where(bits >= pivot1, value, 0.0)
            sum2 += tl.where(bits >= pivot2, value, 0.0)
            sum3 += tl.where(bits >= pivot3, value, 0.0)
            inside = (bits >= low) & (bits < high)
            least = tl.minimum(least, tl.where(inside, bits, HIGHEST))
            most = tl.maximum(most, tl.where(inside, bits, LOWEST))
        lowest, total1 = tl.min(least, 0).to(tl.int64), tl.sum(sum1, 0)
        total2, total3 = tl.sum(sum2, 0), tl.sum(sum3, 0)
        if lowest == tl.max(most, 0):  # one value is left
            low, high = lowest, lowest + 1
        else:
            high = tl.where(total3 < target, pivot3, high)
            high = tl.where(total2 < target, pivot2, high)
            high = tl.where(total1 < target, pivot1, high)
            low = tl.where(total1 >= target, pivot1, low)
            low = tl.where(total2 >= target, pivot2, low)
            low = tl.where(total3 >= target, pivot3, low)
            reached = tl.where(total3 >= target, total3, tl.where(total2 >= target, total2, total1))
            if BY_COUNT:
                high = tl.where(reached == target, low + 1, high)  # exactly as many are above
        pivot1, pivot2 = low + (high - low) // 4, low + (high - low) // 2
        pivot3 = low + (high - low) * 3 // 4
    return low.to(tl.int32)


@triton.jit
def _min_p_threshold(row_ptr, temperature, top, min_p, V, BLOCK_V: tl.constexpr):
    """The lowest ordered bits whose mass is min_p or more."""
    least = tl.full([BLOCK_V], HIGHEST, tl.int32)
    for start in range(0, V, BLOCK_V):
        x, bits, _ = _load_block(row_ptr, start, temperature, V, BLOCK_V)
        least = tl.minimum(least, tl.where((tl.exp(x - top) >= min_p) & (bits > LOWEST), bits, HIGHEST))
    return tl.min(least, 0)


@triton.jit
def _first_dropped_tie_id(row_ptr, temperature, threshold, ties_kept, V, BLOCK_V: tl.constexpr):
    """The id after the first `ties_kept` tokens that equal the threshold."""
    ties_before, first_dropped = tl.zeros([], tl.int32), tl.zeros([], tl.int32)
    for start in range(0, V, BLOCK_V):
        _, bits, ids = _load_block(row_ptr, start, temperature, V, BLOCK_V)
        tie = (bits == threshold).to(tl.int32)
        kept = (tie == 1) & (ties_before + tl.cumsum(tie, 0) <= ties_kept)
        first_dropped = tl.maximum(first_dropped, tl.max(tl.where(kept, ids + 1, 0), 0))
        ties_before += tl.sum(tie, 0)
    return first_dropped


@triton.jit
def find_thresholds_kernel(
    logits, temperature, top_k, top_p, min_p, thresholds, stride_ls, V, BLOCK_V: tl.constexpr, PDL: tl.constexpr
):
    s = tl.program_id(0)
    pdl_wait(PDL)
    row_ptr, temp = logits + s.to(tl.int64) * stride_ls, tl.load(temperature + s)
    k, p, least_p = tl.load(top_k + s), tl.load(top_p + s), tl.load(min_p + s)
    k = tl.where((k <= 0) | (k > V), V, k)
    tl.store(thresholds + s * 2, (tl.zeros([], tl.float32) - float("inf")).to(tl.int32, bitcast=True))
    tl.store(thresholds + s * 2 + 1, V)
    if (temp <= 0) | ((k == V) & (p >= 1) & (least_p <= 0)):
        return
    best = tl.full([BLOCK_V], -float("inf"), tl.float32)
    for start in range(0, V, BLOCK_V):
        x, _, _ = _load_block(row_ptr, start, temp, V, BLOCK_V)
        best = tl.maximum(best, x)
    top = tl.max(best, 0)
    if top == -float("inf"):
        return

    # top-k: the threshold, and how many of its ties are kept
    threshold, ties_kept = tl.zeros([], tl.int32) + MINUS_INF, tl.zeros([], tl.int32) + V
    if k < V:
        threshold = _search_threshold(row_ptr, temp, top, threshold, k.to(tl.float32), V, True, BLOCK_V)
    above, mass, ties = _count_and_mass_above(row_ptr, temp, top, threshold, V, BLOCK_V)
    ties_kept = tl.minimum(k - above, ties)

    # top-p, of the mass that top-k keeps
    if p < 1:
        target = p * (mass + ties_kept * tl.exp(_from_ordered_bits(threshold) - top))
        top_p_threshold = _search_threshold(row_ptr, temp, top, threshold, target, V, False, BLOCK_V)
        above, mass, ties = _count_and_mass_above(row_ptr, temp, top, top_p_threshold, V, BLOCK_V)
        tie_mass = tl.exp(_from_ordered_bits(top_p_threshold) - top)
        needed = tl.maximum(tl.ceil(tl.div_rn(target - mass, tie_mass)), 1.0)
        needed = tl.minimum(needed, 16777216.0).to(tl.int32)
        same = top_p_threshold == threshold
        ties_kept = tl.where(same, tl.minimum(needed, ties_kept), tl.minimum(needed, ties))
        threshold = top_p_threshold

    if least_p > 0:
        min_p_threshold = _min_p_threshold(row_ptr, temp, top, least_p, V, BLOCK_V)
        ties = tl.where(min_p_threshold > threshold, 0, ties)
        ties_kept = tl.where(min_p_threshold > threshold, 0, ties_kept)
        threshold = tl.maximum(threshold, min_p_threshold)
    tl.store(thresholds + s * 2, _from_ordered_bits(threshold).to(tl.int32, bitcast=True))
    if ties_kept < ties:
        first_dropped = _first_dropped_tie_id(row_ptr, temp, threshold, ties_kept, V, BLOCK_V)
        tl.store(thresholds + s * 2 + 1, first_dropped)


def find_thresholds(
    logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor,
    block_v: int = BLOCK_V, *, pdl: bool = False,
) -> torch.Tensor:  # fmt: skip
    """int32 (S, 2): thresholds and first dropped tie ids. Raises BackendError for unsupported shapes and dtypes."""
    check(NAME, logits.ndim == 2 and logits.dtype in FLOATS and logits.stride(1) == 1, f"logits {logits.shape}")
    rows, vocab_size = logits.shape
    check(NAME, {len(t) for t in (temperature, top_k, top_p, min_p)} == {rows}, "not one value per sequence")
    check(NAME, vocab_size < 2**24, "float32 counts above 2^24 are inexact")
    floats = temperature.dtype == top_p.dtype == min_p.dtype == torch.float32
    check(NAME, floats and top_k.dtype == torch.int32, f"{temperature.dtype}, {top_k.dtype}")
    thresholds = torch.empty(rows, 2, dtype=torch.int32, device=logits.device)
    find_thresholds_kernel[(rows,)](
        logits, temperature, top_k, top_p, min_p, thresholds, logits.stride(0), vocab_size,
        BLOCK_V=block_v, PDL=pdl, num_warps=8, launch_pdl=pdl,
    )  # fmt: skip
    return thresholds
