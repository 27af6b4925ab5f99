"""Host state of one request."""

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from llmrs.core.options import SamplingParams

PRIORITY_SECONDS = 10.0  # of waiting that outweigh one level of priority

_ids = itertools.count()


TokenLogprobs = tuple[int, float, list[int], list[float]]  # token, its log probability, likeliest tokens, theirs


@dataclass(eq=False)
class Request:
    """A prompt and its output so far. While it runs, its arrays live in the scheduler's slots.

    `params` are complete except `seed` and the stops; `stops` are all token ids that end the output, EOS included.
    `on_update(request, tokens)` is called on the engine's thread: with the tokens of each commit, and with none after a
    prefill chunk and when `finish_reason` is set without a token. `mask(output)` gives the tokens that may come next,
    as bits uint32 (ceil(V / 32),), the lowest bit first; it is called before each token.
    """

    prompt: Sequence[int]
    params: SamplingParams
    seed: int
    stops: Sequence[int] = ()
    on_update: Callable[["Request", list[int]], None] = lambda request, tokens: None
    mask: Callable[[list[int]], np.ndarray] | None = None
    index: int = 0  # which of the n outputs of its prompt
    id: int = field(default_factory=lambda: next(_ids))
    arrival: float = field(default_factory=time.monotonic)

    # written by the engine and its scheduler
    tokens: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))  # known when it was last queued
    max_total_tokens: int = 0  # of prompt and output
    slot: int = -1  # row in the scheduler's arrays, -1 while waiting
    last_block_id: int = 0  # of its last full, committed block in the prefix cache
    output: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # of `output`, if requested
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)  # of the prompt; the first token has none
    cached_tokens: int = 0  # prompt tokens found in the prefix cache at the first admission
    computed_tokens: int = 0  # prompt tokens in the KV cache, cached ones included
    finish_reason: str | None = None  # stop | length | cancelled | error
    error: Exception | None = None

    @property
    def sort_key(self) -> float:
        """The lowest is scheduled first: arrival, shifted by priority, so that no request starves."""
        return self.arrival + PRIORITY_SECONDS * self.params.priority

    # seconds of time.monotonic(), 0 until then
    started: float = 0.0  # first scheduled
    first_token: float = 0.0
    finished: float = 0.0
