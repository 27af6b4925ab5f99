"""The thread that owns the backend: it loads the model, steps the core, and gives everything back at the end."""

import os
import queue
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import closing
from functools import partial
from typing import TypeVar, cast

from llmrs.backends.base import Backend
from llmrs.core.config import EngineConfig
from llmrs.core.engine import EngineCore
from llmrs.core.errors import BackendError, EngineClosedError, LlmrsError, LoadCancelledError
from llmrs.core.request import Request
from llmrs.fit import Fit
from llmrs.loading import Model, OnFit, Progress, load, make_backend

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
        self._closing = threading.Lock()
        self._closed = False
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
            raise self._failure

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

    def submit(self, request: Request) -> None:
        """Raises RequestError when the request can't be served, EngineClosedError when nobody is there to do it."""
        self.core.check(request)
        self._give(lambda core: core.submit(request))

    def cancel(self, request: Request) -> None:
        if request.finish_reason is None and not self._closed and os.getpid() == self._process:
            self._commands.put(lambda core: core.cancel(request))

    def close(self) -> None:
        """Ends every request with EngineClosedError, and returns when the backend's memory is given back."""
        if os.getpid() != self._process:
            return  # a fork: thread and memory are the parent's
        with self._closing:
            if not self._closed:
                self._closed = True
                self._commands.put(lambda core: core.close(EngineClosedError("the engine was closed")))
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def ask(self, question: Callable[[Backend], Answer]) -> Answer:
        """What the backend answers, on its own thread, between two steps. Raises BackendError where that fails."""
        answers: queue.SimpleQueue[tuple[Answer | None, LlmrsError | None]] = queue.SimpleQueue()

        def answer(core: EngineCore) -> None:
            found: tuple[Answer | None, LlmrsError | None] = None, EngineClosedError("the engine stopped")
            try:
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
        if os.getpid() != self._process:
            raise EngineClosedError("the engine belongs to another process", "make one after the fork")
        with self._closing:
            if self._closed:
                raise EngineClosedError("the engine is closed", "make a new one")
            self._commands.put(command)

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
            self._end(sys.exception())

    def _serve(self) -> None:
        while not (self._closed and self._commands.empty()):
            self._take_commands()
            self.core.step()

    def _end(self, bug: BaseException | None) -> None:
        """Whatever ended the thread, nobody may be left waiting for it."""
        with self._closing:
            self._closed = True
        self._failure = self._failure or bug
        if self._loaded:
            self._take_commands()
            self.core.close(EngineClosedError(f"the engine stopped: {bug!r}" if bug else "the engine was closed"))
        self._loading.put(None)

    def _take_commands(self) -> None:
        """Runs what has been asked for by now; waits for something when there is nothing else to do.

        What comes meanwhile waits for a step: whoever submits many requests must not keep the first ones waiting.
        """
        for _ in range(self._commands.qsize()):
            self._commands.get()(self.core)
        while self.core.idle and not self._closed:
            if not (self._commands.empty() and self._backend.idle()):
                self._commands.get()(self.core)
