"""Gumbel-max sampling: temperature, noise and argmax in one pass, without a softmax over the vocabulary.

Defined by `sample` in backends/reference/sampling.py. S sequences, V tokens:

    logits (S, V), any row stride, bf16, f16 or f32   temperature float32 (S,), 0: greedy
    rng_keys int32 (S,), bits of the uint32 keys
    -> tokens int32 (S,); last_tokens[req_slots[s]] = tokens[s] unless req_slots[s] is -1

Equal scores: the lowest id. Bytes moved: the logits once.

An exact score is expensive, so most are skipped by an upper bound at a tenth of the cost. The score is x / T + g, with
g = -log(-log1p(-v)) < -log v for the uniform v that token and key hash to. In units of log 2

    bound = x * (log2(e) / T) - chord(v)

is above the score up to rounding, and close to it for small v; chord(v), the bits of v read as an integer in place of
its logarithm, lies below log2(v) by less than 0.09.

A CTA walks over a part of a row in chunks and keeps the best score so far. If no bound of a chunk exceeds it, less an
allowance for rounding, the chunk is done; else the score of the highest bound is computed, then of the next. Among n
chunks that takes about log(n) + 1 scores. Equal scores are all computed, so that the lowest id wins.

Instructions per logit: widen 1, hash 10 (6 logical, 4 multiplies), chord 3, bound 1, maximum 1; 20 as compiled, which
takes 26 us for 256 x 151,936 on an H200, against 18 us for reading and 120 instructions for exact scores. The hash has
six steps x ^ (x >> n) and the bound needs four: the second hash begins by undoing the end of the first, and the last
step changes h by less than h / 2^16, which the allowance covers.
"""

import torch
import triton
import triton.language as tl

from llmrs.backends.torch.kernels.gumbel import INVALID_ID, gumbel, reduce_argmax
from llmrs.backends.torch.kernels.launch import FLOATS, check, num_sms

NAME = "sample_gumbel"
CHUNK = 1024  # tokens: 32 per thread of a CTA's single warp, which needs no barrier
CTAS_PER_SM = 16
LOG2E = tl.constexpr(1.4426950408889634)
RELATIVE, ABSOLUTE = tl.constexpr(2.0**-18), tl.constexpr(2.0**-11)  # eight times the rounding error of a bound


@triton.jit
def _mix_core(x):
    """`hash32` of core/sampling.py without its first and last step, x ^ (x >> 16), which undoes itself."""
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    return x * 0x846CA68B


@triton.jit
def score_upper_bound(x, ids, rng_key, scale):
    """Upper bounds of scores in units of log 2; rng_key and ids are those after the step x ^ (x >> 16)."""
    h = _mix_core(_mix_core(ids) ^ rng_key).to(tl.float32)
    chord = h.to(tl.int32, bitcast=True).to(tl.float32) * 2.0**-23 - (127.0 + 32.0)  # of v = h / 2^32
    return x * scale - chord


@triton.jit
def skip_threshold(best, temperature):
    """A bound at or below it means a score below `best`. Greedy scores are their own bounds."""
    threshold = best
    if temperature > 0:
        threshold = best * LOG2E - (tl.abs(best) * RELATIVE + ABSOLUTE)
    return threshold


@triton.jit
def _exact_score(row_ptr, token, temperature, rng_key):
    x = tl.load(row_ptr + token).to(tl.float32)
    if temperature > 0:
        x = tl.div_rn(x, temperature) + gumbel(rng_key, token)
    return x


@triton.jit
def _mask_dropped(x, ids, temperature, threshold, first_dropped_tie_id):
    """x with -inf for tokens that top-k, top-p and min-p drop: below the threshold, or equal to it from an id on."""
    scaled = tl.div_rn(x, tl.zeros_like(x) + temperature)
    kept = (scaled > threshold) | ((scaled == threshold) & (ids < first_dropped_tie_id))
    return tl.where(kept, x, -float("inf"))


