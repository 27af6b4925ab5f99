"""The device thread: it owns the backend, loads the model, steps the core, and releases all memory at the end.

Other threads put commands into a queue (`Worker.submit`); the thread runs them between steps, then calls
`EngineCore.step`, which launches on the backend and reports tokens to each request's `on_update`.
"""

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
from llmrs.loading import OnMemoryPlan, load, make_backend
from llmrs.memory import MemoryPlan
from llmrs.model import Model, Progress
from llmrs.process import current_process

Command = Callable[[EngineCore], None]
Result = TypeVar("Result")
LoadEvent = tuple[str, tuple[object, ...]]  # a callback's name, its arguments


class Worker:
    """Runs commands between steps, in the order of their arrival, from any thread."""

    def __init__(self, config: EngineConfig, model: Model, progress: Progress, on_memory_plan: OnMemoryPlan) -> None:
        """Returns when the model is loaded. Raises the errors of loading."""
        self.core: EngineCore
        self.memory_plan: MemoryPlan
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self.ended: Future[None] = Future()  # done when the backend's memory is released
        self.ended.set_running_or_notify_cancel()  # waiters can't cancel it
        # No lock guards these: a signal handler may close the engine while its thread submits a request. Commands
        # after `_stopped` are refused, those before it are run; see `_enqueue` and `_shut_down`.
        self._closed = self._stopped = False
        self._loaded = False
        self._load_events: queue.SimpleQueue[LoadEvent | None] = queue.SimpleQueue()  # None: loading has ended
        self._load_cancelled = False
        self._failure: BaseException | None = None
        self._process = current_process()
        self._thread = threading.Thread(target=self._run, args=(config, model), name="llmrs", daemon=True)
        self._thread.start()
        self._wait_for_model({"progress": progress, "memory_plan": on_memory_plan})
        if self._failure is not None:
            self._thread.join()
            try:
                raise self._failure
            finally:
                self._failure = None  # its traceback holds this worker

    def _wait_for_model(self, callbacks: Mapping[str, Callable[..., object]]) -> None:
        """Runs the callbacks in the caller's thread; an exception, Ctrl-C included, cancels the loading."""
        event: LoadEvent | None = ("", ())
        try:
            while (event := self._load_events.get()) is not None:
                name, values = event
                if callbacks[name](*values) is False:
                    raise LoadCancelledError("the loading of the model was cancelled")
        finally:
            if event is not None:
                self._load_cancelled = True
                self.close()

    def _report(self, name: str, *values: object) -> None:
        if self._load_cancelled:
            raise LoadCancelledError("the loading of the model was cancelled")
        self._load_events.put((name, values))

    def submit(self, request: Request, followers: Sequence[Request] = ()) -> None:
        """Queues a checked request for `EngineCore.submit`, and others with its prompt. Raises EngineClosedError, in a
        fork too."""
        self._enqueue(lambda core: submit_group(core, request, followers))

    def cancel(self, request: Request) -> None:
        """Ends a request, unless it has ended; one that is not submitted yet will not start."""
        if request.finish_reason is None and not self._closed and not self.in_fork:
            self._commands.put(lambda core: core.cancel(request))

    @property
    def in_fork(self) -> bool:
        """Whether this is a fork of the engine's process, which alone has the thread and the memory."""
        return current_process() != self._process

    def stop(self) -> None:
        """Has the thread end every request with EngineClosedError, and then itself. Does not wait."""
        if not self._stopped and not self.in_fork:
            self._closed = True
            self._commands.put(lambda core: core.close(EngineClosedError("the engine was closed")))

    def close(self) -> None:
        """`stop`, and waits until the backend's memory is released."""
        self.stop()
        if threading.current_thread() is not self._thread and not self.in_fork:
            self._thread.join()

    def run_on_device_thread(self, function: Callable[[Backend], Result]) -> Result:
        """Runs a function between two steps. Raises its LlmrsError; BackendError for errors of the device."""
        results: queue.SimpleQueue[tuple[Result | None, LlmrsError | None]] = queue.SimpleQueue()

        def command(core: EngineCore) -> None:
            result: tuple[Result | None, LlmrsError | None] = None, EngineClosedError("the engine stopped")
            try:
                if not self._stopped:
                    result = function(self._backend), None
            except LlmrsError as error:
                result = None, error
            except (RuntimeError, MemoryError, ArithmeticError) as error:
                result = None, BackendError(f"the device failed: {error}")
            finally:  # the caller must never wait forever
                results.put(result)

        self._enqueue(command)
        value, error = results.get()
        if error is not None:
            raise error
        return cast(Result, value)

    def _enqueue(self, command: Command) -> None:
        if self.in_fork:
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
                callbacks = partial(self._report, "progress"), partial(self._report, "memory_plan")
                self.core, self.memory_plan = load(backend, config, model, *callbacks)
                self._loaded = True
                self._load_events.put(None)
                while not (self._closed and self._commands.empty()):
                    self._drain_commands()
                    self.core.step()
        except LlmrsError as error:
            self._failure = error
        finally:
            try:
                self._shut_down(sys.exception())
            finally:  # waiters are released, whatever ended the thread
                self._load_events.put(None)
                self.ended.set_result(None)

    def _shut_down(self, bug: BaseException | None) -> None:
        """Ends every request, queued submissions included."""
        self._failure = self._failure or bug
        self._closed = self._stopped = True
        if self._loaded:
            try:
                self._drain_commands()
            finally:
                self.core.close(EngineClosedError(f"the engine stopped: {bug!r}" if bug else "the engine was closed"))

    def _drain_commands(self) -> None:
        """Runs the commands queued by now; waits for one while the core is idle.

        Later commands wait for the next step, so that a flood of submissions does not delay running requests.
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
