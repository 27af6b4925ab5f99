"""The part `rows` of bench_cuda.py: a model's merged_linear for up to 512 rows, by themselves and in whole steps.

Of each linear and number of rows: the library's product, by cuBLAS and by cuBLASLt, with its gate or the sum and norm
that follow; and our kernels for all of it, cut as `cut_of` would, and otherwise. Of one row the norm before it too. All
but the library's are chained. A line has the best of each, the JSON all. Every result is compared with the first way's,
and those of the recorded launches with the same ones by themselves, bit by bit.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from llmrs.backends.torch import triton_ops
from llmrs.backends.torch.kernel_configs import Device
from llmrs.backends.torch.kernels.gemm import NORMED, Cut, Tiles, cut_few, cut_many, normed, product, vectors
from llmrs.backends.torch.kernels.gemm_tma import PROGRAMS, SPAN
from llmrs.backends.torch.kernels.launch import chaining

GPU, LAYERS = "cuda:0", 28
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
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
        Linear("gate+up", inner, width, norm=True, gate="silu_and_mul"),
        Linear("down", width, inner, more=True),
        Linear("head", shape["vocab_size"], width, norm=True, times=2),
    )


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=GPU, dtype=torch.bfloat16)


def library(of: Linear, w: torch.Tensor, norm: torch.Tensor, more: torch.Tensor, blas: str = "cublas") -> Run:
    """As many launches as a step has that is not of few rows; cuBLAS or, with kernels of its own choice, cuBLASLt."""

    def run(x: torch.Tensor) -> torch.Tensor:
        before = torch.backends.cuda.preferred_blas_library()
        torch.backends.cuda.preferred_blas_library(blas)
        try:
            y = torch.nn.functional.linear(_before(of, x, norm), w)
        finally:
            torch.backends.cuda.preferred_blas_library(before)
        y = triton_ops.silu_and_mul(None, *y.chunk(2, dim=1)) if of.gate else y
        return triton_ops.fused_add_rms_norm(None, more[: len(x)], y, norm[: of.count], eps=1e-6)[1] if of.more else y

    return run


def _before(of: Linear, x: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    """x as it was, or normed: of several rows that belongs to the launch before."""
    return triton_ops.rms_norm(None, x, norm[: of.width], eps=1e-6) if of.norm and len(x) <= NORMED else x


def ours(of: Linear, w: torch.Tensor, norm: torch.Tensor, more: torch.Tensor, cut: Cut | Tiles) -> Run:
    after = norm[: of.count]

    def run(x: torch.Tensor) -> torch.Tensor:
        if isinstance(cut, Tiles):
            y = product(_before(of, x, norm), w, gate=of.gate, cut=cut)
            return triton_ops.fused_add_rms_norm(None, more[: len(x)], y, after, eps=1e-6)[1] if of.more else y
        within = of.norm and len(x) <= NORMED and normed(w)
        x = x if within else _before(of, x, norm)
        added = more[: len(x)] if of.more else None
        y = product(x, w, None, added, norm[: of.width] if within else None, 1e-6, 0.0, of.gate, cut=cut)
        return triton_ops.rms_norm(None, y, after, eps=1e-6) if of.more else y

    return run


def cuts(of: Linear, rows: int) -> Iterator[tuple[str, Cut | Tiles]]:
    """The kernels by name, and their cuts: the default, and others near it."""
    gate = bool(of.gate)
    if vectors(rows, of.width, gate) and (rows == 1 or of.name != "head"):
        first = cut_few(rows, of.width, 2, gate)
        yield from (("few", c) for c in (first, replace(first, each=2 * first.each), replace(first, part=512)))
    yield from (("many", t) for t in tiles(of, rows) if possible(t, of, rows))


def tiles(of: Linear, rows: int) -> Iterator[Tiles]:
    first = cut_many(rows, of.count, of.width, bool(of.gate), of.more, Device.of(torch.device(GPU)).shared)
    yield first
    for near in (first, replace(first, part=64, stages=8 if first.part == 128 else first.stages)):
        yield from (replace(near, split=n) for n in (1, 2, 4, 6))
        yield from (replace(near, each=192 - near.each), replace(near, warps=12 - near.warps))
        yield from (replace(near, count=2 * near.count), replace(near, count=max(near.count // 2, 16)))
        yield replace(near, stages=near.stages // 2)


def possible(t: Tiles, of: Linear, rows: int) -> bool:
    """Whether it fits into registers and shared memory, has no more work than it must, and ranges that are added up."""
    each = t.each * (2 if of.gate else 1)
    held = each * t.count <= 2**12 * t.warps and t.stages * t.part * 2 * (each + t.count) <= 220 * 1024
    ranged = t.split == 1 or (of.more and of.width >= SPAN * t.split and t.programs(rows, of.count) <= 2 * PROGRAMS)
    return held and t.stages > 1 and t.count < max(2 * rows, 32) and ranged


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


def merged_linear(timed: Timed, found: dict[str, Any], shape: dict[str, Any]) -> None:
    """Microseconds of one launch, or of the launches that it replaces."""
    for of in linears_of(shape):
        weights = [random(of.count * (2 if of.gate else 1), of.width) / 32 for _ in range(of.times)]
        norm, more = random(max(of.width, of.count)), random(max(COUNTS), of.count)
        for rows in COUNTS:
            x = random(rows, of.width)
            wanted = library(of, weights[0], norm, more)(x).float()
            ways = [("library", None, [library(of, w, norm, more) for w in weights])]
            ways += [("library lt", None, [library(of, w, norm, more, "cublaslt") for w in weights])]
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


def restart(backend: Any) -> None:
    """Takes in what was set; each shape gets a graph of its own when it comes again."""
    kernels = backend.kernels
    kernels.begin(backend.graph, backend.programs, backend.kv, backend.slots, backend.type)
    kernels.recorded, kernels.uncaptured = {}, []


def whole_steps(
    timed: Timed, found: dict[str, Any], backend: Any, batch: Callable[[Any, int, int], Any], context: int = 384
) -> None:
    """The forward part of decode steps: without the program for few rows, with it, and with its kernels chained."""
    kernels = backend.kernels
    for name, fused, chained in (("library", False, False), ("fused", True, False), ("fused, chained", True, True)):
        kernels.chain, kernels.fused = chained, fused
        restart(backend)
        for count in COUNTS:
            step = batch(backend, count, context)
            seconds = timed(lambda s=step: backend.forward(s))
            found[f"rows step {count} {name}"] = seconds
            print(f"{count:3} x {context}, {name}: forward {seconds * 1e6:7.0f} us", flush=True)
