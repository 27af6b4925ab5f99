"""The contract between core and backends: the arrays of one step, and the slots that they are made from."""

from dataclasses import dataclass

import numpy as np

from llmrs.core.sampling import SamplingArrays, noise_keys

MAX_STOPS = 32  # token ids that end one request's answer


@dataclass(frozen=True)
class Batch:
    """One step: T tokens of S sequences, each sequence's tokens in a row. All arrays belong to the backend.

    The device holds the last token of every slot, because the host may not have read it yet when it schedules:
    a negative entry in `tokens`, -1 - slot, stands for it. After the step the token sampled for sequence s becomes
    slots[s]'s last token where `sampled[s]`; elsewhere (a part of a prompt) it means nothing.
    """

    tokens: np.ndarray  # int32 (T,): token id, or -1 - slot
    positions: np.ndarray  # int32 (T,): position in its own sequence
    starts: np.ndarray  # int32 (S + 1,): sequence s has the tokens starts[s] .. starts[s + 1] - 1
    lengths: np.ndarray  # int32 (S,): tokens in the KV cache after this step
    blocks: np.ndarray  # int32 (S, B): block of position p is blocks[s, p // block_size]; padded with 0
    slots: np.ndarray  # int32 (S,)
    sampled: np.ndarray  # bool (S,)
    sampling: SamplingArrays  # (S,) each


class Slots:
    """Arrays with one row per running request, updated by difference from step to step.

    The scheduler writes them; `batch` reads them. `length` counts the tokens that the host knows, `pending` those
    that are sampled but not read yet, `computed` those whose KV is stored once the steps launched so far are done.
    """

    def __init__(self, count: int, max_tokens: int, max_blocks: int) -> None:
        self.tokens = np.zeros((count, max_tokens), np.int32)
        self.blocks = np.zeros((count, max_blocks), np.int32)
        self.stops = np.full((count, MAX_STOPS), -1, np.int32)
        self.block_count, self.length, self.pending, self.computed, self.limit, self.hashed = np.zeros(
            (6, count), np.int32
        )
        self.owner = np.full(count, -1, np.int64)  # number of the admission that holds the row, -1: nobody
        self.sampling = SamplingArrays.zeros(count)
        self.seed = np.zeros((count, 2), np.uint32)  # low and high half

    def batch(self, slots: np.ndarray, counts: np.ndarray) -> Batch:
        """The step that feeds the next counts[s] >= 1 tokens of each slot; `computed` and `pending` move on."""
        begin = self.computed[slots]
        end = begin + counts
        known = self.length[slots]
        sampled = end == known + self.pending[slots]
        starts = np.zeros(len(slots) + 1, np.int32)
        np.cumsum(counts, out=starts[1:])
        row = np.repeat(np.arange(len(slots), dtype=np.int32), counts)
        positions = (np.arange(starts[-1], dtype=np.int32) - starts[row] + begin[row]).astype(np.int32)
        tokens = np.where(positions < known[row], self.tokens[slots[row], positions], -1 - slots[row])
        self.computed[slots] = end
        self.pending[slots] += sampled
        width = int(self.block_count[slots].max())
        sampling = self.sampling.take(slots)
        sampling.key = noise_keys(self.seed[slots], end)
        return Batch(
            tokens.astype(np.int32), positions, starts, end, self.blocks[slots, :width], slots, sampled, sampling
        )
