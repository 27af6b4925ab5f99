"""The asyncio side of a stream: the same answer, awaited."""

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Protocol, TypeVar

from llmrs.core.errors import LoadCancelledError
from llmrs.loading import Progress
from llmrs.output import GenerationOutput
from llmrs.stream import Stream


class _Closes(Protocol):
    def close(self) -> None: ...


Closable = TypeVar("Closable", bound=_Closes)


class Bell:
    """Wakes a task of an event loop; `ring` may be called from any thread, also when the loop is gone."""

    def __init__(self) -> None:
        self._loop, self._event = asyncio.get_running_loop(), asyncio.Event()

    def ring(self) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._event.set)

    async def wait(self) -> None:
        await self._event.wait()

    def mute(self) -> None:
        self._event.clear()


class AsyncStream(AsyncIterator[str]):
    """A stream's text for `async for`. A task that is cancelled while it waits cancels the request."""

    def __init__(self, stream: Stream, bell: Bell) -> None:
        self.stream, self._bell = stream, bell

    def __aiter__(self) -> "AsyncStream":
        return self

    async def __anext__(self) -> str:
        while True:
            self._bell.mute()  # before looking: what comes after that rings again
            try:
                return self.stream.take(block=False)
            except StopIteration:
                raise StopAsyncIteration from None
            except queue.Empty:
                await self._next()

    async def _next(self) -> None:
        try:
            await self._bell.wait()
        except asyncio.CancelledError:
            self.cancel()
            raise

    def cancel(self) -> None:
        """Ends the answer where it is."""
        self.stream.cancel()

    def output(self) -> GenerationOutput:
        """The answer so far, without waiting."""
        return self.stream.output()

    async def result(self) -> GenerationOutput:
        """Waits for the end; the whole answer. Raises what ended it when that was an error."""
        async for _ in self:
            pass
        return self.stream.output()


async def load(make: Callable[[Progress], Closable], progress: Progress) -> Closable:
    """What `make(progress)` makes in a thread of its own; `progress` is called in the loop's.

    False from it ends the loading, and so does cancelling the task: what the thread still makes is closed.
    """
    loop, unwanted = asyncio.get_running_loop(), threading.Event()

    def tell(done: int, total: int) -> None:
        if progress(done, total) is False:
            unwanted.set()

    def advance(done: int, total: int) -> bool:
        loop.call_soon_threadsafe(tell, done, total)
        return not unwanted.is_set()

    def run() -> Closable:
        made = make(advance)
        if unwanted.is_set():
            made.close()
        return made

    try:
        made = await asyncio.to_thread(run)  # by now every `tell` has been heard
    except asyncio.CancelledError:
        unwanted.set()
        raise
    if unwanted.is_set():
        await asyncio.to_thread(made.close)
        raise LoadCancelledError("the loading of the model was cancelled")
    return made
