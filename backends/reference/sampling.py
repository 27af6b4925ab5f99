"""Sampling in NumPy: the definition that every backend is tested against. Order and noise: `core/sampling.py`."""

import numpy as np

from llmrs.core.sampling import Logprobs, SamplingArrays, hash32


def gumbel(keys: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Gumbel noise float32 (S, V) for keys uint32 (S,) and token ids (V,).

    h is uniform on 32 bits; v = (h + 0.5) / 2^32 keeps its full precision near 0, where the large values come
    from. Near 1 float32 would round v to 1 and the noise to -inf, so v stops one step short of it.
    """
    h = hash32(hash32(tokens.astype(np.uint32))[None, :] ^ keys[:, None])
    v = np.minimum((h.astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32), np.float32(1 - 2.0**-24))
    return -np.log(-np.log1p(-v))


def apply_penalties(logits: np.ndarray, tokens: np.ndarray, params: SamplingArrays, row: int) -> np.ndarray:
    """Logits float32 (V,) after the penalties of row `row`, for the tokens int32 (n,) of prompt and answer so far.

    Repetition divides positive logits and multiplies negative ones (CTRL, arXiv 1909.05858), for the tokens of
    prompt and answer; presence and frequency are OpenAI's, and count the answer's only.
    """
    factor = np.where(np.bincount(tokens, minlength=len(logits)) > 0, params.repetition_penalty[row], np.float32(1))
    counts = np.bincount(tokens[params.prompt_len[row] :], minlength=len(logits)).astype(np.float32)
    logits = np.where(logits > 0, logits / factor, logits * factor)
    return logits - params.frequency_penalty[row] * counts - params.presence_penalty[row] * (counts > 0)


def sample(logits: np.ndarray, params: SamplingArrays) -> np.ndarray:
    """Token ids int32 (S,) from adjusted logits float32 (S, V)."""
    tokens = np.argmax(logits, axis=-1).astype(np.int32)
    for s in np.flatnonzero(params.temperature > 0):
        kept = filter_logits(logits[s] / params.temperature[s], params.top_k[s], params.top_p[s], params.min_p[s])
        scores = kept + gumbel(params.rng_key[s : s + 1], np.arange(len(kept)))[0]
        tokens[s] = np.argmax(scores)
    return tokens


def logprobs(logits: np.ndarray, tokens: np.ndarray, count: int) -> Logprobs:
    """Of the tokens int32 (R,) that came, and the `count` likeliest, from unadjusted logits float32 (R, V)."""
    wide = logits - logits.max(axis=-1, keepdims=True)
    wide = wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    top = np.argsort(-wide, axis=-1, kind="stable")[:, :count]
    chosen = np.take_along_axis(wide, tokens[:, None], axis=-1)[:, 0]
    return Logprobs(chosen, top.astype(np.int32), np.take_along_axis(wide, top, axis=-1))


def filter_logits(logits: np.ndarray, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """Logits float32 (V,) with -inf for what top-k, top-p and min-p drop; the likeliest token always stays.

    top-p keeps the shortest run of the likeliest tokens whose probability, after top-k, reaches top_p; min-p keeps
    tokens of at least min_p times the largest probability. Of equal logits the lower id is the likelier.
    """
    order = np.argsort(-logits, kind="stable")
    if top_k:
        order = order[:top_k]
    weights = np.exp(logits[order] - logits[order[0]], dtype=np.float32)
    before = np.cumsum(weights, dtype=np.float32) - weights  # probability of what is likelier, unnormalized
    good = (before < np.float32(top_p) * weights.sum()) & (weights >= np.float32(min_p))
    good[0] = True
    kept = np.full_like(logits, -np.inf)
    kept[order[good]] = logits[order[good]]
    return kept
