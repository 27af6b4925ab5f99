"""The tables and JSON records of `llmrs bench`."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from llmrs.bench.plot import Curve, svg
from llmrs.core.errors import ConfigError

if TYPE_CHECKING:
    from llmrs.bench.profile import Profile
    from llmrs.bench.roofline import Measurement
    from llmrs.bench.serving import WorkloadResult
    from llmrs.bench.startup import StartupTimes
    from llmrs.bench.sweep import SweepPoint

DERIVED = ("tokens_per_second", "roofline_tokens_per_second", "fraction_of_roofline")
MIN_SHARE = 0.005  # of a step, for a kernel with its own line
MAX_NAME = 60  # characters of a kernel's name
NOT_MEASURED = "idle: not measured on this backend and device"


def record(r: Any) -> dict[str, Any]:
    """A record as JSON, with its derived rates."""
    return {**asdict(r), **{name: getattr(r, name) for name in DERIVED if hasattr(r, name)}}


def percent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{100 * fraction:.1f} %"


def results(found: "Sequence[Measurement]") -> Iterator[str]:
    yield f"{'':22}{'tokens':>8}{'seconds':>10}{'tokens/s':>12}{'of roofline':>13}"
    for r in found:
        rates = f"{r.tokens_per_second:12.1f}{percent(r.fraction_of_roofline):>13}"
        yield f"{r.name:22}{r.tokens:8}{r.seconds:10.3f}{rates}"


def workloads(found: "Sequence[WorkloadResult]") -> Iterator[str]:
    yield f"{'workload':16}{'requests':>9}{'tokens':>9}{'seconds':>9}{'tokens/s':>10}{'of roofline':>13}{'idle':>8}"
    for r in found:
        shares = f"{percent(r.fraction_of_roofline):>13}{percent(r.idle):>8}"
        yield f"{r.name:16}{r.requests:9}{r.tokens:9}{r.seconds:9.2f}{r.tokens_per_second:10.1f}{shares}"
    if all(r.idle is None for r in found):
        yield NOT_MEASURED
    yield from latencies(found)


def arrivals(found: "Sequence[WorkloadResult]") -> Iterator[str]:
    yield f"{'arrivals':16}{'requests':>9}{'per second':>12}{'seconds':>9}{'tokens/s':>10}"
    for r in found:
        yield f"{r.name:16}{r.requests:9}{r.request_rate:12.2f}{r.seconds:9.2f}{r.tokens_per_second:10.1f}"
    yield from latencies(found)


def latencies(found: "Sequence[WorkloadResult]") -> Iterator[str]:
    yield f"{'ms':16}" + "".join(f"{f'{name} p50':>12}{'p90':>9}{'p99':>9}" for name in ("TTFT", "ITL"))
    for r in found:
        columns = [r.latencies.get(name) for name in ("ttft", "itl")]
        texts = [[f"{1e3 * v:.2f}" for v in values.values()] if values else ["-"] * 3 for values in columns]
        yield f"{r.name:16}" + "".join(f"{p50:>12}{p90:>9}{p99:>9}" for p50, p90, p99 in texts)


def grid(found: "Sequence[SweepPoint]") -> Iterator[str]:
    yield f"{'batch x context':18}{'ms a step':>11}{'roofline':>10}{'tokens/s':>11}{'of roofline':>13}{'idle':>8}"
    for p in found:
        shape = f"{p.batch:5} x {p.context}"
        if p.skipped:
            yield f"{shape:18} not run: {p.skipped}"
            continue
        times = f"{1e3 * p.seconds:11.3f}{1e3 * p.roofline_time:10.3f}{p.tokens_per_second:11.1f}"
        yield f"{shape:18}{times}{percent(p.fraction_of_roofline):>13}{percent(p.idle):>8}"
    if all(p.idle is None for p in found if not p.skipped):
        yield NOT_MEASURED


def profiles(found: "Sequence[Profile]") -> Iterator[str]:
    for p in found:
        within = f"{percent(p.busy / p.seconds)} of it in kernels" if p.busy < p.seconds else "all of it in kernels"
        times = f"{1e6 * p.seconds:.0f} us, roofline {1e6 * p.roofline_time:.0f}"
        yield f"step of {p.batch} x {p.context}: {times}, {within}"
        yield f"{'count':>7}{'us':>10}{'share':>9}{'roofline':>10}{'reached':>10}  kernel"
        total = sum(k.seconds for k in p.kernels) or 1.0
        shown = [k for k in p.kernels if k.seconds >= MIN_SHARE * total]
        for k in shown:
            name = k.name if len(k.name) <= MAX_NAME else f"{k.name[: MAX_NAME - 3]}..."
            yield _kernel(k.count, k.seconds, total, k.roofline_time) + (f"{name}, {k.what}" if k.what else name)
        if rest := p.kernels[len(shown) :]:
            count, seconds = sum(k.count for k in rest), sum(k.seconds for k in rest)
            yield _kernel(count, seconds, total) + f"the rest, of {len(rest)} names"


def _kernel(count: float, seconds: float, total: float, roofline_time: float | None = None) -> str:
    roofline = "-" if roofline_time is None else f"{1e6 * roofline_time:.1f}"
    reached = percent(None if roofline_time is None or not seconds else roofline_time / seconds)
    return f"{count:7.1f}{1e6 * seconds:10.1f}{percent(seconds / total):>9}{roofline:>10}{reached:>10}  "


def start(found: "Sequence[StartupTimes]") -> Iterator[str]:
    for s in found:
        phases = f"imports {s.imported:.2f} s, loading {s.loaded:.2f} s, first token {s.answered:.2f} s"
        yield f"llmrs run, from process start to the first token: {s.first_token:.2f} s"
        yield f"an engine in a process of its own: {phases}"


TABLES = {f.__name__: f for f in (start, results, workloads, arrivals, grid, profiles)}


def picture(points: "Sequence[SweepPoint]") -> str:
    """A sweep as SVG: a curve and its roofline per context. Raises ConfigError if every point was skipped."""
    ran, curves = [p for p in points if not p.skipped], []
    for context in dict.fromkeys(p.context for p in ran):
        row = sorted((p for p in ran if p.context == context), key=lambda p: p.batch)
        curves.append(Curve(f"context {context}", [(p.batch, p.tokens_per_second) for p in row]))
        roofline = [(p.batch, p.roofline_tokens_per_second) for p in row]
        curves.append(Curve(f"roofline at {context}", roofline, roofline=True))
    if not curves:
        raise ConfigError("plot: no step of the grid fits into memory", "give smaller batches or contexts")
    return svg("decoding", "batch size", "tokens/s", curves)
