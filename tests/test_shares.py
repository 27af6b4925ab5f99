"""Single tokens whose keys are shared out: the plan by itself, then the kernel against the reference."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")
from test_triton_attention import DEVICE, LEFT, SIZES, TYPES, expected, pool, step

from llmrs.backends.torch.kernels.attention import Tiling
from llmrs.backends.torch.kernels.shares import Workspace, shared_attention
from llmrs.backends.torch.shares import WIDTH, Shares, share_out
from llmrs.backends.torch.step import single_tiles


def planned(shares: Shares, tiles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    segments = np.full((shares.rows(len(tiles)), WIDTH), 99, np.int32)
    begins = np.full(shares.workers + 1, 99, np.int32)
    share_out(shares, tiles, segments, begins)
    return segments, begins


def tiles_of(lengths: list[int]) -> np.ndarray:
    """In block tables of 100 blocks, of tokens in rows from 7 on."""
    n = np.arange(len(lengths))
    return np.stack([100 * n, n + 7, np.ones_like(n), np.array(lengths, int) - 1], axis=1).astype(np.int32)


@given(
    st.lists(st.one_of(st.integers(1, 40), st.integers(1, 3000)), max_size=60),
    st.integers(1, 70),
    st.sampled_from([1, 16, 64]),
)
@settings(max_examples=300, deadline=None)
def test_the_plan(lengths: list[int], workers: int, keys: int):
    shares = Shares(workers, keys)
    segments, begins = planned(shares, tiles_of(lengths))
    assert begins[0] == 0
    assert (np.diff(begins) >= 0).all()
    used, rest = segments[: begins[-1]], segments[begins[-1] :]
    assert len(rest) >= 1 or not lengths  # the next one can always be read
    assert (rest == 0).all()
    check_sequences(used, lengths, keys)
    sizes = -(-(used[:, 4] - used[:, 3]) // keys)
    each = [sizes[a:b].sum() for a, b in pairwise(begins)]
    assert max(each) - min(each) <= 1
    slots = used[used[:, 5] >= 0, 5]
    assert slots.tolist() == list(range(len(slots)))
    assert len(slots) <= shares.slots


def check_sequences(used: np.ndarray, lengths: list[int], keys: int) -> None:
    """Every key once, from tile to tile; slots side by side."""
    for n, length in enumerate(lengths):
        mine = used[used[:, 1] == n + 7]
        assert (mine[:, 0] == 100 * n).all()
        assert (mine[:, 2] == length - 1).all()
        assert mine[0, 3] == 0
        assert mine[-1, 4] == length
        assert (mine[1:, 3] == mine[:-1, 4]).all()
        assert (mine[:, 3] % keys == 0).all()
        assert (mine[:, 3] < mine[:, 4]).all()
        assert (mine[:, 7] == len(mine)).all()
        whole = len(mine) == 1
        assert mine[:, 5].tolist() == ([-1] if whole else list(range(mine[0, 5], mine[0, 5] + len(mine))))
        assert (mine[:, 6] == mine[0, 5]).all()


def test_a_plan_by_hand():
    segments, begins = planned(Shares(3, 16), tiles_of([40, 17, 50]))  # tiles: 3, 2, 4
    assert begins.tolist() == [0, 1, 3, 4]
    assert segments[:, 3:].tolist() == [
        [0, 40, -1, -1, 1],
        [0, 17, -1, -1, 1],
        [0, 16, 0, 0, 2],
        [16, 50, 1, 0, 2],
        [0] * 5,
        [0] * 5,
    ]


def run(q, kv, batch, scale: float, cut: Tiling, shares: Shares, space: Workspace) -> torch.Tensor:
    """y of the step's single tokens; what is not written is 77."""
    y = torch.full((len(q), q.shape[1] * q.shape[2]), 77.0, dtype=q.dtype, device=DEVICE)
    tiles = single_tiles(batch, np.diff(batch.starts), batch.blocks.shape[1])
    segments, begins = (torch.from_numpy(a).to(DEVICE) for a in planned(shares, tiles))
    keys, values = (x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in kv)
    tables = torch.from_numpy(batch.blocks).to(DEVICE)
    shared_attention(q.to(DEVICE), keys, values, tables, segments, begins, y, space, scale=scale, cut=cut)
    assert (space.arrived == 0).all()
    return y.cpu()


def poisoned(shares: Shares, heads: int, size: int) -> Workspace:
    space = Workspace.of(shares.slots, heads, size, torch.device(DEVICE))
    for floats in (space.sums, space.tops, space.weights):
        floats.fill_(torch.nan)
    return space


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "size"), SIZES)
def test_against_the_reference(heads: int, kv_heads: int, size: int, dtype: torch.dtype):
    """Lengths at the edges of blocks and tiles, beside a part of a prompt; one worker, some, and more than tiles."""
    rng = np.random.default_rng(size)
    for block_size, workers, keys in ((4, 1, 16), (5, 3, 16), (16, 7, 32), (64, 40, 16), (32, 4, 64)):
        batch = step(rng, [0, 15, 16, 3, 63, 100], [1, 1, 1, 4, 1, 1], block_size)
        kv = pool(rng, batch, block_size, kv_heads, size, dtype)
        wide = torch.from_numpy(rng.normal(size=(len(batch.tokens), heads + 2, size))).to(dtype)
        q, shares = wide[:, 1 : heads + 1], Shares(workers, keys)
        space = poisoned(shares, heads, size)
        y = run(q, kv, batch, size**-0.5, Tiling(1, 16, 4, 1), shares, space)
        wanted = expected(q, kv, batch, block_size, size**-0.5, 0)
        single = np.isin(np.arange(len(q)), batch.starts[:-1][np.diff(batch.starts) == 1])
        assert np.abs(y.float().numpy() - wanted)[single].max() < LEFT[dtype], (block_size, workers)
        assert (y[~torch.from_numpy(single)] == 77).all()
        again = run(q, kv, batch, size**-0.5, Tiling(1, 16, 4, 1), shares, space)  # over what the first one left
        assert torch.equal(y, again)
