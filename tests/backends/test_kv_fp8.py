"""A KV cache in fp8: rounding to e4m3 against torch's, what is kept of a head in every backend, and what it costs."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch
from kv_fp8_cases import awkward, heads, zeros_in_torch

from llmrs.backends.base import load_backend
from llmrs.backends.reference import kv_fp8
from llmrs.backends.torch import kv_fp8 as fp8_in_torch
from llmrs.core.errors import BackendError

CODES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)


def in_torch(x: np.ndarray) -> np.ndarray:
    """Torch's codes."""
    return torch.from_numpy(x).to(torch.float8_e4m3fn).view(torch.uint8).numpy()


def test_the_numbers_are_e4m3():
    np.testing.assert_array_equal(kv_fp8.E4M3_VALUES, CODES.float().numpy())


def test_rounding_to_e4m3():
    x = awkward()
    codes = kv_fp8.encode(x)
    np.testing.assert_array_equal(codes & 0x7F, in_torch(x) & 0x7F)
    np.testing.assert_array_equal((codes >= 0x80)[:-1], np.signbit(x)[:-1])
    np.testing.assert_array_equal(
        kv_fp8.E4M3_VALUES[kv_fp8.encode(np.array([449, 1e30, -np.inf], np.float32))], [448, 448, -448]
    )


def test_a_head_is_kept_to_a_sixteenth():
    x = heads()
    kept = kv_fp8.QuantizedKV.zeros((2, *x.shape))
    kept[1, :] = x
    ordinary, most = x[7:], np.abs(x[7:]).max(axis=1, keepdims=True)
    error = np.abs(kept[1, 7:] - ordinary)
    assert (error <= np.maximum(np.abs(ordinary) / 16, most / 448 * 2**-10) * 1.0001).all()
    assert (error.max(axis=1) > 0).all()
    assert (kept[1, :3] == 0).all()
    np.testing.assert_allclose(kept[1, 3], 3e38, rtol=1e-6)
    assert np.isnan(kept[1, 4:7]).all()  # the whole head: nothing hides an infinity
    assert (kept[0] == 0).all()


def test_torch_keeps_the_same():
    x = heads()
    kept, ours = kv_fp8.QuantizedKV.zeros(x.shape), zeros_in_torch(*x.shape)
    kept[:], ours[:] = x, torch.from_numpy(x)
    np.testing.assert_array_equal(ours[:].numpy(), kept[:])
    assert ours.nbytes == kept.nbytes == x.size + 4 * len(x)


@pytest.mark.skipif(find_spec("mlx") is None, reason="needs mlx")
def test_mlx_keeps_the_same():
    import mlx.core as mx

    from llmrs.backends.mlx import kv_fp8 as fp8_in_mlx

    x = heads()
    with mx.stream(mx.cpu):
        kept, ours = kv_fp8.QuantizedKV.zeros(x.shape), fp8_in_mlx.QuantizedKV(x.shape)
        kept[:], ours[:] = x, mx.array(x)
        np.testing.assert_array_equal(np.array(ours[:]), kept[:])
        some = awkward()[:-1]
        np.testing.assert_array_equal(np.array(mx.to_fp8(mx.array(some))) & 0x7F, kv_fp8.encode(some) & 0x7F)


def test_where_it_can_not_be_had(monkeypatch):
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
def test_metal_refuses_it():
    with pytest.raises(BackendError, match="mlx has no fp8 on gpu"):
        load_backend("mlx")("gpu", "bf16", "fp8")


def test_the_bundled_model_is_as_good():
    """Perplexity on held-out conversations, computed in float32: within 1 % of that with a KV cache in bf16."""
    from perplexity import perplexity

    half, eighth = (perplexity(30, dtype="f32", device="cpu", kv_cache_dtype=kv) for kv in ("bf16", "fp8"))
    assert half.answers < 1.05
    assert half.tokens > 2000
    assert 0 < abs(eighth.answers / half.answers - 1) < 0.01
    assert 0 < abs(eighth.all / half.all - 1) < 0.01
