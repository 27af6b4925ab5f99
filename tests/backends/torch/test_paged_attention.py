"""Paged attention against the reference: ragged steps, awkward shapes; nothing else is written."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
from attention_cases import LEFT, TYPES, expected, pool, run, step

from llmrs.backends.torch.kernels.paged_attention import AttnConfig, default_config

SIZES = [(4, 2, 16), (3, 1, 24), (8, 8, 64), (4, 1, 96), (2, 1, 128), (2, 2, 256), (20, 1, 8)]  # Hq, Hk, d


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "size"), SIZES)
def test_ragged_steps(heads: int, kv_heads: int, size: int, dtype: torch.dtype):
    rng = np.random.default_rng(size)
    for block_size, window, split in ((4, 0, 1), (5, 7, 2), (16, 0, 4), (32, 0, 1), (16, 19, 1), (64, 3, 8)):
        batch = step(rng, [0, 37, 3, 0, 65, 8], [1, 1, 13, 5, 1, 1], block_size)
        kv = pool(rng, batch, block_size, kv_heads, size, dtype)
        wide = torch.from_numpy(rng.normal(size=(len(batch.input_ids), heads + 2, size))).to(dtype)
        q = wide[:, 1 : heads + 1]  # not contiguous, like a slice of a merged linear's output
        y = run(q, kv, batch, size**-0.5, window, AttnConfig(4, 16, 4, 1), split)
        wanted = expected(q, kv, batch, block_size, size**-0.5, window)
        assert np.abs(y.float().numpy() - wanted).max() < LEFT[dtype], (block_size, window, split)


def test_the_cut_that_the_gpu_gets():
    """On a prefill chunk of several tiles, with whole tiles of keys before the diagonal."""
    rng = np.random.default_rng(0)
    batch = step(rng, [150, 70], [90, 1], 64)
    kv = pool(rng, batch, 64, 1, 128, torch.float16)
    q = torch.from_numpy(rng.normal(size=(91, 2, 128))).to(torch.float16)
    y = run(q, kv, batch, 0.1, 0, default_config(2, 128, torch.float16, prefill=True), 4)
    assert np.abs(y.float().numpy() - expected(q, kv, batch, 64, 0.1, 0)).max() < 4e-3


def test_rows_of_no_tile_stay_as_they_are():
    rng = np.random.default_rng(0)
    batch = step(rng, [5, 6], [1, 1], 4)
    kv, q = pool(rng, batch, 4, 1, 16, torch.float32), torch.ones(5, 2, 16)
    y = run(q, kv, batch, 1.0, 0, AttnConfig(1, 16, 4, 1), 1)
    assert (y[:2] != 77).all()
    assert (y[2:] == 77).all()
