"""`llmrs bench --host`: what a step costs the host, on a device that answers at once."""

import json
import os
import platform
from typing import Any

from llmrs.backends.base import load_backend
from llmrs.cli.options import BenchOptions
from llmrs.cli.terminal import StatusLine

RUNNING = (1, 8, 32, 128, 256)  # requests at once


def host(options: BenchOptions) -> int:
    from llmrs.bench.host import host_step
    from llmrs.models import demo
    from llmrs.models.text.tokenizer import Tokenizer

    line, tokenizer, found = StatusLine(), Tokenizer.load(demo.FILES), {}
    for running in options.batches or RUNNING:
        line.show(lambda n=running: f"measuring {n} requests")  # type: ignore[misc]
        found[running] = host_step(tokenizer, running)
    line.clear()
    if options.json:
        print(json.dumps({"host_seconds_per_step": found, "python": platform.python_version()}))
        return 0
    print(f"host time per step, median, Python {platform.python_version()}, {os.cpu_count()} cores")
    print(f"{'running':>8}{'ms per step':>14}{'µs per request':>16}")
    for running, seconds in found.items():
        print(f"{running:8}{1e3 * seconds:14.3f}{1e6 * seconds / running:16.2f}")
    return 0


def mlx_host(options: BenchOptions) -> int:
    """The time to build MLX's graph of a decode step, against mlx-lm's where that is installed."""
    load_backend("mlx")  # raises BackendError where MLX is missing or too old
    from llmrs.bench import mlx_lm

    results: dict[int, Any] = {n: mlx_lm.host(n, "f32", "auto", 15) for n in options.batches or (1, 32)}
    counts = mlx_lm.per_layer()
    if options.json:
        print(json.dumps({"graph_seconds_per_step": results, "per_layer": counts}))
        return 0
    print("time to build the graph of a decode step of 28 layers, median")
    for batch, times in results.items():
        print(f"batch {batch:4}: " + ", ".join(f"{name} {1e3 * seconds:.2f} ms" for name, seconds in times.items()))
    print("per layer: " + ", ".join(f"{count} {name}" for name, count in counts.items()))
    return 0
