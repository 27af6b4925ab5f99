"""The part `prefill` of bench_cuda.py: prefill attention by our kernels and by SDPA, a large step's time by kernel, and
the workload `prefill` with each `block_size`.
"""

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from llmrs.backends.torch.attn_metadata import prefill_tiles
from llmrs.backends.torch.kernels import qk_norm_rope_cache
from llmrs.backends.torch.kernels.paged_attention import AttnConfig, paged_attention
from llmrs.backends.torch.kernels.prefill_attention_tma import prefill_attention_tma
from llmrs.core.batch import Batch
from llmrs.random_model import prefill_batch

GPU, DTYPE = "cuda:0", torch.bfloat16
HEADS, KV_HEADS, HEAD_DIM, SCALE = 16, 8, 128, 0.09
CASES = {  # cached tokens, new tokens, sequences
    "1 x 4096": (0, 4096, 1),
    "2 x 4096": (0, 4096, 2),
    "8 x 1024": (0, 1024, 8),
    "1024 after 3072": (3072, 1024, 1),
}
PAGED = ((64, 64, 8, 3), (64, 64, 8, 2), (64, 32, 8, 3), (32, 64, 4, 3))  # AttnConfigs
TMA = {
    64: ((64, 64, 8, 2), (64, 64, 8, 3), (64, 64, 8, 4), (32, 64, 4, 2), (128, 64, 16, 3)),
    128: ((64, 128, 8, 2), (64, 128, 8, 3), (64, 64, 8, 3)),
}  # by block size

Way = Callable[[], torch.Tensor]
paged = partial(paged_attention, window=0)


@dataclass(frozen=True)
class Case:
    """A prefill step and its tensors."""

    batch: Batch
    q: torch.Tensor
    pool: torch.Tensor  # (blocks, 2, Hk, block_size, d)
    block_tables: torch.Tensor

    @property
    def kv(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.pool[:, 0].transpose(1, 2), self.pool[:, 1].transpose(1, 2)

    @property
    def flops(self) -> int:
        return 4 * HEAD_DIM * HEADS * int((self.batch.positions + 1).astype(np.int64).sum())

    def tiles(self, q_tokens: int) -> torch.Tensor:
        counts, width = np.diff(self.batch.query_start_loc), self.batch.block_tables.shape[1]
        return torch.from_numpy(prefill_tiles(self.batch, counts, width, q_tokens)).to(GPU)


def case(past: int, new: int, count: int, block_size: int) -> Case:
    torch.manual_seed(0)
    batch = prefill_batch([[0] * (past + new)] * count, block_size)
    rows = np.flatnonzero(batch.positions >= past)
    shape = batch.block_tables.shape
    blocks = np.random.default_rng(0).permutation(batch.block_tables.size).astype(np.int32).reshape(shape)
    starts = np.arange(count + 1, dtype=np.int32) * new
    batch = Batch(**{**vars(batch), "input_ids": batch.input_ids[rows], "positions": batch.positions[rows],
                     "query_start_loc": starts, "block_tables": blocks})  # fmt: skip
    q = torch.randn(count * new, HEADS, HEAD_DIM, device=GPU).to(DTYPE)
    pool = torch.randn(blocks.size + 1, 2, KV_HEADS, block_size, HEAD_DIM, device=GPU).to(DTYPE)
    return Case(batch, q, pool, torch.from_numpy(blocks.reshape(-1)).to(GPU))


def kernel(c: Case, config: AttnConfig, run: Callable[..., None]) -> Way:
    """One of our two kernels."""
    y = torch.empty(len(c.q), HEADS * HEAD_DIM, device=GPU, dtype=DTYPE)
    tiles = c.tiles(config.q_tokens)

    def launch() -> torch.Tensor:
        run(c.q, *c.kv, c.block_tables, tiles, y, scale=SCALE, config=config)
        return y

    return launch


def sdpa(c: Case, backend: SDPBackend) -> Way:
    """torch's attention by one of its backends, on K and V that were gathered before."""
    count, length = len(c.batch.seq_lens), int(c.batch.seq_lens[0])
    tables = torch.from_numpy(c.batch.block_tables).to(GPU).long()
    # (count, blocks, block_size, Hk, d) -> (count, Hk, length, d)
    k, v = (x[tables].flatten(1, 2)[:, :length].transpose(1, 2).contiguous() for x in c.kv)
    q = c.q.unflatten(0, (count, -1)).transpose(1, 2)
    n = q.shape[2]
    how = {"is_causal": True} if n == length else {"attn_mask": causal_lower_right(n, length)}

    def launch() -> torch.Tensor:
        with sdpa_kernel([backend]):
            y = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=SCALE, enable_gqa=True, **how)
        return y.transpose(1, 2).reshape(len(c.q), -1)

    return launch


