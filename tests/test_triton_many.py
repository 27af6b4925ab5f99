"""The kernel for many rows against float64, on awkward sizes, with its workspace full of what was there before."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
from test_triton_few import DEVICE, TYPES, check, poisoned, random

from llmrs.backends.torch.kernels.launch import chaining
from llmrs.backends.torch.kernels.rows import NARROW, SOME, cut_for, product
from llmrs.backends.torch.kernels.rows_many import MANY, PROGRAMS, TILE, Tiles, cut_many, workspace
from llmrs.core.errors import BackendError

__all__ = ["poisoned"]  # a fixture that every test uses


@pytest.fixture(autouse=True)
def used():
    """Sums that another launch left, and the counters as every launch leaves them."""
    found = workspace(torch.empty(0, device=DEVICE).device)  # as tensors say it, with its number
    found.sums.fill_(float("nan"))
    yield
    assert not found.arrived.any()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("rows", "count", "width"), [(2, 100, 1100), (17, 65, 80), (63, 30, 520), (65, 130, 264)])
def test_products(rows: int, count: int, width: int, dtype: torch.dtype):
    """N no multiple of the tile, K none of the part or the range."""
    each, part = (16, 32) if dtype == torch.float32 else (64, 64)
    for split, gate, more, bias in ((1, "silu_mul", True, False), (3, "", False, True), (4, "gelu_mul", True, True)):
        cut = Tiles(each, 16 if rows < 32 else 32, part, split)
        check(rows, count, width, dtype, gate, more, False, bias, cut=cut)


@pytest.mark.parametrize("rows", [33, 64, 257, MANY])
def test_as_it_is_cut(rows: int):
    for count, width, gate in ((100, 1024, ""), (70, 640, "silu_mul")):
        check(rows, count, width, torch.float16, gate, not gate, False, not gate)


def test_wide_tiles():
    for each, count, part, split in ((128, 64, 128, 2), (64, 256, 64, 1), (128, 128, 64, 5)):
        check(100, 200, 384, torch.float16, "", True, False, False, cut=Tiles(each, count, part, split, 8, 3))


def test_no_range_is_empty():
    """Nine parts in eight ranges of two: five have something."""
    check(20, 64, 9 * 64, torch.float16, "", True, False, False, cut=Tiles(64, 32, 64, 8))


def test_the_same_bits_each_time():
    """Also when launches that share the workspace follow each other, chained where a GPU can."""
    rng = np.random.default_rng(0)
    w, cut = random(rng, 130, 512, dtype=torch.float16), Tiles(64, 16, 64, 4)
    xs = [random(rng, rows, 512, dtype=torch.float16) for rows in (40, 17, 3, 40)]
    first = [product(x, w, cut=cut).clone() for x in xs]
    with chaining(True):
        second = [product(x, w, cut=cut) for x in xs]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("size", [2, 4])
def test_every_cut_fits_the_workspace(size: int):
    for rows in (1, 16, 17, 64, 200, MANY):
        for results, width, gate in ((64, 32, False), (1024, 2048, False), (3072, 1024, True), (12288, 4096, True)):
            cut = cut_many(rows, results, width, size, gate)
            assert cut.each * cut.count * (1 + gate) <= TILE // (1 + (cut.split > 1))
            assert cut.split == 1 or cut.programs(rows, results) <= 2 * PROGRAMS


def test_which_kernel_runs():
    assert isinstance(cut_for(SOME + 1, NARROW, 1024, 2, False), Tiles)
    assert isinstance(cut_for(SOME, NARROW + 1, 1024, 2, False), Tiles)
    assert not isinstance(cut_for(SOME, NARROW, 1024, 2, False), Tiles)
    assert not isinstance(cut_for(1, NARROW + 1, 1024, 2, False), Tiles)


def test_more_tiles_than_the_workspace_has_are_refused():
    x, w = torch.zeros(16, 64, device=DEVICE), torch.zeros(16 * 2 * PROGRAMS + 1, 64, device=DEVICE)
    with pytest.raises(BackendError, match="kernel rows"):
        product(x, w, cut=Tiles(16, 16, 32, 2))
