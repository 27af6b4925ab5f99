"""Host state of one request, and what goes in and comes out of an engine."""

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from llmrs.core.config import SamplingParams

_ids = itertools.count()


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; `role` is what the chat template knows: system, user, assistant, tool."""

    role: str
    content: str


@dataclass(eq=False)
class Request:
    """A prompt on its way to an answer. Its arrays live in the scheduler's slots while it runs.

    `params` hold a value for everything but `seed` and the stops; `stops` are all token ids that end the answer,
    end-of-sequence included. `on_update(request, tokens)` is called by the thread that steps the engine: with the
    tokens of each commit, and once with no tokens when `finish_reason` is set without one.
    """

    prompt: Sequence[int]
    params: SamplingParams
    seed: int
    stops: Sequence[int] = ()
    on_update: Callable[["Request", list[int]], None] = lambda request, tokens: None
    id: int = field(default_factory=lambda: next(_ids))
    arrival: float = field(default_factory=time.monotonic)

    # written by the engine and its scheduler
    tokens: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))  # known when it (last) began to wait
    limit: int = 0  # most tokens of prompt and answer together
    slot: int = -1  # row in the scheduler's arrays, -1 while waiting
    chain: int = 0  # the prefix cache's id of the last full block that is committed
    output: list[int] = field(default_factory=list)
    cached_tokens: int = 0  # prompt tokens that the prefix cache held when the request first ran
    finish_reason: str | None = None  # stop | length | cancelled | error
    error: Exception | None = None

    # seconds of time.monotonic(), 0 until then
    started: float = 0.0  # first scheduled
    first_token: float = 0.0
    finished: float = 0.0


@dataclass(frozen=True)
class GenerationOutput:
    """The answer to one request. Times are seconds: `prompt_time` until the first token, `decode_time` after it."""

    seq_id: int
    text: str
    token_ids: list[int]
    finish_reason: str  # stop | length | cancelled | error
    prompt_length: int
    decoded_length: int
    cached_tokens: int
    queue_time: float
    prompt_time: float
    decode_time: float
