"""Single tokens whose keys are shared out: the plan by itself, then the kernel against the reference."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")
from test_triton_attention import DEVICE, LEFT, SIZES, TYPES, expected, pool, step
from test_triton_fp8 import LEFT as LEFT_FP8
from test_triton_fp8 import filled

from llmrs.backends.base import find
from llmrs.backends.reference import ops
from llmrs.backends.testing import RandomModel, core_on, prefill_batch, prompts, request
from llmrs.backends.testing import run as run_engine
from llmrs.backends.torch import rules
from llmrs.backends.torch.fp8 import Scaled
from llmrs.backends.torch.kernels.attention import Tiling, tiling
from llmrs.backends.torch.kernels.rope import norm_rope_store
from llmrs.backends.torch.kernels.shares import New, Workspace, shared_attention
from llmrs.backends.torch.shares import WIDTH, Shares, share_out
from llmrs.backends.torch.step import Shape, StepInputs, single_tiles
from llmrs.core.errors import BackendError


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


def run(q, kv, batch, scale: float, cut: Tiling, shares: Shares, space: Workspace, new: New | None = None):
    """y of the step's single tokens; what is not written is 77."""
    y = torch.full((len(q), q.shape[1] * q.shape[2]), 77.0, dtype=q.dtype, device=DEVICE)
    tiles = single_tiles(batch, np.diff(batch.starts), batch.blocks.shape[1])
    segments, begins = (torch.from_numpy(a).to(DEVICE) for a in planned(shares, tiles))
    keys, values = (x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in kv)
    tables = torch.from_numpy(batch.blocks).to(DEVICE)
    shared_attention(q.to(DEVICE), keys, values, tables, segments, begins, y, space, scale=scale, cut=cut, new=new)
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
    for block_size, workers, keys in ((4, 1, 16), (5, 3, 16), (64, 20, 16), (16, 4, 64)):
        batch = step(rng, [0, 15, 16, 3, 63, 70], [1, 1, 1, 4, 1, 1], block_size)
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


