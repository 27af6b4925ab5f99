"""What sampling means: the order of the transforms and the noise, in NumPy. Backends compute the same.

    logits -> penalties -> bias -> banned and masked out -> / temperature -> top-k -> top-p -> min-p
           -> argmax(logits + Gumbel noise)

The noise depends on (seed, position, token id) and on nothing else, so neither the rest of the batch nor chunking
nor preemption changes what a seed draws. Temperature 0 is argmax without noise; of equal logits the lowest id wins.
Log probabilities are those of the model: of the logits before any of this.

    seed_key = mix(mix(low + SEED) ^ high)              once a request, on the host
    noise_key = mix(seed_key ^ mix(position + POSITION)) ^ TOKEN    once a token, on the host
    h = mix(mix(token) ^ noise_key)                     once a logit, on the device

Without the constants the stages are the same function of seed, position and token, and cancel: h was 0, the largest
noise, wherever token id = seed_key ^ position, so such a seed drew ids that count up with the position.
"""

from dataclasses import dataclass, fields

import numpy as np

from llmrs.core.config import SamplingParams

GREEDY_BELOW = 1e-5  # of a temperature: float32 logits divided by less may overflow
SEED, POSITION, TOKEN = np.array([0x9E3779B9, 0xB5297A4D, 0x68E31DA5], np.uint32)  # odd, without a pattern


@dataclass
class SamplingArrays:
    """The sampling parameters of S sequences, (S,) each."""

    temperature: np.ndarray  # float32, 0: greedy, else at least GREEDY_BELOW
    top_k: np.ndarray  # int32, 0: all
    top_p: np.ndarray  # float32, 1: all
    min_p: np.ndarray  # float32, 0: all
    repetition_penalty: np.ndarray  # float32, 1: none
    presence_penalty: np.ndarray  # float32, 0: none
    frequency_penalty: np.ndarray  # float32, 0: none
    prompt_len: np.ndarray  # int32: tokens of the prompt; those that follow are the answer's
    rng_key: np.ndarray  # uint32: seed_key, in a step noise_keys

    @staticmethod
    def zeros(count: int) -> "SamplingArrays":
        """Neutral parameters."""
        types = (np.float32, np.int32, *[np.float32] * 5, np.int32, np.uint32)
        arrays = SamplingArrays(*(np.zeros(count, t) for t in types))
        arrays.top_p[:] = arrays.repetition_penalty[:] = 1
        return arrays

    def write(self, row: int, params: SamplingParams, prompt: int, seed: int) -> None:
        for f in fields(self)[:7]:
            getattr(self, f.name)[row] = getattr(params, f.name)
        if self.temperature[row] < GREEDY_BELOW:
            self.temperature[row] = 0
        self.prompt_len[row], self.rng_key[row] = prompt, seed_key(seed)

    def take(self, rows: np.ndarray) -> "SamplingArrays":
        return SamplingArrays(*(getattr(self, f.name)[rows] for f in fields(self)))

    def needs_history(self, row: int | slice = slice(None)) -> np.ndarray:
        """bool: whose sampling depends on the tokens so far."""
        penalty = (self.presence_penalty[row] != 0) | (self.frequency_penalty[row] != 0)
        return penalty | (self.repetition_penalty[row] != 1)


@dataclass(frozen=True)
class Logprobs:
    """Log probabilities of R rows: of the token that came, and of the k likeliest, in order."""

    chosen: np.ndarray  # float32 (R,)
    top_ids: np.ndarray  # int32 (R, k)
    top: np.ndarray  # float32 (R, k)


def mix(x: np.ndarray) -> np.ndarray:
    """A bijection on uint32 whose output bits each depend on all input bits.

    Source: "lowbias32" of C. Wellons' hash prospector (public domain).
    """
    x = x ^ (x >> np.uint32(16))
    x = x * np.uint32(0x7FEB352D)
    x = x ^ (x >> np.uint32(15))
    x = x * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def seed_key(seed: int) -> np.uint32:
    """A seed of 64 bits in 32."""
    low, high = np.array([[seed & 0xFFFFFFFF], [seed >> 32]], np.uint32)
    return mix(mix(low + SEED) ^ high)[0]


def noise_keys(keys: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """uint32 (S,) from the seeds' keys uint32 (S,) and the positions (S,) of the tokens to be drawn."""
    return mix(keys ^ mix(positions.astype(np.uint32) + POSITION)) ^ TOKEN


def gumbel(keys: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Gumbel noise float32 (S, V) for keys uint32 (S,) and token ids (V,).

    h is uniform on 32 bits; v = (h + 0.5) / 2^32 keeps its full precision near 0, where the large values come
    from. Near 1 float32 would round v to 1 and the noise to -inf, so v stops one step short of it.
    """
    h = mix(mix(tokens.astype(np.uint32))[None, :] ^ keys[:, None])
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
        kept = keep(logits[s] / params.temperature[s], params.top_k[s], params.top_p[s], params.min_p[s])
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
