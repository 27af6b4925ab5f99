"""The formats of safetensors files against what made them: MLX, compressed-tensors, transformers, and packers."""

import json
from pathlib import Path

import numpy as np
import pytest
import quantized_files as files
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from vectors import decoded

from llmrs.backends.torch import quant_matrix as torch_matrix
from llmrs.core.errors import ModelError
from llmrs.models.files.quantized import open_weights
from llmrs.quant.arrays import NUMPY
from llmrs.quant.form import unpack
from llmrs.quant.tensor import QuantTensor, Stored

VECTORS = Path(__file__).with_name("compressed_tensors.json")  # by tests/tools/compressed_tensors_vectors.py
PACKED = Path(__file__).with_name("packed_vectors.json")  # by tests/tools/packed_vectors.py
NAME = "a.q_proj.weight"


def source_of(folder, tensors, config):
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return open_weights(folder)


def read(folder, parts, config) -> QuantTensor:
    """The weight of one module."""
    source = source_of(folder, {f"a.q_proj.{part}": t for part, t in parts.items()}, config)
    tensor = source.tensor(NAME)
    assert list(source.names()) == [NAME]
    assert source.shape(NAME) == tensor.shape
    assert isinstance(tensor, QuantTensor)
    assert source.stored(NAME) == Stored(tensor.format, tensor.shape, sum(p.nbytes for p in tensor.planes().values()))
    return tensor


def matrix(rows, columns, seed=0):
    return np.random.default_rng(seed).normal(0, 1, (rows, columns)).astype(np.float32)


@pytest.mark.parametrize("name", files.FILES)
def test_values_are_those_that_were_packed(name, tmp_path):
    quantize, config = files.FILES[name]
    w = matrix(40, 384)
    parts, values = quantize(w)
    assert 0 < np.abs(w - values).mean() < (0.6 if "2" in name[:5] else 0.2)
    tensor = read(tmp_path, parts, config)
    np.testing.assert_array_equal(tensor.float32(), values)
    np.testing.assert_array_equal(tensor.rows(slice(1, None, 3)).float32(), values[1::3])
    np.testing.assert_array_equal(tensor.rows(np.array([5, 5, 0])).float32(), values[[5, 5, 0]])
    assert tensor.nbytes < 40 * 384 * 2  # less than bf16


@pytest.mark.parametrize("name", files.FILES)
def test_torch_and_mlx_unpack_the_same_planes_to_the_same_values(name, tmp_path):
    mlx_matrix = pytest.importorskip("llmrs.backends.mlx.quant_matrix")
    quantize, config = files.FILES[name]
    tensor = read(tmp_path, quantize(matrix(40, 384))[0], config)
    expected = tensor.float32()
    on_torch, on_mlx = torch_matrix.packed_rows(tensor, torch.device("cpu")), mlx_matrix.packed_rows(tensor)
    np.testing.assert_array_equal(on_torch.unpack(torch.float32).numpy(), expected)
    np.testing.assert_array_equal(np.array(on_mlx.unpack(mlx_matrix.DTYPES["f32"])), expected)
    assert sum(p.nbytes for p in on_torch.planes.values()) == tensor.nbytes
    assert sum(p.nbytes for p in on_mlx.planes.values()) == tensor.nbytes


@pytest.mark.parametrize("name", json.loads(VECTORS.read_text()))
def test_compressed_tensors(name, tmp_path):
    vector = json.loads(VECTORS.read_text())[name]
    groups = {"group_0": vector["group"]}
    config = {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": groups, "ignore": []}}
    tensor = read(tmp_path, {n: decoded(t) for n, t in vector["tensors"].items()}, config)
    expected = decoded(vector["values"]).numpy()
    # NVFP4 scales are divided by the global scale there, and multiplied by its inverse here: two roundings
    np.testing.assert_allclose(tensor.float32(), expected, rtol=2.5e-7 if name == "nvfp4" else 0)


@pytest.mark.parametrize("name", json.loads(PACKED.read_text()))
def test_autogptq_autoround_and_modelopt(name, tmp_path):
    vector = json.loads(PACKED.read_text())[name]
    tensor = read(tmp_path, {n: decoded(t) for n, t in vector["tensors"].items()}, vector["config"])
    np.testing.assert_array_equal(tensor.float32(), decoded(vector["values"]).numpy())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, files.F8E8M0])
def test_fp8_blocks_equal_transformers(dtype, tmp_path):
    parts, _ = files.fp8(16, 32, dtype)(matrix(48, 96))
    theirs = Fp8Dequantize(None)._dequantize_one(parts["weight"], parts["weight_scale_inv"], torch.float32)
    np.testing.assert_array_equal(read(tmp_path, parts, files.fp8_config([16, 32])).float32(), theirs.numpy())