def short_pool(rng, batch, block_size: int, kv_heads: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    """As `pool`, made at once: NaN only behind the last token of each sequence."""
    shape = (2, batch.blocks.max() + 2, kv_heads, block_size, size)
    kv = torch.from_numpy(rng.normal(size=shape)).to(dtype).transpose(2, 3)
    for s, length in enumerate(batch.lengths):
        for at in range(length, batch.blocks.shape[1] * block_size):
            kv[:, batch.blocks[s, at // block_size], at % block_size] = torch.nan
    return kv


@pytest.mark.parametrize(
    ("past", "workers"),
    [
        ([0], 5),  # one token
        ([15, 16, 31, 32, 33] * 51 + [7, 8], 9),  # 257 sequences at edges
        ([0, 3, 700, 1, 2, 40], 24),  # one very long among short ones: more parts than are joined at a time
        ([200], 13),
    ],
    ids=["one", "many", "long", "alone"],
)
def test_shapes_of_steps(past: list[int], workers: int):
    rng = np.random.default_rng(0)
    batch = step(rng, past, [1] * len(past), 16)
    kv = short_pool(rng, batch, 16, 2, 32, torch.float32)
    q = torch.from_numpy(rng.normal(size=(len(past), 6, 32))).float()
    shares = Shares(workers, 16)
    y = run(q, kv, batch, 0.2, Tiling(1, 16, 1, 1), shares, poisoned(shares, 6, 32))
    assert np.abs(y.numpy() - expected(q, kv, batch, 16, 0.2, 0)).max() < 2e-5


def test_who_comes_last_does_not_matter():
    """Workers one by one, in another order: the same bits."""
    rng = np.random.default_rng(0)
    batch = step(rng, [90, 3, 200], [1] * 3, 16)
    kv = [x.to(DEVICE) for x in short_pool(rng, batch, 16, 2, 32, torch.float32)]
    q = torch.from_numpy(rng.normal(size=(3, 4, 32))).float()
    shares, cut = Shares(8, 16), Tiling(1, 16, 1, 1)
    space = poisoned(shares, 4, 32)
    expected = run(q, kv, batch, 0.2, cut, shares, space)
    tables = torch.from_numpy(batch.blocks).to(DEVICE)
    tiles = single_tiles(batch, np.diff(batch.starts), batch.blocks.shape[1])
    segments, begins = (torch.from_numpy(a).to(DEVICE) for a in planned(shares, tiles))
    y = torch.full_like(expected, 77.0, device=DEVICE)
    for worker in rng.permutation(8):
        shared_attention(q.to(DEVICE), *kv, tables, segments, begins[worker : worker + 2], y, space, scale=0.2, cut=cut)
    assert torch.equal(y.cpu(), expected)
    assert (space.arrived == 0).all()


def test_the_cut_that_the_gpu_gets():
    rng = np.random.default_rng(0)
    batch = step(rng, [150, 70, 64], [1, 1, 1], 64)
    kv = short_pool(rng, batch, 64, 1, 128, torch.float16)
    q = torch.from_numpy(rng.normal(size=(3, 2, 128))).half()
    cut = tiling(2, 128, torch.float16, prompt=False)
    shares = Shares(4, cut.keys)
    y = run(q, kv, batch, 0.1, cut, shares, poisoned(shares, 2, 128))
    assert np.abs(y.float().numpy() - expected(q, kv, batch, 64, 0.1, 0)).max() < 4e-3


@pytest.mark.parametrize("dtype", TYPES)
def test_a_cache_in_fp8(dtype: torch.dtype):
    rng = np.random.default_rng(0)
    batch = step(rng, [37, 8, 70, 0], [1, 1, 1, 1], 16)
    ours, theirs = filled(rng, batch, 16, 2, 24)
    q = torch.from_numpy(rng.normal(size=(4, 6, 24))).to(dtype)
    shares = Shares(3, 16)
    y = run(q, ours, batch, 0.2, Tiling(1, 16, 4, 1), shares, poisoned(shares, 6, 24))
    wanted = ops.attend(ops.Context(batch, 16), q.float().numpy(), ops.KV(*theirs), scale=0.2)
    assert np.abs(y.float().numpy() - wanted).max() < LEFT_FP8[dtype]


def test_a_workspace_that_is_too_small_is_refused():
    rng = np.random.default_rng(0)
    batch = step(rng, [5], [1], 4)
    kv, q = short_pool(rng, batch, 4, 1, 16, torch.float32), torch.ones(1, 2, 16)
    with pytest.raises(BackendError, match="for 5 workers"):
        run(q, kv, batch, 1.0, Tiling(1, 16, 4, 1), Shares(5, 16), poisoned(Shares(4, 16), 2, 16))


@pytest.mark.parametrize(("name", "graphs"), [("qwen3", True), ("qwen3", False), ("gemma3", False)])
def test_an_engine_gives_the_reference_tokens(name: str, graphs: bool, monkeypatch):
    """Where layers have windows, those go on as before."""

    def answers(backend) -> list[list[int]]:
        asked = [request(p, max_tokens=4) for p in prompts(3, 40, 1)]
        return run_engine(core_on(RandomModel.of(name, **layers).on(backend), max_num_batched_tokens=32), asked)

    layers, launches = {"num_hidden_layers": 6 if name == "gemma3" else 1}, []
    launch = rules.shared_attention
    monkeypatch.setattr(rules, "shared_attention", lambda *a, **k: (launches.append("new" in k), launch(*a, **k))[1])
    ours = find("torch")(DEVICE, "f32", "f32")
    ours.use_kernels("triton", graphs=graphs)
    assert ours.kernels.shares
    assert answers(ours) == answers(find("reference")("cpu", "f32", "f32"))
    assert set(launches) == {False, True}  # a step with parts of prompts, and without
    assert (ours.kernels.shared[1].arrived == 0).all()


def test_what_is_sent():
    """Of a padded step, twice: what is padded, and what was there before, is no segment."""
    shares = Shares(3, 4)
    inputs = StepInputs(Shape(16, 4, 4, 8), 40, torch.device(DEVICE), copies=1, shares=shares)
    inputs.rest(0)
    assert inputs.fields.begins.tolist() == [0] * 4
    for batch in (prefill_batch([[1], [2], [3], [4]], 4), prefill_batch([[7] * 3, [9], [8] * 5], 4)):
        inputs.fill(batch, 4, spare=50, tile=2)
        segments, begins = inputs.fields.segments.tolist(), inputs.fields.begins.tolist()
    assert begins == [0, 0, 0, 1]
    assert segments == [[2, 3, 0, 0, 1, -1, -1, 1], *[[0] * 8] * 6]
    inputs.fill(prefill_batch([[1] * 3], 4), 4, spare=50, tile=2)
    assert inputs.fields.begins.tolist() == [0] * 4


def copied(x: torch.Tensor | Scaled) -> torch.Tensor | Scaled:
    return Scaled(x.codes.clone(), x.scales.clone()) if isinstance(x, Scaled) else x.clone()


def stored(x: torch.Tensor | Scaled) -> tuple[torch.Tensor, ...]:
    return (x.codes.float(), x.scales) if isinstance(x, Scaled) else (x,)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 2, 16), (3, 1, 24), (2, 2, 128), (5, 1, 80)])
