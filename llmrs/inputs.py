"""What is asked of an engine, as checked requests: prompts to token ids, and sampling values from all their sources."""

import secrets
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np

from llmrs.core.batch import MAX_STOPS
from llmrs.core.errors import ContextLengthError, LlmrsError, RequestError
from llmrs.core.options import BUILT_IN, SamplingParams
from llmrs.core.request import Request
from llmrs.core.sampling import hash32, seed_key
from llmrs.loading import Model
from llmrs.models.text.template import ChatPrompt

Prompt = str | Sequence[int]  # a ChatPrompt is a str that carries its token ids


class InputProcessor:
    """Makes and checks the requests of one engine, in the caller's thread. Each is checked once, before it starts."""

    def __init__(self, model: Model, max_model_len: int, defaults: SamplingParams) -> None:
        self.model, self.max_model_len = model, max_model_len
        self.vocabulary = model.config.vocab_size
        self._defaults = (defaults, model.sampling, BUILT_IN)

    def batch(self, params: SamplingParams | Sequence[SamplingParams], prompts: Iterable[Prompt]) -> list[Request]:
        """The requests for all prompts. Raises RequestError that names the prompt."""
        if isinstance(prompts, str):
            raise RequestError("prompts is one text", "give a list of prompts")
        if not isinstance(prompts, Iterable):
            raise RequestError(f"prompts can't be a {type(prompts).__name__}", "give a list of prompts")
        prompts = list(prompts)
        each = list(params) if isinstance(params, Iterable) else [params] * len(prompts)
        if len(each) != len(prompts):
            raise RequestError(f"{len(each)} params for {len(prompts)} prompts", "give one, or one for each prompt")
        pairs = enumerate(zip(each, prompts, strict=True))
        return [request for n, (p, prompt) in pairs for request in self._numbered(n, p, prompt)]

    def _numbered(self, number: int, params: SamplingParams, prompt: Prompt) -> list[Request]:
        try:
            return self.requests(params, prompt)
        except LlmrsError as error:
            raise type(error)(f"prompt {number}: {error.message}", error.hint) from error

    def request(self, params: SamplingParams, prompt: Prompt) -> Request:
        """The request of a stream. Raises RequestError, for more than one answer too."""
        if isinstance(params, SamplingParams) and params.n > 1:
            raise RequestError(f"n is {params.n}, and a stream is one answer", "use generate_streams or generate_sync")
        return self.requests(params, prompt)[0]

    def requests(self, params: SamplingParams, prompt: Prompt) -> list[Request]:
        """One request for each of the n answers."""
        if not isinstance(params, SamplingParams):
            raise RequestError(f"params can't be a {type(params).__name__}", "give SamplingParams")
        p, tokens = params.over(*self._defaults), self._tokens(prompt)
        eos = () if p.ignore_eos else self.model.eos_ids
        stops = tuple(dict.fromkeys((*eos, *(p.stop_token_ids or ()))))
        seed = secrets.randbits(64) if p.seed is None else p.seed
        first = Request(tokens, p, seed, stops)
        self._check(first)
        others = (Request(tokens, p, child_seed(seed, n), stops, index=n) for n in range(1, p.n))
        requests = [first, *others]
        if p.allowed_token_ids is not None:
            bits = token_bits(p.allowed_token_ids, self.vocabulary)
            for request in requests:
                request.mask = lambda output: bits
        return requests

    def _tokens(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, ChatPrompt):
            return list(prompt.token_ids)
        if isinstance(prompt, str):
            return self.model.tokenizer.encode(prompt)
        if isinstance(prompt, np.ndarray) and prompt.ndim == 1:
            return list(prompt.tolist())
        if not isinstance(prompt, Sequence) or isinstance(prompt, bytes | bytearray | memoryview):
            raise RequestError(f"a prompt can't be a {type(prompt).__name__}", "give text or a list of token ids")
        ids: list[Any] = list(prompt)
        if set(map(type, ids)) <= {int}:  # the usual case, four times as fast as to look at each by itself
            return ids
        return [int(t) if isinstance(t, np.integer) else t for t in ids]

    def _check(self, request: Request) -> None:
        """Raises RequestError for an empty or too long prompt, unknown token ids, stops or masks that can't work."""
        p, length = request.params, len(request.prompt)
        if not length:
            raise RequestError("the prompt is empty", "give at least one token")
        self._check_ids((*request.prompt, *request.stops, *(p.logit_bias or ()), *(p.allowed_token_ids or ())))
        if length >= self.max_model_len:
            raise ContextLengthError(
                f"the prompt has {length} tokens, and max_model_len {self.max_model_len} leaves no room for an answer",
                "shorten the prompt or raise max_model_len",
            )
        if len(request.stops) > MAX_STOPS:
            raise RequestError(f"{len(request.stops)} stop tokens, at most {MAX_STOPS} are allowed", "give fewer")
        if p.allowed_token_ids is not None and not p.allowed_token_ids:
            raise RequestError("allowed_token_ids is empty", "give the tokens that may come, or leave it out")
        if p.min_tokens and p.allowed_token_ids and set(p.allowed_token_ids) <= set(request.stops):
            raise RequestError("allowed_token_ids holds only stop tokens, and min_tokens bans them", "allow others too")

    def _check_ids(self, ids: Sequence[int]) -> None:
        if {*map(type, ids)} == {int} and min(ids) >= 0 and max(ids) < self.vocabulary:
            return  # all at once: prompts are long
        bad = next(t for t in ids if type(t) is not int or not 0 <= t < self.vocabulary)
        raise RequestError(f"token id {bad!r} is not in the vocabulary", f"ids are 0 to {self.vocabulary - 1}")


def child_seed(seed: int, index: int) -> int:
    """The seed of answer `index` to one prompt; answer 0 has the request's own."""
    if not index:
        return seed
    low = hash32(np.array([index], np.uint32) ^ seed_key(seed))
    return int(low[0]) | int(hash32(low ^ seed_key(~seed & 2**64 - 1))[0]) << 32


def token_bits(ids: Collection[int], vocabulary: int) -> np.ndarray:
    """Bits uint32 (ceil(V / 32),) that are set for these token ids, the lowest bit of a word first."""
    flags = np.zeros(-(-vocabulary // 32) * 32, np.uint8)
    flags[list(ids)] = 1
    return np.packbits(flags, bitorder="little").view(np.uint32)
