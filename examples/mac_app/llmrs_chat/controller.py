"""The app's engine, without the app: one model at a time, loaded in the background and asked from the event loop.

Knows no Toga. Everything here is called in the thread of the event loop, and so are the callbacks that it is given.
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

Progress = Callable[[int, int], object]  # bytes of weights done, and of all


class Controller:
    """Owns the conversation, and at most one engine."""

    def __init__(self, sampling: SamplingParams | None = None) -> None:
        self.sampling = sampling or SamplingParams(max_tokens=1024)
        self.config: EngineConfig | None = None  # of the engine that is there
        self.messages: list[Message] = []
        self._engine: Engine | None = None
        self._stream: AsyncStream | None = None  # the answer that is being read
        self._unwanted = threading.Event()  # set: nobody wants the model that is being loaded
        self._loading = asyncio.Lock()
        self._closed = False

    @property
    def model(self) -> str | None:
        """The model that is there: "demo", or the path of a folder."""
        return self.config.model_path if self.config else None

    @property
    def context(self) -> int:
        """Tokens that a conversation may have, as far as the memory that it was given goes; 0 without a model."""
        return self._engine.memory_plan.max_model_len if self._engine else 0

    async def switch(self, model: str, kv_cache_memory: int | None, progress: Progress) -> None:
        """Gives the engine that is there back, and then loads `model`: "demo", or the path of a folder.

        `kv_cache_memory` is the budget of the conversation in bytes, None what a full context needs. Raises
        LlmrsError where the model can't be loaded or `cancel_loading` was called; what was there is loaded again.
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
        """Gives the answer to `show` as it grows; the whole of it. Raises LlmrsError, and forgets the question then."""
        if self._engine is None:
            raise EngineClosedError("no model is loaded", "choose one")
        messages, asked = self.messages, Message("user", question)  # a new conversation has a list of its own
        prompt = self._engine.apply_chat_template([*messages, asked])
        self._stream = stream = self._engine.stream_async(self.sampling, prompt)
        try:
            async with stream:  # ends the answer too if `show` raises something
                async for text in stream:
                    show(text)
                output = await stream.result()
        finally:
            self._stream = None
        messages += [asked, Message("assistant", output.text)]
        return output

    def stop(self) -> None:
        """Ends the answer where it is; `ask` returns what is there."""
        if self._stream is not None:
            self._stream.cancel()

    def cancel_loading(self) -> None:
        """Ends the loading that is under way, if one is."""
        self._unwanted.set()

    def new_conversation(self) -> None:
        self.stop()
        self.messages = []

    async def close(self) -> None:
        """Ends answer and loading, and returns when the engine's thread and memory are given back."""
        self._closed = True
        self.cancel_loading()
        async with self._loading:
            await self._give_back()

    async def _load(self, config: EngineConfig, progress: Progress) -> None:
        await self._give_back()  # first: two models at once may not fit
        if self._closed:
            raise EngineClosedError("the app is closing")
        self._unwanted = unwanted = threading.Event()
        try:
            self._engine = await asyncio.to_thread(load, config, marshalled(progress), unwanted)
        finally:
            unwanted.set()  # where this task was cancelled; the thread goes on otherwise
        self.config = config

    async def _give_back(self) -> None:
        self.stop()
        engine, self._engine, self.config = self._engine, None, None
        if engine is not None:
            await asyncio.to_thread(engine.close)  # waits for the step that is under way


def load(config: EngineConfig, progress: Progress, unwanted: threading.Event) -> Engine:
    """An engine, in a thread that may wait for it. Raises LlmrsError, and LoadCancelledError once it is unwanted."""

    def advance(done: int, total: int) -> bool:
        progress(done, total)
        return not unwanted.is_set()

    engine = Engine(config, progress=advance, on_memory_plan=lambda plan: not unwanted.is_set())
    if unwanted.is_set():
        engine.close()
        raise LoadCancelledError("the loading of the model was cancelled")
    return engine


def marshalled(callback: Progress) -> Progress:
    """The callback, to be called from any thread: it runs in the loop's."""
    loop = asyncio.get_running_loop()
    return lambda done, total: loop.call_soon_threadsafe(callback, done, total)


def tokens_per_second(output: GenerationOutput) -> float:
    """Of the answer after its first token, which comes with the prompt; 0.0 where it has no second."""
    return (output.decoded_length - 1) / output.decode_time if output.decode_time > 0 else 0.0
