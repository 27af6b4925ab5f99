"""What sampling means: the order of the transforms and the noise, in NumPy. Backends compute the same.

    logits / temperature -> top-k -> top-p -> min-p -> argmax(logits + Gumbel noise)

The noise depends on (seed, position, token id) and on nothing else, so neither the rest of the batch nor chunking
nor preemption changes what a seed draws. Temperature 0 is argmax without noise; of equal logits the lowest id wins.
"""

from dataclasses import dataclass, fields

import numpy as np


@dataclass
class SamplingArrays:
    """The sampling parameters of S sequences, (S,) each."""

    temperature: np.ndarray  # float32, 0: greedy
    top_k: np.ndarray  # int32, 0: all
    top_p: np.ndarray  # float32, 1: all
    min_p: np.ndarray  # float32, 0: all
    key: np.ndarray  # uint32: seed and position, mixed by noise_keys

    @staticmethod
    def zeros(count: int) -> "SamplingArrays":
        types = (np.float32, np.int32, np.float32, np.float32, np.uint32)
        return SamplingArrays(*(np.zeros(count, t) for t in types))

    def take(self, rows: np.ndarray) -> "SamplingArrays":
        return SamplingArrays(*(getattr(self, f.name)[rows] for f in fields(self)))


def mix(x: np.ndarray) -> np.ndarray:
    """A bijection on uint32 whose output bits each depend on all input bits.

    Source: "lowbias32" of C. Wellons' hash prospector (public domain).
    """
    x = x ^ (x >> np.uint32(16))
    x = x * np.uint32(0x7FEB352D)
    x = x ^ (x >> np.uint32(15))
    x = x * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def noise_keys(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """uint32 (S,) from seeds uint32 (S, 2), low half first, and the positions (S,) of the tokens to be drawn."""
    return mix(mix(mix(seeds[:, 0]) ^ seeds[:, 1]) ^ positions.astype(np.uint32))


def gumbel(keys: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Gumbel noise float32 (S, V) for keys uint32 (S,) and token ids (V,).

    h is uniform on 32 bits; v = (h + 0.5) / 2^32 keeps its full precision near 0, where the large values come
    from. Near 1 float32 would round v to 1 and the noise to -inf, so v stops one step short of it.
    """
    h = mix(mix(tokens.astype(np.uint32))[None, :] ^ keys[:, None])
    v = np.minimum((h.astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32), np.float32(1 - 2.0**-24))
    return -np.log(-np.log1p(-v))


def sample(logits: np.ndarray, params: SamplingArrays) -> np.ndarray:
    """Token ids int32 (S,) from logits float32 (S, V)."""
    tokens = np.argmax(logits, axis=-1).astype(np.int32)
    for s in np.flatnonzero(params.temperature > 0):
        kept = keep(logits[s] / params.temperature[s], params.top_k[s], params.top_p[s], params.min_p[s])
        scores = kept + gumbel(params.key[s : s + 1], np.arange(len(kept)))[0]
        tokens[s] = np.argmax(scores)
    return tokens


def keep(logits: np.ndarray, top_k: int, top_p: float, min_p: float) -> np.ndarray:
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
