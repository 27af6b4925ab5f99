"""`llmrs bench`: how fast a model runs here, beside what the device allows; or what a step costs the host."""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from llmrs.cli.bench_host import host, mlx_host
from llmrs.cli.bench_report import Report
from llmrs.cli.flags import Values
from llmrs.cli.loading import load_engine
from llmrs.cli.options import BenchOptions
from llmrs.cli.outputs import check_outputs
from llmrs.cli.settings import Settings, load_settings
from llmrs.cli.streams import require_stdout
from llmrs.config import EngineConfig
from llmrs.core.errors import ConfigError

if TYPE_CHECKING:
    from llmrs.bench.startup import StartupTimes
    from llmrs.bench.workloads import Workload
    from llmrs.engine import Engine

SECTIONS: dict[str, type] = {"What is measured": BenchOptions, "Model and memory": EngineConfig}
BATCHES = (1, 8, 32)
CONTEXTS = (512,)
PROMPT = 512  # tokens of the prompt that is timed beside decoding


def bench(config: str | None, flags: Values) -> int:
    """Measures a model's speed and the device's ceilings, or with --host the engine's own time per step."""
    mine = BenchOptions(**{name: value for name, value in flags.items() if name in vars(BenchOptions())})
    settings = load_settings(config, {name: value for name, value in flags.items() if name not in vars(mine)})
    mine.check()
    refuse_unused(mine, settings)
    check_outputs({"plot": mine.plot}, settings.inputs, settings.engine.model_path)
    require_stdout()
    if mine.host:
        return mlx_host(mine) if settings.engine.backend == "mlx" else host(mine)
    return model(mine, settings)


def refuse_unused(mine: BenchOptions, settings: Settings) -> None:
    """Raises ConfigError for a flag that changes nothing in what is measured. A file is for other commands too."""
    if mine.host:
        for name in sorted(settings.flags - {"backend"}):
            raise ConfigError(f"{name} changes nothing in the host's part of a step", "leave it out, or --host")
        if "backend" in settings.flags and settings.engine.backend not in ("auto", "mlx"):
            hint = (
                "leave it out: the scheduler's part is the same on all; or --backend mlx, for the part of MLX's graph"
            )
            raise ConfigError(f"backend: {settings.engine.backend} is not used with host", hint)
    elif "prefix_cache" in settings.flags and settings.engine.prefix_cache:
        raise ConfigError("prefix_cache: speed is measured without one", "leave it out")


def model(mine: BenchOptions, settings: Settings) -> int:
    """Everything that needs the model, in one engine; and the start of processes, beside none."""
    from llmrs.bench.workloads import parse_workloads  # here and below, since `llmrs --help` should not wait for it

    chosen = parse_workloads(mine.workloads, mine.scale) if mine.workloads is not None else []
    arriving = parse_workloads("mixed", mine.scale) if mine.arrivals else []
    report = Report(mine)
    if mine.start:
        report.add("start", [started(settings.engine)])
    if mine.table or chosen or arriving or mine.grid or mine.profile:
        config = with_room(settings.engine, mine, [*chosen, *arriving])
        with load_engine(replace(settings, engine=config)) as engine:
            measure(engine, mine, report, chosen, arriving)
    report.end()
    if mine.plot is not None:  # last, so that a disk that is full loses no figures
        report.draw(mine.plot)
    return 0


def started(config: EngineConfig) -> "StartupTimes":
    """Times `llmrs run` with a file of this config."""
    from llmrs.bench import startup

    with TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(json.dumps(vars(config)), "utf-8")  # JSON is YAML
        return startup.measure(config, [sys.executable, "-m", "llmrs.cli", "run", str(file)])


def measure(
    engine: "Engine",
    mine: BenchOptions,
    report: Report,
    chosen: "Sequence[Workload]",
    arriving: "Sequence[Workload]",
) -> None:
    from llmrs.bench import decode, profile, serving, sweep
    from llmrs.bench.roofline import Device

    batches, contexts = mine.batches or BATCHES, mine.contexts or CONTEXTS
    shapes = [(b, c) for c in contexts for b in batches]
    if mine.profile:
        profile.check(engine, shapes)
    device = report.with_ceilings(Device.of(engine))
    if mine.table:
        report.add("results", decode.measure(engine, device, batches, mine.prompt_tokens, mine.new_tokens, PROMPT))
    if chosen:
        report.add("workloads", serving.measure(engine, device, chosen))
    for w in arriving:
        closed = next((m for m in report.found.get("workloads", ()) if m.name == w.name), None)
        report.add("arrivals", serving.open_loop(engine, device, w, mine.arrivals or (), closed))
    if mine.grid:
        report.add("grid", sweep.sweep(engine, device, batches, contexts))
    if mine.profile:
        report.add("profiles", (profile.profile_step(engine, device, b, c) for b, c in shapes))


def with_room(config: EngineConfig, mine: BenchOptions, workloads: "Sequence[Workload]") -> EngineConfig:
    """The config with slots and context for what is measured. Raises ConfigError where the model has no such context.

    Steps of the grid that are too long are left out there, and said to be.
    """
    steps = mine.grid or mine.profile
    batches = (mine.batches or BATCHES) if steps or mine.table else ()
    sequences = max(config.max_num_seqs, *batches, *(w.requests for w in workloads), 1)
    needed = [w.max_len for w in workloads] + [mine.prompt_tokens + mine.new_tokens] * mine.table
    wanted = [*needed, *((mine.contexts or CONTEXTS) if steps else ()), (PROMPT + 1) * mine.table, 2]
    length = config.max_model_len or min(max(wanted), model_context(config))
    if needed and max(needed) > length:
        raise ConfigError(
            f"{max(needed)} tokens of prompt and answer are more than the context of {length}",
            "lower --scale, --prompt-tokens or --new-tokens, or raise --max-model-len",
        )
    return replace(config, max_num_seqs=sequences, max_model_len=length, prefix_cache=False)


def model_context(config: EngineConfig) -> int:
    """Tokens of a context of the model."""
    from llmrs.models.arch.families import read_config
    from llmrs.models.hub.resolve import resolve_model

    return read_config(
        resolve_model(config.model_path, config.revision, offline=config.offline)
    ).max_position_embeddings
