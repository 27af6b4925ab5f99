"""The part `shares` of bench_cuda.py: attention of single tokens, split as before, and shared out evenly; then with the
rotation of the new tokens in a kernel before it, and in the same.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from bench_chain import recorded

from llmrs.backends.torch.kernels.attention import Tiling, attention, splits
from llmrs.backends.torch.kernels.launch import chaining, multiprocessors
from llmrs.backends.torch.kernels.rope import norm_rope_store
from llmrs.backends.torch.kernels.shares import New, Workspace, shared_attention
from llmrs.backends.torch.shares import WIDTH, Shares, share_out

Timed = Callable[[Callable[[], object]], float]
GPU, DTYPE = "cuda:0", torch.bfloat16
HEADS, KV_HEADS, SIZE, BLOCK, SCALE = 16, 8, 128, 64, 0.09
PROGRAMS = (264, 396, 528, 792, 1188)  # for all KV heads together
CUTS = (Tiling(1, 64, 2, 3), Tiling(1, 64, 4, 3), Tiling(1, 32, 2, 4))
BEYOND = 200 * 10**6  # bytes of all layers, which no L2 cache holds
CASES: dict[str, tuple[int, int, int]] = {  # sequences, least and most keys
    "256 x 512": (256, 512, 512),
    "256 of 16 to 1024": (256, 16, 1024),
    "64 of 850 to 1770": (64, 850, 1770),
    "40 of 850 to 1950": (40, 850, 1950),
    "8 x 2000": (8, 2000, 2000),
    "1 x 384": (1, 384, 384),
    "1 x 16384": (1, 16384, 16384),
}


@dataclass(frozen=True)
class Step:
    """Single tokens after `lengths` - 1 others, the KV cache of some layers, and where results go."""

    lengths: np.ndarray
    pools: Sequence[torch.Tensor]  # (blocks, 2, Hk, block, d) each
    q: torch.Tensor
    tables: torch.Tensor
    y: torch.Tensor  # (layers, sequences, Hq * d)

    @staticmethod
    def of(count: int, least: int, most: int) -> "Step":
        lengths = np.random.default_rng(0).integers(least, most + 1, count)
        width = -(-most // BLOCK)
        read = 2 * int(lengths.sum()) * KV_HEADS * SIZE * DTYPE.itemsize
        layers = min(max(BEYOND // read, 3), 96)
        shape = count * width, 2, KV_HEADS, BLOCK, SIZE
        pools = [torch.randn(shape, device=GPU, dtype=DTYPE) for _ in range(layers)]
        q = torch.randn(count, HEADS, SIZE, device=GPU, dtype=DTYPE)
        tables = torch.randperm(count * width, device=GPU).int()
        y = torch.empty(layers, count, HEADS * SIZE, device=GPU, dtype=DTYPE)
        return Step(lengths, pools, q, tables, y)

    @property
    def tiles(self) -> np.ndarray:
        """int32 (n, 4), the longest first."""
        n = np.arange(len(self.lengths))
        tiles = np.stack([n * -(-int(self.lengths.max()) // BLOCK), n, np.ones_like(n), self.lengths - 1], axis=1)
        return tiles[np.argsort(-self.lengths, kind="stable")].astype(np.int32)

    @property
    def bytes(self) -> int:
        """Of one layer's keys and values."""
        return 2 * int(self.lengths.sum()) * KV_HEADS * SIZE * DTYPE.itemsize

    def over_layers(self, launch: Callable[..., None]) -> torch.Tensor:
        for pool, y in zip(self.pools, self.y, strict=True):
            launch(self.q, pool[:, 0].transpose(1, 2), pool[:, 1].transpose(1, 2), self.tables, y)
        return self.y


def split_up(step: Step, cut: Tiling) -> Callable[..., None]:
    tiles = torch.from_numpy(step.tiles).to(GPU)
    split = splits(len(tiles), KV_HEADS, 2 * multiprocessors(torch.device(GPU)))

    def launch(
        q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, tables: torch.Tensor, y: torch.Tensor
    ) -> None:
        attention(q, keys, values, tables, tiles, y, scale=SCALE, window=0, cut=cut, split=split)

    return launch


