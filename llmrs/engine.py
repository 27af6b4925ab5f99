"""The public engine: text or token ids in, text out, from any thread.

A request passes Engine.generate_stream -> Worker.submit (queue to the device thread) -> EngineCore.step ->
Backend.launch. Its tokens return by `on_update` on the device thread -> OutputQueue -> the caller's thread or loop.
"""

import sys
import weakref
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import Any

from llmrs import aio
from llmrs.aio import AsyncStream
from llmrs.config import EngineConfig
from llmrs.core.errors import ConfigError
from llmrs.core.options import SamplingParams
from llmrs.core.request import Request
from llmrs.incoming import check_save_quantized
from llmrs.inputs import InputProcessor, Prompt
from llmrs.loading import OnMemoryPlan
from llmrs.model import Progress, no_callback, read_model, require_template
from llmrs.models.text.detokenize import Detokenizer
from llmrs.models.text.message import Message
from llmrs.models.text.template import ChatPrompt, encode_chat
from llmrs.output import GenerationOutput
from llmrs.stream import OutputQueue, PromptProgress, Stream
from llmrs.trace import Trace
from llmrs.worker import Worker

COUNTERS = (
    *("steps", "prompt_tokens", "generated_tokens", "prefix_queries", "prefix_hits", "preemptions"),
    *(f"finished_{reason}" for reason in ("stop", "length", "cancelled", "error")),
)


