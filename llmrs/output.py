"""What comes out of an engine."""

from dataclasses import dataclass

from llmrs.core.request import TokenLogprobs


@dataclass(frozen=True)
class TokenLogprob:
    """How likely the model held a token that came, and the likeliest ones in its place, as (token id, logprob)."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]

    @staticmethod
    def of(likely: TokenLogprobs) -> "TokenLogprob":
        token, logprob, ids, top = likely
        return TokenLogprob(token, logprob, list(zip(ids, top, strict=True)))


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
    index: int = 0  # which of the n answers to its prompt
    logprobs: list[TokenLogprob] | None = None  # of token_ids; None: not asked for
    prompt_logprobs: list[TokenLogprob | None] | None = None  # of the prompt; the first token has none
