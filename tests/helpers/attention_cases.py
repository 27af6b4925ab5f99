"""Steps and KV caches for the attention kernels, and the reference's results."""

import numpy as np
import pytest
import torch

from llmrs.backends.reference import ops
from llmrs.backends.testing import prefill_batch
from llmrs.backends.torch.kv_fp8 import QuantizedKV
from llmrs.core.batch import Batch

pytest.importorskip("triton")
from llmrs.backends.torch.attn_metadata import decode_tiles, prefill_tiles
from llmrs.backends.torch.kernels.paged_attention import AttnConfig, paged_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
LEFT = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}  # tolerance


def step(rng: np.random.Generator, past: list[int], new: list[int], block_size: int) -> Batch:
    """A step of `new` tokens each after `past` cached ones, in scattered blocks."""
    batch = prefill_batch([[1] * n for n in new], block_size)
    lengths = np.array(past, np.int32) + np.array(new, np.int32)
    width = int(-(-lengths.max() // block_size)) + 1
    blocks = rng.permutation(len(new) * width).astype(np.int32).reshape(len(new), width)
    positions = np.concatenate([p + np.arange(n, dtype=np.int32) for p, n in zip(past, new, strict=True)])
    return Batch(**{**vars(batch), "positions": positions, "seq_lens": lengths, "block_tables": blocks})


def pool(rng: np.random.Generator, batch: Batch, block_size: int, kv_heads: int, size: int, dtype: torch.dtype):
    """K and V caches, NaN at unused tokens; heads before tokens in memory, as on the GPU."""
    shape = (2, batch.block_tables.max() + 2, kv_heads, block_size, size)
    kv = torch.full(shape, torch.nan, dtype=dtype).transpose(2, 3)
    for s, length in enumerate(batch.seq_lens):
        for p in range(length):
            block = batch.block_tables[s, p // block_size]
            kv[:, block, p % block_size] = torch.from_numpy(rng.normal(size=(2, kv_heads, size))).to(dtype)
    return kv


def run(q, kv, batch: Batch, scale: float, window: int, config: AttnConfig, num_splits: int) -> torch.Tensor:
    y = torch.full((len(q), q.shape[1] * q.shape[2]), 77.0, dtype=q.dtype)
    q, tables, y = (x.to(DEVICE) for x in (q, torch.from_numpy(batch.block_tables), y))
    keys, values = (x if isinstance(x, QuantizedKV) else x.to(DEVICE) for x in kv)
    counts, width = np.diff(batch.query_start_loc), batch.block_tables.shape[1]
    singles = decode_tiles(batch, counts, width)
    empty = np.zeros((1, 4), np.int32)
    chunks = prefill_tiles(batch, counts, width, config.q_tokens)
    for tiles, how, n in ((singles, AttnConfig(1, config.block_n, 4, 1), num_splits), (chunks, config, 1)):
        tiles = torch.from_numpy(np.concatenate([empty, tiles])).to(DEVICE)  # and an empty tile
        paged_attention(q, keys, values, tables, tiles, y, scale=scale, window=window, config=how, num_splits=n)
    return y.cpu()


def expected(q, kv, batch: Batch, block_size: int, scale: float, window: int) -> np.ndarray:
    keys, values = (x.float().numpy() for x in kv)
    return ops.attend(
        ops.Context(batch, block_size), q.float().numpy(), ops.KV(keys, values), scale=scale, window=window
    )
