"""Attention that rotates and stores new tokens by itself, beside rope's kernel and attention after it."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
from test_triton_attention import DEVICE, LEFT, TYPES, pool, step
from test_triton_fp8 import filled

from llmrs.backends.base import find
from llmrs.backends.testing import RandomModel, core_on, prompts, request
from llmrs.backends.testing import run as run_engine
from llmrs.backends.torch import rules
from llmrs.backends.torch.fp8 import Scaled
from llmrs.backends.torch.kernels.attention import Tiling, attention
from llmrs.backends.torch.kernels.newest import New
from llmrs.backends.torch.kernels.rope import norm_rope_store
from llmrs.backends.torch.step import single_tiles
from llmrs.core.errors import BackendError

CUT = Tiling(1, 16, 2, 1)


def copied(x: torch.Tensor | Scaled) -> torch.Tensor | Scaled:
    return Scaled(x.codes.clone(), x.scales.clone()) if isinstance(x, Scaled) else x.clone()


def stored(x: torch.Tensor | Scaled) -> tuple[torch.Tensor, ...]:
    return (x.codes.float(), x.scales) if isinstance(x, Scaled) else (x,)


def attended(q, kv, batch, window: int, split: int, new: New | None = None) -> torch.Tensor:
    """(T, Hq * d), of rows that nobody wrote 77; the first tile is empty."""
    y = torch.full((len(q), q.shape[1] * q.shape[2]), 77.0, dtype=q.dtype, device=DEVICE)
    tiles = single_tiles(batch, np.diff(batch.starts), batch.blocks.shape[1])
    tiles = torch.from_numpy(np.concatenate([np.zeros((1, 4), np.int32), tiles])).to(DEVICE)
    tables = torch.from_numpy(batch.blocks).to(DEVICE)
    attention(q, *kv, tables, tiles, y, scale=0.2, window=window, cut=CUT, split=split, new=new)
    return y


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 2, 16), (3, 1, 24), (2, 2, 128), (5, 1, 80)])
def test_new_tokens_in_the_same_launch(heads: int, kv_heads: int, size: int, dtype: torch.dtype):
    """The same in the cache, bit for bit, and next to the same results."""
    rng = np.random.default_rng(size)
    batch = step(rng, [0, 15, 16, 63, 70], [1] * 5, 16)
    both = torch.from_numpy(rng.normal(size=(5, (heads + 2 * kv_heads) * size))).to(dtype).to(DEVICE)
    sizes = [heads * size, kv_heads * size, kv_heads * size]
    q, k, v = (x.unflatten(1, (-1, size)) for x in both.split(sizes, dim=1))
    turns = torch.from_numpy(rng.normal(size=(2, 80, size // 2))).float().to(DEVICE)
    at = batch.blocks[np.arange(5), batch.positions // 16] * 16 + batch.positions % 16
    ints = [torch.from_numpy(a.astype(np.int32)).to(DEVICE) for a in (batch.positions, at)]
    weights = tuple(torch.from_numpy(rng.normal(size=(2, size))).to(dtype).to(DEVICE))
    at, how = at.astype(np.int64), {"eps": 1e-6, "offset": 0.5}
    for norms, fp8, split, window in (
        (None, False, 1, 0),
        (weights, False, 8, 0),
        (weights, True, 4, 0),
        (weights, False, 4, 19),
    ):
        if fp8:
            old = filled(rng, batch, 16, kv_heads, size)[0]
        else:
            old = [x.to(DEVICE) for x in pool(rng, batch, 16, kv_heads, size, dtype)]
        for cache in old:
            cache[at // 16, at % 16] = torch.full((5, kv_heads, size), 9.0, dtype=cache.dtype, device=DEVICE)
        mine = [copied(x) for x in old]
        wanted = attended(norm_rope_store(q, k, v, norms, *ints, turns, *old, **how), old, batch, window, split)
        y = attended(q, mine, batch, window, split, New(k, v, norms, turns, **how))
        for a, b in zip(old, mine, strict=True):
            for x, z in zip(stored(a), stored(b), strict=True):
                assert torch.equal(x.nan_to_num(77.0), z.nan_to_num(77.0))
        assert (y - wanted).abs().max() <= LEFT[dtype] * wanted.abs().max()


def test_what_does_not_fit():
    rng = np.random.default_rng(0)
    batch = step(rng, [3], [1], 16)
    kv, q, turns = (
        pool(rng, batch, 16, 1, 16, torch.float32).to(DEVICE),
        torch.ones(1, 2, 16, device=DEVICE),
        torch.ones(2, 80, 8),
    )
    k, v = torch.ones(2, 1, 1, 16, device=DEVICE)
    for new in (
        New(k[:, :, :8], v, None, turns),
        New(k, v, (k[0, 0, :8],) * 2, turns),
        New(k, v, None, turns[:, :, :4]),
    ):
        with pytest.raises(BackendError, match="attention of new tokens"):
            attended(q, kv, batch, 0, 1, new)


def test_steps_of_few_tokens_do_it(monkeypatch):
    """And answer as those that do not."""
    counts, found = [], []
    attend = rules.paged.attention
    monkeypatch.setattr(
        rules.paged, "attention", lambda *a, **how: (counts.append(how.get("new") is not None), attend(*a, **how))
    )
    for most in (0, 16):
        monkeypatch.setattr(rules, "TURNED", most)
        backend = find("torch")("cuda:0" if DEVICE == "cuda" else "cpu", "f32", "f32")
        backend.use_kernels("triton", graphs=False)
        core = core_on(RandomModel.of("qwen3", num_hidden_layers=1).on(backend))
        counts.clear()
        found.append(run_engine(core, [request(p, max_tokens=4) for p in prompts(3, 20)]))
        assert any(counts) == bool(most)
    assert found[0] == found[1]
