"""The TMA GEMM against float64, on awkward sizes, with NaN in memory that is not written."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
from gemm_cases import DEVICE, LEFT, TYPES, check, expected, poisoned, random

from llmrs.backends.torch.kernels.gemm import fused_linear
from llmrs.backends.torch.kernels.gemm_tma import NUM_SMS, TMA_MAX_M, TmaConfig, tma_config
from llmrs.backends.torch.kernels.launch import supports_pdl
from llmrs.backends.torch.kernels.rms_norm import fused_add_rms_norm
from llmrs.core.errors import BackendError

__all__ = ["poisoned"]  # a fixture that every test uses
HALVES = TYPES[1:]
SMEM_BYTES = 227 * 1024


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("m", "n", "k"), [(2, 100, 1096), (17, 65, 80), (63, 30, 520), (65, 130, 264)])
def test_fused_linear(m: int, n: int, k: int, dtype: torch.dtype):
    """N no multiple of BLOCK_N, so that gate and up tiles overlap; K none of BLOCK_K."""
    for act, bias, block_k in (("silu_and_mul", False, 64), ("", True, 128), ("gelu_and_mul", True, 64)):
        check(m, n, k, dtype, act, False, False, bias, config=TmaConfig(64, 16 if m < 32 else 32, block_k))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("m", "k", "split_k", "left"), [(3, 512, 4, 4), (33, 9 * 64, 8, 5), (20, 9 * 64 + 8, 2, 2), (65, 520, 6, 5)]
)
def test_split_k_and_the_norm_that_reduces_it(m: int, k: int, split_k: int, left: int, dtype: torch.dtype):
    """Also where nine k tiles in eight splits would leave three empty."""
    rng, n = np.random.default_rng(k), 72
    x, w = random(rng, m, k, dtype=dtype), random(rng, n, k, dtype=dtype) / k**0.5
    residual, norm = random(rng, m, n, dtype=dtype), random(rng, n, dtype=dtype)
    sums = fused_linear(x, w, config=TmaConfig(64, 32, 64, split_k))
    assert sums.dtype == torch.float32
    assert sums.shape == (left, m, n)
    total, normed = fused_add_rms_norm(residual, sums, norm, eps=1e-5)
    wanted = expected(x, w, None, residual, None, "")
    assert (np.abs(total.double().cpu().numpy() - wanted) < LEFT[dtype] * np.maximum(np.abs(wanted), 1)).all()
    alone = fused_add_rms_norm(residual, sums.sum(0).to(dtype), norm, eps=1e-5)
    assert torch.equal(total, alone[0])
    assert torch.equal(normed, alone[1])


@pytest.mark.parametrize("m", [33, 64, 257, TMA_MAX_M])
def test_the_config_that_is_chosen(m: int):
    for n, k, act in ((100, 1024, ""), (70, 640, "silu_and_mul")):
        config = tma_config(m, n, k, bool(act), False, SMEM_BYTES)
        check(m, n, k, torch.float16, act, False, False, not act, config=config)


def test_wide_tiles():
    for block_n, block_m, block_k, act in (
        (128, 64, 128, ""),
        (64, 256, 64, "silu_and_mul"),
        (128, 128, 64, "gelu_and_mul"),
    ):
        config = TmaConfig(block_n, block_m, block_k, 1, 8, 3)
        check(100, 200, 384, torch.float16, act, False, False, False, config=config)


def test_the_same_bits_each_time():
    """Also with PDL, on a GPU that has it."""
    rng, dtype = np.random.default_rng(0), torch.float16
    w, norm, config = random(rng, 130, 512, dtype=dtype), random(rng, 130, dtype=dtype), TmaConfig(64, 16, 64, 4)
    xs = [random(rng, m, 512, dtype=dtype) for m in (40, 17, 3, 40)]
    residuals = [random(rng, len(x), 130, dtype=dtype) for x in xs]

    def totals(pdl: bool) -> list[torch.Tensor]:
        return [
            fused_add_rms_norm(r, fused_linear(x, w, config=config, pdl=pdl), norm, eps=1e-5, pdl=pdl)[0]
            for x, r in zip(xs, residuals, strict=True)
        ]

    first, second = totals(False), totals(supports_pdl(w.device))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("smem_bytes", [99 * 1024, SMEM_BYTES])
@pytest.mark.parametrize("act", [False, True])
def test_every_config_fits(act: bool, smem_bytes: int):
    for m in (2, 16, 17, 64, 200, TMA_MAX_M):
        for n, k in ((64, 32), (1024, 2048), (3072, 1024), (2048, 8192), (12288, 4096)):
            config = tma_config(m, n, k, act, not act, smem_bytes)
            columns = config.block_n * (1 + act) + config.block_m
            assert 2 <= config.num_stages <= smem_bytes // (2 * columns * config.block_k)
            assert config.split_k == 1 or (config.num_ctas(m, n) <= 2 * NUM_SMS and k // config.split_k >= 256)
            assert config.split_k == 1 or not act


def test_split_k_fills_the_gpu():
    """Small N, large K, as of `down`; without a norm that reduces partial sums there is no split."""
    assert tma_config(16, 1024, 3072, False, True, SMEM_BYTES).num_ctas(16, 1024) >= 64
    assert tma_config(16, 1024, 3072, False, False, SMEM_BYTES).split_k == 1


def test_what_tma_cannot_do_is_refused():
    x, w = (torch.zeros(n, 64, dtype=torch.float16, device=DEVICE) for n in (4, 8))
    for wrong in (
        lambda: fused_linear(x, w, residual=w[:4, :8], config=TmaConfig(64, 16, 64)),
        lambda: fused_linear(x, w, w[0, :8], config=TmaConfig(64, 16, 32, 2)),
        lambda: fused_linear(x, w, act="silu_and_mul", config=TmaConfig(64, 16, 32, 2)),
        lambda: fused_linear(x[:, 1:9], w[:, :8], config=TmaConfig(64, 16, 64)),
        lambda: fused_linear(x[:, :7].contiguous(), w[:, :7].contiguous(), config=TmaConfig(64, 16, 64)),
        lambda: fused_linear(x.float(), w.float(), config=TmaConfig(64, 16, 64)),
    ):
        with pytest.raises(BackendError, match="kernel gemm"):
            wrong()
