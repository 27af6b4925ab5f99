"""The kernel for many rows against float64, on awkward sizes, with what is not written full of NaN."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
from gemm_cases import DEVICE, LEFT, TYPES, check, expected, poisoned, random

from llmrs.backends.torch.kernels.gemm import product
from llmrs.backends.torch.kernels.gemm_tma import MANY, PROGRAMS, Tiles, cut_many
from llmrs.backends.torch.kernels.launch import chaining
from llmrs.backends.torch.kernels.rms_norm import fused_add_rms_norm
from llmrs.core.errors import BackendError

__all__ = ["poisoned"]  # a fixture that every test uses
HALVES = TYPES[1:]
SHARED = 227 * 1024


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("rows", "count", "width"), [(2, 100, 1096), (17, 65, 80), (63, 30, 520), (65, 130, 264)])
def test_products(rows: int, count: int, width: int, dtype: torch.dtype):
    """N no multiple of the tile, so that its gates and ups overlap; K none of the part."""
    for gate, bias, part in (("silu_and_mul", False, 64), ("", True, 128), ("gelu_and_mul", True, 64)):
        check(rows, count, width, dtype, gate, False, False, bias, cut=Tiles(64, 16 if rows < 32 else 32, part))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("rows", "width", "ranges", "left"), [(3, 512, 4, 4), (33, 9 * 64, 8, 5), (20, 9 * 64 + 8, 2, 2), (65, 520, 6, 5)]
)
def test_ranges_and_the_norm_that_adds_them_up(rows: int, width: int, ranges: int, left: int, dtype: torch.dtype):
    """Also where nine parts in eight ranges would leave three ranges empty."""
    rng, count = np.random.default_rng(width), 72
    x, w = random(rng, rows, width, dtype=dtype), random(rng, count, width, dtype=dtype) / width**0.5
    more, norm = random(rng, rows, count, dtype=dtype), random(rng, count, dtype=dtype)
    sums = product(x, w, cut=Tiles(64, 32, 64, ranges))
    assert sums.dtype == torch.float32
    assert sums.shape == (left, rows, count)
    total, normed = fused_add_rms_norm(more, sums, norm, eps=1e-5)
    wanted = expected(x, w, None, more, None, "")
    assert (np.abs(total.double().cpu().numpy() - wanted) < LEFT[dtype] * np.maximum(np.abs(wanted), 1)).all()
    alone = fused_add_rms_norm(more, sums.sum(0).to(dtype), norm, eps=1e-5)
    assert torch.equal(total, alone[0])
    assert torch.equal(normed, alone[1])


@pytest.mark.parametrize("rows", [33, 64, 257, MANY])
def test_as_it_is_cut(rows: int):
    for count, width, gate in ((100, 1024, ""), (70, 640, "silu_and_mul")):
        cut = cut_many(rows, count, width, bool(gate), False, SHARED)
        check(rows, count, width, torch.float16, gate, False, False, not gate, cut=cut)


def test_wide_tiles():
    for each, count, part, gate in ((128, 64, 128, ""), (64, 256, 64, "silu_and_mul"), (128, 128, 64, "gelu_and_mul")):
        check(100, 200, 384, torch.float16, gate, False, False, False, cut=Tiles(each, count, part, 1, 8, 3))


def test_the_same_bits_each_time():
    """Also when launches follow each other, chained where a GPU can."""
    rng, kind = np.random.default_rng(0), torch.float16
    w, norm, cut = random(rng, 130, 512, dtype=kind), random(rng, 130, dtype=kind), Tiles(64, 16, 64, 4)
    xs = [random(rng, rows, 512, dtype=kind) for rows in (40, 17, 3, 40)]
    mores = [random(rng, len(x), 130, dtype=kind) for x in xs]

    def totals() -> list[torch.Tensor]:
        return [
            fused_add_rms_norm(m, product(x, w, cut=cut), norm, eps=1e-5)[0] for x, m in zip(xs, mores, strict=True)
        ]

    first = totals()
    with chaining(True):
        second = totals()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("shared", [99 * 1024, SHARED])
@pytest.mark.parametrize("gate", [False, True])
def test_every_cut_fits(gate: bool, shared: int):
    for rows in (2, 16, 17, 64, 200, MANY):
        for results, width in ((64, 32), (1024, 2048), (3072, 1024), (2048, 8192), (12288, 4096)):
            cut = cut_many(rows, results, width, gate, not gate, shared)
            columns = cut.each * (1 + gate) + cut.count
            assert 2 <= cut.stages <= shared // (2 * columns * cut.part)
            assert cut.split == 1 or (cut.programs(rows, results) <= 2 * PROGRAMS and width // cut.split >= 256)
            assert cut.split == 1 or not gate


def test_the_device_is_filled_where_ranges_can():
    """Few results of many columns, as of `down`; without something that adds ranges up there is one."""
    assert cut_many(16, 1024, 3072, False, True, SHARED).programs(16, 1024) >= 64
    assert cut_many(16, 1024, 3072, False, False, SHARED).split == 1


def test_what_tiles_cannot_do_is_refused():
    x, w = (torch.zeros(n, 64, dtype=torch.float16, device=DEVICE) for n in (4, 8))
    for wrong in (
        lambda: product(x, w, more=w[:4, :8], cut=Tiles(64, 16, 64)),
        lambda: product(x, w, w[0, :8], cut=Tiles(64, 16, 32, 2)),
        lambda: product(x, w, gate="silu_and_mul", cut=Tiles(64, 16, 32, 2)),
        lambda: product(x[:, 1:9], w[:, :8], cut=Tiles(64, 16, 64)),
        lambda: product(x[:, :7].contiguous(), w[:, :7].contiguous(), cut=Tiles(64, 16, 64)),
        lambda: product(x.float(), w.float(), cut=Tiles(64, 16, 64)),
    ):
        with pytest.raises(BackendError, match="kernel rows"):
            wrong()
