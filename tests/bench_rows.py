"""The part `rows` of bench_cuda.py: a model's linears for up to 512 rows, by themselves and in whole steps.

Of each linear and number of rows: the library's product, by cuBLAS and by cuBLASLt; the way of `kernels: auto` (a norm,
a product, a gate or a sum); the kernels that do all of it, as `product` would choose, and `rows_many` in other cuts.
All but the library's are chained. A line has the best of each, the JSON all. Every result is compared with the second
way's, and those of the recorded launches, which share a workspace, with the same ones by themselves, bit by bit.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from llmrs.backends.torch import rules
from llmrs.backends.torch.kernels.launch import chaining
from llmrs.backends.torch.kernels.rows import (
    NARROW,
    NORMED,
    Cut,
    Tiles,
    cut_few,
    cut_many,
    cut_some,
    normed,
    product,
    vectors,
)
from llmrs.backends.torch.kernels.rows_many import PROGRAMS, TILE

GPU, LAYERS = "cuda:0", 28
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
SOME = 64  # rows up to which the second kernel is tried
SHARED = 220 * 1024  # bytes of a program
Timed = Callable[[Callable[[], object]], float]
Run = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Linear:
    """What stands around a matrix, and how often it comes with other weights, to be beyond the L2 cache."""

    name: str
    count: int
    width: int
    norm: bool = False
    gate: str = ""
    more: bool = False
    times: int = LAYERS


def linears_of(shape: dict[str, Any]) -> tuple[Linear, ...]:
    """Those of a model whose config.json is `shape`."""
    width, inner, size = shape["hidden_size"], shape["intermediate_size"], shape["head_dim"]
    heads, kv_heads = shape["num_attention_heads"], shape["num_key_value_heads"]
    return (
        Linear("qkv", (heads + 2 * kv_heads) * size, width, norm=True),
        Linear("o", width, heads * size, more=True),
        Linear("gate+up", inner, width, norm=True, gate="silu_mul"),
        Linear("down", width, inner, more=True),
        Linear("head", shape["vocab_size"], width, norm=True, times=2),
    )


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=GPU, dtype=torch.bfloat16)


def library(w: torch.Tensor) -> Run:
    return lambda x: torch.nn.functional.linear(x, w)


def lt(w: torch.Tensor) -> Run:
    """By cuBLASLt, which chooses its kernels by itself."""

    def run(x: torch.Tensor) -> torch.Tensor:
        before = torch.backends.cuda.preferred_blas_library()
        torch.backends.cuda.preferred_blas_library("cublaslt")
        try:
            return torch.nn.functional.linear(x, w)
        finally:
            torch.backends.cuda.preferred_blas_library(before)

    return run


def today(of: Linear, w: torch.Tensor, norm: torch.Tensor, more: torch.Tensor) -> Run:
    """As many launches as `kernels: auto` has, but for add + norm, which it does in one."""
    matrix = rules.Matrix(w)

    def run(x: torch.Tensor) -> torch.Tensor:
        x = rules.rms_norm(None, x, norm, eps=1e-6) if of.norm else x
        y = matrix(x)
        y = rules.silu_mul(None, *y.chunk(2, dim=1)) if of.gate else y
        return more[: len(x)] + y if of.more else y

    return run


def ours(of: Linear, w: torch.Tensor, norm: torch.Tensor, more: torch.Tensor, cut: Cut | Tiles) -> Run:
    def run(x: torch.Tensor) -> torch.Tensor:
        before = norm if of.norm else None
        if before is not None and (len(x) > NORMED or not normed(w)):
            x, before = rules.rms_norm(None, x, norm, eps=1e-6), None
        return product(x, w, None, more[: len(x)] if of.more else None, before, 1e-6, 0.0, of.gate, cut=cut)

    return run


def cuts(of: Linear, rows: int) -> Iterator[tuple[str, Cut | Tiles]]:
    """The kernels by name, and their cuts: the default, and others near it."""
    gate = bool(of.gate)
    if vectors(rows, of.width, gate) and (rows == 1 or of.name != "head"):
        first = cut_few(rows, of.width, 2, gate)
        yield from (("few", c) for c in (first, replace(first, each=2 * first.each), replace(first, part=512)))
    if not vectors(rows, of.width, gate) and rows <= SOME and of.count <= NARROW:
        second = cut_some(rows, of.width, 2, gate)
        yield from (("some", c) for c in (second, replace(second, part=128, stages=3)))
    if rows > 1:
        yield from (("many", t) for t in tiles(of, rows) if possible(t, of, rows))


def tiles(of: Linear, rows: int) -> Iterator[Tiles]:
    first = cut_many(rows, of.count, of.width, 2, bool(of.gate))
    yield first
    yield from (replace(first, split=n) for n in (1, 2, 4, 8))
    yield from (replace(first, part=192 - first.part), replace(first, stages=3), replace(first, each=192 - first.each))
    yield from (replace(first, warps=12 - first.warps), replace(first, count=2 * first.count, part=64))
    if first.count > 16:
        yield from (replace(first, count=first.count // 2, split=n) for n in (first.split, 2 * first.split))


def possible(t: Tiles, of: Linear, rows: int) -> bool:
    """Whether it fits into registers, shared memory and workspace, and has no more work than it must."""
    wide, sums = t.each * (2 if of.gate else 1) + t.count, t.each * t.count * (2 if of.gate else 1)
    held = sums <= TILE * t.warps // (16 if t.split > 1 else 8) and t.stages * t.part * 2 * wide <= SHARED
    return held and t.count < max(2 * rows, 32) and (t.split == 1 or t.programs(rows, of.count) <= 2 * PROGRAMS)


def recorded(run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """What runs a graph of it, and the results, which each run overwrites."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = run()
    return graph.replay, results


