"""A timeline of each step's phases, in the trace format of Chrome (chrome://tracing, ui.perfetto.dev).

Source: "Trace Event Format", the complete events ("ph": "X"), with times in microseconds.
"""

import json
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmrs.core.errors import ConfigError

MAX_EVENTS = 1_000_000  # later ones are dropped


class Trace:
    """Records spans of the device thread."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self._start = time.perf_counter_ns()

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        begin = time.perf_counter_ns()
        try:
            yield
        finally:
            if len(self.events) < MAX_EVENTS:
                times = {"ts": (begin - self._start) / 1000, "dur": (time.perf_counter_ns() - begin) / 1000}
                self.events.append({"name": name, "ph": "X", "pid": 0, "tid": 0, **times})

    def write(self, path: Path) -> None:
        """Raises ConfigError where no file can be written."""
        try:
            path.write_text(json.dumps({"traceEvents": self.events, "displayTimeUnit": "ms"}), "utf-8")
        except OSError as error:
            raise ConfigError(f"trace: {path} can't be written: {error.strerror}", "give another file") from error


def union_length(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of the union of (begin, end) intervals: overlaps count once."""
    total, covered_to = 0.0, float("-inf")
    for begin, end in sorted(intervals):
        total += max(end - max(begin, covered_to), 0.0)
        covered_to = max(covered_to, end)
    return total
