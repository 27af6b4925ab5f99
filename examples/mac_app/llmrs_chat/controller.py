"""The app's engine: one model at a time, loaded in the background and used from the event loop. Independent of Toga.

All methods and callbacks run in the event loop's thread.
"""

import asyncio
import threading
from collections.abc import Callable

from llmrs import (
    AsyncStream,
    Engine,
    EngineClosedError,
    EngineConfig,
    GenerationOutput,
    LlmrsError,
    LoadCancelledError,
    Message,
    SamplingParams,
)

Progress = Callable[[int, int], object]  # bytes of weights loaded, in total


class Controller:
    """Owns the conversation, and at most one engine."""

    def __init__(self, sampling: SamplingParams | None = None) -> None:
        self.sampling = sampling or SamplingParams(max_tokens=1024)
        self.config: EngineConfig | None = None  # of the loaded engine
        self.messages: list[Message] = []
        self._engine: Engine | None = None
        self._stream: AsyncStream | None = None  # the current answer
        self._cancelled = threading.Event()  # set: loading is cancelled
        self._loading = asyncio.Lock()
        self._closed = False

    @property
    def model(self) -> str | None:
        """The loaded model: "demo", or the path of a folder."""
        return self.config.model_path if self.config else None

    @property
    def context(self) -> int:
        """Maximum tokens of a conversation; 0 without a model."""
        return self._engine.memory_plan.max_model_len if self._engine else 0

    async def switch(self, model: str, kv_cache_memory: int | None, progress: Progress) -> None:
        """Closes the current engine, then loads `model`: "demo", or the path of a folder.

        `kv_cache_memory` is the conversation's budget in bytes; None: a full context. Raises LlmrsError if loading
        fails or `cancel_loading` is called; the previous model is loaded again.
        """
        async with self._loading:
            before = self.config
            try:  # one conversation at a time: the KV cache needs no room for more
                wanted = EngineConfig(model, offline=True, max_num_seqs=1, kv_cache_memory=kv_cache_memory)
                await self._load(wanted, progress)
            except LlmrsError:
                if before is not None and not self._closed:
                    await self._load(before, progress)
                raise

    async def ask(self, question: str, show: Callable[[str], object]) -> GenerationOutput:
        """Streams the answer to `show`, and returns the whole output. After an LlmrsError the question is dropped."""
        if self._engine is None:
            raise EngineClosedError("no model is loaded", "choose one")
        messages, asked = self.messages, Message("user", question)  # a new conversation has a list of its own
        prompt = self._engine.apply_chat_template([*messages, asked])
        self._stream = stream = self._engine.stream_async(self.sampling, prompt)
        try:
            async with stream:  # cancels the request if `show` raises
                async for text in stream:
                    show(text)
                output = await stream.result()
        finally:
            self._stream = None
        messages += [asked, Message("assistant", output.text)]
        return output

    def stop(self) -> None:
        """Ends the answer; `ask` returns the text so far."""
        if self._stream is not None:
            self._stream.cancel()

    def cancel_loading(self) -> None:
        """Cancels a loading, if any."""
        self._cancelled.set()

    def new_conversation(self) -> None:
        self.stop()
        self.messages = []

    async def close(self) -> None:
        """Ends answer and loading, and waits until the engine's thread and memory are released."""
        self._closed = True
        self.cancel_loading()
        async with self._loading:
            await self._release()

    async def _load(self, config: EngineConfig, progress: Progress) -> None:
        await self._release()  # first: two models at once may not fit
        if self._closed:
            raise EngineClosedError("the app is closing")
        self._cancelled = cancelled = threading.Event()
        try:
            self._engine = await asyncio.to_thread(load, config, in_loop(progress), cancelled)
        finally:
            cancelled.set()  # if this task was cancelled: ends the thread
        self.config = config

    async def _release(self) -> None:
        self.stop()
        engine, self._engine, self.config = self._engine, None, None
        if engine is not None:
            await asyncio.to_thread(engine.close)  # waits for the current step


def load(config: EngineConfig, progress: Progress, cancelled: threading.Event) -> Engine:
    """Loads an engine in a thread that may block. Raises LlmrsError; LoadCancelledError once `cancelled` is set."""

    def advance(done: int, total: int) -> bool:
        progress(done, total)
        return not cancelled.is_set()

    engine = Engine(config, progress=advance, on_memory_plan=lambda plan: not cancelled.is_set())
    if cancelled.is_set():
        engine.close()
        raise LoadCancelledError("the loading of the model was cancelled")
    return engine


def in_loop(callback: Progress) -> Progress:
    """Wraps a callback for any thread: it runs in the event loop's."""
    loop = asyncio.get_running_loop()
    return lambda done, total: loop.call_soon_threadsafe(callback, done, total)


def tokens_per_second(output: GenerationOutput) -> float:
    """The decode rate, without the first token; 0.0 for a single token."""
    return (output.decoded_length - 1) / output.decode_time if output.decode_time > 0 else 0.0
