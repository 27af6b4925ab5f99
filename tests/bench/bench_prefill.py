"""The part `prompt` of bench_cuda.py: attention of prompts by every way there is, where a large step's time goes, and
the workload `prefill` with each choice of the options `attention` and `block_size`.
"""

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import product
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from llmrs.backends.torch.attn_metadata import chunk_tiles
from llmrs.backends.torch.kernels import qk_norm_rope_cache
from llmrs.backends.torch.kernels.gather import gather
from llmrs.backends.torch.kernels.paged_attention import Tiling, attention
from llmrs.backends.torch.kernels.prefill_attention_tma import prompt_attention
from llmrs.backends.torch.library import Flash, Parts, Sdpa, parts_of
from llmrs.core.batch import Batch
from llmrs.random_model import prefill_batch

GPU, DTYPE = "cuda:0", torch.bfloat16
HEADS, KV_HEADS, SIZE, SCALE = 16, 8, 128, 0.09
CASES = {
    "1 x 4096": (0, 4096, 1),
    "2 x 4096": (0, 4096, 2),
    "8 x 1024": (0, 1024, 8),
    "1024 after 3072": (3072, 1024, 1),
}
PRESENT = ((64, 64, 8, 3), (64, 64, 8, 2), (64, 32, 8, 3), (32, 64, 4, 3))  # Tilings
BY_COPY = {
    64: ((64, 64, 8, 2), (64, 64, 8, 3), (64, 64, 8, 4), (32, 64, 4, 2), (128, 64, 16, 3)),
    128: ((64, 128, 8, 2), (64, 128, 8, 3), (64, 64, 8, 3)),
}  # by tokens of a block

WITHOUT_COPIES = partial(attention, window=0)


