"""Where top-k, top-p and min-p cut each row of logits, found without a sort.

Defined by `keep` in core/sampling.py: of the tokens in order of falling logits (equal ones by id) the first m stay.
So there is a lowest logit that stays, the edge, and an id before which the tokens of that very logit do.

    logits (S, V), any row stride   temperature, top_p, min_p float32 (S,)   top_k int32 (S,)
    -> edges int32 (S, 2): the bits of the edge (of logits / temperature, float32), and the first id that goes

A program does a row. Float32 values are mapped to int32 keys in the same order, and a bracket around the edge's key is
cut in four with each pass over the row: how many tokens, or how much probability, lie above each cut? By count for
top-k, then by probability for top-p among what top-k left. A search ends early when one value is left in the bracket,
or when exactly k tokens are above it. Moved: the row once, then from the caches about ten times for each search.
"""

import torch
import triton
import triton.language as tl

from llmrs.backends.torch.kernels.launch import FLOATS, chained, require

NAME = "edges"
PART = 4096
LOWEST = tl.constexpr(-(2**31))  # below every key
HIGHEST = tl.constexpr(2**31 - 1)
MINUS_INF = tl.constexpr(-2139095041)  # the key of -inf


@triton.jit
def _key(x):
    """int32 keys in the order of float32 values, 0 for both zeros."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _part(row, begin, warmth, V, PART: tl.constexpr):
    """Values, keys (LOWEST beyond the end) and ids of a part of the row."""
    at = begin + tl.arange(0, PART)
    x = tl.load(row + at, mask=at < V, other=-float("inf")).to(tl.float32)
    x = tl.div_rn(x, tl.zeros_like(x) + warmth)
    return x, tl.where(at < V, _key(x), LOWEST), at


@triton.jit
def _above(row, warmth, top, key, V, PART: tl.constexpr):
    """Tokens above a key, their weights exp(x - top), and tokens at the key."""
    count, weight, equal = tl.zeros([PART], tl.int32), tl.zeros([PART], tl.float32), tl.zeros([PART], tl.int32)
    for begin in range(0, V, PART):
        x, keys, _ = _part(row, begin, warmth, V, PART)
        count += (keys > key).to(tl.int32)
        weight += tl.where(keys > key, tl.exp(x - top), 0.0)
        equal += (keys == key).to(tl.int32)
    return tl.sum(count, 0), tl.sum(weight, 0), tl.sum(equal, 0)


@triton.jit
def _search(row, warmth, top, floor, wanted, V, COUNT: tl.constexpr, PART: tl.constexpr):
    """The largest key, `floor` or above, that tokens (COUNT), or weights, of as much as is wanted reach.

    By count it may also be one between two tokens, where exactly as many are above.
    """
    low, high = floor.to(tl.int64), _key(top).to(tl.int64) + 1
    first = tl.maximum(_key(top - 20.0), low).to(tl.int64)  # the edge is near the top, mostly
    second = tl.maximum(_key(top - 8.0), low).to(tl.int64)
    third = tl.maximum(_key(top - 3.0), low).to(tl.int64)
    while high - low > 1:
        sum1, sum2, sum3 = tl.zeros([PART], tl.float32), tl.zeros([PART], tl.float32), tl.zeros([PART], tl.float32)
        least, most = tl.full([PART], HIGHEST, tl.int32), tl.full([PART], LOWEST, tl.int32)
        for begin in range(0, V, PART):
            x, keys, _ = _part(row, begin, warmth, V, PART)
            weight = tl.where(keys >= floor, 1.0, 0.0) if COUNT else tl.where(keys >= floor, tl.exp(x - top), 0.0)
            sum1 += tl.where(keys >= first, weight, 0.0)
            sum2 += tl.where(keys >= second, weight, 0.0)
            sum3 += tl.where(keys >= third, weight, 0.0)
            inside = (keys >= low) & (keys < high)
            least = tl.minimum(least, tl.where(inside, keys, HIGHEST))
            most = tl.maximum(most, tl.where(inside, keys, LOWEST))
        one, all1, all2, all3 = tl.min(least, 0).to(tl.int64), tl.sum(sum1, 0), tl.sum(sum2, 0), tl.sum(sum3, 0)
        if one == tl.max(most, 0):  # one value is left
            low, high = one, one + 1
        else:
            high = tl.where(all3 < wanted, third, high)
            high = tl.where(all2 < wanted, second, high)
            high = tl.where(all1 < wanted, first, high)
            low = tl.where(all1 >= wanted, first, low)
            low = tl.where(all2 >= wanted, second, low)
            low = tl.where(all3 >= wanted, third, low)
            reached = tl.where(all3 >= wanted, all3, tl.where(all2 >= wanted, all2, all1))
            if COUNT:
                high = tl.where(reached == wanted, low + 1, high)  # exactly as many are above
        first, second, third = low + (high - low) // 4, low + (high - low) // 2, low + (high - low) * 3 // 4
    return low.to(tl.int32)


@triton.jit
def _least_likely(row, warmth, top, min_p, V, PART: tl.constexpr):
    """The lowest key whose weight is min_p or more."""
    least = tl.full([PART], HIGHEST, tl.int32)
    for begin in range(0, V, PART):
        x, keys, _ = _part(row, begin, warmth, V, PART)
        least = tl.minimum(least, tl.where((tl.exp(x - top) >= min_p) & (keys > LOWEST), keys, HIGHEST))
    return tl.min(least, 0)


@triton.jit
def _id_after(row, warmth, key, count, V, PART: tl.constexpr):
    """The id behind the first `count` tokens at a key."""
    seen, after = tl.zeros([], tl.int32), tl.zeros([], tl.int32)
    for begin in range(0, V, PART):
        _, keys, at = _part(row, begin, warmth, V, PART)
        equal = (keys == key).to(tl.int32)
        mine = (equal == 1) & (seen + tl.cumsum(equal, 0) <= count)
        after = tl.maximum(after, tl.max(tl.where(mine, at + 1, 0), 0))
        seen += tl.sum(equal, 0)
    return after


@triton.jit
def _edges(logits, temperature, top_k, top_p, min_p, edges, logits_row, V, PART: tl.constexpr, PDL: tl.constexpr):
    s = tl.program_id(0)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row, warmth = logits + s.to(tl.int64) * logits_row, tl.load(temperature + s)
    k, p, least = tl.load(top_k + s), tl.load(top_p + s), tl.load(min_p + s)
    k = tl.where((k <= 0) | (k > V), V, k)
    tl.store(edges + s * 2, (tl.zeros([], tl.float32) - float("inf")).to(tl.int32, bitcast=True))
    tl.store(edges + s * 2 + 1, V)
    if (warmth <= 0) | ((k == V) & (p >= 1) & (least <= 0)):
        return
    best = tl.full([PART], -float("inf"), tl.float32)
    for begin in range(0, V, PART):
        x, _, _ = _part(row, begin, warmth, V, PART)
        best = tl.maximum(best, x)
    top = tl.max(best, 0)
    if top == -float("inf"):
        return

    # top-k: the edge, and how many of its equals are left
    edge, room = tl.zeros([], tl.int32) + MINUS_INF, tl.zeros([], tl.int32) + V
    if k < V:
        edge = _search(row, warmth, top, edge, k.to(tl.float32), V, True, PART)
    above, weight, equal = _above(row, warmth, top, edge, V, PART)
    room = tl.minimum(k - above, equal)

    # top-p, of the weight of what top-k left
    if p < 1:
        wanted = p * (weight + room * tl.exp(_value(edge) - top))
        likely = _search(row, warmth, top, edge, wanted, V, False, PART)
        above, weight, equal = _above(row, warmth, top, likely, V, PART)
        each = tl.exp(_value(likely) - top)
        some = tl.maximum(tl.ceil(tl.div_rn(wanted - weight, each)), 1.0)
        some = tl.minimum(some, 16777216.0).to(tl.int32)
        room = tl.where(likely == edge, tl.minimum(some, room), tl.minimum(some, equal))
        edge = likely

    # min-p
    if least > 0:
        lowest = _least_likely(row, warmth, top, least, V, PART)
        equal = tl.where(lowest > edge, 0, equal)
        room = tl.where(lowest > edge, 0, room)
        edge = tl.maximum(edge, lowest)
    tl.store(edges + s * 2, _value(edge).to(tl.int32, bitcast=True))
    if room < equal:
        tl.store(edges + s * 2 + 1, _id_after(row, warmth, edge, room, V, PART))


@triton.jit
def _value(key):
    """The float32 of a key."""
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


def find_edges(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    part: int = PART,
) -> torch.Tensor:
    """int32 (S, 2); the module says what is what. Raises BackendError for shapes and types that it can't do."""
    require(NAME, logits.ndim == 2 and logits.dtype in FLOATS and logits.stride(1) == 1, f"logits {logits.shape}")
    rows, vocabulary = logits.shape
    require(NAME, {len(t) for t in (temperature, top_k, top_p, min_p)} == {rows}, "one value a sequence")
    require(NAME, vocabulary < 2**24, "counts are exact in float32")
    require(NAME, temperature.dtype == top_p.dtype == min_p.dtype == torch.float32, "types")
    require(NAME, top_k.dtype == torch.int32, "types")
    edges = torch.empty(rows, 2, dtype=torch.int32, device=logits.device)
    pdl = chained(logits.device)
    _edges[(rows,)](
        logits, temperature, top_k, top_p, min_p, edges, logits.stride(0), vocabulary,
        PART=part, PDL=pdl, num_warps=8, launch_pdl=pdl,
    )  # fmt: skip
    return edges
