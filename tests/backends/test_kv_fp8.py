"""The fp8 KV cache: e4m3 rounding vs. torch, stored heads of every backend, and perplexity."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch
from kv_fp8_cases import awkward, heads, zeros_in_torch

from llmrs.backends.base import load_backend
from llmrs.backends.reference import kv_fp8
from llmrs.backends.torch import kv_fp8 as fp8_in_torch
from llmrs.core.errors import BackendError

ALL_E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)


def torch_e4m3(x: np.ndarray) -> np.ndarray:
    return torch.from_numpy(x).to(torch.float8_e4m3fn).view(torch.uint8).numpy()


def test_e4m3_values():
    np.testing.assert_array_equal(kv_fp8.E4M3_VALUES, ALL_E4M3.float().numpy())


def test_rounding_to_e4m3():
    x = awkward()
    codes = kv_fp8.encode(x)
    np.testing.assert_array_equal(codes & 0x7F, torch_e4m3(x) & 0x7F)
    np.testing.assert_array_equal((codes >= 0x80)[:-1], np.signbit(x)[:-1])
    np.testing.assert_array_equal(
        kv_fp8.E4M3_VALUES[kv_fp8.encode(np.array([449, 1e30, -np.inf], np.float32))], [448, 448, -448]
    )


def test_the_error_of_a_head_is_at_most_a_sixteenth():
    x = heads()
    kept = kv_fp8.QuantizedKV.zeros((2, *x.shape))
    kept[1, :] = x
    ordinary, absmax = x[7:], np.abs(x[7:]).max(axis=1, keepdims=True)
    error = np.abs(kept[1, 7:] - ordinary)
    assert (error <= np.maximum(np.abs(ordinary) / 16, absmax / 448 * 2**-10) * 1.0001).all()
    assert (error.max(axis=1) > 0).all()
    assert (kept[1, :3] == 0).all()
    np.testing.assert_allclose(kept[1, 3], 3e38, rtol=1e-6)
    assert np.isnan(kept[1, 4:7]).all()  # the whole head
    assert (kept[0] == 0).all()


def test_torch_stores_the_same():
    x = heads()
    kept, ours = kv_fp8.QuantizedKV.zeros(x.shape), zeros_in_torch(*x.shape)
    kept[:], ours[:] = x, torch.from_numpy(x)
    np.testing.assert_array_equal(ours[:].numpy(), kept[:])
    assert ours.nbytes == kept.nbytes == x.size + 4 * len(x)


@pytest.mark.skipif(find_spec("mlx") is None, reason="needs mlx")
def test_mlx_stores_the_same():
    import mlx.core as mx

    from llmrs.backends.mlx import kv_fp8 as fp8_in_mlx

    x = heads()
    with mx.stream(mx.cpu):
        kept, ours = kv_fp8.QuantizedKV.zeros(x.shape), fp8_in_mlx.QuantizedKV(x.shape)
        kept[:], ours[:] = x, mx.array(x)
        np.testing.assert_array_equal(np.array(ours[:]), kept[:])
        finite = awkward()[:-1]
        np.testing.assert_array_equal(np.array(mx.to_fp8(mx.array(finite))) & 0x7F, kv_fp8.encode(finite) & 0x7F)


def test_unsupported_devices(monkeypatch):
    class Plain(load_backend("reference")):
        kv_dtypes = ("f32",)

    with pytest.raises(BackendError, match="kv_cache_dtype: backend reference has no fp8 on cpu") as caught:
        Plain("cpu", "f32", "fp8")
    assert caught.value.hint == "it has: auto, f32"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    with pytest.raises(BackendError, match=r"capability 8\.9 .*cuda:1 has 8\.6") as caught:
        fp8_in_torch.check_device(torch.device("cuda:1"))
    assert "kernels: plain" in caught.value.hint
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    fp8_in_torch.check_device(torch.device("cuda:1"))


@pytest.mark.skipif(find_spec("mlx") is None, reason="needs mlx")
def test_metal_does_not_support_it():
    with pytest.raises(BackendError, match="mlx has no fp8 on gpu"):
        load_backend("mlx")("gpu", "bf16", "fp8")


def test_perplexity_of_the_bundled_model():
    """Within 1 % of a bf16 KV cache, on held-out conversations in float32."""
    from perplexity import perplexity

    bf16, fp8 = (perplexity(30, dtype="f32", device="cpu", kv_cache_dtype=kv) for kv in ("bf16", "fp8"))
    assert bf16.answers < 1.05
    assert bf16.tokens > 2000
    assert 0 < abs(fp8.answers / bf16.answers - 1) < 0.01
    assert 0 < abs(fp8.all / bf16.all - 1) < 0.01
