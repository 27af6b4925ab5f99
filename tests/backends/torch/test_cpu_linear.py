"""Linear maps of 16-bit weights on the CPU: every form against float64, and which form is chosen by what times."""

import itertools

import numpy as np
import pytest
import torch

from llmrs.backends.torch import cpu_linear
from llmrs.backends.torch.cpu.library import libraries
from llmrs.backends.torch.cpu_linear import (
    ALL_ROWS,
    GEMV_MAX_M,
    PREFILL_M,
    Forms,
    fastest,
    gemv,
    make_linear,
    measured,
    packed,
    unpacked,
)

TYPES = (torch.bfloat16, torch.float16)
FORMS = {
    "plain": lambda w, b: unpacked(w, b, Forms(False, ALL_ROWS)),
    "upcast": lambda w, b: unpacked(w, b, Forms(False, 0)),
    "packed": packed,
    "chosen": make_linear,
    **{f"gemv {n}": lambda w, b, k=k: unpacked(w, b, Forms(False, 0, ALL_ROWS), k) for n, k in enumerate(libraries())},
}


def made(form, weight, bias):
    try:
        return FORMS[form](weight, bias)
    except RuntimeError as error:
        pytest.skip(f"oneDNN packs no such weight here: {error}")


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("biased", [False, True])
def test_products(form, dtype, biased, monkeypatch):
    """Rows that are no multiple of anything, and several slices of which the last is smaller."""
    monkeypatch.setattr(cpu_linear, "SLICE_BYTES", 64 * 4 * 48)
    rng = np.random.default_rng(0)
    weight = torch.from_numpy(rng.normal(size=(150, 48))).to(dtype)
    bias = torch.from_numpy(rng.normal(size=150)).to(dtype) if biased else None
    run = made(form, weight, bias)
    for rows in (1, 2, 3, 15, 70):
        x = torch.from_numpy(rng.normal(size=(rows, 48))).to(dtype)
        exact = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
        y = run(x)
        assert y.dtype == dtype
        assert y.shape == (rows, 150)
        assert y.is_contiguous()
        error = (y.double() - exact).norm() / exact.norm()
        assert error < {torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]


def choice(**seconds):
    """The forms chosen where a product takes what these functions of its rows say."""
    return fastest(lambda form, rows: seconds[form](rows) if form in seconds else None)


def test_a_cpu_without_instructions_for_the_type():
    """AVX2: oneDNN packs nothing, and torch's own product takes rows one by one."""
    assert choice(plain=lambda n: n, upcast=lambda n: 5 + n / 20) == Forms(packed=False, plain_max_m=4)


def test_a_cpu_whose_packed_product_is_emulated():
    """AVX512 without AVX512-BF16: slower than plain for one row, and than float32 for many."""
    times = {"plain": lambda n: n, "upcast": lambda n: 5 + n / 20, "packed": lambda n: 2 + n / 4}
    assert choice(**times) == Forms(packed=False, plain_max_m=4)


def test_a_cpu_with_instructions_for_the_type():
    times = {"plain": lambda n: 1.5 + n / 30, "upcast": lambda n: 5 + n / 20, "packed": lambda n: 1 + n / 60}
    assert choice(**times) == Forms(packed=True, plain_max_m=ALL_ROWS)


def test_one_row_is_never_upcast():
    assert choice(plain=lambda n: 10, upcast=lambda n: 1) == Forms(packed=False, plain_max_m=1)


def test_decode_and_prefill_both_count():
    """Packed loses a little for one row and gains much for many."""
    times = {"plain": lambda n: n, "upcast": lambda n: 5 + n / 2, "packed": lambda n: 1.1 + n / 10}
    assert choice(**times).packed
    assert not choice(**{**times, "packed": lambda n: 2 + n * 0.4}).packed


def test_our_kernel_for_few_rows():
    """It reads a weight fastest, and multiplies slower than torch from 4 rows on."""
    times = {"plain": lambda n: 2 + n / 8, "gemv": lambda n: 1 + n / 2, "upcast": lambda n: 5 + n / 4}
    assert choice(**times) == Forms(packed=False, plain_max_m=ALL_ROWS, gemv_max_m=2)
    assert choice(**times, packed=lambda n: 1.8 + n / 9) == Forms(False, ALL_ROWS, 2)
    assert choice(**times, packed=lambda n: 1 + n / 16).packed
    assert choice(**times | {"gemv": lambda n: 3}).gemv_max_m == 0
    assert choice(**times | {"gemv": lambda n: 1}).gemv_max_m == GEMV_MAX_M


@pytest.mark.parametrize("library", range(len(libraries())))
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (7, 17), (33, 100), (130, 64), (50, 1040)])
def test_odd_shapes(library, rows, columns):
    """Results in poisoned memory; weights that begin anywhere in a file."""
    kernels, generator = libraries()[library], torch.Generator().manual_seed(0)
    for dtype in TYPES:
        for m in (1, 2, 5, 8, 9):
            x = torch.randn(m, columns, generator=generator).to(dtype)
            w = torch.randn(rows * columns + 3, generator=generator).to(dtype)[3:].view(rows, columns)
            torch.empty(m, rows, dtype=dtype).fill_(torch.nan)
            exact = x.double() @ w.double().t()
            error = (gemv(x, w, None, kernels).double() - exact).abs().max() / exact.abs().max()
            assert error < {torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]


@pytest.mark.parametrize("dtype", TYPES)
def test_what_is_measured_is_a_choice_and_measured_once(dtype, monkeypatch):
    forms = measured(dtype, torch.get_num_threads())
    assert forms.plain_max_m in {1, *(2**n for n in range(1, PREFILL_M.bit_length())), ALL_ROWS}
    monkeypatch.setattr(cpu_linear, "bench", None)
    assert measured(dtype, torch.get_num_threads()) is forms


def test_trials_are_few():
    """At most three forms for each number of rows, and what decides on the packed one."""
    calls = []
    clock = itertools.count()
    fastest(lambda form, rows: (calls.append((form, rows)), float(next(clock)))[1])
    assert len(calls) == len(set(calls)) <= 3 * PREFILL_M.bit_length() + 4
