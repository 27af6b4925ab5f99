"""The part `gemms_in_step` of bench_cuda.py: decode steps in which one kind of GEMM is ours and the others are cuBLAS.

A GEMM by itself differs from one in a step, between its neighbours. So this decides whether gemm_tma beats cuBLAS
(`beats_cublas` in kernels/gemm.py) and which tiles are best (`estimate_us` in kernels/gemm_tma.py). Prints microseconds
per launch, with what is fused, relative to cuBLAS.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import torch
from bench_gemm import restart

from llmrs.backends.torch.kernels import gemm
from llmrs.backends.torch.kernels.gemm import LM_HEAD_N, GemmConfig, TmaConfig
from llmrs.backends.torch.kernels.gemm_tma import MIN_K_PER_SPLIT, fit_to_smem, tma_config

COUNTS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 384, 512)  # sequences
TILES = [*product((64,), (32, 64, 128, 256)), *product((128,), (64, 128))]  # BLOCK_N, BLOCK_M
Timed = Callable[[Callable[[], object]], float]
Select = Callable[..., GemmConfig | None]


def kind_of(w: torch.Tensor, act: bool, reducible: bool) -> str:
    """In a layer of Qwen3, Llama or Mistral."""
    if act or not reducible:
        return "gate+up" if act else "lm_head" if len(w) > LM_HEAD_N else "qkv"
    return "down" if w.shape[1] > len(w) else "o"


def only(kind: str, tiles: tuple[int, int, int] | None = None) -> Select:
    """A `select_gemm` that gives one kind to gemm_tma, with the default config or (BLOCK_N, BLOCK_M, SPLIT_K)."""

    def select(m: int, w: torch.Tensor, act: bool, reducible: bool, smem_bytes: int) -> TmaConfig | None:
        if kind_of(w, act, reducible) != kind:
            return None
        n, k = len(w) // (1 + act), w.shape[1]
        if tiles is None:
            return tma_config(m, n, k, act, reducible, smem_bytes)
        c = fit_to_smem(*tiles, m, n, act, smem_bytes)
        return c if c.num_stages > 1 and (c.split_k == 1 or (reducible and k >= MIN_K_PER_SPLIT * c.split_k)) else None

    return select


@contextmanager
def chosen(select: Select) -> Iterator[None]:
    before = gemm.select_gemm
    gemm.select_gemm = select
    try:
        yield
    finally:
        gemm.select_gemm = before


def gemms_in_step(timed: Timed, report: dict[str, Any], backend: Any, batch: Callable[[int], Any]) -> None:
    """`batch` makes a step of a number of sequences."""
    steps, layers = [(count, batch(count)) for count in COUNTS], len(backend.kv)
    cublas = seconds(timed, backend, only("none"), steps)
    print(f"{'':22}", *(f"{count:8}" for count in COUNTS))
    print(f"{'cuBLAS, whole steps':22}", *(f"{s * 1e6:8.0f}" for s in cublas), flush=True)
    for kind in ("qkv", "o", "gate+up", "down", "lm_head"):
        splits = (1, 2, 4) if kind in ("o", "down") else (1,)
        for tiles in (None, *((*shape, split) for shape, split in product(TILES, splits))):
            times = seconds(timed, backend, only(kind, tiles), steps)
            name = f"{kind} " + ("default" if tiles is None else "{}x{}/{}".format(*tiles))
            report[f"gemm in step {name}"] = dict(zip(COUNTS, times, strict=True))
            launches = 1 if kind == "lm_head" else layers
            more = [(t - base) * 1e6 / launches for t, base in zip(times, cublas, strict=True)]
            print(f"{name:22}", *(f"{m:8.1f}" for m in more), flush=True)


def seconds(timed: Timed, backend: Any, select: Select, steps: list[tuple[int, Any]]) -> list[float]:
    """Of the forward part of each step, captured anew; NaN on failure."""
    times = []
    with chosen(select):
        restart(backend)
        for _, step in steps:
            try:
                times.append(timed(lambda s=step: backend.forward(s)))
            except RuntimeError as error:
                print(f"FAILED, {type(error).__name__}: {error}")
                times.append(float("nan"))
    return times
