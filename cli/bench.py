"""`llmrs bench`: a model's speed against the device's roofline, or the CPU overhead of a step."""

import json
import os
import platform
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from llmrs.cli.flags import Flags
from llmrs.cli.loading import load_engine
from llmrs.cli.options import BenchOptions
from llmrs.cli.outputs import check_outputs
from llmrs.cli.settings import Settings, load_settings
from llmrs.cli.streams import require_stdout, write_hint
from llmrs.cli.terminal import StatusLine
from llmrs.config import EngineConfig
from llmrs.core.errors import ConfigError

if TYPE_CHECKING:
    from llmrs.bench.roofline import Device
    from llmrs.bench.startup import StartupTimes
    from llmrs.bench.workloads import Workload
    from llmrs.engine import Engine

# llmrs.bench is imported inside functions to keep `llmrs --help` fast

SECTIONS: dict[str, type] = {"Measurements": BenchOptions, "Model and memory": EngineConfig}
BATCHES = (1, 8, 32)
CONTEXTS = (512,)
PREFILL_TOKENS = 512  # of the default measurement
HOST_BATCHES = (1, 8, 32, 128, 256)


def bench(config: str | None, flags: Flags) -> int:
    """Measure a model's speed against the device's roofline, or the CPU overhead per step (--host)."""
    own = {name: value for name, value in flags.items() if name in vars(BenchOptions())}
    options = BenchOptions(**own)
    settings = load_settings(config, {name: value for name, value in flags.items() if name not in own})
    options.check()
    refuse_unused(options, settings)
    check_outputs({"plot": options.plot}, settings.inputs, settings.engine.model_path)
    require_stdout()
    if options.host:
        return host(options)
    return bench_model(options, settings)


def refuse_unused(options: BenchOptions, settings: Settings) -> None:
    """Raises ConfigError for a flag without effect. A config file may hold options of other commands."""
    if options.host:
        for name in sorted(settings.flags - {"backend"}):
            raise ConfigError(f"{name} has no effect on the CPU overhead of a step", "leave it out, or --host")
        if "backend" in settings.flags and settings.engine.backend not in ("auto", "mlx"):
            hint = "leave it out, since the scheduler is the same for all"
            raise ConfigError(f"backend: {settings.engine.backend} is not used with host", hint)
    elif "prefix_cache" in settings.flags and settings.engine.prefix_cache:
        raise ConfigError("prefix_cache: benchmarks run without it", "leave it out")


def bench_model(options: BenchOptions, settings: Settings) -> int:
    """All measurements that need the model, in one engine; startup in processes without another engine."""
    from llmrs.bench.workloads import parse_workloads

    workloads = parse_workloads(options.workloads, options.scale) if options.workloads is not None else []
    open_loop = parse_workloads("mixed", options.scale) if options.arrivals else []
    report = Report(options)
    if options.start:
        report.add("start", [time_startup(settings.engine)])
    if options.decode or workloads or open_loop or options.sweep or options.profile:
        config = size_for_bench(settings.engine, options, [*workloads, *open_loop])
        with load_engine(replace(settings, engine=config)) as engine:
            measure(engine, report, workloads, open_loop)
    report.end()
    if options.plot is not None:  # last, so that a full disk loses no figures
        report.write_plot(options.plot)
    return 0


def time_startup(config: EngineConfig) -> "StartupTimes":
    """Times `llmrs run` with this config."""
    from llmrs.bench import startup

    with TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(json.dumps(vars(config)), "utf-8")  # JSON is YAML
        return startup.measure(config, [sys.executable, "-m", "llmrs.cli", "run", str(file)])


def measure(
    engine: "Engine", report: "Report", workloads: "Sequence[Workload]", open_loop: "Sequence[Workload]"
) -> None:
    from llmrs.bench import decode, profile, serving, sweep
    from llmrs.bench.roofline import Device

    options = report.options
    batches, contexts = options.batches or BATCHES, options.contexts or CONTEXTS
    shapes = [(b, c) for c in contexts for b in batches]
    if options.profile:
        profile.check(engine, shapes)
    device = Device.of(engine)
    report.add_device(device)
    if options.decode:
        lengths = options.prompt_tokens, options.new_tokens, PREFILL_TOKENS
        report.add("results", decode.measure(engine, device, batches, *lengths))
    if workloads:
        report.add("workloads", serving.measure(engine, device, workloads))
    for w in open_loop:
        closed_loop = next((m for m in report.results.get("workloads", ()) if m.name == w.name), None)
        report.add("arrivals", serving.open_loop(engine, device, w, options.arrivals or (), closed_loop))
    if options.sweep:
        report.add("grid", sweep.sweep(engine, device, batches, contexts))
    if options.profile:
        report.add("profiles", (profile.profile_step(engine, device, b, c) for b, c in shapes))