def test_new_tokens_in_the_same_launch(heads: int, kv_heads: int, size: int, dtype: torch.dtype):
    """As norm_rope_store and then attention: the same in the cache, bit for bit, and next to the same results."""
    rng = np.random.default_rng(size)
    batch = step(rng, [0, 15, 16, 63, 70], [1] * 5, 16)
    both = torch.from_numpy(rng.normal(size=(5, (heads + 2 * kv_heads) * size))).to(dtype).to(DEVICE)
    sizes = [heads * size, kv_heads * size, kv_heads * size]
    q, k, v = (x.unflatten(1, (-1, size)) for x in both.split(sizes, dim=1))
    turns = torch.from_numpy(rng.normal(size=(2, 80, size // 2))).float().to(DEVICE)
    at = batch.blocks[np.arange(5), batch.positions // 16] * 16 + batch.positions % 16
    ints = [torch.from_numpy(a.astype(np.int32)).to(DEVICE) for a in (batch.positions, at)]
    weights = tuple(torch.from_numpy(rng.normal(size=(2, size))).to(dtype).to(DEVICE))
    at = at.astype(np.int64)
    for norms, fp8, workers in ((None, False, 3), (weights, False, 20), (weights, True, 2)):
        if fp8:
            old = filled(rng, batch, 16, kv_heads, size)[0]
        else:
            old = [x.to(DEVICE) for x in pool(rng, batch, 16, kv_heads, size, dtype)]
        for pool_ in old:
            pool_[at // 16, at % 16] = torch.full((5, kv_heads, size), 9.0, dtype=pool_.dtype, device=DEVICE)
        mine, shares, how = [copied(x) for x in old], Shares(workers, 16), {"eps": 1e-6, "offset": 0.5}
        turned = norm_rope_store(q, k, v, norms, *ints, turns, *old, **how)
        space = poisoned(shares, heads, size)
        wanted = run(turned, old, batch, 0.2, Tiling(1, 16, 2, 1), shares, space)
        new = New(k, v, norms, turns, **how)
        y = run(q, mine, batch, 0.2, Tiling(1, 16, 2, 1), shares, space, new)
        for a, b in zip(old, mine, strict=True):
            for x, z in zip(stored(a), stored(b), strict=True):
                assert torch.equal(x.nan_to_num(77.0), z.nan_to_num(77.0))
        assert (y - wanted).abs().max() <= LEFT[dtype] * wanted.abs().max()
