"""`llmrs bench`: what a step costs beside the device's own work."""

import json
import os
import platform

import typer

from llmrs.cli.terminal import StatusLine, guarded
from llmrs.core.errors import ConfigError

RUNNING = (1, 8, 32, 128, 256)  # requests at once


def bench(
    host: bool = typer.Option(False, "--host", help="the host's part of a step, on a device that answers at once"),
    as_json: bool = typer.Option(False, "--json", help="one JSON object"),
) -> int:
    """Measures the engine's own time per step: schedule, batch, commit, and tokens to text."""
    return guarded(lambda: measure(host, as_json))


def measure(host: bool, as_json: bool) -> int:
    if not host:
        raise ConfigError("`llmrs bench` without --host is not there yet", "`llmrs run` ends with tokens per second")
    # here, since `llmrs --help` should not wait for them
    from llmrs.bench import host_step
    from llmrs.models import demo
    from llmrs.models.tokenizer import Tokenizer

    line, tokenizer, found = StatusLine(), Tokenizer.load(demo.FILES), {}
    for running in RUNNING:
        line.show(lambda n=running: f"measuring {n} requests")  # type: ignore[misc]
        found[running] = host_step(tokenizer, running)
    line.clear()
    if as_json:
        print(json.dumps({"host_seconds_per_step": found, "python": platform.python_version()}))
        return 0
    print(f"host time per step, median, Python {platform.python_version()}, {os.cpu_count()} cores")
    print(f"{'running':>8}{'ms per step':>14}{'µs per request':>16}")
    for running, seconds in found.items():
        print(f"{running:8}{1e3 * seconds:14.3f}{1e6 * seconds / running:16.2f}")
    return 0