@triton.jit
def sample_gumbel_kernel(
    logits, temperature, rng_keys, thresholds, partial_max, partial_argmax, stride_ls, V, span,
    CHUNK: tl.constexpr, FILTER: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The largest score among `span` tokens of a row, and the lowest id that has it."""
    row, part, lane = tl.program_id(0), tl.program_id(1), tl.arange(0, CHUNK)
    if PDL:
        tl.extra.cuda.gdc_wait()
    row_ptr, begin = logits + row.to(tl.int64) * stride_ls, part * span
    end = tl.minimum(begin + span, V)
    temp, rng_key = tl.load(temperature + row), tl.load(rng_keys + row).to(tl.uint32, bitcast=True)
    folded_key, scale = rng_key ^ (rng_key >> 16), LOG2E / tl.maximum(temp, 1e-37)
    next_x = tl.load(row_ptr + begin + lane, mask=begin + lane < V, other=-float("inf"))
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    best, token = tl.zeros([], tl.float32) - float("inf"), begin
    for start in range(begin, end, CHUNK):
        ids, x = start + lane, next_x.to(tl.float32)
        mask = (start + CHUNK < end) & (ids + CHUNK < V)
        next_x = tl.load(row_ptr + CHUNK + ids, mask=mask, other=-float("inf"))
        bounds = x
        if temp > 0:
            if FILTER:
                threshold = tl.load(thresholds + row * 2).to(tl.float32, bitcast=True)
                x = _mask_dropped(x, ids, temp, threshold, tl.load(thresholds + row * 2 + 1))
            # ids >> 16 is the same for a whole chunk
            bounds = score_upper_bound(x, (ids ^ (start >> 16)).to(tl.uint32), folded_key, scale)
        top = tl.max(bounds, 0)
        while top > skip_threshold(best, temp):
            candidate = tl.min(tl.where(bounds == top, ids, INVALID_ID), 0)
            score = _exact_score(row_ptr, candidate, temp, rng_key)
            token = tl.where((score > best) | ((score == best) & (candidate < token)), candidate, token)
            best = tl.maximum(best, score)
            bounds = tl.where(ids == candidate, -float("inf"), bounds)
            top = tl.max(bounds, 0)
    offs = row * tl.num_programs(1) + part
    tl.store(partial_max + offs, best)
    tl.store(partial_argmax + offs, token)


def sample_gumbel(
    logits: torch.Tensor, temperature: torch.Tensor, rng_keys: torch.Tensor, req_slots: torch.Tensor,
    last_tokens: torch.Tensor, thresholds: torch.Tensor | None = None, chunk: int = CHUNK, num_ctas: int = 0,
    out: torch.Tensor | None = None, *, pdl: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Token ids int32 (S,), in `out` if given. `thresholds` int32 (S, 2) are those of `find_thresholds`; `num_ctas`
    replaces the number that fills the GPU. Raises BackendError for unsupported shapes and dtypes."""
    check(NAME, logits.ndim == 2 and logits.dtype in FLOATS and logits.stride(1) == 1, f"logits {logits.shape}")
    check(NAME, {len(t) for t in (temperature, rng_keys, req_slots)} == {len(logits)}, "not one value per sequence")
    ints = rng_keys.dtype == req_slots.dtype == torch.int32
    check(NAME, temperature.dtype == torch.float32 and ints, f"{temperature.dtype}, {rng_keys.dtype}")
    rows, vocab_size = logits.shape
    chunks, num_ctas = triton.cdiv(vocab_size, chunk), num_ctas or CTAS_PER_SM * num_sms(logits.device)
    span = triton.cdiv(chunks, min(chunks, max(num_ctas // rows, 1))) * chunk
    parts = triton.cdiv(vocab_size, span)
    partial_max = torch.empty(rows, parts, dtype=torch.float32, device=logits.device)
    partial_argmax = torch.empty(rows, parts, dtype=torch.int32, device=logits.device)
    sample_gumbel_kernel[(rows, parts)](
        logits, temperature, rng_keys, rng_keys if thresholds is None else thresholds, partial_max, partial_argmax,
        logits.stride(0), vocab_size, span,
        CHUNK=chunk, FILTER=thresholds is not None, PDL=pdl, num_warps=1, launch_pdl=pdl,
    )  # fmt: skip
    return reduce_argmax(partial_max, partial_argmax, req_slots, last_tokens, vocab_size, out, pdl=pdl)
