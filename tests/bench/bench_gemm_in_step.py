"""The part `products` of bench_cuda.py: decode steps in which one kind of product is ours, and the others are not.

A product by itself is not one in a step: what stands before and after it counts. So this is what says whether `many` is
faster than the library (`worthwhile` in kernels/rows.py), and which tiles are the best (`on_paper` in rows_many.py).
Printed are microseconds of one launch more or less than the library's, with what is fused with it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import torch
from bench_gemm import restart

from llmrs.backends.torch import triton_ops
from llmrs.backends.torch.kernels.gemm import HEAD, Cut, Tiles
from llmrs.backends.torch.kernels.gemm_tma import SPAN, cut_many, filled

COUNTS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 384, 512)  # sequences
TILES = [*product((64,), (32, 64, 128, 256)), *product((128,), (64, 128))]
Timed = Callable[[Callable[[], object]], float]
CutOf = Callable[..., Cut | Tiles | None]


def kind_of(w: torch.Tensor, gate: bool, summed: bool) -> str:
    """As in a layer of Qwen3, Llama or Mistral."""
    if gate or not summed:
        return "gate+up" if gate else "head" if len(w) > HEAD else "qkv"
    return "down" if w.shape[1] > len(w) else "o"


def only(kind: str, tiles: tuple[int, int, int] | None = None) -> CutOf:
    """A `cut_of` by which `many` does one kind of product: as it would be, or in tiles (rows of w, of x, ranges)."""

    def cut_of(rows: int, w: torch.Tensor, gate: bool, summed: bool, shared: int) -> Tiles | None:
        if kind_of(w, gate, summed) != kind:
            return None
        count, width = len(w) // (1 + gate), w.shape[1]
        if tiles is None:
            return cut_many(rows, count, width, gate, summed, shared)
        cut = filled(*tiles, rows, count, gate, shared)
        return cut if cut.stages > 1 and (cut.split == 1 or (summed and width >= SPAN * cut.split)) else None

    return cut_of


@contextmanager
def chosen(cut_of: CutOf) -> Iterator[None]:
    before = triton_ops.few.cut_of
    triton_ops.few.cut_of = cut_of
    try:
        yield
    finally:
        triton_ops.few.cut_of = before


def products(timed: Timed, found: dict[str, Any], backend: Any, batch: Callable[[int], Any]) -> None:
    """`batch` makes a step of so many sequences."""
    steps, layers = [(count, batch(count)) for count in COUNTS], len(backend.kv)
    library = seconds(timed, backend, only("none"), steps)
    print(f"{'':22}", *(f"{count:8}" for count in COUNTS))
    print(f"{'library, whole steps':22}", *(f"{s * 1e6:8.0f}" for s in library), flush=True)
    for kind in ("qkv", "o", "gate+up", "down", "head"):
        splits = (1, 2, 4) if kind in ("o", "down") else (1,)
        for tiles in (None, *((*shape, split) for shape, split in product(TILES, splits))):
            times = seconds(timed, backend, only(kind, tiles), steps)
            name = f"{kind} " + ("as cut" if tiles is None else "{}x{}/{}".format(*tiles))
            found[f"product {name}"] = dict(zip(COUNTS, times, strict=True))
            launches = 1 if kind == "head" else layers
            more = [(t - base) * 1e6 / launches for t, base in zip(times, library, strict=True)]
            print(f"{name:22}", *(f"{m:8.1f}" for m in more), flush=True)


def seconds(timed: Timed, backend: Any, cut_of: CutOf, steps: list[tuple[int, Any]]) -> list[float]:
    """Of the forward part of each step, recorded anew; NaN where it fails."""
    times = []
    with chosen(cut_of):
        restart(backend)
        for _, step in steps:
            try:
                times.append(timed(lambda s=step: backend.forward(s)))
            except RuntimeError as error:
                print(f"FAILED, {type(error).__name__}: {error}")
                times.append(float("nan"))
    return times
