"""The thread that owns the backend: it loads the model, steps the core, and gives everything back at the end."""

import os
import queue
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import closing
from functools import partial
from typing import TypeVar, cast

from llmrs.backends.base import Backend
from llmrs.config import EngineConfig
from llmrs.core.engine import EngineCore
from llmrs.core.errors import BackendError, EngineClosedError, LlmrsError, LoadCancelledError
from llmrs.core.request import Request
from llmrs.loading import Model, OnFit, Progress, load, make_backend
from llmrs.memory import Fit

Command = Callable[[EngineCore], None]
Answer = TypeVar("Answer")
Event = tuple[str, tuple[object, ...]]  # which callback, and what it is told


class Worker:
    """Runs commands between steps, in the order in which they were given, from any thread."""

    def __init__(self, config: EngineConfig, model: Model, progress: Progress, on_fit: OnFit) -> None:
        """Returns when the model is loaded; raises what loading raised."""
        self.core: EngineCore
        self.fit: Fit
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self.ended: Future[None] = Future()  # done when the backend's memory is given back
        self.ended.set_running_or_notify_cancel()  # who waits for it can't cancel it
        # No lock guards these: a signal handler may close the engine while its thread submits a request. Commands that
        # come after `_stopped` are refused, those before it are run; see `_give` and `_end`.
        self._closed = self._stopped = False
        self._loaded = False
        self._loading: queue.SimpleQueue[Event | None] = queue.SimpleQueue()  # None: the end
        self._unwanted = False  # nobody waits for the model any more
        self._failure: BaseException | None = None
        self._process = os.getpid()
        self._thread = threading.Thread(target=self._run, args=(config, model), name="llmrs", daemon=True)
        self._thread.start()
        self._wait_for_model({"progress": progress, "fit": on_fit})
        if self._failure is not None:
            self._thread.join()
            try:
                raise self._failure
            finally:
                self._failure = None  # whose traceback holds this worker

    def _wait_for_model(self, callbacks: Mapping[str, Callable[..., object]]) -> None:
        """Calls the caller's callbacks in the caller's thread; what they raise, or Ctrl-C, ends the loading too."""
        event: Event | None = ("", ())
        try:
            while (event := self._loading.get()) is not None:
                name, values = event
                if callbacks[name](*values) is False:
                    raise LoadCancelledError("the loading of the model was cancelled")
        finally:
            if event is not None:
                self._unwanted = True
                self.close()

    def _report(self, name: str, *values: object) -> None:
        if self._unwanted:
            raise LoadCancelledError("the loading of the model was cancelled")
        self._loading.put((name, values))

    def submit(self, request: Request, followers: Sequence[Request] = ()) -> None:
        """Queues a checked request, and others with its prompt. Raises EngineClosedError, in a fork too."""
        self._give(lambda core: submit_group(core, request, followers))

    def cancel(self, request: Request) -> None:
        """Ends a request, unless it has ended; one that is not submitted yet will not start."""
        if request.finish_reason is None and not self._closed and not self.foreign:
            self._commands.put(lambda core: core.cancel(request))

    @property
    def foreign(self) -> bool:
        """Whether this is a fork of the engine's process, which alone has the thread and the memory."""
        return os.getpid() != self._process

    def stop(self) -> None:
        """Has the thread end every request with EngineClosedError, and then itself. Does not wait."""
        if not self._stopped and not self.foreign:
            self._closed = True
            self._commands.put(lambda core: core.close(EngineClosedError("the engine was closed")))

    def close(self) -> None:
        """`stop`, and returns when the backend's memory is given back."""
        self.stop()
        if threading.current_thread() is not self._thread and not self.foreign:
            self._thread.join()

    def ask(self, question: Callable[[Backend], Answer]) -> Answer:
        """What the backend answers, on its own thread, between two steps. Raises BackendError where that fails."""
        answers: queue.SimpleQueue[tuple[Answer | None, LlmrsError | None]] = queue.SimpleQueue()

        def answer(core: EngineCore) -> None:
            found: tuple[Answer | None, LlmrsError | None] = None, EngineClosedError("the engine stopped")
            try:
                if not self._stopped:
                    found = question(self._backend), None
            except LlmrsError as error:
                found = None, error
            except (RuntimeError, MemoryError, ArithmeticError) as error:
                found = None, BackendError(f"the device failed: {error}")
            finally:  # whatever happens, nobody may be left waiting
                answers.put(found)

        self._give(answer)
        result, error = answers.get()
        if error is not None:
            raise error
        return cast(Answer, result)

    def _give(self, command: Command) -> None:
        if self.foreign:
            hint = "make an engine in each process, and start processes with multiprocessing's 'spawn'"
            raise EngineClosedError("the engine belongs to another process", hint)
        if not self._closed:
            self._commands.put(command)
            if not self._stopped:  # else the thread may have ended without running it
                return
        why = f"the engine stopped: {self._failure!r}" if self._failure else "the engine is closed"
        raise EngineClosedError(why, "make a new one")

    def _run(self, config: EngineConfig, model: Model) -> None:
        try:
            with closing(make_backend(config)) as backend:
                self._backend = backend
                told = partial(self._report, "progress"), partial(self._report, "fit")
                self.core, self.fit = load(backend, config, model, *told)
                self._loaded = True
                self._loading.put(None)
                self._serve()
        except LlmrsError as error:
            self._failure = error
        finally:
            try:
                self._end(sys.exception())
            finally:  # whatever ended the thread, nothing may be left waiting for it
                self._loading.put(None)
                self.ended.set_result(None)

    def _serve(self) -> None:
        while not (self._closed and self._commands.empty()):
            self._take_commands()
            self.core.step()

    def _end(self, bug: BaseException | None) -> None:
        """Ends every request, those whose submission still waits in the queue too."""
        self._failure = self._failure or bug
        self._closed = self._stopped = True
        if self._loaded:
            try:
                self._take_commands()
            finally:
                self.core.close(EngineClosedError(f"the engine stopped: {bug!r}" if bug else "the engine was closed"))

    def _take_commands(self) -> None:
        """Runs what has been asked for by now; waits for something when there is nothing else to do.

        What comes meanwhile waits for a step: whoever submits many requests must not keep the first ones waiting.
        """
        for _ in range(self._commands.qsize()):
            self._commands.get()(self.core)
        while self.core.idle and not self._closed:
            if not (self._commands.empty() and self._backend.idle()):
                self._commands.get()(self.core)


def submit_group(core: EngineCore, request: Request, followers: Sequence[Request]) -> None:
    """Submits a request, and its followers once their common prompt is in the prefix cache."""
    update, waiting = request.on_update, list(followers)

    def on_update(request: Request, tokens: list[int]) -> None:
        update(request, tokens)
        while waiting and (request.output or request.finish_reason):
            core.submit(waiting.pop(0))

    if followers:
        request.on_update = on_update
    core.submit(request)
