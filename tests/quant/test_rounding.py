"""Round-to-nearest quantizers against MLX and torch."""

import numpy as np
import pytest
import torch

from llmrs.quant.arrays import FLOAT8
from llmrs.quant.rounding import quantize_fp8, quantize_mlx, to_e4m3, to_format

RNG = np.random.default_rng(0)
X = RNG.normal(size=(24, 256)).astype(np.float32)
X[0] = 0
X[1] = np.abs(X[1]) + 3
X[2] = -np.abs(X[2])


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_mlx_affine_is_mlxs(bits, group):
    mx = pytest.importorskip("mlx.core")
    theirs = [np.array(a) for a in mx.quantize(mx.array(X), group_size=group, bits=bits)]
    ours = quantize_mlx(X, bits, group, "f32")
    assert np.allclose(ours.arrays["scales"], theirs[1], rtol=1e-6)
    assert np.allclose(ours.arrays["biases"], theirs[2], rtol=1e-6)
    codes = theirs[0].view(np.uint8)
    assert (ours.arrays["codes"] != codes).mean() < 1e-3  # ties
    unpacked = np.array(mx.dequantize(*map(mx.array, (ours.arrays["codes"].view(np.uint32), ours.arrays["scales"],
                                                     ours.arrays["biases"])), group_size=group, bits=bits))  # fmt: skip
    assert np.allclose(ours.float32(), unpacked, atol=1e-6)


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_rounded_scales_cost_no_more_than_in_mlx(dtype):
    mx = pytest.importorskip("mlx.core")
    kind = {"bf16": mx.bfloat16, "f16": mx.float16}[dtype]
    x = to_format(X, dtype).float32()
    theirs = mx.dequantize(*mx.quantize(mx.array(x).astype(kind), group_size=64, bits=4), group_size=64, bits=4)
    errors = [np.square(y - x).mean() for y in (quantize_mlx(x, 4, 64, dtype).float32(), theirs.astype(mx.float32))]
    assert errors[0] <= errors[1] * 1.001


def test_e4m3_is_torchs():
    x = np.concatenate([FLOAT8["e4m3"][:127], RNG.normal(size=5000) * 10.0 ** RNG.integers(-4, 3, 5000), [0, 448, 500]])
    x = np.concatenate([x, -x, (FLOAT8["e4m3"][:126] + FLOAT8["e4m3"][1:127]) / 2]).astype(np.float32)  # and ties
    expected = torch.from_numpy(x).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    assert np.array_equal(to_e4m3(x), expected)


def test_fp8_blocks_reach_the_largest_code():
    x = RNG.normal(size=(130, 300)).astype(np.float32)
    x[:, 290:] = 0
    codes, scales = quantize_fp8(x)
    assert codes.shape == x.shape
    assert scales.shape == (2, 3)
    values = FLOAT8["e4m3"][codes]
    for i in range(2):
        for j in range(3):
            part = values[128 * i : 128 * i + 128, 128 * j : 128 * j + 128]
            assert np.abs(part).max() == 448
    wide = np.repeat(np.repeat(scales, 128, 0), 128, 1)[:130, :300]
    assert np.abs(values * wide - x).max() <= np.abs(x).max() / 27  # 3 bits of mantissa


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
def test_dense_formats_are_torchs(dtype):
    x = np.concatenate([X.reshape(-1), [np.inf, -np.inf, np.nan, 1e38, 1e-40, 65520]]).astype(np.float32)
    kind = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}[dtype]
    assert np.array_equal(to_format(x, dtype).float32(), torch.from_numpy(x).to(kind).float().numpy(), equal_nan=True)
