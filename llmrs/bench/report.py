"""The tables of what `llmrs bench` measures, and its records as JSON."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from llmrs.bench.plot import Curve, svg
from llmrs.core.errors import ConfigError

if TYPE_CHECKING:
    from llmrs.bench.profile import Profile
    from llmrs.bench.serving import Measured
    from llmrs.bench.startup import Start
    from llmrs.bench.sweep import Cell

LEAST = 0.005  # part of a step from which a kernel has a line of its own
NOT_MEASURED = "idle: not measured on this backend and device"


def record(r: Any) -> dict[str, Any]:
    """A record as JSON, with what follows from it."""
    derived = {"tokens_per_second": "rate", "ceiling": "ceiling", "share_of_ceiling": "share"}
    return {**asdict(r), **{key: getattr(r, name) for key, name in derived.items() if hasattr(r, name)}}


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def results(found: Sequence[Any]) -> Iterator[str]:
    yield f"{'':22}{'tokens':>8}{'seconds':>10}{'tokens/s':>12}{'of ceiling':>12}"
    for r in found:
        yield f"{r.what:22}{r.tokens:8}{r.seconds:10.3f}{r.rate:12.1f}{percent(r.share):>12}"


def workloads(found: "Sequence[Measured]") -> Iterator[str]:
    yield f"{'workload':16}{'requests':>9}{'tokens':>9}{'seconds':>9}{'tokens/s':>10}{'of ceiling':>12}{'idle':>8}"
    for r in found:
        numbers = f"{r.requests:9}{r.tokens:9}{r.seconds:9.2f}{r.rate:10.1f}{percent(r.share):>12}{percent(r.idle):>8}"
        yield f"{r.name:16}{numbers}"
    if all(r.idle is None for r in found):
        yield NOT_MEASURED
    yield from latencies(found)


def arrivals(found: "Sequence[Measured]") -> Iterator[str]:
    yield f"{'arrivals':16}{'requests':>9}{'a second':>10}{'seconds':>9}{'tokens/s':>10}"
    for r in found:
        yield f"{r.name:16}{r.requests:9}{r.rate_of_requests:10.2f}{r.seconds:9.2f}{r.rate:10.1f}"
    yield from latencies(found)


def latencies(found: "Sequence[Measured]") -> Iterator[str]:
    yield f"{'':16}{'ms to first token p50':>22}{'p90':>9}{'p99':>9}{'between tokens p50':>20}{'p90':>9}{'p99':>9}"
    for r in found:
        cells = []
        for name, widths in (("first_token", (22, 9, 9)), ("between_tokens", (20, 9, 9))):
            values = r.latencies.get(name)
            texts = ["-"] * 3 if values is None else [f"{1e3 * v:.2f}" for v in values.values()]
            cells += [f"{text:>{width}}" for text, width in zip(texts, widths, strict=True)]
        yield f"{r.name:16}{''.join(cells)}"


def grid(found: "Sequence[Cell]") -> Iterator[str]:
    yield f"{'batch x context':18}{'ms a step':>11}{'floor':>9}{'tokens/s':>11}{'of ceiling':>12}{'idle':>8}"
    for c in found:
        shape = f"{c.batch:5} x {c.context}"
        if c.skipped:
            yield f"{shape:18} not run: {c.skipped}"
            continue
        times = f"{1e3 * c.seconds:11.3f}{1e3 * c.floor:9.3f}{c.rate:11.1f}"
        yield f"{shape:18}{times}{percent(c.share):>12}{percent(c.idle):>8}"
    if all(c.idle is None for c in found if not c.skipped):
        yield NOT_MEASURED


def profiles(found: "Sequence[Profile]") -> Iterator[str]:
    for p in found:
        within = f"{percent(p.busy / p.seconds)} of it in kernels" if p.busy < p.seconds else "all of it in kernels"
        yield f"step of {p.batch} x {p.context}: {1e6 * p.seconds:.0f} us, floor {1e6 * p.floor:.0f}, {within}"
        yield f"{'count':>7}{'us':>10}{'share':>9}{'floor':>10}{'reached':>10}  kernel"
        total = sum(k.seconds for k in p.kernels) or 1.0
        shown = [k for k in p.kernels if k.seconds >= LEAST * total]
        for k in shown:
            floor = "-" if k.floor is None else f"{1e6 * k.floor:.1f}"
            reached = percent(None if k.floor is None or not k.seconds else k.floor / k.seconds)
            name = f"{short(k.name)}, {k.what}" if k.what else short(k.name)
            numbers = f"{k.count:7.1f}{1e6 * k.seconds:10.1f}{percent(k.seconds / total):>9}"
            yield f"{numbers}{floor:>10}{reached:>10}  {name}"
        if rest := p.kernels[len(shown) :]:
            count, seconds = sum(k.count for k in rest), sum(k.seconds for k in rest)
            numbers = f"{count:7.1f}{1e6 * seconds:10.1f}{percent(seconds / total):>9}"
            yield f"{numbers}{'-':>10}{'-':>10}  the rest, of {len(rest)} names"


def short(name: str, most: int = 60) -> str:
    return name if len(name) <= most else name[: most - 3] + "..."


def start(found: "Sequence[Start]") -> Iterator[str]:
    for s in found:
        parts = f"imports {s.imported:.2f} s, loading {s.loaded:.2f} s, first token {s.answered:.2f} s"
        yield f"llmrs run, from process start to the first token: {s.first_token:.2f} s"
        yield f"an engine in a process of its own: {parts}"


TABLES = {
    "start": start,
    "results": results,
    "workloads": workloads,
    "arrivals": arrivals,
    "grid": grid,
    "profiles": profiles,
}


def picture(cells: "Sequence[Cell]") -> str:
    """A grid as SVG: tokens per second by batch, a curve with its ceiling for each context. Raises ConfigError where
    there is nothing to draw."""
    ran, curves = [c for c in cells if not c.skipped], []
    for context in dict.fromkeys(c.context for c in ran):
        row = sorted((c for c in ran if c.context == context), key=lambda c: c.batch)
        curves.append(Curve(f"context {context}", [(c.batch, c.rate) for c in row]))
        curves.append(Curve(f"ceiling at {context}", [(c.batch, c.ceiling) for c in row], ceiling=True))
    if not curves:
        raise ConfigError("plot: no step of the grid fits into memory", "give smaller batches or contexts")
    return svg("decoding", "answers at once", "tokens/s", curves)
