"""The noise of sampling is uniform and independent for every seed, position and token; tiny temperatures are greedy."""

import numpy as np
import pytest
from tiny import BACKENDS

from llmrs import Engine, EngineConfig, Message, SamplingParams
from llmrs.backends.reference.sampling import gumbel
from llmrs.core.sampling import SEED, SamplingArrays, hash32, noise_keys, seed_key

VOCABULARY = 20_000


def seeds_with_small_keys() -> list[int]:
    """Those of the first 2^23 seeds whose key, with the constants of its hash or without, is below VOCABULARY."""
    found: set[int] = set()
    words = np.arange(2**23, dtype=np.uint32)
    for constant in (np.uint32(0), SEED):
        found.update(np.flatnonzero(hash32(hash32(words + constant)) < VOCABULARY).tolist())
    return sorted(found)


def many_seeds() -> list[int]:
    """10,000: the small ones, those with small keys, and some of 64 bits."""
    seeds = [*range(9000), *seeds_with_small_keys()]
    return [*seeds, *np.random.default_rng(0).integers(0, 2**64, 10_000 - len(seeds), np.uint64).tolist()]


def uniform(seeds: list[int], positions: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """The noise as numbers that must be uniform in (0, 1), float64 (seeds, positions, tokens)."""
    keys = np.array([seed_key(s) for s in seeds]).repeat(len(positions))
    g = gumbel(noise_keys(keys, np.tile(positions, len(seeds))), tokens).astype(np.float64)
    return np.exp(-np.exp(-g)).reshape(len(seeds), len(positions), len(tokens))


def test_the_noise_of_every_seed_is_uniform():
    u = uniform(many_seeds(), np.arange(4), np.arange(64))
    counts = np.histogram(u, 64, (0, 1))[0]
    chi2 = ((counts - u.size / 64) ** 2 / (u.size / 64)).sum()
    assert chi2 < 63 + 5 * np.sqrt(2 * 63)
    z = (u.mean(axis=(1, 2)) - 0.5) * np.sqrt(12 * 256)  # (seeds,), each normal
    assert np.abs(z).max() < 5.5  # of 10,000 normal numbers the largest is about 4
    assert abs((z**2).mean() - 1) < 5 * np.sqrt(2 / len(z))
    for axis in ((0, 2), (0, 1)):  # every position, every token
        mean = u.mean(axis=axis)
        assert np.abs(mean - 0.5).max() * np.sqrt(12 * u.size / mean.size) < 5


@pytest.mark.parametrize("seed", [-1, 0, 1])
@pytest.mark.parametrize("position", [-1, 0, 1])
@pytest.mark.parametrize("token", [0, 1, 2])
def test_neighbours_are_independent(seed, position, token):
    """The correlation of the noise at (seed, position, token) and at its neighbour is that of chance."""
    if (seed, position, token) == (0, 0, 0):
        return
    u = uniform(list(range(1002)), np.arange(18), np.arange(34)) - 0.5
    here = u[1:-1, 1:-1, :-2]
    there = u[1 + seed : 1001 + seed, 1 + position : 17 + position, token : 32 + token]
    r = (here * there).mean() * 12
    assert abs(r) < 5 / np.sqrt(here.size)


def test_no_seed_draws_ids_that_follow_its_positions():
    """The largest noise, position by position: with the stages of the hash alike it was at seed_key ^ position."""
    seeds = [*range(150), *seeds_with_small_keys()]
    keys = np.array([seed_key(s) for s in seeds])
    best = np.array(
        [gumbel(noise_keys(keys, np.full(len(keys), p)), np.arange(VOCABULARY)).argmax(1) for p in range(9)]
    )
    steps = np.diff(best.astype(np.int64), axis=0)
    assert (np.abs(steps) < 10).sum() < 20  # 1.9 by chance
    assert (best == (keys ^ np.arange(9)[:, None])).sum() < 3
    counts = np.histogram(best, 20, (0, VOCABULARY))[0]
    assert ((counts - best.size / 20) ** 2 / (best.size / 20)).sum() < 19 + 5 * np.sqrt(2 * 19)


@pytest.mark.parametrize("temperature", [1e-6, 1e-37, 1e-38, 1e-40, 5e-324])
def test_a_temperature_near_0_is_greedy(temperature):
    arrays = SamplingArrays.zeros(1)
    arrays.write(0, SamplingParams(temperature=temperature).over(SamplingParams(top_k=0, top_p=1.0, min_p=0.0)), 1, 1)
    assert arrays.temperature[0] == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_temperatures_near_0_answer_as_0_does(backend):
    kind, _, device = backend.partition(":")
    with Engine(EngineConfig("demo", backend=kind, device=device or "cpu"), "f32") as engine:
        prompt = engine.apply_chat_template([Message("user", "What is 7 + 5?")])
        asked = [SamplingParams(temperature=t, seed=1, max_tokens=12) for t in (0, 1e-4, 1e-5, 1e-6, 1e-38, 1e-40)]
        answers = engine.generate_sync(asked, [prompt] * len(asked))
    assert answers[0].text
    assert {a.text for a in answers} == {answers[0].text}
