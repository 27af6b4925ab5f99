"""norm_rope, fused_add_rms_norm and act_and_mul against the ops of the reference backend."""

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")

from metal_cases import DTYPES, assert_close, assert_found, kernels, rounded, without_barriers  # noqa: E402

from llmrs.backends.mlx.kernels import elementwise  # noqa: E402
from llmrs.backends.mlx.kernels.launch import Kernels  # noqa: E402
from llmrs.backends.reference import ops  # noqa: E402
from llmrs.core.errors import BackendError  # noqa: E402
from llmrs.core.ir import RopeFrequencies  # noqa: E402

EPS = 1e-5


def norm_rope(mutate=None, dtype=mx.float32, heads=4, kv_heads=2, size=64, norm=True, offset=0.0, kv_dtype=None):
    rng = np.random.default_rng(heads * size)
    positions = np.array([0, 1, 77, 1000, 131071], np.int32)
    frequencies = RopeFrequencies("test", tuple(10000.0 ** (-2 * i / size) for i in range(size // 2)), 1.1)
    x, x32 = rounded(rng.normal(size=(5, heads + 2 * kv_heads, size)) * 3, dtype)
    weights = [rounded(rng.normal(size=size) + 1, dtype) for _ in range(2)]
    got = elementwise.norm_rope(
        kernels(mutate), x, mx.array(positions), mx.array(np.array(frequencies.values, np.float32)),
        tuple(w for w, _ in weights) if norm else None, kv_heads=kv_heads, eps=EPS, offset=offset,
        rope_scale=frequencies.scale, kv_dtype=kv_dtype or dtype,
    )  # fmt: skip
    q, k, v = np.split(x32, [heads, heads + kv_heads], axis=1)
    if norm:
        q, k = (ops.rms_norm(None, y, w, eps=EPS, offset=offset) for y, (_, w) in zip((q, k), weights, strict=True))
    q, k = (ops.rope(None, y, positions, frequencies=frequencies) for y in (q, k))
    for result, expected in zip(got, (q, k, v), strict=True):
        assert_close(result, expected, kv_dtype)
    assert [g.dtype for g in got] == [dtype, *[kv_dtype or dtype] * 2]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [True, False])
def test_norm_rope_types(dtype, norm):
    norm_rope(dtype=DTYPES[dtype], norm=norm)


@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(1, 1, 16), (14, 2, 80), (3, 1, 256), (9, 3, 96)])
def test_norm_rope_shapes(heads, kv_heads, size):
    norm_rope(heads=heads, kv_heads=kv_heads, size=size)


def test_norm_rope_with_an_offset_and_another_type_of_cache():
    norm_rope(offset=1.0)
    norm_rope(kv_dtype=mx.float16)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("i < HALF; i += 32", "i < HALF - 1; i += 32"),
        ("simd_sum(squares)", "squares"),
        ("head >= HQ + HK)", "head > HQ + HK)"),
        ("b * c + a * s", "b * c - a * s"),
        ("q_weight[i + HALF]", "q_weight[i + HALF + 1]"),
        ("token) * HK + head - HQ)", "token) * HK + head)"),
        ("float(D) + eps", "float(D)"),
        ("cos(angle) * rope_scale", "cos(angle)"),
    ],
)
def test_a_mutated_norm_rope_fails(old, new):
    assert_found(old, new, lambda mutate: norm_rope(mutate, size=80) if "eps" not in old else tiny_values(mutate))


def tiny_values(mutate):
    """Values so small that eps matters."""
    x = mx.full((1, 3, 16), 1e-3)
    ones, zeros = mx.ones((16,)), mx.zeros((8,))
    q, *_ = elementwise.norm_rope(
        kernels(mutate), x, mx.array([3]), zeros, (ones, ones), kv_heads=1, eps=EPS, kv_dtype=mx.float32
    )
    assert_close(q, ops.rms_norm(None, np.array(x[:, :1]), np.ones(16, np.float32), eps=EPS))


