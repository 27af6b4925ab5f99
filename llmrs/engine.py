"""The engine as Python programs use it: text or token ids in, text out, from any thread."""

import secrets
import sys
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from llmrs.core.config import BUILT_IN, EngineConfig, SamplingParams
from llmrs.core.errors import ConfigError, LlmrsError, RequestError
from llmrs.core.request import GenerationOutput, Message, Request
from llmrs.loading import Progress, ignore_progress, read_model, require_template
from llmrs.models.detokenize import Detokenizer
from llmrs.models.template import ChatPrompt, encode_chat
from llmrs.stream import Sink, Stream
from llmrs.worker import Worker

Prompt = str | Sequence[int]  # a ChatPrompt is a str that carries its token ids


class Engine:
    """A loaded model. Use it as a context manager or call `close()`: it owns a thread and the device's memory."""

    def __init__(
        self,
        config: EngineConfig | None = None,
        dtype: str | None = None,
        *,
        defaults: SamplingParams | None = None,
        progress: Progress = ignore_progress,
    ) -> None:
        """Loads the model; `progress` is given the bytes of weights that are done and of all.

        `dtype` ("bf16", "f16", "f32") replaces the config's. `defaults` stand between a request's own sampling
        values and those that the model's author recommends. Raises ConfigError, ModelError, BackendError.
        """
        config = config or EngineConfig()
        self.config = config if dtype is None else replace(config, dtype=dtype)
        self.model = read_model(self.config.model_path)
        self._defaults = (defaults or SamplingParams(), self.model.sampling, BUILT_IN)
        self._worker = Worker(self.config, self.model, progress)
        self._finalizer = weakref.finalize(self, self._worker.close)  # also at exit

    def apply_chat_template(self, messages: Sequence[Message], log: bool = False) -> ChatPrompt:
        """The prompt for a conversation, with the beginning of the answer; `log` prints it to stderr.

        Control tokens inside a message are plain text. Raises ModelError where the model has no template.
        """
        turns = [{"role": m.role, "content": m.content} for m in messages]
        prompt = encode_chat(self.model.tokenizer, require_template(self.model), turns)
        if log:
            print(prompt, file=sys.stderr)
        return prompt

    def generate_stream(self, params: SamplingParams, prompt: Prompt) -> Stream:
        """Starts one request; the text comes as it is generated. Raises RequestError."""
        return self._start(self._request(params, prompt))

    def generate_sync(
        self, params: SamplingParams | Sequence[SamplingParams], prompts: Sequence[Prompt]
    ) -> list[GenerationOutput]:
        """Answers to all prompts, in their order; one SamplingParams serves all, or each has its own.

        Every request is checked before the first one starts: a RequestError names the one that is wrong.
        """
        if isinstance(prompts, str):
            raise RequestError("prompts is one text", "give a list of prompts")
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise RequestError(f"{len(each)} params for {len(prompts)} prompts", "give one, or one for each prompt")
        requests = [self._checked(n, p, prompt) for n, (p, prompt) in enumerate(zip(each, prompts, strict=True))]
        streams = [self._start(request) for request in requests]
        return [stream.result() for stream in streams]  # what is left of them is cancelled if this is interrupted

    def close(self) -> None:
        """Ends what still runs with EngineClosedError, and gives thread and memory back. May be called again."""
        self._finalizer()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __reduce__(self) -> Any:
        raise ConfigError("an Engine can't be pickled", "make one in each process")

    def _checked(self, number: int, params: SamplingParams, prompt: Prompt) -> Request:
        try:
            request = self._request(params, prompt)
            self._worker.core.check(request)
        except LlmrsError as error:
            raise type(error)(f"prompt {number}: {error.message}", error.hint) from error
        return request

    def _request(self, params: SamplingParams, prompt: Prompt) -> Request:
        params = params.over(*self._defaults)
        stops = () if params.ignore_eos else self.model.eos_ids
        seed = secrets.randbits(64) if params.seed is None else params.seed
        return Request(self._tokens(prompt), params, seed, (*stops, *(params.stop_token_ids or ())))

    def _tokens(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, ChatPrompt):
            return list(prompt.token_ids)
        if isinstance(prompt, str):
            return self.model.tokenizer.encode(prompt)
        if isinstance(prompt, list | tuple | np.ndarray):
            return [int(t) if isinstance(t, np.integer) else t for t in prompt]
        raise RequestError(f"a prompt can't be a {type(prompt).__name__}", "give text or a list of token ids")

    def _start(self, request: Request) -> Stream:
        detokenizer = Detokenizer(self.model.tokenizer, tuple(request.params.stop or ()))
        sink = Sink(detokenizer, self._worker.core.cancel)
        request.on_update = sink.update
        self._worker.submit(request)
        return Stream(request, sink, self._worker.cancel)
