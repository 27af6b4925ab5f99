"""What `llmrs bench` prints: each part when it is there, or one JSON object at the end; and the picture's file."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrs.cli.options import BenchOptions
from llmrs.cli.streams import advice
from llmrs.cli.terminal import StatusLine
from llmrs.core.errors import ConfigError

if TYPE_CHECKING:
    from llmrs.bench.roofline import Device

FULL = 1.0  # scale of a workload as it is defined


class Report:
    """What was measured, by heading; each part is printed when it is there, or all of it at the end as JSON."""

    def __init__(self, options: BenchOptions) -> None:
        self.options, self.found = options, dict[str, list[Any]]()
        self.head: dict[str, float] = {} if options.scale == FULL else {"scale": options.scale}
        if self.head:
            self._print(f"scaled: {options.scale:g} of each workload's requests and tokens")

    def with_ceilings(self, device: "Device") -> "Device":
        """The device itself."""
        self.head |= {"bytes_per_second": device.bandwidth, "operations_per_second": device.flops}
        read, computed = device.bandwidth / 1e9, device.flops / 1e12
        self._print(f"ceilings: {read:.1f} GB/s read, {computed:.2f} TFLOP/s")
        return device

    def add(self, heading: str, records: Iterable[Any]) -> None:
        """Takes what is measured meanwhile."""
        from llmrs.bench.report import TABLES

        line = StatusLine()
        line.show(lambda: f"measuring {heading}")
        self.found[heading] = list(records)
        line.clear()
        self._print(*TABLES[heading](self.found[heading]))

    def end(self) -> None:
        from llmrs.bench.report import record

        if self.options.json:
            print(json.dumps({**self.head, **{name: [*map(record, found)] for name, found in self.found.items()}}))

    def _print(self, *lines: str) -> None:
        if not self.options.json:
            print("\n".join(lines), flush=True)

    def draw(self, path: str) -> None:
        """Writes the picture of the grid. Raises ConfigError where there is nothing to draw, or no place for a file."""
        from llmrs.bench.report import picture

        try:
            Path(path).write_text(picture(self.found["grid"]), "utf-8")
        except OSError as error:
            raise ConfigError(f"plot: {path} can't be written: {error.strerror}", advice(error)) from error
