"""GEMV and GEMM on quantized weights against unpacked weights in float64, on random blocks of the real formats."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
from gemm_cases import DEVICE, TYPES, poisoned, random  # noqa: F401 - a fixture
from quant_cases import cases, random_gguf

from llmrs.backends.torch import triton_rows
from llmrs.backends.torch.kernels.quant_gemm import QuantGemmConfig, quant_gemm
from llmrs.backends.torch.kernels.quant_gemv import MAX_M, QuantGemvConfig, quant_gemv
from llmrs.backends.torch.kernels.quantize_activations import quantize_activations
from llmrs.backends.torch.quant_linear import GEMM_MAX_M, Norm, quant_linear
from llmrs.backends.torch.quant_matrix import QuantMatrix, packed_rows, quant_matrix
from llmrs.core.errors import BackendError
from llmrs.quant.tensor import QuantTensor

# relative to the norm of the result: codes of 16 bits; weights and their scales rounded once
GEMV_ERROR = 6e-5
GEMM_ERROR = {torch.float32: 1e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}
ROUNDING = {torch.float32: 1e-6, torch.float16: 4e-4, torch.bfloat16: 3.2e-3}  # of a result
HALVES = [dtype for dtype in TYPES if dtype != torch.float32]


def rows_of(tensor: QuantTensor) -> triton_rows.TritonRows:
    rows = triton_rows.pack(packed_rows(tensor, torch.device(DEVICE)), torch.float16)
    assert isinstance(rows, triton_rows.TritonRows)
    return rows


def error(found: torch.Tensor, expected: np.ndarray | torch.Tensor) -> float:
    found, expected = found.double().cpu(), torch.as_tensor(expected).double().cpu()
    return float((found - expected).norm() / expected.norm())


def exact(x: torch.Tensor, tensor: QuantTensor) -> np.ndarray:
    return x.double().cpu().numpy() @ tensor.float32().astype(np.float64).T


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("norm", [False, True])
def test_activations(norm: bool, dtype: torch.dtype):
    rng = np.random.default_rng(0)
    x, weight = random(rng, 3, 328, dtype=dtype)[:, 4:324] * 3, random(rng, 320, dtype=dtype)
    x[1] = 0
    codes, scales = quantize_activations(x, weight if norm else None, eps=1e-5, offset=0.5)
    expected = x.double()
    if norm:
        expected = expected * (expected.square().mean(1, keepdim=True) + 1e-5).rsqrt() * (weight.double() + 0.5)
        expected = expected.to(dtype).double()
    pairs = codes.view(3, -1, 2, 2, 4)  # unit, o, h, w
    both = torch.stack([(pairs << 16) >> 16, pairs >> 16], 3)  # the low one: i = 0
    values = both.permute(0, 1, 2, 3, 5, 4).reshape(3, 10, 32).double() * scales[:, 0, :, None]
    assert error(values.reshape(3, 320), expected) < (4e-3 if norm else 3e-5)  # norms round, here and there
    sums = values.view(3, 10, 2, 16).sum(3).permute(0, 2, 1)
    assert torch.allclose(scales[:, 1:].double(), sums, rtol=1e-5, atol=1e-5)
    assert int(both.abs().max()) == 32767


@pytest.mark.parametrize("tensor", [t for t in cases() if t.form.kind != "fp8"], ids=lambda t: f"{t.format} {t.form}")
def test_gemv(tensor: QuantTensor):
    rows = rows_of(tensor)
    for dtype in HALVES:
        x = random(np.random.default_rng(0), 2, tensor.shape[1], dtype=dtype)
        out = torch.empty(2, tensor.shape[0], device=DEVICE)
        quant_gemv(*quantize_activations(x), rows.arguments, rows.constants, out)
        assert error(out, exact(x, tensor)) < GEMV_ERROR


@pytest.mark.parametrize("tensor", cases(), ids=lambda t: f"{t.format} {t.form}")
def test_gemm(tensor: QuantTensor):
    rows = rows_of(tensor)
    for dtype in TYPES:
        x = random(np.random.default_rng(0), 19, tensor.shape[1] + 8, dtype=dtype)[:, : tensor.shape[1]]
        out = torch.empty(19, tensor.shape[0], device=DEVICE)
        quant_gemm(x, rows.arguments, rows.constants, out, config=QuantGemmConfig(64, 16, 128))
        assert error(out, exact(x, tensor)) < GEMM_ERROR[dtype]


@pytest.mark.parametrize("name", ["q4_k", "q6_k", "q8_0"])
@pytest.mark.parametrize(("n", "k"), [(1, 256), (18, 768), (5, 2304)])
def test_sizes_that_tiles_do_not_divide(n: int, k: int, name: str):
    """Also other configs, and split-K, whose partial sums add up."""
    tensor = random_gguf(name, n + 1, k)  # the first row is 0
    rows, x = rows_of(tensor), random(np.random.default_rng(0), 3, k, dtype=torch.float16)
    for config in (QuantGemvConfig(1, 4, 1), QuantGemvConfig(2, 1, 1), QuantGemvConfig(8, 2, 3)):
        out = torch.empty(3 if config.rows == 2 else 1, n + 1, device=DEVICE)
        quant_gemv(*quantize_activations(x[: len(out)]), rows.arguments, rows.constants, out, config=config)
        assert error(out, exact(x[: len(out)], tensor)) < 4 * GEMV_ERROR  # of few results, which cancel
    for config in (QuantGemmConfig(64, 16, 64, 3), QuantGemmConfig(128, 32, 256, 2, 8)):
        shape = (3, n + 1) if config.splits(k) == 1 else (config.splits(k), 3, n + 1)
        out = torch.empty(shape, device=DEVICE)
        quant_gemm(x, rows.arguments, rows.constants, out, config=config)
        assert error(out if out.ndim == 2 else out.sum(0), exact(x, tensor)) < 3 * GEMM_ERROR[torch.float16]


def matrix(tensors: Sequence[QuantTensor], dtype: torch.dtype) -> QuantMatrix:
    return quant_matrix(tensors, torch.device(DEVICE), dtype, triton_rows.pack)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("names", [("q4_k",), ("q4_k", "q6_k")])
def test_around_a_matrix(names: tuple[str, ...], dtype: torch.dtype):
    """Norm, bias, activation, residual, segments of several forms; every kernel by its M."""
    tensors = [random_gguf(names[n % len(names)], 16, 256, n) for n in range(2)]
    weight = matrix(tensors, dtype)
    assert len(weight.segments) == len(names)
    rng = np.random.default_rng(0)
    bias, norm = random(rng, 32, dtype=dtype), random(rng, 256, dtype=dtype) / 16
    w = np.concatenate([t.float32() for t in tensors]).astype(np.float64)
    for m in (1, 9, GEMM_MAX_M + 1):
        x = random(rng, m, 256, dtype=dtype) / 16
        residual = {n: random(rng, m, n + 8, dtype=dtype)[:, :n] for n in (16, 32)}
        for act, fused_norm, added, biased in (
            ("", True, False, True), ("", False, True, False), ("silu_and_mul", True, False, False),
            ("gelu_and_mul", False, True, True),
        ):  # fmt: skip
            a = x.double().cpu()
            if fused_norm:
                a = a * (a.square().mean(1, keepdim=True) + 1e-5).rsqrt() * norm.double().cpu()
            y = a @ torch.from_numpy(w).T + (bias.double().cpu() if biased else 0)
            if act:
                gate, up = y.chunk(2, 1)
                kind = {"silu_and_mul": {}, "gelu_and_mul": {"approximate": "tanh"}}[act]
                y = getattr(torch.nn.functional, act[:4])(gate, **kind) * up
            res = residual[y.shape[1]] if added else None
            found = quant_linear(
                x, weight, bias if biased else None, res, Norm(norm, {"eps": 1e-5}) if fused_norm else None, act
            )
            assert found.dtype == dtype
            expected = y + (res.double().cpu() if res is not None else 0)
            assert error(found, expected) < 3 * max(ROUNDING[dtype], GEMM_ERROR[dtype])


def test_partial_sums_where_a_norm_follows():
    weight = matrix([random_gguf("q4_k", 64, 2048)], torch.float16)
    x = random(np.random.default_rng(0), 8, 2048, dtype=torch.float16)
    whole, partial = (quant_linear(x, weight, splittable=splittable) for splittable in (False, True))
    assert partial.dtype == torch.float32
    assert partial.shape[1:] == whole.shape
    assert error(partial.sum(0), whole) < 2 * ROUNDING[torch.float16]


def test_what_does_not_fit_is_refused():
    rows = rows_of(random_gguf("q4_k", 16, 256))
    x = random(np.random.default_rng(0), MAX_M + 1, 256, dtype=torch.float16)
    with pytest.raises(BackendError, match="M = 5"):
        quant_gemv(*quantize_activations(x), rows.arguments, rows.constants, torch.empty(MAX_M + 1, 16, device=DEVICE))
    with pytest.raises(BackendError):
        quantize_activations(x[:, :40])
    with pytest.raises(BackendError, match="splits"):
        quant_gemm(x, rows.arguments, rows.constants, torch.empty(3, 5, 16), config=QuantGemmConfig(64, 16, 128, 2))