def test_experts_of_gpt_oss_equal_transformers(tmp_path):
    """transformers gives (E, K, N), and keeps gate and up alternating."""
    rng = np.random.default_rng(0)
    path = "model.layers.0.mlp.experts"
    tensors, expected = {}, {}
    for name, rows, columns in (("gate_up", 48, 64), ("down", 64, 96)):
        blocks = torch.from_numpy(rng.integers(0, 256, (3, rows, columns // 32, 16), np.uint8))
        scales = torch.from_numpy(rng.integers(120, 134, (3, rows, columns // 32), np.uint8))
        tensors |= {f"{path}.{name}_proj_blocks": blocks, f"{path}.{name}_proj_scales": scales}
        tensors[f"{path}.{name}_proj_bias"] = torch.from_numpy(rng.normal(size=(3, rows)).astype(np.float32))
        dense = convert_moe_packed_tensors(blocks, scales).float().numpy().transpose(0, 2, 1)
        bias = tensors[f"{path}.{name}_proj_bias"].numpy()
        for e in range(3):
            for part, step in (
                (("gate", slice(0, None, 2)), ("up", slice(1, None, 2)))
                if name == "gate_up"
                else (("down", slice(None)),)
            ):
                expected[f"{path}.{e}.{part}_proj.weight"] = dense[e, step]
                expected[f"{path}.{e}.{part}_proj.bias"] = bias[e, step]
    source = source_of(tmp_path, tensors, {"quantization_config": {"quant_method": "mxfp4"}})
    assert set(source.names()) == set(expected)
    for name, values in expected.items():
        assert source.shape(name) == source.stored(name).shape == values.shape
        np.testing.assert_array_equal(source.tensor(name).float32(), values)


few = settings(max_examples=25, deadline=None)
sizes, groups, seeds = st.integers(1, 70), st.integers(1, 6), st.integers(0, 2**32)


@few
@given(rows=sizes, columns=sizes, n=st.integers(1, 40), k=st.integers(1, 40), seed=seeds)
def test_fp8_blocks_of_any_size(rows, columns, n, k, seed, tmp_path_factory):
    parts, values = files.fp8(n, k)(matrix(rows, columns, seed))
    tensor = read(tmp_path_factory.mktemp("fp8"), parts, files.fp8_config([n, k]))
    np.testing.assert_array_equal(tensor.float32(), values)
    planes = tensor.planes()
    assert columns % tensor.form.group == 0
    assert planes["scales"].shape == (rows, columns // tensor.form.group)
    np.testing.assert_array_equal(unpack(NUMPY, tensor.form, planes, columns), values)


@few
@given(
    rows=st.integers(1, 30),
    groups=groups,
    bits=st.sampled_from([2, 3, 4, 5, 6, 8]),
    symmetric=st.booleans(),
    seed=seeds,
)
def test_packed_integers_of_any_shape(rows, groups, bits, symmetric, seed, tmp_path_factory):
    """Rows of any number, and rows whose last word is not full."""
    for group in (8, 24, 0):
        quantize, config = files.ct_packed(bits, symmetric, group), files.ct_int(bits, symmetric, group)
        parts, values = quantize(matrix(rows, groups * (group or 8), seed))
        tensor = read(tmp_path_factory.mktemp("int"), parts, config)
        np.testing.assert_array_equal(tensor.float32(), values)


@few
@given(eights=st.integers(1, 5), groups=groups, name=st.sampled_from(["awq", "gptq-v2", "gptq3"]), seed=seeds)
def test_gptq_and_awq_of_any_shape(eights, groups, name, seed, tmp_path_factory):
    quantize, config = files.FILES[name]
    parts, values = quantize(matrix(8 * eights, 32 * groups, seed))
    np.testing.assert_array_equal(read(tmp_path_factory.mktemp("g"), parts, config).float32(), values)


def test_a_zero_of_256_is_refused(tmp_path):
    """Version 1 of GPTQ stores zero - 1; AutoGPTQ reads the largest code as 2^bits, which 8 bits can't hold here."""
    quantize, config = files.FILES["gptq8"]
    parts, _ = quantize(matrix(8, 64))
    parts["qzeros"][0, 1] = -1
    with pytest.raises(ModelError, match=r"a.q_proj.qzeros holds a zero point of 256"):
        read(tmp_path, parts, config)


def test_a_global_scale_of_mlx(tmp_path):
    """An option of MLX's nvfp4: the largest weight of the matrix."""
    mx = pytest.importorskip("mlx.core")
    w, factor = mx.array(matrix(8, 64)), mx.array(3.7)
    weight, scales = mx.quantize(w, mode="nvfp4", global_scale=factor)
    values = mx.dequantize(weight, scales, mode="nvfp4", global_scale=factor, dtype=mx.float32)
    parts = {"weight": torch.from_numpy(np.array(weight)), "scales": torch.from_numpy(np.array(scales))}
    parts["global_scale"] = torch.tensor(float(factor))
    tensor = read(tmp_path, parts, {"quantization": {"mode": "nvfp4"}})
    np.testing.assert_allclose(tensor.float32(), np.array(values), rtol=2.5e-7)
    assert np.abs(np.array(values) - np.array(w)).mean() < 0.2
