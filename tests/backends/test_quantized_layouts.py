"""File layouts on each framework: the same planes and weights as NumPy's, which is the definition."""

import mlx.core as mx
import numpy as np
import pytest
import torch

from llmrs.backends.base import load_backend
from llmrs.backends.mlx import quant_matrix as mlx_matrix
from llmrs.backends.torch import quant_matrix as torch_matrix
from llmrs.quant.ggml import GGML_TYPES, GgmlType, tensor
from llmrs.quant.tensor import QuantTensor
from llmrs.random_model import RandomModel

NATIVE = [t for t in GGML_TYPES.values() if t.format]
CPU = torch.device("cpu")


def random_tensor(t: GgmlType, rows: int = 48, columns: int = 512) -> QuantTensor:
    blocks = np.random.default_rng(t.number).integers(0, 60, (rows, columns // t.block * t.block_bytes), np.uint8)
    made = tensor(t, (rows, columns), blocks.reshape(-1))
    assert isinstance(made, QuantTensor)
    return made


@pytest.mark.parametrize("t", NATIVE, ids=lambda t: t.name)
def test_planes_and_weights_are_numpys(t: GgmlType) -> None:
    packed = random_tensor(t)
    expected, planes = packed.float32(), packed.planes()
    ours, mlx = torch_matrix.packed_rows(packed, CPU), mlx_matrix.packed_rows(packed)
    for name, plane in planes.items():
        np.testing.assert_array_equal(ours.planes[name].numpy(), plane)
        np.testing.assert_array_equal(np.array(mlx.planes[name]), plane)
    np.testing.assert_array_equal(ours.unpack(torch.float32).numpy(), expected)
    np.testing.assert_array_equal(np.array(mlx.unpack(mx.float32)), expected)
    np.testing.assert_array_equal(torch_matrix.to_dense(packed, CPU, torch.float32).numpy(), expected)


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_half_precision_rounds_once(dtype: str) -> None:
    packed, kind = random_tensor(GGML_TYPES[12]), {"bf16": torch.bfloat16, "f16": torch.float16}[dtype]
    expected = torch.from_numpy(packed.float32()).to(kind)
    assert torch.equal(torch_matrix.packed_rows(packed, CPU).unpack(kind), expected)
    ours = np.array(mlx_matrix.packed_rows(packed).unpack(mlx_matrix.DTYPES[dtype]).astype(mx.float32))
    np.testing.assert_array_equal(ours, expected.float().numpy())


def test_slices_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, x = random_tensor(GGML_TYPES[14]), np.random.default_rng(0).normal(size=(3, 512)).astype(np.float32)
    whole = [p.float32() for p in (packed, packed.rows(slice(0, 5)))]
    expected = x @ np.concatenate(whole).T
    monkeypatch.setitem(torch_matrix.SLICE_WEIGHTS, "cpu", 1000)
    monkeypatch.setattr(mlx_matrix, "SLICE_WEIGHTS", 5000)
    parts = [packed, packed.rows(slice(0, 5))]
    y = torch_matrix.quant_matrix(parts, CPU, torch.float32).linear(torch.from_numpy(x)).numpy()
    z = np.array(mlx_matrix.quant_matrix(parts, mx.float32).linear(mx.array(x)))
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    np.testing.assert_allclose(z, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_memory_is_that_of_the_file() -> None:
    """At most a tenth more, on both frameworks."""
    for t in NATIVE:
        packed = random_tensor(t)
        ours, mlx = (
            torch_matrix.quant_matrix([packed], CPU, torch.bfloat16),
            mlx_matrix.quant_matrix([packed], mx.bfloat16),
        )
        assert ours.nbytes <= 1.05 * packed.nbytes
        assert sum(a.nbytes for a in mlx.arrays()) <= 1.05 * packed.nbytes


def test_loading_leaves_no_copies_on_mlx() -> None:
    """Active memory after a load: the planes, at most a tenth above the file."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "head_dim": 128, "num_hidden_layers": 2}
    forms = [random_tensor(GGML_TYPES[n]).form for n in (12, 14)]
    more = [("super_scales", "mins", "super_mins"), ("super_scales",)]
    model = RandomModel.of("qwen3", **sizes, vocab_size=4096).quantized(*zip(forms, more, strict=True))
    stored = sum(t.nbytes for t in model.weights.values())
    backend = load_backend("mlx")("cpu", "bf16", "bf16")
    mx.clear_cache()
    before = mx.get_active_memory()
    model.on(backend)
    loaded = mx.get_active_memory() - before
    assert 0.9 * stored < loaded < 1.1 * stored
    backend.close()
