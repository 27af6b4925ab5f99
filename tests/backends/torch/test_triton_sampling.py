"""Sampling kernels against the reference: the same tokens for the same rng keys."""

import numpy as np
import pytest
import torch

from llmrs.backends.reference.sampling import filter_logits, gumbel, sample
from llmrs.backends.testing import random_sampling

pytest.importorskip("triton")
from llmrs.backends.torch.kernels.gumbel import gumbel as gumbel_of_kernels
from llmrs.backends.torch.kernels.gumbel_argmax import sample_gumbel, score_upper_bound, skip_threshold
from llmrs.backends.torch.kernels.top_k_top_p import find_thresholds

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def run(logits, params, slots=None, last=None, part=0, **more) -> np.ndarray:
    """Tokens of logits, in chunks of `part`."""
    count = len(logits)
    slots = torch.arange(count, dtype=torch.int32) if slots is None else slots
    last = torch.zeros(count, dtype=torch.int64) if last is None else last
    arrays = (torch.from_numpy(params.temperature), torch.from_numpy(params.rng_key.view(np.int32)), slots, last)
    if part:
        more |= {"chunk": part, "num_ctas": 2 * count}
    return sample_gumbel(torch.as_tensor(logits).to(DEVICE), *(a.to(DEVICE) for a in arrays), **more).cpu().numpy()


def plain(seed: int, count: int = 4):
    """Random sampling without top-k, top-p and min-p."""
    params = random_sampling(np.random.default_rng(seed), count)
    params.top_k[:], params.top_p[:], params.min_p[:] = 0, 1, 0
    return params


@pytest.mark.parametrize("vocabulary", [2, 33, 1000, 5003])
def test_draws(vocabulary: int):
    for seed in range(4):
        rng, params = np.random.default_rng(seed), plain(seed)
        logits = np.round(rng.normal(size=(4, vocabulary)) * 4).astype(np.float32) / 2  # with ties
        for part in (16, 1024) if vocabulary < 100 else (1024,):
            np.testing.assert_array_equal(run(logits, params, part=part), sample(logits, params))


def thresholds_of(logits, params, part=16) -> torch.Tensor:
    arrays = (params.temperature, params.top_k, params.top_p, params.min_p)
    return find_thresholds(
        torch.as_tensor(logits).to(DEVICE), *(torch.from_numpy(a).to(DEVICE) for a in arrays), block_v=part
    )


@pytest.mark.parametrize("vocabulary", [2, 33, 211, 3000])
@pytest.mark.parametrize("ties", [True, False])
def test_top_k_top_p_and_min_p(vocabulary: int, ties: bool):
    for seed in range(8):
        rng = np.random.default_rng(seed)
        params = random_sampling(rng, 5)
        logits = (rng.normal(size=(5, vocabulary)) * 4).astype(np.float32)
        logits = np.round(logits) / 2 if ties else logits
        logits[0, 1:] -= np.inf
        thresholds = thresholds_of(logits, params, part=16 if vocabulary < 100 else 1024).cpu()
        for s in np.flatnonzero(params.temperature > 0):
            x = logits[s] / params.temperature[s]
            threshold = thresholds[s : s + 1, 0].view(torch.float32).numpy()
            kept = (x > threshold) | ((x == threshold) & (np.arange(vocabulary) < int(thresholds[s, 1])))
            expected = filter_logits(x, params.top_k[s], params.top_p[s], params.min_p[s])
            other = kept != (expected > -np.inf)  # the reference's running sum rounds in a long tail
            assert np.exp(x[other] - x.max()).sum() <= (1e-4 if vocabulary > 100 else 0), (seed, s)
        np.testing.assert_array_equal(run(logits, params, thresholds=thresholds.to(DEVICE)), sample(logits, params))


