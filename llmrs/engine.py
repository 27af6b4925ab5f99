"""The engine as Python programs use it: text or token ids in, text out, from any thread."""

import secrets
import sys
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from llmrs import aio
from llmrs.aio import AsyncStream, Bell
from llmrs.core.config import BUILT_IN, EngineConfig, SamplingParams
from llmrs.core.errors import ConfigError, LlmrsError, RequestError
from llmrs.core.request import Request
from llmrs.core.sampling import mix, seed_key
from llmrs.loading import OnFit, Progress, ignore_fit, ignore_progress, read_model, require_template
from llmrs.models.detokenize import Detokenizer
from llmrs.models.message import Message
from llmrs.models.template import ChatPrompt, encode_chat
from llmrs.output import GenerationOutput
from llmrs.speed import Device
from llmrs.stream import PromptProgress, Sink, Stream
from llmrs.trace import Trace
from llmrs.worker import Worker

COUNTS = (
    *("steps", "prompt_tokens", "generated_tokens", "prefix_queries", "prefix_hits", "preemptions"),
    *(f"finished_{reason}" for reason in ("stop", "length", "cancelled", "error")),
)
OnUpdate = Callable[[Request, list[int]], None]
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
        on_download: Progress = ignore_progress,
        on_fit: OnFit = ignore_fit,
    ) -> None:
        """Loads the model; `progress` is given the bytes of weights that are done and of all, in this thread.

        So is `on_download` before, where files of a Hugging Face id are missing; `on_fit` is given what the model
        needs of memory and what there is. What they raise, or LoadCancelledError where they return False, ends the
        loading. `dtype` ("bf16", "f16", "f32") replaces the config's. `defaults` stand between a request's own
        sampling values and those that the model's author recommends. Raises ConfigError, ModelError, BackendError.
        """
        config = config or EngineConfig()
        self.config = config if dtype is None else replace(config, dtype=dtype)
        self.model = read_model(self.config, on_download)
        self._defaults = (defaults or SamplingParams(), self.model.sampling, BUILT_IN)
        self._worker = Worker(self.config, self.model, progress, on_fit)
        self.fit = self._worker.fit  # how model and KV cache fit into memory
        self._finalizer = weakref.finalize(self, self._worker.close)  # also at exit

    @classmethod
    async def load_async(
        cls,
        config: EngineConfig | None = None,
        dtype: str | None = None,
        *,
        defaults: SamplingParams | None = None,
        progress: Progress = ignore_progress,
    ) -> "Engine":
        """The constructor, awaited, with `progress` in the event loop's thread. A cancelled task loads no more."""
        return await aio.load(lambda p: cls(config, dtype, defaults=defaults, progress=p), progress)

    def apply_chat_template(
        self,
        messages: Sequence[Message | Mapping[str, Any]],
        log: bool = False,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool | str = False,
        **variables: Any,
    ) -> ChatPrompt:
        """The prompt for a conversation, with the beginning of the answer; `log` prints it to stderr.

        `tools` are descriptions of functions as OpenAI's API has them. `continue_final_message` leaves the last
        message open, for the answer to go on with: its content, or the field that is named. `variables` are others
        that the template knows, such as enable_thinking. Control tokens in anything that is given are plain text.
        Raises RequestError, and ModelError where the model has no template, or one that can't work.
        """
        options = {"add_generation_prompt": add_generation_prompt, "continue_final_message": continue_final_message}
        template = require_template(self.model)
        prompt = encode_chat(self.model.tokenizer, template, messages, tools=tools, **options, **variables)
        if log:
            print(prompt, file=sys.stderr)
        return prompt

    def generate_stream(
        self, params: SamplingParams, prompt: Prompt, *, progress: PromptProgress | None = None
    ) -> Stream:
        """Starts one request; the text comes as it is generated. Raises RequestError.

        `progress` is called while the stream is read, with the prompt's tokens that are computed and with all;
        where it returns False the request is cancelled.
        """
        (request,) = self._requests(params, prompt, most=1)
        return self._start(request, progress=progress)

    def generate_streams(self, params: SamplingParams, prompt: Prompt) -> list[Stream]:
        """Starts `params.n` answers to one prompt, which is computed once."""
        return [self._start(request) for request in self._requests(params, prompt)]

    def generate_sync(
        self, params: SamplingParams | Sequence[SamplingParams], prompts: Sequence[Prompt]
    ) -> list[GenerationOutput]:
        """Answers to all prompts, in their order, `n` in a row for each; one SamplingParams serves all or each its own.

        Every request is checked before the first one starts: a RequestError names the one that is wrong.
        """
        streams = [self._start(request) for request in self._all_checked(params, prompts)]
        return [stream.result() for stream in streams]  # what is left of them is cancelled if this is interrupted

    def stream_async(self, params: SamplingParams, prompt: Prompt) -> AsyncStream:
        """`generate_stream` for `async for`, within a running event loop."""
        (request,) = self._requests(params, prompt, most=1)
        return self._start_async(request)

    async def generate_async(
        self, params: SamplingParams | Sequence[SamplingParams], prompts: Sequence[Prompt]
    ) -> list[GenerationOutput]:
        """`generate_sync`, awaited; the requests are cancelled where the task is."""
        streams = [self._start_async(request) for request in self._all_checked(params, prompts)]
        return [await stream.result() for stream in streams]

    def stats(self) -> dict[str, int]:
        """Counts since the start, and what is there now.

        prompt_tokens are those computed, again after preemption too; prefix_queries those that were looked for in
        the prefix cache, and prefix_hits those found; finished_* count requests by finish reason.
        """
        scheduler = self._worker.core.scheduler
        pool = scheduler.pool
        return {
            **{name: scheduler.stats[name] for name in COUNTS},
            "running": len(scheduler.running),
            "waiting": len(scheduler.waiting),
            "kv_blocks": pool.count,
            "kv_blocks_used": pool.count - pool.free,
        }

    def ceilings(self) -> Device:
        """What the device can do, measured now: what a speed should be compared with."""
        name = f"{self.config.backend} {self.config.device}"
        return Device(name, *self._worker.ask(lambda backend: backend.ceilings()))

    def start_trace(self) -> Trace:
        """Records from now on what each step spends its time on."""
        trace = Trace()
        self._worker.core.span = trace.span
        return trace

    def close(self) -> None:
        """Ends what still runs with EngineClosedError, and gives thread and memory back. May be called again."""
        self._finalizer()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __reduce__(self) -> Any:
        raise ConfigError("an Engine can't be pickled", "make one in each process")

    async def __aenter__(self) -> "Engine":
        return self

    async def __aexit__(self, *exception: object) -> None:
        self.close()

    def _all_checked(
        self, params: SamplingParams | Sequence[SamplingParams], prompts: Sequence[Prompt]
    ) -> list[Request]:
        """The requests for all prompts, none of them started."""
        if isinstance(prompts, str):
            raise RequestError("prompts is one text", "give a list of prompts")
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise RequestError(f"{len(each)} params for {len(prompts)} prompts", "give one, or one for each prompt")
        pairs = enumerate(zip(each, prompts, strict=True))
        return [request for n, (p, prompt) in pairs for request in self._checked(n, p, prompt)]

    def _checked(self, number: int, params: SamplingParams, prompt: Prompt) -> list[Request]:
        try:
            requests = self._requests(params, prompt)
            self._worker.core.check(requests[0])
        except LlmrsError as error:
            raise type(error)(f"prompt {number}: {error.message}", error.hint) from error
        return requests

    def _requests(self, params: SamplingParams, prompt: Prompt, most: int = 16) -> list[Request]:
        """One request for each of the n answers; all but the first wait until the prompt is computed."""
        if params.n > most:
            raise RequestError(f"n is {params.n}, and a stream is one answer", "use generate_streams or generate_sync")
        p, tokens = params.over(*self._defaults), self._tokens(prompt)
        eos = () if p.ignore_eos else self.model.eos_ids
        stops = tuple(dict.fromkeys((*eos, *(p.stop_token_ids or ()))))
        seed = secrets.randbits(64) if p.seed is None else p.seed
        requests: list[Request] = []
        for n in range(p.n):
            parent = requests[0] if n else None
            requests.append(Request(tokens, p, child_seed(seed, n), stops, parent=parent, index=n))
        if p.allowed_token_ids is not None:
            self._allow_only(p.allowed_token_ids, requests)
        return requests

    def _allow_only(self, ids: Collection[int], requests: Collection[Request]) -> None:
        if not ids:
            raise RequestError("allowed_token_ids is empty", "give the tokens that may come, or leave it out")
        bits = token_bits([i for i in ids if i < self.model.config.vocabulary], self.model.config.vocabulary)
        for request in requests:  # ids beyond the vocabulary are refused with the other ids of the request
            request.mask = lambda output: bits

    def _tokens(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, ChatPrompt):
            return list(prompt.token_ids)
        if isinstance(prompt, str):
            return self.model.tokenizer.encode(prompt)
        if isinstance(prompt, list | tuple | np.ndarray):
            if set(map(type, prompt)) <= {int}:  # the usual case, four times as fast as to look at each by itself
                return list(prompt)
            return [int(t) if isinstance(t, np.integer) else t for t in prompt]
        raise RequestError(f"a prompt can't be a {type(prompt).__name__}", "give text or a list of token ids")

    def _start(
        self,
        request: Request,
        notify: Callable[[], None] = lambda: None,
        progress: PromptProgress | None = None,
        around: Callable[[OnUpdate], OnUpdate] = lambda update: update,
    ) -> Stream:
        """`around` may wrap what the engine's thread calls with new tokens, to look on."""
        p = request.params
        detokenizer = Detokenizer(self.model.tokenizer, tuple(p.stop or ()), p.min_tokens)
        sink = Sink(detokenizer, self._worker.core.cancel, notify)
        request.on_update = around(sink.update)
        self._worker.submit(request)
        return Stream(request, sink, self._worker.cancel, progress)

    def _start_async(self, request: Request) -> AsyncStream:
        bell = Bell()
        return AsyncStream(self._start(request, bell.ring), bell)


def child_seed(seed: int, index: int) -> int:
    """The seed of answer `index` to one prompt; answer 0 has the request's own."""
    if not index:
        return seed
    low = mix(np.array([index], np.uint32) ^ seed_key(seed))
    return int(low[0]) | int(mix(low ^ seed_key(~seed & 2**64 - 1))[0]) << 32


def token_bits(ids: Collection[int], vocabulary: int) -> np.ndarray:
    """Bits uint32 (ceil(V / 32),) that are set for these token ids, the lowest bit of a word first."""
    flags = np.zeros(-(-vocabulary // 32) * 32, np.uint8)
    flags[list(ids)] = 1
    return np.packbits(flags, bitorder="little").view(np.uint32)
