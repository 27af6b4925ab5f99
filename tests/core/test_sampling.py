"""Sampling against its definition: the noise, the transforms, the distribution, and every backend alike."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import BACKENDS, empty_backend

from llmrs.backends import testing
from llmrs.backends.reference.sampling import apply_penalties, filter_logits, gumbel, logprobs
from llmrs.core.sampling import SamplingArrays, hash32, noise_keys, seed_key


def arrays(count, keys=None, **options):
    """Parameters for `count` rows, each with a key of its own."""
    params = SamplingArrays.zeros(count)
    for name, value in {"temperature": 1.0, **options}.items():
        getattr(params, name)[:] = value
    params.rng_key[:] = noise_keys(np.zeros(count, np.uint32), np.arange(count)) if keys is None else keys
    return params


@pytest.fixture(scope="module")
def samplers():
    """Every backend, with a model so small that only sampling matters."""
    model = testing.RandomModel.of("qwen3", num_hidden_layers=1)
    found = {name: model.on(empty_backend(name)) for name in BACKENDS}
    for backend in found.values():
        backend.allocate(1, 4, 40_000, 8)
    return found


def drawn(backend, logits, params):
    return backend.sample(backend.to_device(logits), testing.sampling_batch(params)).tokens()


def lowbias32(x):
    """The same in Python's own integers."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        x = (x ^ x >> shift) * factor % 2**32
    return x


def test_mix_is_a_bijection_with_good_bits():
    x = np.arange(2**16, dtype=np.uint32)
    assert len(np.unique(hash32(x))) == len(x)
    flips = np.unpackbits((hash32(x) ^ hash32(x ^ np.uint32(1))).view(np.uint8)).mean()
    assert abs(flips - 0.5) < 0.01  # one input bit changes half of the output bits
    assert [lowbias32(i) for i in (0, 1, 77, 2**32 - 1)] == hash32(np.array([0, 1, 77, 2**32 - 1], np.uint32)).tolist()


def test_noise_is_gumbel_and_finite():
    g = gumbel(noise_keys(np.array([1], np.uint32), np.array([7])), np.arange(200_000))[0]
    assert np.isfinite(g).all()
    assert abs(g.mean() - np.euler_gamma) < 0.01
    assert abs(g.var() - np.pi**2 / 6) < 0.03


def test_noise_depends_on_seed_position_and_token():
    tokens = np.arange(50)
    seeds = np.array([seed_key(s) for s in (1, 2, 1 + 2**32, 1)])
    keys = noise_keys(seeds, np.array([5, 5, 5, 6]))
    g = gumbel(keys, tokens)
    assert len(np.unique(g)) == g.size
    np.testing.assert_array_equal(gumbel(keys[2:3], tokens), g[2:3])  # and not on the batch


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(-6, 6), min_size=1, max_size=12),
    st.integers(0, 14),
    st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    st.sampled_from([0.0, 0.05, 0.5, 1.0]),
)
def test_keep_is_what_it_says(values, top_k, top_p, min_p):
    """Against a direct statement of top-k, top-p and min-p in float64, where no sum lies on the edge."""
    logits = np.array(values, np.float32) * np.float32(0.37)
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[: top_k or None]
    p = np.exp(logits[order].astype(np.float64))
    p /= p.sum()
    before = np.concatenate([[0], np.cumsum(p)[:-1]])
    if np.abs(before - top_p).min() < 1e-5 or np.abs(p / p[0] - min_p).min() < 1e-5 < min_p < 1:
        return
    expected = {i for i, b, q in zip(order, before, p, strict=True) if b < top_p and q >= min_p * p[0]} | {order[0]}
    assert set(np.flatnonzero(np.isfinite(filter_logits(logits, top_k, top_p, min_p))).tolist()) == expected


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}, {"temperature": 0.5}])
def test_distribution(name, options, samplers):
    """Chi-square of 40,000 draws, each at another position, against the probabilities computed directly."""
    logits = np.random.default_rng(1).normal(size=20).astype(np.float32) * 1.5
    count = 40_000
    scaled = filter_logits(
        logits / options.get("temperature", 1.0),
        *(options.get(k, d) for k, d in zip(("top_k", "top_p", "min_p"), (0, 1.0, 0.0), strict=True)),
    )
    p = np.exp(scaled - scaled.max(), dtype=np.float64)
    p /= p.sum()
    tokens = drawn(samplers[name], np.tile(logits, (count, 1)), arrays(count, **options))
    observed = np.bincount(tokens, minlength=20)
    assert observed[p == 0].sum() == 0
    expected = (count * p)[p > 0]
    chi2 = ((observed[p > 0] - expected) ** 2 / expected).sum()
    degrees = (p > 0).sum() - 1
    assert chi2 < degrees + 5 * np.sqrt(2 * degrees) + 5  # about one in 10^6 for a fair draw, and the draw is fixed


def test_greedy_takes_the_lowest_of_equal_logits(samplers):
    logits = np.array([[0, 3, 3, 1]], np.float32)
    for backend in samplers.values():
        assert drawn(backend, logits, arrays(1, temperature=0.0)).tolist() == [1]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=12),
    st.data(),
    st.sampled_from([0.5, 1.0, 1.7]),
    st.sampled_from([-1.0, 0.0, 0.5]),
    st.sampled_from([-0.5, 0.0, 0.25]),
)
def test_penalties_are_what_they_say(tokens, data, repetition, presence, frequency):
    """Against a statement of them token by token: repetition of prompt and answer, the other two of the answer."""
    prompt = data.draw(st.integers(1, len(tokens)))
    logits = np.array(data.draw(st.lists(st.integers(-3, 3), min_size=7, max_size=7)), np.float32)
    params = arrays(1, repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency)
    params.prompt_len[:] = prompt
    expected = logits.copy()
    for token in set(tokens):
        expected[token] *= 1 / repetition if logits[token] > 0 else repetition
    for token in tokens[prompt:]:
        expected[token] -= frequency
    for token in set(tokens[prompt:]):
        expected[token] -= presence
    np.testing.assert_allclose(apply_penalties(logits, np.array(tokens), params, 0), expected, atol=1e-5)


def test_log_probabilities_against_probabilities_in_float64():
    logits = np.random.default_rng(0).normal(size=(3, 11)).astype(np.float32)
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(axis=1, keepdims=True)
    found = logprobs(logits, np.array([2, 0, 10]), 4)
    np.testing.assert_allclose(found.chosen, np.log(p[[0, 1, 2], [2, 0, 10]]), atol=1e-5)
    for row in range(3):
        order = sorted(range(11), key=lambda t: -p[row, t])[:4]
        assert found.top_ids[row].tolist() == order
        np.testing.assert_allclose(found.top[row], np.log(p[row, order]), atol=1e-5)
