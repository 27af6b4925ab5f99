"""paged_decode and paged_combine against `attend` of the reference backend."""

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")

from metal_cases import DTYPES, assert_close, assert_found, attention_case, kernels, without_barriers  # noqa: E402

from llmrs.backends.mlx.kernels import attention  # noqa: E402
from llmrs.backends.reference.ops import attend  # noqa: E402
from llmrs.core.errors import BackendError  # noqa: E402


def case(**options):
    """Arguments of paged_decode, and of the reference."""
    arrays, (context, q, kv) = attention_case(**options)
    batch = context.batch
    token_to_seq = np.repeat(np.arange(len(batch.seq_lens), dtype=np.int32), np.diff(batch.query_start_loc))
    return [*arrays, *map(mx.array, (batch.block_tables, token_to_seq, batch.positions + 1))], (context, q, kv)


def compare(mutate=None, window=0, num_splits=0, **options):
    arrays, (context, q, kv) = case(**options)
    scale, max_seq_len = q.shape[-1] ** -0.5, int(context.batch.seq_lens.max())
    got = attention.paged_decode(
        kernels(mutate), *arrays, scale=scale, window=window, max_seq_len=max_seq_len, num_splits=num_splits
    )
    assert got.dtype == arrays[0].dtype
    assert_close(got, attend(context, q, kv, scale=scale, window=window).reshape(q.shape))


EDGES = {"counts": [1] * 6, "lengths": [1, 15, 16, 17, 32, 70]}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("splits", [1, 3])
def test_types(dtype, splits):
    compare(dtype=DTYPES[dtype], num_splits=splits, **EDGES)


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (2, 1), (7, 1), (14, 2)])
def test_groups(heads, kv_heads):
    compare(heads=heads, kv_heads=kv_heads, size=128, counts=[1, 1], lengths=[37, 5])


@pytest.mark.parametrize("size", [16, 32, 80, 96, 192, 256])
def test_head_sizes(size):
    compare(size=size, counts=[1, 1], lengths=[20, 3], num_splits=2)


@pytest.mark.parametrize("window", [1, 5, 16, 40])
def test_windows(window):
    compare(window=window, **EDGES)
    compare(window=window, num_splits=2, counts=[1], lengths=[90])


def test_any_token_of_a_ragged_step():
    compare(counts=[5, 1, 3], lengths=[5, 40, 18], block=8, num_splits=2)


def test_a_token_without_context_gives_zeros():
    arrays, _ = case(counts=[1, 1], lengths=[9, 20])
    arrays[5] = mx.array([9, 0], dtype=mx.int32)
    for splits in (1, 2):
        got = attention.paged_decode(kernels(), *arrays, scale=0.1, max_seq_len=20, num_splits=splits)
        assert not np.array(got)[1].any()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("p < to; p", "p + 1 < to; p"),
        ("min(from + share, end)", "from + share"),
        ("tables_shape[1] + p / BLOCK", "tables_shape[1] + (p + 1) / BLOCK"),
        ("end - WINDOW : 0", "end - WINDOW + 1 : 0"),
        ("first / (HQ / HK)", "first % HK"),
        ("p += SIMDS", "p += SIMDS - 1"),
        ("active = at < D", "active = at <= D"),
        ("l[g] * alpha", "l[g]"),
        *without_barriers("paged_decode"),
        ("s = 0; s < splits", "s = 0; s + 1 < splits"),
    ],
)
def test_a_mutated_kernel_fails(old, new):
    options = {"window": 33, "num_splits": 3, "size": 80, "counts": [1] * 4, "lengths": [1, 15, 48, 112]}
    assert_found(old, new, lambda mutate: compare(mutate, **options))


def test_the_launcher_checks_its_arguments():
    arrays, _ = case(counts=[1, 1], lengths=[9, 20], heads=3, kv_heads=2)
    with pytest.raises(BackendError, match="3 query heads"):
        attention.paged_decode(kernels(), *arrays, scale=1.0, max_seq_len=20)
    arrays, _ = case(counts=[1, 1], lengths=[9, 20])
    for index, wrong in ((0, arrays[0].astype(mx.int32)), (1, arrays[1][:, :, :, :32]), (5, arrays[5][:1])):
        with pytest.raises(BackendError, match="paged_decode"):
            attention.paged_decode(kernels(), *arrays[:index], wrong, *arrays[index + 1 :], scale=1.0, max_seq_len=20)


def test_splits_fill_the_gpu_but_keep_work_for_each():
    assert attention.choose_num_splits(8, 40) == 1
    assert attention.choose_num_splits(8, 64 * 10) == 10
    assert attention.choose_num_splits(8, 10**5) == 32
    assert attention.choose_num_splits(400, 10**5) == 1
