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
    params.key[:] = rng.integers(0, 2**32, len(rows), dtype=np.uint32)
    return params


def draw(mutate=None, options=OPTIONS, vocabulary=1237, dtype=mx.float32, seed=0, logits=None, part=4096):
    """Draws once and compares."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(len(options), vocabulary)) * 3 if logits is None else logits
    x, x32 = rounded(x, dtype)
    params = parameters(options, seed)
    got = sampling.sample(kernels(mutate), x, params, part)
    assert got.dtype == mx.int32
    np.testing.assert_array_equal(np.array(got), reference.sample(x32, params))


def kept(mutate, x32, params, listed):
    """Which tokens sample_keep lets stay, bool (S, V)."""
    edges = np.array(sampling.keep(kernels(mutate), mx.array(x32), params, listed))
    bits = (
        (x32 / np.where(params.temperature > 0, params.temperature, 1)[:, None] + 0).astype(np.float32).view(np.uint32)
    )
    keys = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))
    return (keys > edges[:, :1]) | ((keys == edges[:, :1]) & (np.arange(x32.shape[1]) <= edges[:, 1:2]))


def compare_kept(mutate=None, vocabulary=1237, scale=3.0, decimals=9, seed=0, listed=64):
    rng = np.random.default_rng(seed)
    x = np.round(rng.normal(size=(len(OPTIONS), vocabulary)) * scale, decimals).astype(np.float32)
    params = parameters(OPTIONS)
    got = kept(mutate, x, params, listed)
    for s in np.flatnonzero(params.temperature > 0):
        top_p = params.top_p[s] if params.top_p[s] < 1 else 2  # 1 cuts off what float32 sums lose at their end
        expected = reference.filter_logits(x[s] / params.temperature[s], params.top_k[s], top_p, 0.0)
        np.testing.assert_array_equal(np.flatnonzero(got[s]), np.flatnonzero(np.isfinite(expected)), err_msg=str(s))


@pytest.mark.parametrize("dtype", DTYPES)
def test_draws(dtype):
    for seed in range(2):
        draw(dtype=DTYPES[dtype], seed=seed)


@pytest.mark.parametrize("vocabulary", [8, 255, 4096, 9001])
def test_vocabularies(vocabulary):
    draw(vocabulary=vocabulary, seed=3)


def test_many_parts():
    draw(vocabulary=9001, part=256)
    draw(part=256, logits=spikes())


def test_one_row():
    draw(options=[{}])
    draw(options=[{"temperature": 0.0}])


@pytest.mark.parametrize("seed", range(3))
def test_what_stays(seed):
    for listed in (1, 64, 2048):  # none of them fits, some do, all do
        compare_kept(seed=seed, listed=listed)
        compare_kept(seed=seed, listed=listed, decimals=0)  # many equal ones
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
    """It may differ in the last places from NumPy's, whose logarithms are others."""
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


def found_by_what_stays(mutate):
    for decimals in (9, 0):
        compare_kept(mutate, decimals=decimals)
    compare_kept(mutate, scale=0.0, vocabulary=300)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("sums[j] < most", "sums[j] <= most"),
        ("sums[3 + j] < limit", "sums[j] < limit"),
        ("uint low = ordered(bottom) - 1", "uint low = ordered(bottom)"),
        ("above_low - above_high > 1)", "above_low - above_high > 2)"),
        ("above_low <= LIST", "above_low <= 4 * LIST"),
        ("size = above_low;", "size = above_low - 1;"),
        ("surplus > 0) sum[0]", "false) sum[0]"),
        ("list[at++] = key", "list[at] = key"),
        ("before == room", "before == room + 1"),
        ("g < simd; g++", "g + 1 < simd; g++"),
        ("low + (j + 1) * step : high", "low + (j + 1) * step : low"),
        ("bits >> 31 ? ~bits", "bits >> 31 ? bits"),
        *without_barriers("sample_keep"),
        *without_barriers("random"),
    ],
)
def test_a_mutated_keep_fails(old, new):
    assert_found(old, new, found_by_what_stays)


def found_by_draws(mutate):
    draw(mutate, part=32, vocabulary=1237)
    draw(mutate, part=512, logits=np.zeros((len(OPTIONS), 2000)))
    draw(mutate, part=256, logits=spikes())


def spikes():
    """Logits with one likely token each, at the ends of parts."""
    x = np.zeros((len(OPTIONS), 9001))
    x[np.arange(len(OPTIONS)), [255, 256, 511, 512, 767, 9000, 8960, 8959, 0, 8191, 8192, 31]] = 50
    return x


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("(part + 1) * PART, uint(VOCAB)", "(part + 1) * PART, uint(VOCAB + 1)"),
        ("(part + 1) * PART, uint(VOCAB)", "(part + 1) * PART - 1, uint(VOCAB)"),
        ("x > best)", "x >= best)"),
        ("id = simd_min(best == top ? id : uint(VOCAB));", ""),
        ("x /= heat", "x *= heat"),
        ("< min_p[s]", "< 0.5f * min_p[s]"),
        ("i > edges[3 * s + 1]", "i >= edges[3 * s + 1]"),
        ("p += 32", "p += 33"),
        ("p = lane; p < parts", "p = lane; p + 1 < parts"),
        ("0x7FEB352Du", "0x7FEB352Fu"),
        ("mixed(token) ^ key", "token ^ key"),
        *without_barriers("sample_part"),
    ],
)
def test_a_mutated_draw_fails(old, new):
    assert_found(old, new, found_by_draws)


def test_what_the_launcher_refuses():
    params = parameters([{}])
    for wrong in (mx.zeros((1, 7)), mx.zeros((8,)), mx.zeros((1, 8), dtype=mx.int32)):
        with pytest.raises(BackendError, match="sample_part"):
            sampling.sample(kernels(), wrong, params)
