"""The CPU's kernels for quantized weights, of each instruction set that this CPU has: products against float64."""

import ctypes
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from llmrs.backends.base import Backend
from llmrs.backends.testing import FORMS, BackendSuite
from llmrs.backends.torch.cpu import native
from llmrs.backends.torch.cpu.library import Kernels, libraries
from llmrs.backends.torch.cpu.native import NativeRows, native_rows, supports
from llmrs.backends.torch.cpu_linear import Forms
from llmrs.backends.torch.quant_matrix import PackedRows, QuantMatrix, packed_rows
from llmrs.quant.form import Form
from llmrs.quant.tensor import QuantTensor
from llmrs.random_model import random_quantized

CPU = torch.device("cpu")
ALL = [case for forms in FORMS for case in forms]
LIBRARIES = libraries()
needs_kernels = pytest.mark.skipif(not LIBRARIES, reason="no C++ compiler built the CPU kernels")
pytestmark = needs_kernels


@pytest.fixture(params=range(len(LIBRARIES)), ids=lambda n: f"library {n}")
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return LIBRARIES[request.param]


def made(
    kernels: Kernels, form: Form, more: tuple[str, ...], rows: int, columns: int
) -> tuple[QuantTensor, NativeRows]:
    tensor = random_quantized(np.random.default_rng(rows), form, more, (rows, columns))
    return tensor, native_rows(packed_rows(tensor, CPU), kernels)


def relative_error(y: torch.Tensor, x: torch.Tensor, w: np.ndarray) -> float:
    """Root mean square, against float64."""
    expected = x.double().numpy() @ w.astype(np.float64).T
    return float(np.sqrt(np.square(y.double().numpy() - expected).mean() / np.square(expected).mean()))


@pytest.mark.parametrize(("form", "more"), ALL, ids=lambda v: str(v) if isinstance(v, Form) else "")
def test_products(kernels: Kernels, form: Form, more: tuple[str, ...]) -> None:
    """Rows that no task and no block of rows of x divides; several blocks of scales, the last one cut."""
    for columns in (256, 1280):
        tensor, rows = made(kernels, form, more, 37, columns)
        w = tensor.float32()
        assert np.abs(rows.unpack(torch.float32).numpy() - w).max() <= 3e-7 * np.abs(w).max()
        for m in (1, 2, 3, 8):
            x = torch.randn(m, columns)
            assert relative_error(rows.multiply(x), x, w) < 1e-6
            for dtype in (torch.float16, torch.bfloat16):
                half = x.to(dtype)
                assert relative_error(rows.multiply(half, torch.float32), half, w) < 6e-5
                assert torch.equal(rows.multiply(half), rows.multiply(half, torch.float32).to(dtype))


def test_outliers_in_activations(kernels: Kernels) -> None:
    tensor, rows = made(kernels, *FORMS[1][0], 64, 1024)
    x = torch.randn(4, 1024).half()
    x[:, ::128] *= 100
    assert relative_error(rows.multiply(x, torch.float32), x, tensor.float32()) < 1e-4


@pytest.mark.parametrize(("group", "columns"), [(96, 96), (1000, 1000), (512, 1536), (4096, 4096), (40, 40)])
def test_large_groups_and_odd_rows(kernels: Kernels, group: int, columns: int) -> None:
    """One scale a row, which no vector divides; groups above the kernels' largest."""
    for form, more in ((Form("affine", "u8", group, "f32", 128), ()), (Form("fp8", "e4m3", group, "f32"), ())):
        tensor, rows = made(kernels, form, more, 9, columns)
        assert supports(form, columns)
        x, w = torch.randn(3, columns), tensor.float32()
        assert relative_error(rows.multiply(x), x, w) < 1e-6
        assert np.abs(rows.unpack(torch.float32).numpy() - w).max() <= 3e-7 * np.abs(w).max()
        assert relative_error(rows.multiply(x.bfloat16()), x.bfloat16(), w) < 3e-3


@pytest.mark.parametrize(
    ("code", "group", "columns"), [("iq4", 32, 96), ("u4", 32, 160), ("u6", 16, 80), ("u3", 16, 48)]
)
def test_rows_that_end_within_a_chunk(kernels: Kernels, code: str, group: int, columns: int) -> None:
    """Padding counts for nothing, whatever is left there of the call before."""
    form = Form("fp4" if code == "iq4" else "affine", code, group, "f16")
    tensor, rows = made(kernels, form, (), 9, columns)
    rows.multiply(torch.full((3, columns), 1e4).half())
    x, w = torch.randn(3, columns), tensor.float32()
    assert relative_error(rows.multiply(x), x, w) < 1e-6
    assert relative_error(rows.multiply(x.half(), torch.float32), x.half(), w) < 6e-5
    assert np.abs(rows.unpack(torch.float32).numpy() - w).max() <= 3e-7 * np.abs(w).max()


def test_forms_that_are_left_out() -> None:
    assert not supports(Form("affine", "u4", 24, "f16"), 48)
    assert not supports(Form("affine", "u4", 40, "f16"), 80)
    rows = packed_rows(random_quantized(np.random.default_rng(0), Form("affine", "u4", 24, "f16"), (), (4, 48)), CPU)
    pack = native.packer(LIBRARIES[0])
    dense = pack(rows, torch.bfloat16)
    assert isinstance(dense, torch.Tensor)
    assert torch.equal(dense, rows.unpack(torch.bfloat16))


