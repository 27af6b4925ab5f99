"""Results of requests."""

from dataclasses import dataclass

from llmrs.core.request import TokenLogprobs


@dataclass(frozen=True)
class TokenLogprob:
    """A token's log probability, and the top alternatives as (token id, logprob)."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]

    @staticmethod
    def of(logprobs: TokenLogprobs) -> "TokenLogprob":
        token, logprob, ids, top = logprobs
        return TokenLogprob(token, logprob, list(zip(ids, top, strict=True)))


@dataclass(frozen=True)
class GenerationOutput:
    """The output of one request. Times are seconds: `prompt_time` to the first token, `decode_time` after it."""

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
    index: int = 0  # among the n outputs of its prompt
    logprobs: list[TokenLogprob] | None = None  # of token_ids; None: not requested
    prompt_logprobs: list[TokenLogprob | None] | None = None  # of the prompt; the first token has none
