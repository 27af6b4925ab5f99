"""Host state of one request."""

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from llmrs.core.options import SamplingParams

PRIORITY_SECONDS = 10.0  # of waiting that make up for one step of priority

_ids = itertools.count()


TokenLogprobs = tuple[int, float, list[int], list[float]]  # a token, its log probability, the likeliest ones and theirs


@dataclass(eq=False)
class Request:
    """A prompt on its way to an answer. Its arrays live in the scheduler's slots while it runs.

    `params` hold a value for everything but `seed` and the stops; `stops` are all token ids that end the answer,
    end-of-sequence included. `on_update(request, tokens)` is called by the thread that steps the engine: with the
    tokens of each commit, and with none when a part of the prompt is computed and when `finish_reason` is set without
    a token. `mask(output)`, where there is one, gives the tokens that may come next, as bits uint32 (ceil(V / 32),),
    the lowest bit first; it is called before each token.
    """

    prompt: Sequence[int]
    params: SamplingParams
    seed: int
    stops: Sequence[int] = ()
    on_update: Callable[["Request", list[int]], None] = lambda request, tokens: None
    mask: Callable[[list[int]], np.ndarray] | None = None
    index: int = 0  # which of the n answers to its prompt
    id: int = field(default_factory=lambda: next(_ids))
    arrival: float = field(default_factory=time.monotonic)

    # written by the engine and its scheduler
    tokens: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))  # known when it (last) began to wait
    max_total_tokens: int = 0  # most tokens of prompt and answer together
    slot: int = -1  # row in the scheduler's arrays, -1 while waiting
    last_block_id: int = 0  # the prefix cache's id of the last full block that is committed
    output: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # of `output`, where asked for
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)  # of the prompt; the first has none
    cached_tokens: int = 0  # prompt tokens that the prefix cache held when the request first ran
    computed_tokens: int = 0  # prompt tokens that are in the KV cache, cached ones included
    finish_reason: str | None = None  # stop | length | cancelled | error
    error: Exception | None = None

    @property
    def sort_key(self) -> float:
        """Who goes first, the lowest: by arrival, which priority shifts, so nobody waits for ever."""
        return self.arrival + PRIORITY_SECONDS * self.params.priority

    # seconds of time.monotonic(), 0 until then
    started: float = 0.0  # first scheduled
    first_token: float = 0.0
    finished: float = 0.0