def test_some_rows(kernels: Kernels) -> None:
    """Slices, such as experts, and rows by their numbers, of a table whose last scales lie at the planes' end."""
    form, more = FORMS[1][0]
    _, rows = made(kernels, form, more, 50, 256)
    whole, x = rows.unpack(torch.bfloat16), torch.randn(2, 256)
    for begin, end in ((0, 1), (7, 20), (49, 50)):
        assert torch.equal(rows[begin:end].unpack(torch.bfloat16), whole[begin:end])
        assert torch.equal(rows[begin:end].multiply(x), rows.multiply(x)[:, begin:end])
    index = torch.tensor([49, 0, 7, 49])
    assert torch.equal(rows.gather(index, torch.bfloat16), whole[index])


def test_segments_and_bias(kernels: Kernels) -> None:
    """One result of rows in several forms, with a bias; its segments end within blocks of rows."""
    pairs = [made(kernels, *case, rows, 256) for case, rows in zip(FORMS[1], (37, 20), strict=True)]
    w, bias = np.concatenate([tensor.float32() for tensor, _ in pairs]), torch.randn(57)
    for dtype in (torch.float32, torch.float16):
        for m in (1, 3, 40):
            x = torch.randn(m, 256).to(dtype)
            y = native.make_linear(
                QuantMatrix(tuple(rows for _, rows in pairs), dtype), bias.to(dtype), kernels=kernels
            )(x)
            expected = x.double() @ torch.from_numpy(w).double().t() + bias.to(dtype).double()
            assert y.dtype == dtype
            assert (y - expected).norm() / expected.norm() < (1e-6 if dtype == torch.float32 else 1e-3)


def test_many_rows_of_x_take_a_gemm(kernels: Kernels) -> None:
    tensor, rows = made(kernels, *FORMS[1][1], 70, 512)
    for dtype in (torch.float32, torch.bfloat16):
        assert 4 <= native.max_gemv_m(kernels, dtype, 1) <= 32
        x = torch.randn(40, 512).to(dtype)
        assert relative_error(rows.linear(x), x, tensor.float32()) < (1e-6 if dtype == torch.float32 else 6e-3)


@pytest.mark.parametrize("plain_max_m", [0, 100])
def test_a_gemm_in_float32_where_that_is_faster(
    kernels: Kernels, plain_max_m: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor, rows = made(kernels, *FORMS[1][1], 70, 512)
    monkeypatch.setattr(native, "measured", lambda *_: Forms(False, plain_max_m))
    x = torch.randn(40, 512).bfloat16()
    y = rows.gemm(x)
    assert y.dtype == torch.bfloat16
    assert relative_error(y, x, tensor.float32()) < (2.5e-3 if plain_max_m == 0 else 6e-3)


def test_what_is_not_finite_stays_so(kernels: Kernels) -> None:
    for form, more in (FORMS[1][0], FORMS[1][1], FORMS[9][0]):
        _, rows = made(kernels, form, more, 20, 512)
        for value in (torch.inf, -torch.inf, torch.nan):
            for dtype in (torch.float32, torch.bfloat16):
                x = torch.zeros(3, 512, dtype=dtype)
                x[1, 300] = value
                y = rows.multiply(x)
                assert not y[1].isfinite().any()
                assert (y[[0, 2]] == 0).all()


def test_extremes(kernels: Kernels) -> None:
    """Largest codes, scales and x, of one sign: no integer overflows."""
    for code, group, zero in (("u8", 256, 0), ("u8", 16, 128), ("u6", 16, 32), ("u4", 32, 0)):
        form = Form("affine", code, group, "f32", zero)
        codes = torch.full((5, 2048 * form.bits // 8), 255, dtype=torch.uint8)
        packed = PackedRows(form, 2048, {"codes": codes, "scales": torch.full((5, 2048 // group), 3.0)})
        x = torch.full((4, 2048), 200.0).bfloat16()
        expected = 2048 * 200 * 3.0 * ((1 << form.bits) - 1 - zero)
        assert torch.allclose(
            native_rows(packed, kernels).multiply(x).double(), torch.tensor(expected).double(), rtol=5e-3
        )
        assert (native_rows(packed, kernels).multiply(torch.zeros_like(x)) == 0).all()


def test_memory_is_that_of_the_form() -> None:
    for form, more in ALL:
        tensor, rows = made(LIBRARIES[0], form, more, 64, 2048)
        planes = packed_rows(tensor, CPU).planes.values()
        assert sum(p.nbytes for p in rows.planes.values()) == sum(p.nbytes for p in planes)


def test_the_struct_is_that_of_the_source() -> None:
    """A field that one side lacks would shift the others: the last ones are read."""
    form, more = FORMS[7][1]
    tensor, rows = made(LIBRARIES[0], form, more, 3, 64)
    assert ctypes.sizeof(rows.rows) % 8 == 0
    assert rows.rows.factor == 0.5
    assert np.abs(rows.unpack(torch.float32).numpy() - tensor.float32()).max() == 0


@pytest.mark.slow
def test_the_plain_source(tmp_path: Path) -> None:
    """What other CPUs run, without vector instructions."""
    library, folder = tmp_path / "kernels_generic.so", Path(native.__file__).parent
    sources = sorted(folder.glob("*.cpp"))
    subprocess.run(
        ["g++", "-std=c++17", "-O1", "-pthread", "-fPIC", "-w", "-shared", *sources, "-o", library], check=True
    )
    kernels = Kernels(library)
    for form, more in ALL:
        test_products(kernels, form, more)


class TestCPUKernels(BackendSuite):
    """Whole models, where they are used."""

    backend, device = "torch", "cpu"
    test_sampling = test_placeholder_tokens = None

    def make(self, dtype: str = "f32", kv_dtype: str | None = None) -> Backend:
        backend = super().make(dtype, kv_dtype)
        backend.use_kernels("auto")
        return backend
