"""The part `gemms` of bench_cuda.py: a model's linears for M up to 512, by themselves and in whole steps.

For each linear and M: cuBLAS and cuBLASLt with kernels for activation, or residual and norm, around them; and our fused
kernels with the config of `select_gemm` and others. M = 1 includes the norm before. All but the libraries run with PDL.
A line has the best of each, the JSON all. Every result is compared with cuBLAS's, and CUDA graphs with eager launches,
bit by bit.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch

from llmrs.backends.torch import triton_ops
from llmrs.backends.torch.kernel_configs import Device
from llmrs.backends.torch.kernels.gemm import (
    MAX_FUSED_NORM_M,
    GemmConfig,
    TmaConfig,
    can_fuse_norm,
    fits_in_registers,
    fused_linear,
    gemv_config,
    tma_config,
)
from llmrs.backends.torch.kernels.gemm_tma import MIN_K_PER_SPLIT, NUM_SMS

GPU, LAYERS = "cuda:0", 28
MS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
Timed = Callable[[Callable[[], object]], float]
Run = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Linear:
    """A linear with its neighbours; `copies` with other weights exceed the L2 cache."""

    name: str
    n: int
    k: int
    norm: bool = False
    act: str = ""
    residual: bool = False
    copies: int = LAYERS


def linears_of(shape: dict[str, Any]) -> tuple[Linear, ...]:
    """Those of a model whose config.json is `shape`."""
    hidden, intermediate, head_dim = shape["hidden_size"], shape["intermediate_size"], shape["head_dim"]
    heads, kv_heads = shape["num_attention_heads"], shape["num_key_value_heads"]
    return (
        Linear("qkv", (heads + 2 * kv_heads) * head_dim, hidden, norm=True),
        Linear("o", hidden, heads * head_dim, residual=True),
        Linear("gate+up", intermediate, hidden, norm=True, act="silu_and_mul"),
        Linear("down", hidden, intermediate, residual=True),
        Linear("lm_head", shape["vocab_size"], hidden, norm=True, copies=2),
    )


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=GPU, dtype=torch.bfloat16)


def context(pdl: bool) -> Any:
    """All that elementwise ops need of a step."""
    return SimpleNamespace(pdl=pdl)


def cublas(of: Linear, w: torch.Tensor, norm: torch.Tensor, residual: torch.Tensor, blas: str = "cublas") -> Run:
    """The launches of a step without fused linears; `blas`: cublas, or cublaslt with its own choice of kernels."""
    c = context(pdl=False)

    def run(x: torch.Tensor) -> torch.Tensor:
        before = torch.backends.cuda.preferred_blas_library()
        torch.backends.cuda.preferred_blas_library(blas)
        try:
            y = torch.nn.functional.linear(_normed(c, of, x, norm), w)
        finally:
            torch.backends.cuda.preferred_blas_library(before)
        y = triton_ops.silu_and_mul(c, *y.chunk(2, dim=1)) if of.act else y
        return triton_ops.fused_add_rms_norm(c, residual[: len(x)], y, norm[: of.n], eps=1e-6)[1] if of.residual else y

    return run


def _normed(c: Any, of: Linear, x: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    """x, for M = 1 after the norm; for larger M the norm belongs to the launch before."""
    return triton_ops.rms_norm(c, x, norm[: of.k], eps=1e-6) if of.norm and len(x) <= MAX_FUSED_NORM_M else x


def ours(of: Linear, w: torch.Tensor, norm: torch.Tensor, residual: torch.Tensor, config: GemmConfig) -> Run:
    after, c = norm[: of.n], context(pdl=True)

    def run(x: torch.Tensor) -> torch.Tensor:
        if isinstance(config, TmaConfig):
            y = fused_linear(_normed(c, of, x, norm), w, act=of.act, config=config, pdl=True)
            if not of.residual:
                return y
            return triton_ops.fused_add_rms_norm(c, residual[: len(x)], y, after, eps=1e-6)[1]
        fuse_norm = of.norm and len(x) <= MAX_FUSED_NORM_M and can_fuse_norm(w)
        x = x if fuse_norm else _normed(c, of, x, norm)
        added, norm_weight = residual[: len(x)] if of.residual else None, norm[: of.k] if fuse_norm else None
        y = fused_linear(x, w, None, added, norm_weight, 1e-6, 0.0, of.act, config=config, pdl=True)
        return triton_ops.rms_norm(c, y, after, eps=1e-6) if of.residual else y

    return run


def configs(of: Linear, m: int) -> Iterator[tuple[str, GemmConfig]]:
    """The kernels by name with their configs: the default, and others near it."""
    act = bool(of.act)
    if fits_in_registers(m, of.k, act) and (m == 1 or of.name != "lm_head"):
        first = gemv_config(m, of.n, of.k, 2, act)
        others = replace(first, rows_per_warp=2 * first.rows_per_warp), replace(first, block_k=512)
        yield from (("gemv", c) for c in (first, *others))
    yield from (("tma", c) for c in tma_configs(of, m) if possible(c, of, m))


def tma_configs(of: Linear, m: int) -> Iterator[TmaConfig]:
    first = tma_config(m, of.n, of.k, bool(of.act), of.residual, Device.of(torch.device(GPU)).smem_bytes)
    yield first
    for near in (first, replace(first, block_k=64, num_stages=8 if first.block_k == 128 else first.num_stages)):
        yield from (replace(near, split_k=n) for n in (1, 2, 4, 6))
        yield from (replace(near, block_n=192 - near.block_n), replace(near, num_warps=12 - near.num_warps))
        yield from (replace(near, block_m=2 * near.block_m), replace(near, block_m=max(near.block_m // 2, 16)))
        yield replace(near, num_stages=near.num_stages // 2)


def possible(c: TmaConfig, of: Linear, m: int) -> bool:
    """Whether it fits into registers and shared memory, wastes no tile, and splits K only before a norm."""
    w_rows = c.block_n * (2 if of.act else 1)
    smem = c.num_stages * c.block_k * 2 * (w_rows + c.block_m)
    fits = w_rows * c.block_m <= 2**12 * c.num_warps and smem <= 220 * 1024
    splittable = of.residual and of.k >= MIN_K_PER_SPLIT * c.split_k and c.num_ctas(m, of.n) <= 2 * NUM_SMS
    return fits and c.num_stages > 1 and c.block_m < max(2 * m, 32) and (c.split_k == 1 or splittable)


def captured(run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """The replay of its CUDA graph, and the results, which each replay overwrites."""
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
    """Seconds of one of `runs` in a graph of all. Prints WRONG if a result is far from `wanted`, or differs from the
    eager one."""
    replay, results = captured(lambda: [run(x) for run in runs])
    seconds = timed(replay) / of.copies
    if wanted is not None:
        off = float((results[0].float() - wanted).norm() / wanted.norm())
        if not off < 0.02:
            print(f"WRONG by {off:.3f} of the norm: ", end="")
        others = sum(not torch.equal(found, run(x)) for found, run in zip(results, runs, strict=True))
        if others:
            print(f"WRONG: {others} of {len(runs)} graph results differ from eager ones: ", end="")
    return seconds


def gemms(timed: Timed, report: dict[str, Any], shape: dict[str, Any]) -> None:
    """Microseconds of a linear with its neighbours."""
    for of in linears_of(shape):
        weights = [random(of.n * (2 if of.act else 1), of.k) / 32 for _ in range(of.copies)]
        norm, residual = random(max(of.k, of.n)), random(max(MS), of.n)
        for m in MS:
            x = random(m, of.k)
            wanted = cublas(of, weights[0], norm, residual)(x).float()
            ways: list[tuple[str, Any, list[Run]]] = [
                (blas, None, [cublas(of, w, norm, residual, blas) for w in weights]) for blas in ("cublas", "cublaslt")
            ]
            for name, config in dict.fromkeys(configs(of, m)):
                ways.append((name, config, [ours(of, w, norm, residual, config) for w in weights]))
            best: dict[str, tuple[float, Any]] = {}
            for name, config, runs in ways:
                seconds = attempt(timed, of, x, runs, wanted, name, config)
                if seconds is None:
                    continue
                report[f"gemm {of.name} {m} {name}" + (f" {config}" if config else "")] = seconds
                best.setdefault(f"{name} default" if config else name, (seconds, None))
                if config:
                    best[name] = min(best.get(name, (seconds, config)), (seconds, config), key=lambda pair: pair[0])
            said = [f"{name} {s * 1e6:.2f}{f' {config}' if config else ''}" for name, (s, config) in best.items()]
            print(f"{of.name:8} M = {m:3}: {', '.join(said)}", flush=True)


def attempt(
    timed: Timed, of: Linear, x: torch.Tensor, runs: list[Run], wanted: torch.Tensor, name: str, config: Any
) -> float | None:
    """Seconds; None, and a line, on failure: the others go on, since time on a GPU is short."""
    try:
        return measured(timed, of, x, runs, wanted if config else None)
    except Exception as error:  # noqa: BLE001
        print(f"{of.name:8} M = {len(x):3}, {name} {config}: FAILED, {type(error).__name__}: {error}", flush=True)
        return None


def restart(backend: Any) -> None:
    """Applies changed settings; each shape is captured when it comes again."""
    runner = backend.runner
    runner.begin(backend.graph, backend.programs, backend.kv, backend.slots, backend.torch_dtype)
    runner.graphs = runner.new_graph_cache()


def whole_steps(
    timed: Timed, report: dict[str, Any], backend: Any, batch: Callable[[Any, int, int], Any], context: int = 384
) -> None:
    """The forward part of decode steps: without fused linears, with them, and with PDL too."""
    runner = backend.runner
    for name, fused, pdl in (("cuBLAS", False, False), ("fused", True, False), ("fused, PDL", True, True)):
        runner.use_pdl, runner.fuse_small_batches = pdl, fused
        restart(backend)
        for count in MS:
            step = batch(backend, count, context)
            seconds = timed(lambda s=step: backend.forward(s))
            report[f"gemm step {count} {name}"] = seconds
            print(f"{count:3} x {context}, {name}: forward {seconds * 1e6:7.0f} us", flush=True)