@dataclass(frozen=True)
class Case:
    """A step of `count` prompts of `new` tokens after `past`, and its tensors."""

    batch: Batch
    block: int
    q: torch.Tensor
    pool: torch.Tensor  # (blocks, 2, Hk, block, d)
    tables: torch.Tensor

    @property
    def kv(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.pool[:, 0].transpose(1, 2), self.pool[:, 1].transpose(1, 2)

    @property
    def operations(self) -> int:
        return 4 * SIZE * HEADS * int((self.batch.positions + 1).astype(np.int64).sum())

    def tiles(self, tokens: int, *, ordered: bool = True) -> torch.Tensor:
        tiles = chunk_tiles(self.batch, np.diff(self.batch.query_start_loc), self.batch.block_tables.shape[1], tokens)
        return torch.from_numpy(tiles if ordered else tiles[np.argsort(tiles[:, 1])]).to(GPU)


def case(past: int, new: int, count: int, block: int) -> Case:
    torch.manual_seed(0)
    batch = prefill_batch([[0] * (past + new)] * count, block)
    rows = np.flatnonzero(batch.positions >= past)
    batch = Batch(**{**vars(batch), "input_ids": batch.input_ids[rows], "positions": batch.positions[rows],
                     "starts": np.arange(count + 1, dtype=np.int32) * new})  # fmt: skip
    blocks = (
        np.random.default_rng(0).permutation(batch.block_tables.size).astype(np.int32).reshape(batch.block_tables.shape)
    )
    batch = Batch(**{**vars(batch), "block_tables": blocks})
    q = torch.randn(count * new, HEADS, SIZE, device=GPU).to(DTYPE)
    pool = torch.randn(blocks.size + 1, 2, KV_HEADS, block, SIZE, device=GPU).to(DTYPE)
    return Case(batch, block, q, pool, torch.from_numpy(blocks.reshape(-1)).to(GPU))


Way = Callable[[], torch.Tensor]


def kernel(c: Case, cut: Tiling, run: Callable[..., None], *, ordered: bool = True) -> Way:
    """One of our two kernels."""
    y = torch.empty(len(c.q), HEADS * SIZE, device=GPU, dtype=DTYPE)
    tiles = c.tiles(cut.tokens, ordered=ordered)

    def launch() -> torch.Tensor:
        run(c.q, *c.kv, c.tables, tiles, y, scale=SCALE, cut=cut)
        return y

    return launch


def library(c: Case, made: Any, p: Parts, *, gathers: bool) -> Way:
    """A library as the option `attention` has it, or without the gathering of keys."""
    kv = gather(*c.kv, p.pieces, p.keys, DTYPE)

    def launch() -> torch.Tensor:
        k, v = gather(*c.kv, p.pieces, p.keys, DTYPE) if gathers else kv
        return made.attend(c.q, k, v, p, SCALE, 0).flatten(1)

    return launch


def by_backend(c: Case, p: Parts, backend: SDPBackend) -> Way:
    """torch's attention by one of its backends alone, keys gathered before."""
    (n, length), s = p.counts[0], len(p.counts)
    kv = gather(*c.kv, p.pieces, p.keys, DTYPE)
    x, k, v = (t.unflatten(0, (s, -1)).transpose(1, 2) for t in (c.q, *kv))
    how = {"is_causal": True} if n == length else {"attn_mask": causal_lower_right(n, length)}

    def launch() -> torch.Tensor:
        with sdpa_kernel([backend]):
            y = torch.nn.functional.scaled_dot_product_attention(x, k, v, scale=SCALE, enable_gqa=True, **how)
        return y.transpose(1, 2).reshape(len(c.q), -1)

    return launch


def varlen(c: Case, p: Parts) -> Way:
    """torch's varlen_attn; releases differ in what it is told, and older ones want as many key heads as query heads."""
    from torch.nn.attention.varlen import varlen_attn

    k, v = gather(*c.kv, p.pieces, p.keys, DTYPE)
    (n, length), told = p.counts[0], varlen_attn.__kwdefaults__ or {}
    how: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in told else {"is_causal": True}
    how |= {name: value for name, value in (("scale", SCALE), ("enable_gqa", True)) if name in told}
    return lambda: varlen_attn(c.q, k, v, p.starts, p.key_starts, n, length, **how).flatten(1)


def ways(past: int, new: int, count: int) -> dict[str, tuple[Case, Callable[[], Way]]]:
    """By name. The first is what `kernels: auto` does."""
    cases = {block: case(past, new, count, block) for block in BY_COPY}
    c = cases[64]
    p = parts_of(c.batch, 64, torch.device(GPU))
    assert p is not None
    found: dict[str, tuple[Case, Callable[[], Way]]] = {}
    for n, cut in enumerate(PRESENT):
        found[f"present {cut}"] = c, partial(kernel, c, Tiling(*cut), WITHOUT_COPIES)
        if n == 0:
            found[f"present {cut}, shortest first"] = c, partial(kernel, c, Tiling(*cut), WITHOUT_COPIES, ordered=False)
    for block, cuts in BY_COPY.items():
        for cut in cuts:
            found[f"by copy, block {block} {cut}"] = (
                cases[block],
                partial(kernel, cases[block], Tiling(*cut), prompt_attention),
            )
    made = {"sdpa": Sdpa} | ({"flash": Flash} if find_spec("flash_attn_interface") or find_spec("flash_attn") else {})
    for (name, how), gathers in product(made.items(), (True, False)):
        found[name + (" with gather" if gathers else "")] = c, partial(library, c, how(), p, gathers=gathers)
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        found[f"torch {backend.name}"] = c, partial(by_backend, c, p, backend)
    found["torch varlen_attn"] = c, partial(varlen, c, p)
    return found


def kernels(timed: Callable[..., float]) -> dict[str, Any]:
    """TFLOP/s of each way on each case; and how far it is from the present kernel, which shows what is wrong."""
    results: dict[str, Any] = {}
    for name, (past, new, count) in CASES.items():
        expected: dict[int, torch.Tensor] = {}  # pools of other blocks hold other keys
        for way, (c, make) in ways(past, new, count).items():
            try:
                run = make()
                if c.block not in expected:
                    expected[c.block] = kernel(c, Tiling(*PRESENT[0]), WITHOUT_COPIES)().float().clone()
                error = (run().float() - expected[c.block]).norm() / expected[c.block].norm()
                rate = c.operations / timed(run) / 1e12
            except Exception as failed:  # noqa: BLE001 - the others go on: time on a GPU is short
                print(f"{name}, {way}: FAILED: {type(failed).__name__}: {str(failed)[:200]}", flush=True)
                continue
            results[f"{name}, {way}"] = [rate, float(error)]
            wrong = " WRONG" if not error < 0.01 else ""
            print(f"{name}, {way}: {rate:.0f} TFLOP/s, differs by {error:.4f}{wrong}", flush=True)
    return results


def step(timed: Callable[..., float], backend: Any) -> None:
    """One step of two prompts of 4,096: its time on the device, the host's to launch it, and the top kernels."""
    import time

    batch = prefill_batch([[7] * 4096] * 2, backend.block_size)
    for many in (2**30, qk_norm_rope_cache.MANY):  # programs of few heads, then of more
        qk_norm_rope_cache.MANY, before = many, qk_norm_rope_cache.MANY
        seconds = timed(lambda: backend.launch(batch))
        qk_norm_rope_cache.MANY = before
        begin = time.perf_counter()
        ticket = backend.launch(batch)
        host = time.perf_counter() - begin
        ticket.tokens()
        print(f"step of 8192, rope.MANY {many}: {seconds * 1e3:.2f} ms, {8192 / seconds:.0f} tokens/s; "
              f"host {host * 1e3:.2f} ms", flush=True)  # fmt: skip
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(3):
            backend.launch(batch).tokens()
    table = profile.key_averages().table(sort_by="self_device_time_total", row_limit=20, max_name_column_width=60)
    print(f"3 steps of 8192\n{table}", flush=True)


def prefill(
    loaded: Callable[..., Any], measured: Callable[[Any], float], timed: Callable[..., float]
) -> dict[str, Any]:
    """Prompt tokens/s of the workload, the best of three, with each choice; and the steps of the first and the best."""
    results: dict[str, Any] = {}
    choices: list[dict[str, Any]] = [
        {},
        {"block_size": 128},
        {"attention": "sdpa"},
        *([{"attention": "flash"}] if find_spec("flash_attn_interface") or find_spec("flash_attn") else []),
    ]
    for options in choices:
        try:
            with loaded(kv_cache_memory=9 * 10**9, **options) as engine:
                rates = [measured(engine) for _ in range(4)][1:]  # the first compiles
                results[str(options)] = rates
                print(f"prefill {options}: {max(rates):.0f} tokens/s of {[round(r) for r in rates]}", flush=True)
                if options.get("attention") is None and "block_size" not in options:
                    engine._worker.run_on_device_thread(partial(step, timed))
        except Exception:  # noqa: BLE001
            traceback.print_exc()
    return results