def fused_add_rms_norm(mutate=None, dtype=mx.float32, count=3, width=640, offset=0.0):
    rng = np.random.default_rng(width)
    (x, x32), (y, y32) = (rounded(rng.normal(size=(count, width)), dtype) for _ in range(2))
    w, w32 = rounded(rng.normal(size=width) + 1, dtype)
    total, normed = elementwise.fused_add_rms_norm(kernels(mutate), x, y, w, eps=EPS, offset=offset)
    expected = x32 + y32
    assert_close(total, expected)
    assert total.dtype == normed.dtype == dtype
    stored = np.array((x + y).astype(mx.float32))
    np.testing.assert_array_equal(np.array(total.astype(mx.float32)), stored)
    assert_close(normed, ops.rms_norm(None, stored, w32, eps=EPS, offset=offset))


@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_add_rms_norm_types(dtype):
    fused_add_rms_norm(dtype=DTYPES[dtype], offset=1.0)


@pytest.mark.parametrize(("count", "width"), [(1, 8), (2, 100), (1, 1025), (2, 4096)])
def test_fused_add_rms_norm_shapes(count, width):
    fused_add_rms_norm(count=count, width=width)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        *without_barriers("fused_add_rms_norm"),
        ("squares = simd_sum(squares);", ""),
        ("lane < SIMDS ?", "lane < SIMDS - 1 ?"),
        ("squares / float(N)", "squares / float(N + 1)"),
        ("y) * N;", "x) * N;"),
    ],
)
def test_a_mutated_fused_add_rms_norm_fails(old, new):
    assert_found(old, new, lambda mutate: fused_add_rms_norm(mutate))


def act_and_mul(mutate=None, dtype=mx.float32, gelu=False, count=3, width=96):
    rng = np.random.default_rng(width)
    x = rng.normal(size=(count, 2 * width)) * 3
    x[0, 0], x[0, 1] = 60, -60  # saturates tanh and exp
    x, x32 = rounded(x, dtype)
    got = elementwise.act_and_mul(kernels(mutate), x, gelu=gelu)
    assert got.dtype == dtype
    assert_close(got, (ops.gelu_and_mul if gelu else ops.silu_and_mul)(None, *np.split(x32, 2, axis=1)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gelu", [False, True])
def test_act_and_mul(dtype, gelu):
    act_and_mul(dtype=DTYPES[dtype], gelu=gelu)
    act_and_mul(dtype=DTYPES[dtype], gelu=gelu, count=1, width=301)


@pytest.mark.parametrize(
    ("old", "new", "gelu"),
    [("2 * N + N + i", "2 * N + N + i + 1", False), ("1.0f + metal::precise::exp", "metal::precise::exp", False),
     ("0.044715f", "0.044f", True)],
)  # fmt: skip
def test_a_mutated_act_and_mul_fails(old, new, gelu):
    assert_found(old, new, lambda mutate: act_and_mul(mutate, gelu=gelu))


@pytest.mark.skipif(mx.metal.is_available(), reason="needs a system without Metal")
def test_without_metal_the_error_says_so():
    with pytest.raises(BackendError, match=r"act_and_mul can't be run.*No Metal back-end"):
        mx.eval(elementwise.act_and_mul(Kernels(), mx.zeros((2, 16)), gelu=False))


def test_the_launchers_check_their_arguments():
    x = mx.zeros((2, 16))
    with pytest.raises(BackendError, match=r"fused_add_rms_norm: residual has shape \(1, 16\), not \(2, 16\)"):
        elementwise.fused_add_rms_norm(kernels(), x, x[:1], x[0], eps=EPS)
    with pytest.raises(BackendError, match=r"act_and_mul: gate_up is mlx\.core\.int32"):
        elementwise.act_and_mul(kernels(), x.astype(mx.int32), gelu=False)
    with pytest.raises(BackendError, match="norm_rope: head size 15"):
        elementwise.norm_rope(
            kernels(), mx.zeros((1, 3, 15)), mx.array([0]), mx.zeros((7,)), None, kv_heads=1, kv_dtype=mx.float32
        )
