"""Sampling: the order of the logits processors, and the keys of the noise. `backends/reference/sampling.py` defines the
rest in NumPy; every backend computes the same.

    logits -> penalties -> bias -> banned and masked out -> / temperature -> top-k -> top-p -> min-p
           -> argmax(logits + Gumbel noise)

The noise depends on (seed, position, token id) only, so that neither the rest of the batch nor chunking nor preemption
changes the tokens of a seed. Temperature 0 is argmax without noise; of equal logits the lowest id wins. Log
probabilities are those of the unprocessed logits.

    seed_key = hash32(hash32(low + SEED) ^ high)                        per request, on the host
    noise_key = hash32(seed_key ^ hash32(position + POSITION)) ^ TOKEN  per token, on the host
    h = hash32(hash32(token) ^ noise_key)                               per logit, on the device

Without the constants the stages would cancel: h is 0, the largest noise, wherever token id = seed_key ^ position.
"""

from dataclasses import dataclass, fields

import numpy as np

from llmrs.core.options import SamplingParams

GREEDY_BELOW = 1e-5  # temperatures: float32 logits divided by less may overflow
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
    prompt_len: np.ndarray  # int32: prompt tokens; the rest is output
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
        """bool: which sequences have a penalty, and so need their tokens so far."""
        penalty = (self.presence_penalty[row] != 0) | (self.frequency_penalty[row] != 0)
        return penalty | (self.repetition_penalty[row] != 1)


@dataclass(frozen=True)
class Logprobs:
    """Log probabilities of R rows: of the sampled token, and of the k likeliest, in order."""

    chosen: np.ndarray  # float32 (R,)
    top_ids: np.ndarray  # int32 (R, k)
    top: np.ndarray  # float32 (R, k)


def hash32(x: np.ndarray) -> np.ndarray:
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
    return hash32(hash32(low + SEED) ^ high)[0]


def noise_keys(keys: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """uint32 (S,) from the seeds' keys uint32 (S,) and the positions (S,) of the tokens to be drawn."""
    return hash32(keys ^ hash32(positions.astype(np.uint32) + POSITION)) ^ TOKEN