def size_for_bench(config: EngineConfig, options: BenchOptions, workloads: "Sequence[Workload]") -> EngineConfig:
    """The config with the sequences and the context that the measurements need.

    Raises ConfigError for workloads longer than the model's context. The sweep skips such steps and says so.
    """
    steps = options.sweep or options.profile
    batches = (options.batches or BATCHES) if steps or options.decode else ()
    max_num_seqs = max(config.max_num_seqs, *batches, *(w.requests for w in workloads), 1)
    required = [w.max_len for w in workloads] + [options.prompt_tokens + options.new_tokens] * options.decode
    lengths = [*required, *((options.contexts or CONTEXTS) if steps else ()), (PREFILL_TOKENS + 1) * options.decode, 2]
    max_model_len = config.max_model_len or min(max(lengths), model_context(config))
    if required and max(required) > max_model_len:
        raise ConfigError(
            f"{max(required)} tokens of prompt and answer are more than the context of {max_model_len}",
            "lower --scale, --prompt-tokens or --new-tokens, or raise --max-model-len",
        )
    return replace(config, max_num_seqs=max_num_seqs, max_model_len=max_model_len, prefix_cache=False)


def model_context(config: EngineConfig) -> int:
    from llmrs.models.arch.gguf import model_config
    from llmrs.models.hub.resolve import resolve_model

    path = resolve_model(config.model_path, config.revision, offline=config.offline)
    return model_config(path).max_position_embeddings


def host(options: BenchOptions) -> int:
    """CPU time of a step by batch size, with a device that computes nothing."""
    from llmrs.bench.host import host_step
    from llmrs.models import demo
    from llmrs.models.text.tokenizer import Tokenizer

    line, tokenizer, times = StatusLine(), Tokenizer.load(demo.FILES), {}
    for batch in options.batches or HOST_BATCHES:
        line.show(lambda n=batch: f"measuring batch {n}")  # type: ignore[misc]
        times[batch] = host_step(tokenizer, batch)
    line.clear()
    if options.json:
        print(json.dumps({"host_seconds_per_step": times, "python": platform.python_version()}))
        return 0
    print(f"CPU overhead per step, median, Python {platform.python_version()}, {os.cpu_count()} cores")
    print(f"{'batch':>8}{'ms per step':>14}{'µs per request':>16}")
    for batch, seconds in times.items():
        print(f"{batch:8}{1e3 * seconds:14.3f}{1e6 * seconds / batch:16.2f}")
    return 0


class Report:
    """Results by section: each printed when it is complete, or all of them as one JSON object at the end."""

    def __init__(self, options: BenchOptions) -> None:
        self.options, self.results = options, dict[str, list[Any]]()
        self.header: dict[str, float] = {}
        if options.scale != BenchOptions.scale:
            self.header["scale"] = options.scale
            self._print(f"scaled: {options.scale:g} of each workload's requests and tokens")

    def add_device(self, device: "Device") -> None:
        self.header |= {"bytes_per_second": device.bandwidth, "operations_per_second": device.flops}
        self._print(f"roofline: {device.bandwidth / 1e9:.1f} GB/s read, {device.flops / 1e12:.2f} TFLOP/s")

    def add(self, section: str, records: Iterable[Any]) -> None:
        """Runs the measurements, which `records` yields."""
        from llmrs.bench.report import TABLES

        line = StatusLine()
        line.show(lambda: f"measuring {section}")
        self.results[section] = list(records)
        line.clear()
        self._print(*TABLES[section](self.results[section]))

    def end(self) -> None:
        from llmrs.bench.report import record

        if self.options.json:
            sections = {name: [*map(record, records)] for name, records in self.results.items()}
            print(json.dumps({**self.header, **sections}))

    def write_plot(self, path: str) -> None:
        """Raises ConfigError where the sweep is empty or the file can't be written."""
        from llmrs.bench.report import picture

        try:
            Path(path).write_text(picture(self.results["grid"]), "utf-8")
        except OSError as error:
            raise ConfigError(f"plot: {path} can't be written: {error.strerror}", write_hint(error)) from error

    def _print(self, *lines: str) -> None:
        if not self.options.json:
            print("\n".join(lines), flush=True)
