"""`llmrs bench`: how fast a model runs here, beside what the device allows; or what a step costs the host."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from llmrs.cli import bench_tables as tables
from llmrs.cli.bench_host import host, mlx_host
from llmrs.cli.flags import Values, spelled
from llmrs.cli.loading import load_engine
from llmrs.cli.options import BenchOptions
from llmrs.cli.run import check_output
from llmrs.cli.settings import Settings, load_settings
from llmrs.cli.terminal import StatusLine
from llmrs.core.config import EngineConfig, options
from llmrs.core.errors import ConfigError

if TYPE_CHECKING:
    from llmrs.engine import Engine
    from llmrs.workloads import Workload

SECTIONS: dict[str, type] = {"What is measured": BenchOptions, "Model and memory": EngineConfig}
BATCHES = (1, 8, 32)
CONTEXTS = (512,)
PROMPT = 512  # tokens of the prompt that is timed beside decoding
Found = dict[str, list[Any]]  # what was measured: heading -> records


def bench(config: str | None, flags: Values) -> int:
    """Measures a model's speed and the device's ceilings, or with --host the engine's own time per step."""
    mine = BenchOptions(**{name: value for name, value in flags.items() if name in vars(BenchOptions())})
    settings = load_settings(config, {name: value for name, value in flags.items() if name not in vars(mine)})
    mine.check()
    check_output("plot", mine.plot)
    if mine.host:
        return mlx_host(mine) if settings.engine.backend == "mlx" else host(mine)
    return model(mine, settings)


def model(mine: BenchOptions, settings: Settings) -> int:
    """Everything that needs the model, in one engine; and the start of processes, beside none."""
    from llmrs.workloads import named  # here and below, since `llmrs --help` should not wait for it

    chosen = named(mine.workloads, mine.scale) if mine.workloads is not None else []
    arriving = named("mixed", mine.scale) if mine.arrivals else []
    found: Found = {}
    if mine.start:
        from llmrs import bench_start

        run = [sys.executable, "-m", "llmrs.cli", "run", *arguments(settings.engine)]
        found["start"] = [bench_start.measure(settings.engine, run)]
    ceilings = None
    if mine.table or chosen or arriving or mine.grid or mine.profile:
        engine_config = with_room(settings.engine, mine, [*chosen, *arriving])
        with load_engine(replace(settings, engine=engine_config)) as engine:
            ceilings = engine.ceilings()
            found |= measured(engine, ceilings, mine, chosen, arriving)
    if mine.plot is not None:
        tables.draw(mine.plot, found["grid"])
    tables.show(mine, ceilings, found)
    return 0


def measured(
    engine: "Engine",
    ceilings: Any,
    mine: BenchOptions,
    chosen: "Sequence[Workload]",
    arriving: "Sequence[Workload]",
) -> Found:
    from llmrs import bench, bench_profile, bench_steps, bench_workloads

    batches, contexts, found = mine.batches or BATCHES, mine.contexts or CONTEXTS, Found()
    line = StatusLine()

    def note(doing: str, records: Any) -> None:
        line.show(lambda: f"measuring {doing}")
        found[doing] = list(records)

    if mine.table:
        note("results", bench.measure(engine, ceilings, batches, mine.prompt_tokens, mine.new_tokens, PROMPT))
    if chosen:
        note("workloads", bench_workloads.measure(engine, ceilings, chosen))
    for w in arriving:
        closed = next((m for m in found.get("workloads", ()) if m.name == w.name), None)
        note("arrivals", bench_workloads.over_time(engine, ceilings, w, mine.arrivals or (), closed))
    if mine.grid:
        note("grid", bench_steps.grid(engine, ceilings, batches, contexts))
    if mine.profile:
        shapes = [(b, c) for c in contexts for b in batches]
        check_shapes(engine, shapes)
        note("profiles", (bench_profile.profile_step(engine, ceilings, b, c) for b, c in shapes))
    line.clear()
    return found


def check_shapes(engine: "Engine", shapes: Sequence[tuple[int, int]]) -> None:
    """Raises ConfigError for a step that can't be run."""
    from llmrs.bench_steps import too_large

    for batch, context in shapes:
        if reason := too_large(engine, batch, context):
            raise ConfigError(f"a step of {batch} x {context} {reason}", "give smaller batches or contexts")


def with_room(config: EngineConfig, mine: BenchOptions, workloads: "Sequence[Workload]") -> EngineConfig:
    """The config with slots and context for what is measured. Raises ConfigError where the model has no such context.

    Steps of the grid that are too long are left out there, and said to be.
    """
    steps = mine.grid or mine.profile
    batches = (mine.batches or BATCHES) if steps or mine.table else ()
    sequences = max(config.max_num_seqs, *batches, *(w.requests for w in workloads), 1)
    needed = [w.longest for w in workloads] + [mine.prompt_tokens + mine.new_tokens] * mine.table
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
    from llmrs.models.families import read_config
    from llmrs.models.locate import locate

    return read_config(locate(config.model_path, config.revision, offline=config.offline)).context


def arguments(config: EngineConfig) -> list[str]:
    """The flags that make this config."""
    found = []
    for o in options(EngineConfig):
        value = getattr(config, o.name)
        if value != o.default:
            flag = spelled(o.name)
            found += [flag if value else f"--no-{flag[2:]}"] if o.kind is bool else [flag, str(value)]
    return found
