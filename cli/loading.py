"""Loads an engine for a command, with progress on the terminal."""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from llmrs.cli.settings import Settings
from llmrs.cli.terminal import StatusLine

if TYPE_CHECKING:
    from llmrs.engine import Engine
    from llmrs.memory import MemoryPlan


def show_progress(line: StatusLine, action: str, name: str) -> Callable[[int, int], None]:
    """A callback of bytes done and in total."""

    def show(done: int, total: int) -> None:
        line.show(lambda: f"{action} {name}: {100 * done // max(total, 1)} % of {total / 1e6:.1f} MB")

    return show


def load_engine(settings: Settings) -> "Engine":
    """Loads the model; the caller closes the engine. Raises LlmrsError."""
    line, name = StatusLine(), settings.engine.model_path
    line.show(lambda: f"loading {name}")

    def table(plan: "MemoryPlan") -> None:
        line.clear()
        if line.active or not plan.complete:  # without a terminal only where the config was not met in full
            for title, text in plan.table():
                print(f"{title:13}{text}", file=sys.stderr)

    try:
        from llmrs.engine import Engine  # imported here to keep `llmrs --help` fast

        loading, downloading = (show_progress(line, action, name) for action in ("loading", "downloading"))
        return Engine(settings.engine, progress=loading, on_download=downloading, on_memory_plan=table)
    finally:
        line.clear()