class Engine:
    """A loaded model. Use it as a context manager or call `close()`: it owns a thread and device memory.

    An engine without references closes itself once its streams are read to their end or deleted.
    """

    def __init__(
        self, config: EngineConfig | None = None, dtype: str | None = None, *,
        defaults: SamplingParams | None = None, progress: Progress = no_callback, on_download: Progress = no_callback,
        on_memory_plan: OnMemoryPlan = no_callback, on_fit: OnMemoryPlan | None = None,
    ) -> None:  # fmt: skip
        """Loads the model; `progress` receives bytes of weights loaded and in total, in this thread.

        `on_download` reports missing Hub files in the same way; `on_memory_plan` (or `on_fit`, its old name) receives
        the memory plan. Loading stops if a callback raises, or returns False (LoadCancelledError). `dtype` ("bf16",
        "f16", "f32") overrides the config's. `defaults` rank between a request's sampling values and the model
        author's. Raises ConfigError, ModelError, BackendError.
        """
        config = EngineConfig() if config is None else config
        if not isinstance(config, EngineConfig):
            raise ConfigError(f"config can't be a {type(config).__name__}", "give an EngineConfig")
        self.config = config if dtype is None else replace(config, dtype=dtype)
        check_save_quantized(self.config)
        self.model = read_model(self.config, on_download)
        self._worker = Worker(self.config, self.model, progress, on_fit or on_memory_plan)
        self._finalizer = weakref.finalize(self, self._worker.close)  # also at exit
        self.memory_plan = self._worker.memory_plan
        self._inputs = InputProcessor(self.model, self.memory_plan.max_model_len, defaults or SamplingParams())

    @classmethod
    async def load_async(
        cls, config: EngineConfig | None = None, dtype: str | None = None, *,
        defaults: SamplingParams | None = None, progress: Progress = no_callback, on_download: Progress = no_callback,
        on_memory_plan: OnMemoryPlan = no_callback, on_fit: OnMemoryPlan | None = None,
    ) -> "Engine":  # fmt: skip
        """The constructor, awaited, with the callbacks in the event loop's thread.

        Loading does not wait for them: it stops at the next report after one raised or returned False, or after the
        task is cancelled.
        """
        make = partial(cls, config, dtype, defaults=defaults)
        plan = on_fit or on_memory_plan
        return await aio.load(make, progress=progress, on_download=on_download, on_memory_plan=plan)

    def apply_chat_template(
        self, messages: Sequence[Message | Mapping[str, Any]], log: bool = False, *,
        tools: Sequence[Mapping[str, Any]] | None = None, add_generation_prompt: bool | None = None,
        continue_final_message: bool | str = False, **variables: Any,
    ) -> ChatPrompt:  # fmt: skip
        """The prompt for a conversation, up to the start of the answer; `log` prints it to stderr.

        `tools` are function descriptions of OpenAI's API. `continue_final_message` lets the answer continue the last
        message: its content, or the named field. `variables` are others of the template, such as enable_thinking.
        Control tokens in any input are plain text. Raises RequestError; ModelError for a missing or broken template.
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
        """Starts one request and streams its text. Raises RequestError, EngineClosedError.

        Reading the stream calls `progress` with the prompt tokens computed and in total. The request is cancelled if
        it returns False or raises; the stream raises its exception.
        """
        stream = self._stream(self._inputs.request(params, prompt), progress)
        self._submit([stream])
        return stream

    def generate_streams(self, params: SamplingParams, prompt: Prompt) -> list[Stream]:
        """Starts `params.n` requests that share one prefill. Raises RequestError, EngineClosedError."""
        streams = [self._stream(request) for request in self._inputs.requests(params, prompt)]
        self._submit(streams)
        return streams

    def generate_sync(
        self, params: SamplingParams | Sequence[SamplingParams], prompts: Iterable[Prompt]
    ) -> list[GenerationOutput]:
        """Outputs of all prompts in order, `n` in a row for each; one SamplingParams for all, or one for each.

        Requests are checked before the first one starts: a RequestError names the prompt. All are cancelled if one
        fails or this is interrupted.
        """
        streams = [self._stream(request) for request in self._inputs.batch(params, prompts)]
        with cancelling(streams):
            self._submit(streams)
            return [stream.result() for stream in streams]

    def stream_async(self, params: SamplingParams, prompt: Prompt) -> AsyncStream:
        """`generate_stream` for `async for`; only the running event loop may read it."""
        request = self._inputs.request(params, prompt)
        aio.require_loop()
        stream = AsyncStream(self._stream(request))
        self._submit([stream.stream])
        return stream

    async def generate_async(
        self, params: SamplingParams | Sequence[SamplingParams], prompts: Iterable[Prompt]
    ) -> list[GenerationOutput]:
        """`generate_sync`, awaited; all requests are cancelled if one fails or the task is cancelled."""
        streams = [AsyncStream(self._stream(request)) for request in self._inputs.batch(params, prompts)]
        with cancelling(streams):
            self._submit([stream.stream for stream in streams])
            return [await stream.result() for stream in streams]

    def stats(self) -> dict[str, int]:
        """Counters since the start, and current gauges.

        prompt_tokens count recomputation after preemption too; prefix_queries are tokens looked up in the prefix
        cache, prefix_hits those found; finished_* count requests by finish reason.
        """
        scheduler = self._worker.core.scheduler
        pool = scheduler.pool
        return {
            **{name: scheduler.stats[name] for name in COUNTERS},
            "running": len(scheduler.running),
            "waiting": len(scheduler.waiting),
            "kv_blocks": pool.count,
            "kv_blocks_used": pool.count - pool.num_free,
        }

    def start_trace(self) -> Trace:
        """Records the time of each phase of a step from now on."""
        trace = Trace()
        self._worker.core.span = trace.span
        return trace

    def close(self) -> None:
        """Ends running requests with EngineClosedError, and releases thread and memory. Callable repeatedly."""
        self._worker.close()
        self._finalizer.detach()

    async def aclose(self) -> None:
        """`close`, awaited: the event loop runs until the current step ends."""
        self.stop()
        if not self._worker.in_fork:
            await aio.wait_for(self._worker.ended)
        self.close()

    def stop(self) -> None:
        """Starts to `close`, without waiting."""
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

    def _submit(self, streams: Sequence[Stream]) -> None:
        """Starts all of them, or none where that fails or is interrupted."""
        with cancelling(streams) as unless_all:
            for _, group in groupby(streams, key=lambda stream: id(stream.request.prompt)):
                first, *others = (stream.request for stream in group)
                self._worker.submit(first, others)
            unless_all.pop_all()

    def _stream(self, request: Request, progress: PromptProgress | None = None) -> Stream:
        """The output of a request, before `_submit`."""
        p = request.params
        stops, skip = tuple(p.stop or ()), p.skip_special_tokens
        detokenizer = Detokenizer(self.model.tokenizer, stops, p.min_tokens, skip_special_tokens=skip)
        output_queue = OutputQueue(detokenizer, self._worker.core.cancel)
        request.on_update = output_queue.on_update
        return Stream(request, output_queue, self._worker.cancel, progress, engine=self)


def cancelling(streams: Sequence[Stream | AsyncStream]) -> ExitStack:
    """A context that cancels these streams on exit, unless its `pop_all` is called."""
    stack = ExitStack()
    for stream in streams:
        stack.callback(stream.cancel)
    return stack
