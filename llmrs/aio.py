"""asyncio: a stream read with `async for`, and loading and closing that do not block the event loop."""

import asyncio
import queue
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from threading import get_ident
from typing import TYPE_CHECKING, Any, Self

from llmrs.core.errors import LlmrsError, LoadCancelledError, RequestError
from llmrs.output import GenerationOutput
from llmrs.stream import Stream

if TYPE_CHECKING:
    from llmrs.engine import Engine

Callback = Callable[..., object]  # False cancels the loading


def require_loop() -> None:
    """Raises RequestError without a running event loop."""
    try:
        asyncio.get_running_loop()
    except RuntimeError as error:
        hint = "call it in a coroutine, or use generate_stream"
        raise RequestError("stream_async needs a running event loop", hint) from error


class AsyncStream(AsyncIterator[str]):
    """A stream's text for `async for`, in the event loop that made it.

    `async with stream:` and `aclose()` cancel an unfinished request; so do the cancellation of a task that waits for
    the stream, the end of the event loop, and the stream's deletion. Tasks that read one stream share its text, and
    each gets the end.
    """

    def __init__(self, stream: Stream) -> None:
        loop, event, request, cancel = asyncio.get_running_loop(), asyncio.Event(), stream.request, stream._cancel
        self.stream, self._loop, self._event, self._thread = stream, loop, event, get_ident()

        def notify() -> None:  # holds no reference to the stream, whose deletion cancels the request
            try:
                loop.call_soon_threadsafe(event.set)
            except RuntimeError:  # the loop is closed
                cancel(request)

        stream._output.notify = notify

    def __aiter__(self) -> "AsyncStream":
        return self

    async def __anext__(self) -> str:
        if get_ident() != self._thread or not self._loop.is_running():
            self._check_loop()  # not for each token: on Linux before Python 3.12 it takes a system call
        while True:
            try:
                return self.stream.take(block=False)
            except StopIteration:
                raise StopAsyncIteration from None
            except queue.Empty:
                await self._wait()

    def _check_loop(self) -> None:
        """Raises RequestError in another loop."""
        if asyncio.get_running_loop() is not self._loop:
            hint = "read it in the loop that stream_async was called in"
            raise RequestError("the stream belongs to another event loop", hint)

    async def _wait(self) -> None:
        """Waits for new output. Cancels the request if the task is cancelled or closed."""
        interrupted = True
        try:
            await self._event.wait()
            self._event.clear()  # before the queue is read: later output sets it again
            interrupted = False
        finally:
            if interrupted:
                self.cancel()

    def cancel(self) -> None:
        """Ends the request after the current step."""
        self.stream.cancel()

    async def aclose(self) -> None:
        """Cancels an unfinished request and releases the engine. Callable repeatedly."""
        self.stream.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.aclose()

    def __reduce__(self) -> Any:
        raise RequestError("an AsyncStream can't be pickled or copied", "pickle the result of output()")

    def output(self) -> GenerationOutput:
        """The output so far, without waiting."""
        return self.stream.output()

    async def result(self) -> GenerationOutput:
        """Waits for the end and returns the whole output. Raises the request's error."""
        async for _ in self:
            pass
        return self.stream.output()


class LoadCallbacks:
    """Runs the callbacks of a loading thread in the event loop's thread.

    The loading thread does not wait for them: the loop may end first. The loading is cancelled at its next report after
    a callback raised or returned False, or `cancelled` was set.
    """

    def __init__(self) -> None:
        self.cancelled = False
        self._loop = asyncio.get_running_loop()
        self._calls: list[Future[None]] = []

    def in_loop(self, callback: Callback) -> Callback:
        """Wraps a callback for the loading thread; returns False once the loading is cancelled."""

        def report(*values: object) -> bool:
            if not self.cancelled:
                self._calls.append(asyncio.run_coroutine_threadsafe(self._call(callback, values), self._loop))
            return not self.cancelled

        return report

    async def _call(self, callback: Callback, values: tuple[object, ...]) -> None:
        if self.cancelled:
            return
        refused = True
        try:
            refused = callback(*values) is False
        finally:
            self.cancelled |= refused

    async def check(self) -> None:
        """Raises a callback's exception, or LoadCancelledError after one returned False."""
        for call in self._calls:
            await asyncio.wrap_future(call)
        if self.cancelled:
            raise LoadCancelledError("the loading of the model was cancelled")


async def load(make: Callable[..., "Engine"], **callbacks: Callback) -> "Engine":
    """Runs `make(**callbacks)` in a thread of its own, the callbacks in the event loop's.

    Loading ends if a callback raises, or returns False (LoadCancelledError), or the task is cancelled; an engine that
    the thread still makes is closed.
    """
    calls, made, complete = LoadCallbacks(), list["Engine"](), False

    def run() -> None:
        made.append(make(**{name: calls.in_loop(callback) for name, callback in callbacks.items()}))
        if calls.cancelled:
            made[0].close()

    try:
        try:
            await asyncio.to_thread(run)
        except LlmrsError:
            await calls.check()  # a callback's exception comes first: the error may follow from it
            raise
        try:
            await calls.check()
        finally:
            if calls.cancelled:
                await made[0].aclose()
        complete = True
    finally:
        if not complete:
            calls.cancelled = True  # before `made` is read: `run` reads it after
            for engine in made:
                engine.stop()
    return made[0]


async def wait_for(future: Future[None]) -> None:
    """Waits for a future of another thread; cancelling the task does not cancel it."""
    await asyncio.shield(asyncio.wrap_future(future))
