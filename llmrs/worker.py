"""The thread that owns the backend: it loads the model, steps the core, and gives everything back at the end."""

import queue
import sys
import threading
from collections.abc import Callable
from contextlib import closing

from llmrs.core.config import EngineConfig
from llmrs.core.engine import EngineCore
from llmrs.core.errors import EngineClosedError, LlmrsError
from llmrs.core.request import Request
from llmrs.loading import Model, Progress, load, make_backend

Command = Callable[[EngineCore], None]


class Worker:
    """Runs commands between steps, in the order in which they were given, from any thread."""

    def __init__(self, config: EngineConfig, model: Model, progress: Progress) -> None:
        """Returns when the model is loaded; raises what loading raised."""
        self.core: EngineCore
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._closing = threading.Lock()
        self._closed = False
        self._loaded = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(config, model, progress), name="llmrs", daemon=True)
        self._thread.start()
        self._loaded.wait()
        if self._failure is not None:
            self._thread.join()
            raise self._failure

    def submit(self, request: Request) -> None:
        """Raises RequestError when the request can't be served, EngineClosedError when nobody is there to do it."""
        self.core.check(request)
        self._give(lambda core: core.submit(request))

    def cancel(self, request: Request) -> None:
        if request.finish_reason is None and not self._closed:
            self._commands.put(lambda core: core.cancel(request))

    def close(self) -> None:
        """Ends every request with EngineClosedError, and returns when the backend's memory is given back."""
        with self._closing:
            if not self._closed:
                self._closed = True
                self._commands.put(lambda core: core.close(EngineClosedError("the engine was closed")))
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _give(self, command: Command) -> None:
        with self._closing:
            if self._closed:
                raise EngineClosedError("the engine is closed", "make a new one")
            self._commands.put(command)

    def _run(self, config: EngineConfig, model: Model, progress: Progress) -> None:
        try:
            with closing(make_backend(config)) as backend:
                self.core = load(backend, config, model, progress)
                self._loaded.set()
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
        if self._loaded.is_set():
            self._take_commands()
            self.core.close(EngineClosedError(f"the engine stopped: {bug!r}" if bug else "the engine was closed"))
        self._loaded.set()

    def _take_commands(self) -> None:
        """Runs what was asked for; waits for something when there is nothing else to do."""
        while not self._commands.empty() or (self.core.idle and not self._closed):
            self._commands.get()(self.core)
