"""The engine as Python programs use it: text or token ids in, text out, from any thread."""

import sys
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import Any

from llmrs import aio
from llmrs.aio import AsyncStream, Bell
from llmrs.config import EngineConfig
from llmrs.core.errors import ConfigError
from llmrs.core.options import SamplingParams
from llmrs.core.request import Request
from llmrs.inputs import InputProcessor, Prompt
from llmrs.loading import OnFit, Progress, ignore_fit, ignore_progress, read_model, require_template
from llmrs.models.text.detokenize import Detokenizer
from llmrs.models.text.message import Message
from llmrs.models.text.template import ChatPrompt, encode_chat
from llmrs.output import GenerationOutput
from llmrs.stream import PromptProgress, Sink, Stream, cancelling
from llmrs.trace import Trace
from llmrs.worker import Worker

COUNTS = (
    *("steps", "prompt_tokens", "generated_tokens", "prefix_queries", "prefix_hits", "preemptions"),
    *(f"finished_{reason}" for reason in ("stop", "length", "cancelled", "error")),
)
OnUpdate = Callable[[Request, list[int]], None]


class Engine:
    """A loaded model. Use it as a context manager or call `close()`: it owns a thread and the device's memory.

    An engine that is dropped closes itself, when its streams are read to their end or dropped too.
    """

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
        config = EngineConfig() if config is None else config
        if not isinstance(config, EngineConfig):
            raise ConfigError(f"config can't be a {type(config).__name__}", "give an EngineConfig")
        self.config = config if dtype is None else replace(config, dtype=dtype)
        self.model = read_model(self.config, on_download)
        self._worker = Worker(self.config, self.model, progress, on_fit)
        self._finalizer = weakref.finalize(self, self._worker.close)  # also at exit
        self.fit = self._worker.fit  # how model and KV cache fit into memory
        self._inputs = InputProcessor(self.model, self.fit.length, defaults or SamplingParams())

    @classmethod
    async def load_async(
        cls,
        config: EngineConfig | None = None,
        dtype: str | None = None,
        *,
        defaults: SamplingParams | None = None,
        progress: Progress = ignore_progress,
        on_download: Progress = ignore_progress,
        on_fit: OnFit = ignore_fit,
    ) -> "Engine":
        """The constructor, awaited, with the callbacks in the event loop's thread.

        The loading does not wait for them, and ends at the next report after one has raised something or returned
        False. It ends there too when the task is cancelled.
        """

        def make(progress: Progress, on_download: Progress, on_fit: OnFit) -> "Engine":
            return cls(config, dtype, defaults=defaults, progress=progress, on_download=on_download, on_fit=on_fit)

        return await aio.load(make, progress, on_download, on_fit)

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
        """Starts one request; the text comes as it is generated. Raises RequestError, EngineClosedError.

        `progress` is called while the stream is read, with the prompt's tokens that are computed and with all. The
        request is cancelled where it returns False, and where it raises an exception, which comes out of the stream.
        """
        return self._start(self._inputs.request(params, prompt), progress=progress)

    def generate_streams(self, params: SamplingParams, prompt: Prompt) -> list[Stream]:
        """Starts `params.n` answers to one prompt, which is computed once. Raises as `generate_stream`."""
        streams = [self._stream(request) for request in self._inputs.requests(params, prompt)]
        self._submit(streams)
        return streams

    def generate_sync(
        self, params: SamplingParams | Sequence[SamplingParams], prompts: Iterable[Prompt]
    ) -> list[GenerationOutput]:
        """Answers to all prompts, in their order, `n` in a row for each; one SamplingParams serves all or each its own.

        Every request is checked before the first one starts: a RequestError names the one that is wrong. All are
        cancelled if one fails or this is interrupted.
        """
        streams = [self._stream(request) for request in self._inputs.batch(params, prompts)]
        with cancelling(streams):
            self._submit(streams)
            return [stream.result() for stream in streams]

    def stream_async(self, params: SamplingParams, prompt: Prompt) -> AsyncStream:
        """`generate_stream` for `async for`, within a running event loop, which alone may read it."""
        stream = self._stream_async(self._inputs.request(params, prompt))
        self._submit([stream.stream])
        return stream

    async def generate_async(
        self, params: SamplingParams | Sequence[SamplingParams], prompts: Iterable[Prompt]
    ) -> list[GenerationOutput]:
        """`generate_sync`, awaited; all requests are cancelled if one fails or the task is cancelled."""
        streams = [self._stream_async(request) for request in self._inputs.batch(params, prompts)]
        with cancelling(streams):
            self._submit([stream.stream for stream in streams])
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
            "kv_blocks_used": pool.count - pool.num_free,
        }

    def start_trace(self) -> Trace:
        """Records from now on what each step spends its time on."""
        trace = Trace()
        self._worker.core.span = trace.span
        return trace

    def close(self) -> None:
        """Ends what still runs with EngineClosedError, and gives thread and memory back. May be called again."""
        self._worker.close()
        self._finalizer.detach()

    async def aclose(self) -> None:
        """`close`, awaited: the event loop goes on while the step under way ends."""
        self.stop()
        if not self._worker.foreign:
            await aio.ended(self._worker.ended)
        self.close()

    def stop(self) -> None:
        """Begins to `close`, and returns at once."""
        self._worker.stop()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __reduce__(self) -> Any:
        raise ConfigError("an Engine can't be pickled", "make one in each process")

    async def __aenter__(self) -> "Engine":
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.aclose()

    def _start(
        self,
        request: Request,
        progress: PromptProgress | None = None,
        around: Callable[[OnUpdate], OnUpdate] = lambda update: update,
    ) -> Stream:
        stream = self._stream(request, progress=progress, around=around)
        self._submit([stream])
        return stream

    def _submit(self, streams: Sequence[Stream]) -> None:
        """Starts all of them, or none where that fails or is interrupted."""
        with cancelling(streams) as unless_all:
            for _, group in groupby(streams, key=lambda stream: id(stream.request.prompt)):
                first, *others = (stream.request for stream in group)
                self._worker.submit(first, others)
            unless_all.pop_all()

    def _stream(
        self,
        request: Request,
        notify: Callable[[], None] = lambda: None,
        progress: PromptProgress | None = None,
        around: Callable[[OnUpdate], OnUpdate] = lambda update: update,
    ) -> Stream:
        """The answer to a request, before it is submitted.

        `around` may wrap what the engine's thread calls with new tokens, to look on.
        """
        p = request.params
        stops, skip = tuple(p.stop or ()), p.skip_special_tokens
        detokenizer = Detokenizer(self.model.tokenizer, stops, p.min_tokens, skip_special_tokens=skip)
        sink = Sink(detokenizer, self._worker.core.cancel, notify)
        request.on_update = around(sink.update)
        return Stream(request, sink, self._worker.cancel, progress, engine=self)

    def _stream_async(self, request: Request) -> AsyncStream:
        bell = Bell(partial(self._worker.cancel, request))
        return AsyncStream(self._stream(request, bell.ring), bell)
