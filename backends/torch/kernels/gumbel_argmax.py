"""Sampling that works out few scores: the largest score by an upper bound that costs a tenth of it.

Temperature, Gumbel noise, and the largest score in two stages, without a softmax over the vocabulary. Defined by
`sample` in core/sampling.py. S sequences, V tokens:

    logits (S, V), any row stride, bf16, f16 or f32   temperature float32 (S,), 0: greedy   keys int32 (S,), the
    bits of the uint32 ones   -> tokens int32 (S,), and last[slots[s]] = tokens[s] where slots[s] >= 0

Equal scores: the lowest id. Moved: the logits once. A score is x / T + g, and for the
uniform v that token and key are hashed to, g = -log(-log1p(-v)) is below -log v. So in units of log 2

    bound = x * (log2(e) / T) - chord(v)     is above the score, but for rounding, and near it where v is small,

where chord(v), the bits of v as a float in place of its logarithm, lies below log2(v) by less than 0.09.

A program walks over a part of a row, CHUNK tokens at a time, with the largest score so far. Where a chunk's largest
bound is not above it, less an allowance for rounding, that is all. Else that one token's score is worked out, and so
on with the next largest: among n chunks about log(n) + 1 times, since the largest so far seldom changes. Equal
scores are all worked out, and the lowest id stays.

Instructions for each drawn logit: widened 1, hash 10 (6 logical, 4 multiplications), chord 3, bound 1, maximum 1; with
addresses and masks the compiler makes it 20, which is 26 us for 256 x 151,936 on an H200; reading takes 18. Working out
every score takes 120. Of the hash's six x ^ (x >> n) four are left: the second mix begins with what undoes the end of
the first, and the very last one changes h by less than h / 2^16, which the allowance for rounding covers.
"""

import torch
import triton
import triton.language as tl

from llmrs.backends.torch.kernels.gumbel import NOWHERE, check, gumbel, picked
from llmrs.backends.torch.kernels.launch import chained, multiprocessors

CHUNK = 1024  # tokens: 32 for each thread of a program's one warp, which needs no barrier
PROGRAMS = 16  # on a multiprocessor at once
LOG2E = tl.constexpr(1.4426950408889634)
RELATIVE, ABSOLUTE = tl.constexpr(2.0**-18), tl.constexpr(2.0**-11)  # what rounding may do to a bound, eight times over


@triton.jit
def _middle(x):
    """`mix` of core/sampling.py without its first and last step, x ^ (x >> 16), which undoes itself."""
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    return x * 0x846CA68B


@triton.jit
def _bounds(x, ids, key, scale):
    """Bounds of drawn scores, in units of log 2; key and ids are those after the step x ^ (x >> 16)."""
    h = _middle(_middle(ids) ^ key).to(tl.float32)
    log = h.to(tl.int32, bitcast=True).to(tl.float32) * 2.0**-23 - (127.0 + 32.0)  # of v = h / 2^32
    return x * scale - log


@triton.jit
def _limit(best, warmth):
    """What a bound must be above for its score to be `best` or more. Greedy ones are their own bound."""
    limit = best
    if warmth > 0:
        limit = best * LOG2E - (tl.abs(best) * RELATIVE + ABSOLUTE)
    return limit


@triton.jit
def _score(line, at, warmth, key):
    """The score of one token."""
    x = tl.load(line + at).to(tl.float32)
    if warmth > 0:
        x = tl.div_rn(x, warmth) + gumbel(key, at)
    return x


@triton.jit
def _kept(x, at, warmth, edge, first_out):
    """x with -inf for what top-k, top-p and min-p drop: below the edge, and of its equals those from an id on."""
    q = tl.div_rn(x, tl.zeros_like(x) + warmth)
    return tl.where((q > edge) | ((q == edge) & (at < first_out)), x, -float("inf"))


@triton.jit
def _search(
    logits, temperature, keys, edges, scores, ids, logits_row, V, span,
    CHUNK: tl.constexpr, EDGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The largest score among `span` tokens of a row, and the lowest id that has it."""
    row, part, lane = tl.program_id(0), tl.program_id(1), tl.arange(0, CHUNK)
    if PDL:
        tl.extra.cuda.gdc_wait()
    line, begin = logits + row.to(tl.int64) * logits_row, part * span
    end = tl.minimum(begin + span, V)
    warmth, key = tl.load(temperature + row), tl.load(keys + row).to(tl.uint32, bitcast=True)
    folded, scale = key ^ (key >> 16), LOG2E / tl.maximum(warmth, 1e-37)
    ahead = tl.load(line + begin + lane, mask=begin + lane < V, other=-float("inf"))
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    best, token = tl.zeros([], tl.float32) - float("inf"), begin
    for start in range(begin, end, CHUNK):
        at, x = start + lane, ahead.to(tl.float32)
        ahead = tl.load(line + CHUNK + at, mask=(start + CHUNK < end) & (at + CHUNK < V), other=-float("inf"))
        bounds = x
        if warmth > 0:
            if EDGES:
                x = _kept(x, at, warmth, tl.load(edges + row * 2).to(tl.float32, bitcast=True),
                          tl.load(edges + row * 2 + 1))  # fmt: skip
            bounds = _bounds(x, (at ^ (start >> 16)).to(tl.uint32), folded, scale)  # a chunk's ids >> 16 are one
        most = tl.max(bounds, 0)
        while most > _limit(best, warmth):
            one = tl.min(tl.where(bounds == most, at, NOWHERE), 0)
            score = _score(line, one, warmth, key)
            token = tl.where((score > best) | ((score == best) & (one < token)), one, token)
            best = tl.maximum(best, score)
            bounds = tl.where(at == one, -float("inf"), bounds)
            most = tl.max(bounds, 0)
    to = row * tl.num_programs(1) + part
    tl.store(scores + to, best)
    tl.store(ids + to, token)


def draw(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    keys: torch.Tensor,
    slots: torch.Tensor,
    last: torch.Tensor,
    edges: torch.Tensor | None = None,
    chunk: int = CHUNK,
    programs: int = 0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Token ids int32 (S,), in `out` where it is given. `edges` int32 (S, 2) are those of `find_edges`. `programs`: of
    the chip, for tests."""
    check(logits, temperature, keys, slots)
    rows, vocabulary = logits.shape
    chunks, programs = triton.cdiv(vocabulary, chunk), programs or PROGRAMS * multiprocessors(logits.device)
    span = triton.cdiv(chunks, min(chunks, max(programs // rows, 1))) * chunk
    parts, pdl = triton.cdiv(vocabulary, span), chained(logits.device)
    scores = torch.empty(rows, parts, dtype=torch.float32, device=logits.device)
    ids = torch.empty(rows, parts, dtype=torch.int32, device=logits.device)
    _search[(rows, parts)](
        logits, temperature, keys, keys if edges is None else edges, scores, ids, logits.stride(0), vocabulary, span,
        CHUNK=chunk, EDGES=edges is not None, PDL=pdl, num_warps=1, launch_pdl=pdl,
    )  # fmt: skip
    return picked(scores, ids, slots, last, vocabulary, out)
