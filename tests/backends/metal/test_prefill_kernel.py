"""paged_prefill against `attend` of the reference backend."""

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")

from metal_cases import DTYPES, assert_close, assert_found, attention_case, kernels, without_barriers  # noqa: E402

from llmrs.backends.mlx.kernels import attention  # noqa: E402
from llmrs.backends.reference.ops import attend  # noqa: E402
from llmrs.core.errors import BackendError  # noqa: E402


def compare(mutate=None, window=0, heads=2, kv_heads=1, **options):
    arrays, (context, q, kv) = attention_case(heads=heads, kv_heads=kv_heads, **options)
    batch, scale = context.batch, q.shape[-1] ** -0.5
    steps = (mx.array(batch.block_tables), batch.query_start_loc, batch.seq_lens)
    got = attention.paged_prefill(kernels(mutate), *arrays, *steps, scale=scale, window=window)
    assert got.dtype == arrays[0].dtype == options.get("dtype", mx.float32)
    assert_close(got, attend(context, q, kv, scale=scale, window=window).reshape(q.shape))


RAGGED = {"counts": [33, 1, 7, 20], "lengths": [33, 1, 50, 20]}


@pytest.mark.parametrize("dtype", DTYPES)
def test_types(dtype):
    compare(dtype=DTYPES[dtype], **RAGGED)


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (7, 1), (4, 2)])
def test_groups(heads, kv_heads):
    compare(heads=heads, kv_heads=kv_heads, counts=[9], lengths=[40], size=32)


@pytest.mark.parametrize(("size", "dtype"), [(16, "f32"), (80, "f16"), (128, "f32"), (256, "f32"), (256, "bf16")])
def test_head_sizes(size, dtype):
    compare(size=size, dtype=DTYPES[dtype], counts=[18], lengths=[45])


@pytest.mark.parametrize("window", [1, 5, 32, 45])
def test_windows(window):
    compare(window=window, counts=[40, 3], lengths=[70, 3], block=8)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("p <= position &&", "p < position &&"),
        ("p <= position &&", "p <= position + 1 &&"),
        ("position - p < WINDOW", "position - p <= WINDOW"),
        ("first - WINDOW + 1", "first - WINDOW + 2"),
        ("min(TILE, after - token)", "TILE"),
        ("ulong2(0, 0), true", "ulong2(0, 0), false"),
        ("my_diagonal[r * 9]", "my_diagonal[r * 8]"),
        ("simd_shuffle_xor(sum, 2)", "simd_shuffle_xor(sum, 1)"),
        ("head / (HQ / HK)", "head % HK"),
        ("key += TILE", "key += TILE - 1"),
        ("row < count", "true"),
        *without_barriers("paged_prefill"),
    ],
)
def test_a_mutated_kernel_fails(old, new):
    options = {"counts": [35, 5], "lengths": [60, 5], "window": 20, "heads": 4, "kv_heads": 2, "size": 16}
    assert_found(old, new, lambda mutate: compare(mutate, **options))


def test_tiles():
    tiles = attention.prefill_tiles(np.array([0, 33, 34, 34, 66]), 32)
    assert tiles.tolist() == [[0, 0], [0, 32], [1, 33], [3, 34]]


@pytest.mark.parametrize("size", range(16, 257, 8))
def test_tiles_fit_threadgroup_memory(size):
    assert attention.tile_simds(size, mx.float32) >= (4 if size <= 192 else 2)
    assert attention.tile_simds(size, mx.bfloat16) == 4


def test_the_launcher_checks_its_arguments():
    q, pool = mx.zeros((3, 2, 16)), mx.zeros((2, 16, 1, 16))
    good = (q, pool, pool, mx.zeros((1, 1), dtype=mx.int32), np.array([0, 3]), np.array([3]))
    for index, wrong in ((1, pool.astype(mx.float16)), (4, np.array([0, 2])), (5, np.array([3, 3]))):
        with pytest.raises(BackendError, match="paged_prefill"):
            attention.paged_prefill(kernels(), *good[:index], wrong, *good[index + 1 :], scale=1.0)
