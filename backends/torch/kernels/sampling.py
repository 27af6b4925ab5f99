"""Sampling without a softmax over the vocabulary: temperature, Gumbel noise, and the largest score in two stages.

Defined by `sample` in core/sampling.py. S sequences, V tokens, P parts of the vocabulary:

    logits (S, V), any row stride, bf16, f16 or f32   temperature float32 (S,), 0: greedy   keys int32 (S,), the
    bits of the uint32 ones   -> tokens int32 (S,), and last[slots[s]] = tokens[s] where slots[s] >= 0

Equal scores: the lowest id. The noise is the hash of (key, token id) that core/sampling.py has, bit by bit. Its
inner logarithm is a series, since the GPU's fast one is off by too much near 1, where the large values come from.
Moved: the logits once. About 40 operations for each drawn one.
"""

import torch
import triton
import triton.language as tl

from llmrs.backends.torch.kernels.launch import FLOATS, chained, power, require

NAME = "sampling"
NOWHERE = tl.constexpr(2**31 - 1)
FEW = 16  # sequences from which on each has less to be split over the chip


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
def _score(
    logits, temperature, keys, edges, scores, ids, logits_row, V,
    PART: tl.constexpr, EDGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The largest score of a part, and the lowest id that has it."""
    row, part = tl.program_id(0), tl.program_id(1)
    at = part * PART + tl.arange(0, PART)
    if PDL:
        tl.extra.cuda.gdc_wait()
    x = tl.load(logits + row.to(tl.int64) * logits_row + at, mask=at < V, other=-float("inf")).to(tl.float32)
    warmth = tl.load(temperature + row)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    if warmth > 0:
        x = tl.div_rn(x, tl.zeros_like(x) + warmth)
        if EDGES:  # what top-k, top-p and min-p drop: what is below the edge, and of its equals those from an id on
            edge = tl.load(edges + row * 2).to(tl.float32, bitcast=True)
            x = tl.where((x > edge) | ((x == edge) & (at < tl.load(edges + row * 2 + 1))), x, -float("inf"))
        x += gumbel(tl.load(keys + row).to(tl.uint32, bitcast=True), at)
        x = tl.where(at < V, x, -float("inf"))
    best = tl.max(x, 0)
    to = row * tl.num_programs(1) + part
    tl.store(scores + to, best)
    tl.store(ids + to, tl.min(tl.where(x == best, at, NOWHERE), 0))


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


def parted(rows: int) -> int:
    """Elements of a program: few where there are few rows, so that every multiprocessor has some."""
    return 1024 if rows < FEW else 4096


def draw(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    keys: torch.Tensor,
    slots: torch.Tensor,
    last: torch.Tensor,
    edges: torch.Tensor | None = None,
    part: int = 0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Token ids int32 (S,), in `out` where it is given; the module says what is what. `edges` int32 (S, 2) are those
    of `edges.find`."""
    check(logits, temperature, keys, slots)
    rows, vocabulary = logits.shape
    part = part or parted(rows)
    parts, pdl = triton.cdiv(vocabulary, part), chained(logits.device)
    scores = torch.empty(rows, parts, dtype=torch.float32, device=logits.device)
    ids = torch.empty(rows, parts, dtype=torch.int32, device=logits.device)
    given = keys if edges is None else edges
    _score[(rows, parts)](
        logits, temperature, keys, given, scores, ids, logits.stride(0), vocabulary,
        PART=part, EDGES=edges is not None, PDL=pdl, num_warps=4, launch_pdl=pdl,
    )  # fmt: skip
    return picked(scores, ids, slots, last, vocabulary, out)


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
