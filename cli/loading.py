"""An engine for a command, with its progress on the terminal."""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from llmrs.cli.settings import Settings
from llmrs.cli.terminal import StatusLine

if TYPE_CHECKING:
    from llmrs.engine import Engine
    from llmrs.memory import MemoryPlan


def load_engine(settings: Settings) -> "Engine":
    """Loads the model; the caller closes the engine. Raises LlmrsError."""
    line, name = StatusLine(), settings.engine.model_path
    line.show(lambda: f"loading {name}")

    def show(doing: str) -> Callable[[int, int], None]:
        return lambda done, total: line.show(lambda: f"{doing} {name}: {share(done, total)}")

    def table(plan: "MemoryPlan") -> None:
        line.clear()
        if line.active or not plan.complete:  # a script is told only what is not as it asked
            for title, text in plan.table():
                print(f"{title:13}{text}", file=sys.stderr)

    try:
        from llmrs.engine import Engine  # here, since it imports what `llmrs --help` should not wait for

        return Engine(settings.engine, progress=show("loading"), on_download=show("downloading"), on_memory_plan=table)
    finally:
        line.clear()


def share(done: int, total: int) -> str:
    """How much of it, in words."""
    return f"{100 * done // max(total, 1)} % of {total / 1e6:.1f} MB"
