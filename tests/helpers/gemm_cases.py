"""Inputs for the GEMM kernels, and results in float64."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
from llmrs.backends.torch.kernels.gemm import fused_linear
from llmrs.backends.torch.triton_ops import Linear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
LEFT = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def random(rng: np.random.Generator, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(rng.normal(size=shape)).to(dtype).to(DEVICE)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch):
    """Memory that a kernel does not write is NaN."""
    empty = torch.empty

    def filled(*shape, **how):
        made = empty(*shape, **how)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", filled)


def expected(x, w, bias, residual, norm, act: str) -> np.ndarray:
    """In float64, rounded where the unfused ops round."""
    kind = x.dtype

    def rounded(a: torch.Tensor) -> torch.Tensor:
        return a.to(kind).double()

    a = x.double()
    if norm is not None:
        a = rounded(a * (a.square().mean(1, keepdim=True) + 1e-5).rsqrt() * (norm.double() + 0.5))
    a = rounded(a @ w.double().T + (0 if bias is None else bias.double()))
    if act:
        g, up = a.chunk(2, dim=1)
        g = torch.nn.functional.silu(g) if act == "silu_and_mul" else torch.nn.functional.gelu(g, approximate="tanh")
        a = rounded(g * up)
    return (a if residual is None else residual.double() + a).cpu().numpy()


def check(m: int, n: int, k: int, dtype: torch.dtype, act: str, residual: bool, norm: bool, bias: bool, **how):
    rng = np.random.default_rng(k)
    x = random(rng, m, k + 16, dtype=dtype)[:, 8 : k + 8]
    w = random(rng, n * (2 if act else 1), k + 8, dtype=dtype)[:, :k] / k**0.5
    biases = random(rng, len(w), dtype=dtype) if bias else None
    residuals = random(rng, m, n + 24, dtype=dtype)[:, 16 : n + 16] if residual else None
    norm_weight = random(rng, k, dtype=dtype) if norm else None
    out = fused_linear(x, w, biases, residuals, norm_weight, 1e-5, 0.5, act, **how)
    wanted = expected(x, w, biases, residuals, norm_weight, act)
    assert out.shape == (m, n)
    assert out.dtype == dtype
    assert (np.abs(out.double().cpu().numpy() - wanted) < LEFT[dtype] * np.maximum(np.abs(wanted), 1)).all()


def check_linear(n: int, k: int, dtype: torch.dtype) -> None:
    """M = 1 through a linear without neighbours."""
    rng = np.random.default_rng(k)
    x, w, bias = (random(rng, *shape, dtype=dtype) for shape in ((1, k), (n, k), (n,)))
    w = w / k**0.5
    for b in (None, bias):
        found, wanted = Linear(w, b)(x).double().cpu().numpy(), expected(x, w, b, None, None, "")
        assert (np.abs(found - wanted) < LEFT[dtype] * np.maximum(np.abs(wanted), 1)).all()
