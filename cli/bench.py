"""`llmrs bench`: how fast a model runs here, beside what the device allows; or what a step costs the host."""

import json
import os
import platform
from dataclasses import asdict, replace
from typing import Any

from llmrs.cli.flags import Values
from llmrs.cli.loading import load_engine
from llmrs.cli.options import BenchOptions
from llmrs.cli.settings import Settings, load_settings
from llmrs.cli.terminal import StatusLine
from llmrs.core.config import EngineConfig
from llmrs.core.errors import BackendError, ConfigError

SECTIONS: dict[str, type] = {"What is measured": BenchOptions, "Model and memory": EngineConfig}
RUNNING = (1, 8, 32, 128, 256)  # requests at once, for the host's part
BATCHES = (1, 8, 32)


def bench(config: str | None, flags: Values) -> int:
    """Measures a model's speed and the device's ceilings, or with --host the engine's own time per step."""
    mine = BenchOptions(**{name: value for name, value in flags.items() if name in vars(BenchOptions())})
    settings = load_settings(config, {name: value for name, value in flags.items() if name not in vars(mine)})
    if mine.host:
        return mlx_host(mine) if settings.engine.backend == "mlx" else host(mine)
    return model(mine, settings)


def model(options: BenchOptions, settings: Settings) -> int:
    # here, since `llmrs --help` should not wait for it
    from llmrs.bench import measure

    batches = tuple(options.batches or BATCHES)
    length = options.prompt_tokens + options.new_tokens
    wanted = max(settings.engine.max_num_seqs, *batches)
    engine_config = replace(settings.engine, max_num_seqs=wanted, prefix_cache=False)
    with load_engine(replace(settings, engine=engine_config)) as engine:
        if length > engine.fit.length:
            raise ConfigError(
                f"{length} tokens of prompt and answer are more than the context of {engine.fit.length}",
                "lower --prompt-tokens or --new-tokens, or raise --max-model-len",
            )
        line = StatusLine()
        line.show(lambda: "measuring")
        device = engine.ceilings()
        found = list(measure(engine, device, batches, options.prompt_tokens, options.new_tokens))
        line.clear()
    ceilings = {"bytes_per_second": device.bandwidth, "operations_per_second": device.operations}
    if options.json:
        rows = [{**asdict(r), "tokens_per_second": r.rate, "share_of_ceiling": r.share} for r in found]
        print(json.dumps({**ceilings, "results": rows}))
        return 0
    print(f"ceilings: {device.bandwidth / 1e9:.1f} GB/s read, {device.operations / 1e12:.2f} TFLOP/s")
    print(f"{'':22}{'tokens':>8}{'seconds':>10}{'tokens/s':>12}{'of ceiling':>12}")
    for r in found:
        print(f"{r.what:22}{r.tokens:8}{r.seconds:10.3f}{r.rate:12.1f}{100 * r.share:10.1f} %")
    return 0


def host(options: BenchOptions) -> int:
    from llmrs.bench_host import host_step
    from llmrs.models import demo
    from llmrs.models.tokenizer import Tokenizer

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
    try:
        from llmrs import bench_mlx
    except ImportError as error:
        raise BackendError(f"MLX can't be loaded: {error}", "pip install 'llmrs[mlx]'") from error
    results: dict[int, Any] = {n: bench_mlx.host(n, "f32", "auto", 15) for n in options.batches or (1, 32)}
    counts = bench_mlx.per_layer()
    if options.json:
        print(json.dumps({"graph_seconds_per_step": results, "per_layer": counts}))
        return 0
    print("time to build the graph of a decode step of 28 layers, median")
    for batch, times in results.items():
        print(f"batch {batch:4}: " + ", ".join(f"{name} {1e3 * seconds:.2f} ms" for name, seconds in times.items()))
    print("per layer: " + ", ".join(f"{count} {name}" for name, count in counts.items()))
    return 0
