"""The part `rows` of bench_cuda.py: the linears of Qwen3-0.6B for few rows, by themselves and in whole decode steps.

The way of `kernels: auto` (a norm, the library's product or `matvec`, a gate or a sum) beside the kernel that does all
of it, the latter in several cuts. Every result is compared with the first way's.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from llmrs.backends.torch import rules
from llmrs.backends.torch.kernels.launch import chaining
from llmrs.backends.torch.kernels.rows import NORMED, Cut, cut_few, cut_some, product, vectors

GPU, LAYERS = "cuda:0", 28
COUNTS = (1, 2, 4, 8, 16, 32, 64)
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


LINEARS = (
    Linear("qkv", 4096, 1024, norm=True),
    Linear("o", 1024, 2048, more=True),
    Linear("gate+up", 3072, 1024, norm=True, gate="silu_mul"),
    Linear("down", 1024, 3072, more=True),
    Linear("head", 151936, 1024, norm=True, times=2),
)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=GPU, dtype=torch.bfloat16)


def today(of: Linear, w: torch.Tensor, norm: torch.Tensor, more: torch.Tensor) -> Run:
    """As many launches as `kernels: auto` has, but for add + norm, which it does in one."""
    matrix = rules.Matrix(w)

    def run(x: torch.Tensor) -> torch.Tensor:
        x = rules.rms_norm(None, x, norm, eps=1e-6) if of.norm else x
        y = matrix(x)
        y = rules.silu_mul(None, *y.chunk(2, dim=1)) if of.gate else y
        return more[: len(x)] + y if of.more else y

    return run


def ours(of: Linear, w: torch.Tensor, norm: torch.Tensor, more: torch.Tensor, cut: Cut | None, normed: int) -> Run:
    """`normed`: rows up to which the norm is not by itself."""

    def run(x: torch.Tensor) -> torch.Tensor:
        before = norm if of.norm else None
        if before is not None and len(x) > normed:
            x, before = rules.rms_norm(None, x, norm, eps=1e-6), None
        return product(x, w, None, more[: len(x)] if of.more else None, before, 1e-6, 0.0, of.gate, cut=cut)

    return run


def cuts(of: Linear, count: int) -> Iterator[Cut]:
    """The default, and others near it."""
    if vectors(count, of.width, bool(of.gate)):
        first = cut_few(count, of.width, 2, bool(of.gate))
        yield from (first, replace(first, early=True), replace(first, each=2 * first.each))
        yield from (replace(first, warps=12 - first.warps), replace(first, part=min(2 * first.part, 1024)))
    else:
        first = cut_some(count, of.count, of.width, 2, bool(of.gate))
        yield from (first, replace(first, early=True), replace(first, stages=3), replace(first, each=2 * first.each))
        yield from (replace(first, warps=8, stages=3), replace(first, part=128, stages=3))


def recorded(run: Callable[[], object]) -> Callable[[], None]:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run()
    return graph.replay


def library(w: torch.Tensor) -> Run:
    return lambda x: torch.nn.functional.linear(x, w)


def measured(timed: Timed, of: Linear, x: torch.Tensor, runs: list[Run], wanted: torch.Tensor | None) -> float:
    """Seconds of one of `runs` in a graph of all. Says so if the first one's result is not near what is wanted."""
    if wanted is not None:
        off = float((runs[0](x).float() - wanted).norm() / wanted.norm())
        if not off < 0.02:
            print(f"WRONG by {off:.3f} of the norm: ", end="")
    return timed(recorded(lambda: [run(x) for run in runs])) / of.times


def linears(timed: Timed, found: dict[str, Any]) -> None:
    """Microseconds of one launch, or of the launches that it replaces, and terabytes of weights a second."""
    for of in LINEARS:
        weights = [random(of.count * (2 if of.gate else 1), of.width) / 32 for _ in range(of.times)]
        norm, more, read = random(of.width), random(64, of.count), weights[0].nbytes
        for count in COUNTS:
            x = random(count, of.width)
            wanted = today(of, weights[0], norm, more)(x).float()
            ways: dict[str, list[Run]] = {"library": [library(w) for w in weights]}
            ways["auto"] = [today(of, w, norm, more) for w in weights]
            for cut in dict.fromkeys(cuts(of, count)):
                ways[str(cut)] = [ours(of, w, norm, more, cut, NORMED) for w in weights]
            if of.norm and count <= NORMED:
                ways["the norm by itself"] = [ours(of, w, norm, more, None, 0) for w in weights]
            for name, runs in ways.items():
                try:
                    with chaining(name not in ("library", "auto")):
                        seconds = measured(timed, of, x, runs, None if name == "library" else wanted)
                except Exception as error:  # noqa: BLE001 - the others go on: time on a GPU is short
                    print(f"{of.name:8} {count:3} rows, {name}: FAILED, {type(error).__name__}: {error}", flush=True)
                    continue
                found[f"rows {of.name} {count} {name}"] = seconds
                speed = read / seconds / 1e12
                print(f"{of.name:8} {count:3} rows, {name}: {seconds * 1e6:6.2f} us, {speed:.2f} TB/s", flush=True)


def whole_steps(
    timed: Timed, found: dict[str, Any], made: Callable[[str], Any], batch: Callable[[Any, int, int], Any]
) -> None:
    """The forward part of decode steps: `made` gives an engine for a choice of kernels, `batch` a step."""
    for kernels, fused, chained in (("auto", False, False), ("triton", False, True), ("triton", True, False),
                                    ("triton", True, True)):  # fmt: skip
        engine = made(kernels)
        backend = engine._worker.core.backend
        name = f"{kernels}, {'fused' if fused else 'apart'}{', chained' if chained else ''}"
        backend.kernels.chain, backend.kernels.fused = chained, fused
        backend.kernels.begin(backend.graph, backend.program, backend.kv, backend.slots, backend.type)
        for count in COUNTS:
            step = batch(backend, count, 384)
            seconds = timed(lambda b=backend, s=step: b.forward(s))
            found[f"rows step {count} {name}"] = seconds
            print(f"{count:3} x 384, {name}: forward {seconds * 1e6:7.0f} us", flush=True)
        engine.close()
