"""The sampling kernels against core/sampling.py."""

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")

from metal_cases import DTYPES, assert_found, kernels, rounded, without_barriers  # noqa: E402

from llmrs.backends.mlx.kernels import sampling  # noqa: E402
from llmrs.backends.mlx.kernels.launch import source  # noqa: E402
from llmrs.backends.reference import sampling as reference  # noqa: E402
from llmrs.core.errors import BackendError  # noqa: E402
from llmrs.core.sampling import SamplingArrays  # noqa: E402

WHOLE = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
OPTIONS = [
    {"temperature": 0.0},
    {},
    {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
    {"top_k": 1},
    {"top_k": 7},
    {"top_p": 0.5, "temperature": 1.7},
    {"top_p": 0.0},
    {"min_p": 0.1},
    {"min_p": 0.6, "temperature": 8.0},
    {"top_k": 50, "top_p": 0.8, "min_p": 0.05, "temperature": 0.8},
    {"temperature": 0.0, "top_k": 5, "top_p": 0.1},
    {"top_k": 10**6, "temperature": 2.0},
]


def parameters(options, seed=0):
    rng = np.random.default_rng(seed)
    rows = [WHOLE | o for o in options]
    params = SamplingArrays.zeros(len(rows))
    for name in WHOLE:
        getattr(params, name)[:] = [r[name] for r in rows]
    params.rng_key[:] = rng.integers(0, 2**32, len(rows), dtype=np.uint32)
    return params


def draw(mutate=None, options=OPTIONS, vocabulary=1237, dtype=mx.float32, seed=0, logits=None, block_v=4096):
    """Samples once and compares."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(len(options), vocabulary)) * 3 if logits is None else logits
    x, x32 = rounded(x, dtype)
    params = parameters(options, seed)
    got = sampling.sample(kernels(mutate), x, params, block_v)
    assert got.dtype == mx.int32
    np.testing.assert_array_equal(np.array(got), reference.sample(x32, params))


def kept(mutate, x32, params, candidates):
    """Tokens that find_thresholds keeps, bool (S, V)."""
    thresholds = np.array(sampling.find_thresholds(kernels(mutate), mx.array(x32), params, candidates))
    scaled = x32 / np.where(params.temperature > 0, params.temperature, 1)[:, None] + 0
    bits = scaled.astype(np.float32).view(np.uint32)
    bits = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))
    return (bits > thresholds[:, :1]) | ((bits == thresholds[:, :1]) & (np.arange(x32.shape[1]) <= thresholds[:, 1:2]))


def compare_kept(mutate=None, vocabulary=1237, scale=3.0, decimals=9, seed=0, candidates=64):
    rng = np.random.default_rng(seed)
    x = np.round(rng.normal(size=(len(OPTIONS), vocabulary)) * scale, decimals).astype(np.float32)
    params = parameters(OPTIONS)
    got = kept(mutate, x, params, candidates)
    for s in np.flatnonzero(params.temperature > 0):
        top_p = params.top_p[s] if params.top_p[s] < 1 else 2  # 1 would drop what float32 sums lose
        expected = reference.filter_logits(x[s] / params.temperature[s], params.top_k[s], top_p, 0.0)
        np.testing.assert_array_equal(np.flatnonzero(got[s]), np.flatnonzero(np.isfinite(expected)), err_msg=str(s))


@pytest.mark.parametrize("dtype", DTYPES)
def test_draws(dtype):
    for seed in range(2):
        draw(dtype=DTYPES[dtype], seed=seed)


@pytest.mark.parametrize("vocabulary", [8, 255, 4096, 9001])
def test_vocabularies(vocabulary):
    draw(vocabulary=vocabulary, seed=3)


def test_many_blocks():
    draw(vocabulary=9001, block_v=256)
    draw(block_v=256, logits=spikes())


def test_one_row():
    draw(options=[{}])
    draw(options=[{"temperature": 0.0}])


@pytest.mark.parametrize("seed", range(3))
def test_kept_tokens(seed):
    for candidates in (1, 64, 2048):  # fewer than the kept tokens, some, all
        compare_kept(seed=seed, candidates=candidates)
        compare_kept(seed=seed, candidates=candidates, decimals=0)  # many ties
    compare_kept(seed=seed, scale=1e-3)
    compare_kept(seed=seed, decimals=1, scale=30)


def test_equal_logits_keep_the_lowest_ids():
    compare_kept(scale=0.0)
    compare_kept(scale=0.0, vocabulary=9)
    draw(logits=np.zeros((len(OPTIONS), 300)))


def test_masked_tokens_are_never_drawn():
    x = np.random.default_rng(0).normal(size=(len(OPTIONS), 500))
    x[:, :490] = -np.inf
    draw(logits=x)
    x[:, 491:] = -np.inf
    draw(logits=x)


def test_noise():
    """Up to rounding: NumPy has other logarithms."""
    text = "noise[thread_position_in_grid.x] = gumbel(keys[0], thread_position_in_grid.x);"
    keys = np.array([0x89ABCDEF] * 8, np.uint32)
    made = kernels()._make(
        name="noise", input_names=["keys"], output_names=["noise"], source=text, header=source("random")
    )
    (noise,) = made(
        inputs=[mx.array(keys)], output_shapes=[(20000,)], output_dtypes=[mx.float32], grid=(20000, 1, 1),
        threadgroup=(256, 1, 1),
    )  # fmt: skip
    np.testing.assert_allclose(np.array(noise), reference.gumbel(keys[:1], np.arange(20000))[0], rtol=3e-6, atol=1e-6)


def compare_all_kept(mutate):
    for decimals in (9, 0):
        compare_kept(mutate, decimals=decimals)
    compare_kept(mutate, scale=0.0, vocabulary=300)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("sums[j] < max_count", "sums[j] <= max_count"),
        ("sums[3 + j] < max_mass", "sums[j] < max_mass"),
        ("uint low = ordered_bits(bottom) - 1", "uint low = ordered_bits(bottom)"),
        ("above_low - above_high > 1)", "above_low - above_high > 2)"),
        ("above_low <= MAX_CANDIDATES", "above_low <= 4 * MAX_CANDIDATES"),
        ("size = above_low;", "size = above_low - 1;"),
        ("ties_dropped > 0) sum[0]", "false) sum[0]"),
        ("candidates[at++] = bits", "candidates[at] = bits"),
        ("rank == ties_kept", "rank == ties_kept + 1"),
        ("g < simd; g++", "g + 1 < simd; g++"),
        ("low + (j + 1) * step : high", "low + (j + 1) * step : low"),
        ("bits >> 31 ? ~bits", "bits >> 31 ? bits"),
        *without_barriers("find_thresholds"),
        *without_barriers("random"),
    ],
)
def test_a_mutated_find_thresholds_fails(old, new):
    assert_found(old, new, compare_all_kept)


def compare_draws(mutate):
    draw(mutate, block_v=32, vocabulary=1237)
    draw(mutate, block_v=512, logits=np.zeros((len(OPTIONS), 2000)))
    draw(mutate, block_v=256, logits=spikes())


def spikes():
    """Logits with one likely token each, at the ends of blocks."""
    x = np.zeros((len(OPTIONS), 9001))
    x[np.arange(len(OPTIONS)), [255, 256, 511, 512, 767, 9000, 8960, 8959, 0, 8191, 8192, 31]] = 50
    return x


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("(block + 1) * BLOCK_V, uint(VOCAB)", "(block + 1) * BLOCK_V, uint(VOCAB + 1)"),
        ("(block + 1) * BLOCK_V, uint(VOCAB)", "(block + 1) * BLOCK_V - 1, uint(VOCAB)"),
        ("x > best)", "x >= best)"),
        ("id = simd_min(best == top ? id : uint(VOCAB));", ""),
        ("x /= temp", "x *= temp"),
        ("< min_p[s]", "< 0.5f * min_p[s]"),
        ("i > thresholds[3 * s + 1]", "i >= thresholds[3 * s + 1]"),
        ("b += 32", "b += 33"),
        ("b = lane; b < blocks", "b = lane; b + 1 < blocks"),
        ("0x7FEB352Du", "0x7FEB352Fu"),
        ("mix32(token) ^ rng_key", "token ^ rng_key"),
        *without_barriers("sample_gumbel"),
    ],
)
def test_a_mutated_sample_gumbel_fails(old, new):
    assert_found(old, new, compare_draws)


def test_the_launcher_checks_its_arguments():
    params = parameters([{}])
    for wrong in (mx.zeros((1, 7)), mx.zeros((8,)), mx.zeros((1, 8), dtype=mx.int32)):
        with pytest.raises(BackendError, match="sample_gumbel"):
            sampling.sample(kernels(), wrong, params)