def ways(past: int, new: int, count: int) -> dict[str, tuple[int, Case, Callable[[], Way]]]:
    """Block size, case and launch by name; the first is the reference of the others."""
    cases = {size: case(past, new, count, size) for size in TMA}
    c = cases[64]
    found: dict[str, tuple[int, Case, Callable[[], Way]]] = {}
    for how in PAGED:
        found[f"paged {how}"] = 64, c, partial(kernel, c, AttnConfig(*how), paged)
    for size, configs in TMA.items():
        for how in configs:
            launch = partial(kernel, cases[size], AttnConfig(*how), prefill_attention_tma)
            found[f"TMA, blocks of {size}, {how}"] = size, cases[size], launch
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        found[f"SDPA {backend.name}"] = 64, c, partial(sdpa, c, backend)
    return found


def kernels(timed: Callable[..., float]) -> dict[str, Any]:
    """TFLOP/s of each way on each case, and its difference from the paged kernel."""
    results: dict[str, Any] = {}
    for name, (past, new, count) in CASES.items():
        expected: dict[int, torch.Tensor] = {}  # pools of another block size hold other keys
        for way, (size, c, make) in ways(past, new, count).items():
            try:
                run = make()
                if size not in expected:
                    expected[size] = kernel(c, AttnConfig(*PAGED[0]), paged)().float().clone()
                error = (run().float() - expected[size]).norm() / expected[size].norm()
                rate = c.flops / timed(run) / 1e12
            except Exception as failed:  # noqa: BLE001 - the others go on: time on a GPU is short
                print(f"{name}, {way}: FAILED: {type(failed).__name__}: {str(failed)[:200]}", flush=True)
                continue
            results[f"{name}, {way}"] = [rate, float(error)]
            wrong = " WRONG" if not error < 0.01 else ""
            print(f"{name}, {way}: {rate:.0f} TFLOP/s, differs by {error:.4f}{wrong}", flush=True)
    return results


def step(timed: Callable[..., float], backend: Any) -> None:
    """One step of two prompts of 4,096 tokens: device time, the host's time to launch it, and the top kernels."""
    batch = prefill_batch([[7] * 4096] * 2, backend.block_size)
    for many in (2**30, qk_norm_rope_cache.MANY_TOKENS):
        qk_norm_rope_cache.MANY_TOKENS, before = many, qk_norm_rope_cache.MANY_TOKENS
        seconds = timed(lambda: backend.launch(batch))
        qk_norm_rope_cache.MANY_TOKENS = before
        begin = time.perf_counter()
        ticket = backend.launch(batch)
        host = time.perf_counter() - begin
        ticket.tokens()
        print(f"step of 8192, MANY_TOKENS {many}: {seconds * 1e3:.2f} ms, {8192 / seconds:.0f} tokens/s; "
              f"host {host * 1e3:.2f} ms", flush=True)  # fmt: skip
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(3):
            backend.launch(batch).tokens()
    table = profile.key_averages().table(sort_by="self_device_time_total", row_limit=20, max_name_column_width=60)
    print(f"3 steps of 8192\n{table}", flush=True)


def prefill(
    loaded: Callable[..., Any], measured: Callable[[Any], float], timed: Callable[..., float]
) -> dict[str, Any]:
    """Prompt tokens/s of the workload, the best of three, by block size; and the steps of each."""
    results: dict[str, Any] = {}
    for options in ({}, {"block_size": 128}):
        try:
            with loaded(kv_cache_memory=9 * 10**9, **options) as engine:
                rates = [measured(engine) for _ in range(4)][1:]  # the first compiles
                results[str(options)] = rates
                print(f"prefill {options}: {max(rates):.0f} tokens/s of {[round(r) for r in rates]}", flush=True)
                engine._worker.run_on_device_thread(partial(step, timed))
        except Exception:  # noqa: BLE001
            traceback.print_exc()
    return results
