"""The asyncio side: a stream whose text is awaited, and loading and closing that leave the event loop free."""

import asyncio
import queue
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from threading import get_ident
from typing import Any, Protocol, Self, TypeVar

from llmrs.core.errors import LlmrsError, LoadCancelledError, RequestError
from llmrs.output import GenerationOutput
from llmrs.stream import Stream

Callback = Callable[..., object]  # False from it ends the loading


class Closable(Protocol):
    def close(self) -> None: ...

    async def aclose(self) -> None: ...

    def stop(self) -> None:
        """Begins to close it, and does not wait."""


Made = TypeVar("Made", bound=Closable)


class Bell:
    """Wakes tasks of the running event loop; `ring` may be called from any thread, also when the loop is closed."""

    def __init__(self, on_closed: Callable[[], None]) -> None:
        """`on_closed` is called by `ring` when the loop is closed, which leaves no task that could read.

        Raises RequestError where no loop runs.
        """
        try:
            self.loop = asyncio.get_running_loop()
        except RuntimeError as error:
            hint = "call it in a coroutine, or use generate_stream"
            raise RequestError("stream_async needs a running event loop", hint) from error
        self.event, self._on_closed, self.thread = asyncio.Event(), on_closed, get_ident()

    def ring(self) -> None:
        try:
            self.loop.call_soon_threadsafe(self.event.set)
        except RuntimeError:
            self._on_closed()

    def check_loop(self) -> None:
        """Raises RequestError in another loop than its own."""
        if asyncio.get_running_loop() is not self.loop:
            hint = "read it in the loop that stream_async was called in"
            raise RequestError("the stream belongs to another event loop", hint)


class AsyncStream(AsyncIterator[str]):
    """A stream's text for `async for`, in the event loop that it was made in.

    `async with stream:` and `aclose()` cancel a request that has not ended. So does a task that is cancelled while it
    waits for the stream, the end of the event loop, and the stream's deletion. Tasks that read one stream share its
    pieces, and each gets the end.
    """

    def __init__(self, stream: Stream, bell: Bell) -> None:
        self.stream, self._bell = stream, bell

    def __aiter__(self) -> "AsyncStream":
        return self

    async def __anext__(self) -> str:
        bell = self._bell
        if get_ident() != bell.thread or not bell.loop.is_running():
            bell.check_loop()  # not for each token: on Linux before Python 3.12 it takes a system call
        while True:
            try:
                return self.stream.take(block=False)
            except StopIteration:
                raise StopAsyncIteration from None
            except queue.Empty:
                await self._wait()

    async def _wait(self) -> None:
        """Waits for what comes next. Cancels the request if the task is cancelled or closed meanwhile."""
        interrupted = True
        try:
            await self._bell.event.wait()
            self._bell.event.clear()  # before looking: what comes after that rings again
            interrupted = False
        finally:
            if interrupted:
                self.cancel()

    def cancel(self) -> None:
        """Ends the answer where it is, after the step under way."""
        self.stream.cancel()

    async def aclose(self) -> None:
        """Cancels what has not ended, and needs the engine no more. May be called again."""
        self.stream.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.aclose()

    def __reduce__(self) -> Any:
        raise RequestError("an AsyncStream can't be pickled or copied", "pickle what output() gives")

    def output(self) -> GenerationOutput:
        """The answer so far, without waiting."""
        return self.stream.output()

    async def result(self) -> GenerationOutput:
        """Waits for the end; the whole answer. Raises what ended it when that was an error."""
        async for _ in self:
            pass
        return self.stream.output()


class Loading:
    """Callbacks of a loading in another thread, called in the event loop's thread.

    The loading thread does not wait for them: the loop may end first. What a callback raises, or False from it, ends
    the loading at its next report, and so does `wanted = False`.
    """

    def __init__(self) -> None:
        self.wanted = True
        self._loop = asyncio.get_running_loop()
        self._calls: list[Future[None]] = []

    def in_loop(self, callback: Callback) -> Callback:
        """For the loading thread: has the callback called in the loop's; False where the loading is not wanted."""

        def report(*values: object) -> bool:
            if self.wanted:
                self._calls.append(asyncio.run_coroutine_threadsafe(self._call(callback, values), self._loop))
            return self.wanted

        return report

    async def _call(self, callback: Callback, values: tuple[object, ...]) -> None:
        if not self.wanted:
            return
        refused = True
        try:
            refused = callback(*values) is False
        finally:
            if refused:
                self.wanted = False

    async def check(self) -> None:
        """Raises what a callback raised, or LoadCancelledError where one returned False."""
        for call in self._calls:
            await asyncio.wrap_future(call)
        if not self.wanted:
            raise LoadCancelledError("the loading of the model was cancelled")


async def load(make: Callable[..., Made], *callbacks: Callback) -> Made:
    """What `make(*callbacks)` makes in a thread of its own; the callbacks are called in the event loop's.

    What they raise, or LoadCancelledError where they return False, ends the loading, and so does cancelling the task:
    what the thread still makes is closed.
    """
    loading, made, complete = Loading(), list[Made](), False

    def run() -> None:
        made.append(make(*map(loading.in_loop, callbacks)))
        if not loading.wanted:
            made[0].close()

    try:
        try:
            await asyncio.to_thread(run)
        except LlmrsError:
            await loading.check()  # what a callback raised comes first: the error may follow from it
            raise
        try:
            await loading.check()
        finally:
            if not loading.wanted:
                await made[0].aclose()
        complete = True
    finally:
        if not complete:
            loading.wanted = False  # before looking at `made`: `run` looks at it after
            for engine in made:
                engine.stop()
    return made[0]


async def ended(future: Future[None]) -> None:
    """Waits for a future of another thread; cancelling the task does not cancel it."""
    await asyncio.shield(asyncio.wrap_future(future))
