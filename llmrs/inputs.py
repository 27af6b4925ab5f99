"""Checked requests from prompts and sampling parameters."""

import secrets
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np

from llmrs.core.batch import MAX_STOPS
from llmrs.core.errors import ContextLengthError, LlmrsError, RequestError
from llmrs.core.options import BUILT_IN, SamplingParams
from llmrs.core.request import Request
from llmrs.core.sampling import hash32, seed_key
from llmrs.model import Model
from llmrs.models.text.template import ChatPrompt

Prompt = str | Sequence[int]  # a ChatPrompt is a str that carries its token ids


class InputProcessor:
    """Makes and checks the requests of one engine, in the caller's thread, before they are submitted."""

    def __init__(self, model: Model, max_model_len: int, defaults: SamplingParams) -> None:
        self.model, self.max_model_len = model, max_model_len
        self.vocab_size = model.config.vocab_size
        self._defaults = (defaults, model.sampling, BUILT_IN)

    def batch(self, params: SamplingParams | Sequence[SamplingParams], prompts: Iterable[Prompt]) -> list[Request]:
        """The requests of all prompts. Raises a RequestError that names the prompt."""
        if isinstance(prompts, str):
            raise RequestError("prompts is one text", "give a list of prompts")
        if not isinstance(prompts, Iterable):
            raise RequestError(f"prompts can't be a {type(prompts).__name__}", "give a list of prompts")
        prompts = list(prompts)
        each = list(params) if isinstance(params, Iterable) else [params] * len(prompts)
        if len(each) != len(prompts):
            raise RequestError(f"{len(each)} params for {len(prompts)} prompts", "give one, or one for each prompt")
        requests = []
        for n, prompt in enumerate(prompts):
            try:
                requests += self.requests(each[n], prompt)
            except LlmrsError as error:
                raise type(error)(f"prompt {n}: {error.message}", error.hint) from error
        return requests

    def request(self, params: SamplingParams, prompt: Prompt) -> Request:
        """The request of one stream. Raises RequestError, for n > 1 too."""
        if isinstance(params, SamplingParams) and params.n > 1:
            raise RequestError(f"n is {params.n}, and a stream is one answer", "use generate_streams or generate_sync")
        return self.requests(params, prompt)[0]

    def requests(self, params: SamplingParams, prompt: Prompt) -> list[Request]:
        """One request for each of the n outputs; all but the first wait for the prefill of the first."""
        if not isinstance(params, SamplingParams):
            raise RequestError(f"params can't be a {type(params).__name__}", "give SamplingParams")
        p, tokens = params.over(*self._defaults), self._tokens(prompt)
        eos = () if p.ignore_eos else self.model.eos_ids
        stops = tuple(dict.fromkeys((*eos, *(p.stop_token_ids or ()))))
        seed = secrets.randbits(64) if p.seed is None else p.seed
        requests = [Request(tokens, p, child_seed(seed, n), stops, index=n) for n in range(p.n)]
        self._check(requests[0])
        if p.allowed_token_ids is not None:
            mask = token_mask(p.allowed_token_ids, self.vocab_size)
            for request in requests:
                request.mask = lambda output: mask
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
        if set(map(type, ids)) <= {int}:  # the usual case, 4x faster than a loop
            return ids
        return [int(t) if isinstance(t, np.integer) else t for t in ids]

    def _check(self, request: Request) -> None:
        """Raises RequestError for an empty or long prompt, unknown token ids, and impossible stops or masks."""
        p, length = request.params, len(request.prompt)
        if not length:
            raise RequestError("the prompt is empty", "give at least one token")
        self._check_ids((*request.prompt, *request.stops, *(p.logit_bias or ()), *(p.allowed_token_ids or ())))
        if length >= self.max_model_len:
            room = f"max_model_len {self.max_model_len} leaves no room for an answer"
            hint = "shorten the prompt or raise max_model_len"
            raise ContextLengthError(f"the prompt has {length} tokens, and {room}", hint)
        if len(request.stops) > MAX_STOPS:
            raise RequestError(f"{len(request.stops)} stop tokens, at most {MAX_STOPS} are allowed", "give fewer")
        if p.allowed_token_ids is not None and not p.allowed_token_ids:
            raise RequestError("allowed_token_ids is empty", "list the allowed tokens, or leave it out")
        if p.min_tokens and p.allowed_token_ids and set(p.allowed_token_ids) <= set(request.stops):
            raise RequestError("allowed_token_ids holds only stop tokens, and min_tokens bans them", "allow others too")

    def _check_ids(self, ids: Sequence[int]) -> None:
        if {*map(type, ids)} == {int} and min(ids) >= 0 and max(ids) < self.vocab_size:
            return  # all at once: prompts are long
        bad = next(t for t in ids if type(t) is not int or not 0 <= t < self.vocab_size)
        raise RequestError(f"token id {bad!r} is not in the vocabulary", f"ids are 0 to {self.vocab_size - 1}")


def child_seed(seed: int, index: int) -> int:
    """The seed of output `index` of a prompt; output 0 has the request's own."""
    if not index:
        return seed
    low = hash32(np.array([index], np.uint32) ^ seed_key(seed))
    return int(low[0]) | int(hash32(low ^ seed_key(~seed & 2**64 - 1))[0]) << 32


def token_mask(ids: Collection[int], vocab_size: int) -> np.ndarray:
    """Bit mask uint32 (ceil(V / 32),) of these token ids, the lowest bit of a word first."""
    flags = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
    flags[list(ids)] = 1
    return np.packbits(flags, bitorder="little").view(np.uint32)