@pytest.mark.parametrize("temperature", [0, 1e-4, 0.6, 100])
def test_any_temperature_and_any_row(temperature: float):
    """Random, all equal, one far above, nearly all masked, and coarse logits."""
    rng, params = np.random.default_rng(1), plain(1, 6)
    params.temperature[:] = temperature
    logits = rng.normal(size=(6, 700)).astype(np.float32)
    logits[1] = 3.5
    logits[2, 650] += 40
    logits[3, np.setdiff1d(np.arange(700), [13, 600, 699])] = -np.inf
    logits[4] = np.round(logits[4] * 4) / 4
    logits[5] = -np.abs(logits[5]) * 30
    for part in (128, 1024):
        np.testing.assert_array_equal(run(logits, params, part=part), sample(logits, params))
    half = torch.from_numpy(logits).half()
    np.testing.assert_array_equal(run(half, params), sample(half.float().numpy(), params))


def test_scores_are_below_their_bounds():
    """And close to them where the noise is large."""
    import triton
    import triton.language as tl

    bounds, limit = score_upper_bound, skip_threshold

    @triton.jit
    def fill(x, y, z, scores, key, scale, bounds: tl.constexpr, limit: tl.constexpr, N: tl.constexpr):
        at, folded = tl.arange(0, N), tl.load(key).to(tl.uint32, bitcast=True)
        ids = at.to(tl.uint32)
        tl.store(y + at, bounds(tl.load(x + at), ids ^ (ids >> 16), folded ^ (folded >> 16), tl.load(scale)))
        tl.store(z + at, limit(tl.load(scores + at), 1.0))

    n, key = 2**17, np.array([2**32 - 77], np.uint32)
    for temperature in (1e-3, 0.6, 50.0):
        x = np.random.default_rng(0).normal(size=n).astype(np.float32) * 20
        scores = x / np.float32(temperature) + gumbel(key, np.arange(n))[0]
        y, z = torch.empty(2, n, device=DEVICE)
        arrays = (torch.from_numpy(a).to(DEVICE) for a in (scores, key.view(np.int32)))
        scale = torch.tensor([np.float32(1.4426950408889634) / np.float32(temperature)], device=DEVICE)
        fill[(1,)](torch.from_numpy(x).to(DEVICE), y, z, *arrays, scale, bounds, limit, N=n)
        assert (y > z).all()
        likely = gumbel(key, np.arange(n))[0] > 3
        above = (y.cpu().numpy() - scores * np.float64(1.4426950408889634))[likely]
        assert above.max() < 0.2 + 1e-5 * np.abs(scores).max()


def test_masked_rows_and_rows_of_nan():
    params = random_sampling(np.random.default_rng(0), 3)
    params.temperature[:] = 0, 1, 0
    logits = np.full((3, 50), -np.inf, np.float32)
    logits[2] = np.nan
    assert run(logits, params, part=16)[:2].tolist() == [0, 0]
    assert run(logits, params, part=16)[2] < 50


def test_the_token_is_stored_for_its_slot():
    params = random_sampling(np.random.default_rng(0), 3)
    params.temperature[:] = 0
    logits, last = np.eye(3, 40, 7, dtype=np.float32), torch.full((5,), 99).to(DEVICE)
    run(logits, params, torch.tensor([4, -1, 0], dtype=torch.int32), last)
    assert last.tolist() == [9, 99, 99, 99, 7]


def test_half_precision_logits_with_strides():
    rng, params = np.random.default_rng(0), plain(0)
    wide = torch.from_numpy(rng.normal(size=(4, 300)) * 3).half()
    logits = wide[:, :211]
    np.testing.assert_array_equal(run(logits, params), sample(logits.float().numpy(), params))


def test_the_series_of_the_logarithm():
    """Within two units in the last place of float64."""
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

    noise = gumbel_of_kernels

    @triton.jit
    def fill(y, key, noise: tl.constexpr, N: tl.constexpr):
        at = tl.arange(0, N)
        tl.store(y + at, noise(tl.load(key).to(tl.uint32, bitcast=True), at))

    y = torch.empty(4096, device=DEVICE)
    fill[(1,)](y, torch.tensor([-77], dtype=torch.int32, device=DEVICE), noise, N=4096)
    expected = gumbel(np.array([2**32 - 77], np.uint32), np.arange(4096))[0]
    np.testing.assert_allclose(y.cpu().numpy(), expected, rtol=1e-5, atol=2e-6)
