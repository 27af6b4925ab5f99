"""Sampling kernels against core/sampling.py: the same tokens for the same keys."""

import numpy as np
import pytest
import torch

from llmrs.backends.testing import random_sampling
from llmrs.core.sampling import gumbel, keep, sample

pytest.importorskip("triton")
from llmrs.backends.torch.kernels import sampling as kernels
from llmrs.backends.torch.kernels.edges import find_edges
from llmrs.backends.torch.kernels.sampling import draw

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def run(logits, params, slots=None, last=None, **more) -> np.ndarray:
    count = len(logits)
    slots = torch.arange(count, dtype=torch.int32) if slots is None else slots
    last = torch.zeros(count, dtype=torch.int64) if last is None else last
    arrays = (torch.from_numpy(params.temperature), torch.from_numpy(params.key.view(np.int32)), slots, last)
    return draw(torch.as_tensor(logits).to(DEVICE), *(a.to(DEVICE) for a in arrays), **more).cpu().numpy()


@pytest.mark.parametrize("vocabulary", [2, 33, 1000, 5003])
def test_draws(vocabulary: int):
    for seed in range(4):
        rng = np.random.default_rng(seed)
        params = random_sampling(rng, 4)
        params.top_k[:], params.top_p[:], params.min_p[:] = 0, 1, 0
        logits = np.round(rng.normal(size=(4, vocabulary)) * 4).astype(np.float32) / 2  # with ties
        for part in (16, 1024) if vocabulary < 100 else (1024,):
            np.testing.assert_array_equal(run(logits, params, part=part), sample(logits, params))


def cut(logits, params, part=16) -> torch.Tensor:
    arrays = (params.temperature, params.top_k, params.top_p, params.min_p)
    return find_edges(torch.as_tensor(logits).to(DEVICE), *(torch.from_numpy(a).to(DEVICE) for a in arrays), part=part)


@pytest.mark.parametrize("vocabulary", [2, 33, 211, 3000])
@pytest.mark.parametrize("ties", [True, False])
def test_what_top_k_top_p_and_min_p_keep(vocabulary: int, ties: bool):
    for seed in range(8):
        rng = np.random.default_rng(seed)
        params = random_sampling(rng, 5)
        logits = (rng.normal(size=(5, vocabulary)) * 4).astype(np.float32)
        logits = np.round(logits) / 2 if ties else logits
        logits[0, 1:] -= np.inf
        edges = cut(logits, params, part=16 if vocabulary < 100 else 1024).cpu()
        for s in np.flatnonzero(params.temperature > 0):
            x = logits[s] / params.temperature[s]
            edge = edges[s : s + 1, 0].view(torch.float32).numpy()
            kept = (x > edge) | ((x == edge) & (np.arange(vocabulary) < int(edges[s, 1])))
            expected = keep(x, params.top_k[s], params.top_p[s], params.min_p[s])
            other = kept != (expected > -np.inf)  # the reference's running sum rounds in a long tail
            assert np.exp(x[other] - x.max()).sum() <= (1e-4 if vocabulary > 100 else 0), (seed, s)
        found = run(logits, params, edges=edges.to(DEVICE))
        np.testing.assert_array_equal(found, sample(logits, params))


def test_rows_that_are_masked_out_and_rows_of_nan():
    params = random_sampling(np.random.default_rng(0), 3)
    params.temperature[:] = 0, 1, 0
    logits = np.full((3, 50), -np.inf, np.float32)
    logits[2] = np.nan
    assert run(logits, params, part=16)[:2].tolist() == [0, 0]
    assert run(logits, params, part=16)[2] < 50


def test_the_token_is_kept_where_it_counts():
    params = random_sampling(np.random.default_rng(0), 3)
    params.temperature[:] = 0
    logits, last = np.eye(3, 40, 7, dtype=np.float32), torch.full((5,), 99).to(DEVICE)
    run(logits, params, torch.tensor([4, -1, 0], dtype=torch.int32), last)
    assert last.tolist() == [9, 99, 99, 99, 7]


def test_half_precision_logits_with_strides():
    rng = np.random.default_rng(0)
    params = random_sampling(rng, 4)
    params.top_k[:], params.top_p[:], params.min_p[:] = 0, 1, 0
    wide = torch.from_numpy(rng.normal(size=(4, 300)) * 3).half()
    logits = wide[:, :211]
    np.testing.assert_array_equal(run(logits, params), sample(logits.float().numpy(), params))


def test_the_series_of_the_logarithm():
    """To two units in the last place, where float64 says what is right."""
    v = np.concatenate([np.geomspace(1e-10, 0.5, 2000), np.linspace(0.5, 1 - 2.0**-24, 500)]).astype(np.float32)
    s = v / (np.float32(2) - v)
    series = np.float32(1 / 15)
    for n in range(7):
        series = series * s * s + np.float32(1 / (13 - 2 * n))
    found = np.where(v <= 0.5, 2 * s * series, -np.log(1 - v))
    exact = -np.log1p(-v.astype(np.float64))
    assert np.abs(found / exact - 1).max() < 2.5e-7


def test_noise():
    import triton
    import triton.language as tl

    noise = kernels.gumbel

    @triton.jit
    def fill(y, key, noise: tl.constexpr, N: tl.constexpr):
        at = tl.arange(0, N)
        tl.store(y + at, noise(tl.load(key).to(tl.uint32, bitcast=True), at))

    y = torch.empty(4096, device=DEVICE)
    fill[(1,)](y, torch.tensor([-77], dtype=torch.int32, device=DEVICE), noise, N=4096)
    expected = gumbel(np.array([2**32 - 77], np.uint32), np.arange(4096))[0]
    np.testing.assert_allclose(y.cpu().numpy(), expected, rtol=1e-5, atol=2e-6)
