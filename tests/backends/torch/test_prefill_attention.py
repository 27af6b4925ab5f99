"""Prefill attention with TMA against the reference."""

import numpy as np
import pytest
import torch

from llmrs.backends.base import load_backend
from llmrs.backends.testing import RandomModel, prefill_batch, prompts
from llmrs.core.errors import BackendError

pytest.importorskip("triton")
from attention_cases import LEFT, TYPES, expected, pool, step

from llmrs.backends.torch import triton_ops
from llmrs.backends.torch.attn_metadata import prefill_tiles
from llmrs.backends.torch.kernels.paged_attention import AttnConfig
from llmrs.backends.torch.kernels.prefill_attention_tma import prefill_attention_tma, prefill_config, tma_compatible
from llmrs.backends.torch.kv_fp8 import CODES, Scaled

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALVES = [t for t in TYPES if t != torch.float32]


def run(q, kv, batch, scale: float, config: AttnConfig) -> torch.Tensor:
    y = torch.full((len(q), q.shape[1] * q.shape[2]), 77.0, dtype=q.dtype)
    q, kv, tables, y = (x.to(DEVICE) for x in (q, kv, torch.from_numpy(batch.block_tables), y))
    tiles = prefill_tiles(batch, np.diff(batch.query_start_loc), batch.block_tables.shape[1], config.q_tokens)
    tiles = torch.from_numpy(np.concatenate([np.zeros((1, 4), np.int32), tiles])).to(DEVICE)  # and an empty tile
    prefill_attention_tma(q, *kv, tables, tiles, y, scale=scale, config=config)
    return y.cpu()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 2, 16), (3, 1, 24), (8, 8, 64), (4, 1, 96), (2, 1, 128)])
def test_ragged_steps(heads: int, kv_heads: int, size: int, dtype: torch.dtype):
    """With and without cached tokens; only prefill chunks are written."""
    rng = np.random.default_rng(size)
    for block_size, keys in ((16, 16), (32, 16), (64, 64), (64, 32), (128, 128)):
        batch = step(rng, [0, 37, 3, 130, 65], [1, 13, 5, 40, 70], block_size)
        kv = pool(rng, batch, block_size, kv_heads, size, dtype)
        wide = torch.from_numpy(rng.normal(size=(len(batch.input_ids), heads + 2, size))).to(dtype)
        q = wide[:, 1 : heads + 1]  # not contiguous, like a slice of a merged linear's output
        y = run(q, kv, batch, size**-0.5, AttnConfig(8, keys, 4, 2))
        wanted = expected(q, kv, batch, block_size, size**-0.5, 0)
        assert np.abs(y[1:].float().numpy() - wanted[1:]).max() < LEFT[dtype], block_size
        assert (y[0] == 77).all()


@pytest.mark.parametrize(("size", "block_size"), [(128, 64), (128, 128), (256, 64)])
def test_the_cut_that_the_gpu_gets(size: int, block_size: int):
    rng = np.random.default_rng(0)
    batch = step(rng, [150, 0], [90, 200], block_size)
    kv = pool(rng, batch, block_size, 1, size, torch.float16)
    q = torch.from_numpy(rng.normal(size=(290, 2, size))).to(torch.float16)
    y = run(q, kv, batch, 0.1, prefill_config(2, size, block_size))
    assert np.abs(y.float().numpy() - expected(q, kv, batch, block_size, 0.1, 0)).max() < 4e-3


def test_caches_that_tma_cannot_load():
    heads_first = torch.zeros(4, 2, 16, 24, dtype=torch.float16).transpose(1, 2)
    assert tma_compatible(heads_first, torch.float16)
    assert not tma_compatible(heads_first, torch.bfloat16)  # a cache of another type
    assert not tma_compatible(heads_first.float(), torch.float32)
    assert not tma_compatible(heads_first[:, :8], torch.float16)  # blocks of fewer tokens than an MMA takes
    assert not tma_compatible(
        torch.zeros(4, 16, 2, 24, dtype=torch.float16), torch.float16
    )  # a head's tokens are not contiguous
    assert not tma_compatible(torch.zeros(4, 2, 16, 12, dtype=torch.float16).transpose(1, 2), torch.float16)  # 24 bytes
    assert not tma_compatible(Scaled(heads_first.to(CODES), torch.zeros(4, 16, 2)), torch.float16)
    rng = np.random.default_rng(0)
    batch = step(rng, [0], [5], 16)
    kv, q = pool(rng, batch, 16, 1, 16, torch.float16), torch.ones(5, 2, 16, dtype=torch.float16)
    with pytest.raises(BackendError, match="prefill_attention_tma"):
        run(q, kv, batch, 1.0, AttnConfig(8, 32, 4, 2))  # tiles larger than blocks


def test_a_model_with_it(monkeypatch):
    """On long prefill chunks; float16 logits within the precision of the mantissa."""
    calls, found = [], []
    monkeypatch.setattr("llmrs.backends.torch.attn_metadata.TMA_MIN_PREFILL", 1)
    launch = triton_ops.prefill_attention_tma
    monkeypatch.setattr(
        triton_ops, "prefill_attention_tma", lambda *args, **how: (calls.append(how["config"]), launch(*args, **how))
    )
    for name, dtype in (("reference", "f32"), ("torch", "f16")):
        backend = load_backend(name)(f"{DEVICE}:0" if DEVICE == "cuda" and name == "torch" else "cpu", dtype, dtype)
        if name == "torch":
            backend.use_kernels("triton", graphs=False)
        RandomModel.of("qwen3").on(backend).allocate(64, 16, 4, 256)
        found.append(backend.to_host(backend.forward(prefill_batch(prompts(30, 7), 16))))
    assert len(calls) == 3  # layers
    assert np.linalg.norm(found[0] - found[1]) < 0.02 * np.linalg.norm(found[0])
