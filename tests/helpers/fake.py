"""A backend without a model, for the tests of the core.

It checks each batch, and its next token hashes the whole sequence, so that any wrong input changes the output.
"""

import numpy as np

from llmrs.core.batch import Batch


def next_token(sequence, vocabulary):
    """The fake model's next token of a sequence."""
    value = 17
    for token in sequence:
        value = (value * 31 + token + 1) % 1_000_003
    return value % vocabulary


def first_permitted(token, vocabulary, permits):
    """The token, or the next permitted one."""
    return next(t % vocabulary for t in range(token, token + vocabulary) if permits(t % vocabulary))


class FakeTicket:
    def __init__(self, backend, tokens):
        self.backend, self.result = backend, tokens

    def tokens(self):
        self.backend.unread -= 1
        return self.result

    def logprobs(self):
        return None


class FakeBackend:
    """Its KV cache holds (token, position) in each slot; attention reads the whole sequence back."""

    step_tokens = 16

    def __init__(self, blocks, block_size, slots, vocabulary=50, max_in_flight=1):
        self.cells = np.full((blocks, block_size, 2), -1, np.int64)
        self.last_token = np.full(slots, -1, np.int64)
        self.block_size, self.vocabulary, self.max_in_flight = block_size, vocabulary, max_in_flight
        self.unread = 0
        self.steps: list[Batch] = []
        self.fail_at: int | None = None

    def launch(self, batch):
        return self.sample(self.forward(batch), batch, None)

    def forward(self, batch):
        """The sequences, in place of logits."""
        self.steps.append(batch)
        if self.fail_at == len(self.steps):
            self.unread = 0  # lost steps are not read
            raise RuntimeError("the device caught fire")
        tokens = np.where(batch.input_ids >= 0, batch.input_ids, self.last_token[-1 - np.minimum(batch.input_ids, -1)])
        assert len(batch.input_ids) == len(batch.positions) == batch.query_start_loc[-1]
        assert len(set(batch.req_slots.tolist())) == len(batch.req_slots)
        return [self._sequence(batch, tokens, s) for s in range(len(batch.req_slots))]

    def sample(self, logits, batch, mask):
        result = np.array([self._chosen(logits[s], batch, mask, s) for s in range(len(batch.req_slots))], np.int32)
        self.last_token[batch.req_slots[batch.do_sample]] = result[batch.do_sample]
        self.unread += 1
        assert self.unread <= self.max_in_flight
        return FakeTicket(self, result)

    def _sequence(self, batch, tokens, s):
        rows = slice(batch.query_start_loc[s], batch.query_start_loc[s + 1])
        positions, length = batch.positions[rows], batch.seq_lens[s]
        assert positions[-1] == length - 1
        assert (np.diff(positions) == 1).all()
        blocks = batch.block_tables[s, positions // self.block_size]
        self.cells[blocks, positions % self.block_size] = np.stack([tokens[rows], positions], axis=1)
        every = np.arange(length)
        held = self.cells[batch.block_tables[s, every // self.block_size], every % self.block_size]
        assert (held[:, 1] == every).all(), "a block holds another sequence's positions"
        return held[:, 0].tolist()

    @staticmethod
    def permits(token, banned, mask):
        """Whether a token may be sampled: not banned, and its bit set in the mask, if any."""
        return token not in banned and (mask is None or bool(mask[token // 32] >> np.uint32(token % 32) & 1))

    def _chosen(self, sequence, batch, mask, s):
        """The first permitted token from the fake model's own on."""
        token = next_token(sequence, self.vocabulary)
        banned = set() if batch.banned_ids is None else set(batch.banned_ids[s].tolist())
        return first_permitted(
            token, self.vocabulary, lambda t: self.permits(t, banned, None if mask is None else mask[s])
        )