def shared_out(step: Step, cut: Tiling, programs: int, space: Workspace) -> Callable[..., None]:
    plan = Shares(max(programs // KV_HEADS, 1), cut.keys)
    found = np.zeros((plan.rows(len(step.lengths)), WIDTH), np.int32), np.zeros(plan.workers + 1, np.int32)
    share_out(plan, step.tiles, *found)
    segments, begins = (torch.from_numpy(a).to(GPU) for a in found)

    def launch(
        q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, tables: torch.Tensor, y: torch.Tensor
    ) -> None:
        shared_attention(q, keys, values, tables, segments, begins, y, space, scale=SCALE, cut=cut)

    return launch


def turned(step: Step, space: Workspace, *, at_once: bool) -> Callable[..., None]:
    """Norm, rotation and store of new tokens, and attention: shared out as the engine does it."""
    count, plan = len(step.lengths), Shares(PROGRAMS[1] // KV_HEADS, CUTS[0].keys)
    found = np.zeros((plan.rows(count), WIDTH), np.int32), np.zeros(plan.workers + 1, np.int32)
    share_out(plan, step.tiles, *found)
    segments, begins = (torch.from_numpy(a).to(GPU) for a in found)
    positions = torch.from_numpy(step.lengths - 1).to(GPU)
    cells = step.tables.view(count, -1)[torch.arange(count, device=GPU), positions // BLOCK] * BLOCK + positions % BLOCK
    ints = positions.int(), cells.int()
    rng = torch.Generator(GPU).manual_seed(0)
    k, v, *norms = (
        torch.randn(n, device=GPU, generator=rng).to(DTYPE)
        for n in ((count, KV_HEADS, SIZE), (count, KV_HEADS, SIZE), SIZE, SIZE)
    )
    angles = torch.rand(int(step.lengths.max()), SIZE // 2, device=GPU, generator=rng) * 6
    new = New(k, v, (norms[0], norms[1]), torch.stack([angles.cos(), angles.sin()]), 1e-6)

    def launch(
        q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, tables: torch.Tensor, y: torch.Tensor
    ) -> None:
        if not at_once:
            q = norm_rope_store(q, k, v, new.norms, *ints, new.turns, keys, values, eps=new.eps)
        shared_attention(
            q, keys, values, tables, segments, begins, y, space, scale=SCALE, cut=CUTS[0], new=new if at_once else None
        )

    return launch


def shares(timed: Timed, found: dict[str, Any]) -> None:
    """Microseconds of a launch and TB/s, in a graph of some layers; results beside those of the way before."""
    space = Workspace.of(2 * max(PROGRAMS), HEADS, SIZE, torch.device(GPU))
    planning(found)
    for name, sizes in CASES.items():
        step = Step.of(*sizes)
        ways = {"before": split_up(step, CUTS[0])} | {
            f"{p // KV_HEADS} workers, {cut.keys} keys, {cut.warps} warps": shared_out(step, cut, p, space)
            for cut in CUTS
            for p in (PROGRAMS if cut == CUTS[0] else PROGRAMS[:4])
        }
        compared(timed, found, name, step, ways, space)
        both = {f"new tokens {how}": turned(step, space, at_once=how == "inside") for how in ("apart", "inside")}
        compared(timed, found, name, step, both, space)
        del step, ways
        torch.cuda.empty_cache()


def compared(
    timed: Timed, found: dict[str, Any], name: str, step: Step, ways: dict[str, Callable[..., None]], space: Workspace
) -> None:
    """Each way, and the first once more, which the others must agree with."""
    expected = None
    for way, launch in (*ways.items(), next(iter(ways.items()))):
        step.y.fill_(torch.nan)
        with chaining(True):
            seconds = timed(recorded(partial(step.over_layers, launch))) / len(step.pools)
        expected = step.y.float() if expected is None else expected
        right = alike(step.y.float(), expected) and not space.arrived.any()
        found.setdefault(f"shares {name}", {})[way] = [seconds, step.bytes / seconds / 1e12, right]
        print(f"{name:18} {way:31} {seconds * 1e6:6.1f} us, {step.bytes / seconds / 1e12:.2f} TB/s"
              f"{'' if right else '  WRONG'}", flush=True)  # fmt: skip


def alike(y: torch.Tensor, expected: torch.Tensor) -> bool:
    """Within two steps of bfloat16, or a little of what is usual."""
    return bool(((y - expected).abs() <= expected.abs() / 64 + expected.std() / 64).all())


def planning(found: dict[str, Any]) -> None:
    """The host's time for a plan of 256 sequences, the best of 200."""
    plan, rng, times = Shares(49, 64), np.random.default_rng(0), []
    tiles = np.stack([np.arange(256), np.arange(256), np.ones(256), rng.integers(16, 1024, 256)], axis=1).astype(
        np.int32
    )
    segments, begins = np.zeros((plan.rows(256), WIDTH), np.int32), np.zeros(plan.workers + 1, np.int32)
    for _ in range(200):
        begin = time.perf_counter()
        share_out(plan, tiles, segments, begins)
        times.append(time.perf_counter() - begin)
    found["shares plan"] = min(times)
    print(f"a plan of 256 sequences: {min(times) * 1e6:.0f} us of the host")