def measured(timed: Timed, of: Linear, x: torch.Tensor, runs: list[Run], wanted: torch.Tensor | None) -> float:
    """Seconds of one of `runs` in a graph of all. Says so if a result is not near what is wanted, or not the same
    in the graph."""
    replay, results = recorded(lambda: [run(x) for run in runs])
    seconds = timed(replay) / of.times
    if wanted is not None:
        off = float((results[0].float() - wanted).norm() / wanted.norm())
        if not off < 0.02:
            print(f"WRONG by {off:.3f} of the norm: ", end="")
        others = sum(not torch.equal(found, run(x)) for found, run in zip(results, runs, strict=True))
        if others:
            print(f"WRONG: {others} of {len(runs)} results are others than when they run alone: ", end="")
    return seconds


def linears(timed: Timed, found: dict[str, Any], shape: dict[str, Any]) -> None:
    """Microseconds of one launch, or of the launches that it replaces."""
    for of in linears_of(shape):
        weights = [random(of.count * (2 if of.gate else 1), of.width) / 32 for _ in range(of.times)]
        norm, more = random(of.width), random(max(COUNTS), of.count)
        for rows in COUNTS:
            x = random(rows, of.width)
            wanted = today(of, weights[0], norm, more)(x).float()
            ways = [("library", None, [library(w) for w in weights])]
            ways += [("library lt", None, [lt(w) for w in weights])]
            ways += [("auto", None, [today(of, w, norm, more) for w in weights])]
            for name, cut in dict.fromkeys(cuts(of, rows)):
                ways.append((name, cut, [ours(of, w, norm, more, cut) for w in weights]))
            best: dict[str, tuple[float, Any]] = {}
            for name, cut, runs in ways:
                seconds = attempt(timed, of, x, runs, wanted, name, cut)
                if seconds is None:
                    continue
                found[f"rows {of.name} {rows} {name}" + (f" {cut}" if cut else "")] = seconds
                best.setdefault(f"{name} as cut" if cut else name, (seconds, None))
                if cut:
                    best[name] = min(best.get(name, (seconds, cut)), (seconds, cut), key=lambda pair: pair[0])
            said = [f"{name} {s * 1e6:.2f}{f' {cut}' if cut else ''}" for name, (s, cut) in best.items()]
            print(f"{of.name:8} {rows:3} rows: {', '.join(said)}", flush=True)


def attempt(
    timed: Timed, of: Linear, x: torch.Tensor, runs: list[Run], wanted: torch.Tensor, name: str, cut: Cut | Tiles | None
) -> float | None:
    """Seconds; None if it fails, which is said: the others go on, since time on a GPU is short."""
    theirs = name.startswith("library")
    try:
        with chaining(not theirs):
            return measured(timed, of, x, runs, None if theirs else wanted)
    except Exception as error:  # noqa: BLE001
        print(f"{of.name:8} {len(x):3} rows, {name} {cut}: FAILED, {type(error).__name__}: {error}", flush=True)
        return None


def whole_steps(
    timed: Timed, found: dict[str, Any], backend: Any, batch: Callable[[Any, int, int], Any], context: int = 384
) -> None:
    """The forward part of decode steps: as `kernels: auto` has it, then with what it leaves out."""
    kernels = backend.kernels
    for name, fused, chained in (("auto", False, False), ("chained", False, True), ("fused, chained", True, True)):
        kernels.chain, kernels.fused = chained, fused
        kernels.begin(backend.graph, backend.program, backend.kv, backend.slots, backend.type)
        for count in COUNTS:
            step = batch(backend, count, context)
            seconds = timed(lambda s=step: backend.forward(s))
            found[f"rows step {count} {name}"] = seconds
            print(f"{count:3} x {context}, {name}: forward {seconds * 1e6:7.0f} us", flush=True)
