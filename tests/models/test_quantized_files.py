"""Quantized tensors that contradict config.json or each other, and unusual ones: read, or refused by name."""

import numpy as np
import pytest
import quantized_files as files
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantized_folders import W, ct, hf, module, open_folder, read_all, read_or_refused, wrong

from llmrs.models.files import quantized

# Tensors that contradict the config, or each other


@pytest.mark.parametrize("name", files.FILES)
def test_a_dense_model_whose_config_says_quantized(name, tmp_path):
    words = "and no tensor is quantized"
    wrong(tmp_path, {"m.q_proj.weight": torch.zeros(4, 4)}, files.FILES[name][1], words)


@pytest.mark.parametrize("name", files.FILES)
def test_a_quantized_model_whose_config_says_nothing(name, tmp_path):
    """The tensors are unexpected, or of a type that only quantized weights have."""
    tensors, _ = module(name)
    source = open_folder(tmp_path, tensors, {})
    assert set(source.names()) == set(tensors)
    assert any(n.rpartition(".")[2] != "weight" for n in source.names())


@pytest.mark.parametrize("name", files.FILES)
def test_every_part_is_needed_and_checked(name, tmp_path):
    """Without it, of another type, longer, shorter, of more dimensions: refused, and the module named.

    Where one scale stands for all rows or columns, a longer weight has another shape, which the config refuses.
    """
    tensors, config = module(name)
    for part, t in tensors.items():
        suffix, rest = part.rpartition(".")[2], {n: x for n, x in tensors.items() if n != part}
        if suffix.startswith("input_"):
            continue
        if suffix != "g_idx":
            wrong(tmp_path, rest, config, "m.q_proj" if len(rest) else "no tensor")
        wrong(tmp_path, {**tensors, part: t.to(torch.float64)}, config, "m.q_proj")
        changed = [t.reshape(-1).repeat(3), t[None, None, None]]
        changed += [torch.cat([t, t]), t[:0]] if t.ndim else []
        changed += [torch.cat([t, t], 1), t[:, :0], t[..., None].expand(*t.shape, 2)] if t.ndim == 2 else []
        for new in changed:
            if suffix == "weight" and name.startswith("fp8"):
                found = read_or_refused(tmp_path, {**tensors, part: new}, config)
                assert W.shape not in [shape for shape, _ in found.values()]
            else:
                wrong(tmp_path, {**tensors, part: new}, config, "m.q_proj")


@pytest.mark.parametrize("other", ["int4", "gptq4", "awq", "fp8", "nvfp4-ct", "nvfp4-modelopt", "mxfp4-ct"])
@pytest.mark.parametrize("name", ["int4", "gptq4", "fp8", "nvfp4-ct", "nvfp4-modelopt", "mxfp4-ct"])
def test_the_config_of_another_format(name, other, tmp_path):
    tensors, _ = module(name)
    if name != other and {name, other} != {"gptq4", "awq"}:  # those have tensors of the same names
        wrong(tmp_path, tensors, files.FILES[other][1], "m.q_proj")


def test_groups_that_do_not_divide(tmp_path):
    tensors, _ = module("int4")
    wrong(tmp_path, tensors, ct(group_size=48), "weight_packed", "48")
    tensors, config = module("gptq-v2")
    wrong(tmp_path, tensors, {"quantization_config": {**config["quantization_config"], "group_size": 48}}, "48")
    wrong(tmp_path, *module("awq")[:1], hf("awq", bits=4, group_size=96), "qweight", "96")


def test_activation_order_in_the_tensors(tmp_path):
    tensors, config = module("gptq4")
    tensors["m.q_proj.g_idx"] = tensors["m.q_proj.g_idx"].flip(0)
    wrong(tmp_path, tensors, config, "m.q_proj.g_idx", "activation order")
    tensors, config = module("int4")
    tensors["m.q_proj.weight_g_idx"] = torch.randperm(128).to(torch.int32) // 16
    wrong(tmp_path, tensors, config, "m.q_proj.weight_g_idx", "activation order")


def test_zero_points_that_the_config_denies(tmp_path):
    wrong(tmp_path, module("int4-asymmetric")[0], files.ct_int(4, True), "weight_zero_point", "symmetric")
    wrong(tmp_path, module("int4")[0], files.ct_int(4, False), "weight_zero_point", "symmetric")


@pytest.mark.parametrize("shape", [[0, 128], [32, 0], [-32, 128], [32, -128], [32, 2**62], [2**62, 4]])
def test_a_weight_shape_that_is_wrong(shape, tmp_path):
    tensors, config = module("int4")
    wrong(tmp_path, {**tensors, "m.q_proj.weight_shape": torch.tensor(shape)}, config, "weight_shape")


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_global_scale_to_divide_by(value, tmp_path):
    tensors, config = module("nvfp4-ct")
    wrong(tmp_path, {**tensors, "m.q_proj.weight_global_scale": torch.tensor([value])}, config, "weight_global_scale")


def test_modules_that_the_config_names(tmp_path):
    mlx = {"quantization": {"group_size": 32, "bits": 4, "m.q_proj": False, "m.k_proj": {"bits": 8, "group_size": 32}}}
    tensors = {"m.q_proj.weight": torch.zeros(4, 4), "m.v_proj.weight": torch.zeros(4, 32, dtype=torch.float16)}
    tensors["m.v_proj.weight"] = torch.zeros(4, 4, dtype=torch.uint32)
    scales = {f"m.{n}_proj.{part}": torch.zeros(4, 1) for n in ("v", "q") for part in ("scales", "biases")}
    wrong(tmp_path, {**tensors, **scales}, mlx, "m.q_proj", "not quantized")
    tensors |= {n: t for n, t in scales.items() if "v_proj" in n}
    assert read_all(tmp_path, tensors, mlx)["m.v_proj.weight"][0] == (4, 32)
    wrong(tmp_path, {**tensors, "m.k_proj.weight": torch.zeros(4, 4)}, mlx, "m.k_proj is not quantized")


def test_biases_of_zeros_in_older_gptq_files(tmp_path):
    tensors, config = module("gptq4")
    more = {"m.q_proj.bias": torch.zeros(32, dtype=torch.float16)}
    assert list(read_all(tmp_path, tensors | more, config)) == ["m.q_proj.weight"]
    more["m.q_proj.bias"][3] = 1
    assert len(read_all(tmp_path, tensors | more, config)) == 2


# Stacks of experts


def stack(count=3, path="m.switch_mlp.up_proj"):
    mx = pytest.importorskip("mlx.core")
    weight, scales, biases = map(np.array, mx.quantize(mx.array(np.stack([W] * count)), 32, 4))
    parts = {"weight": weight, "scales": scales, "biases": biases}
    return {f"{path}.{n}": torch.from_numpy(a) for n, a in parts.items()}, {
        "quantization": {"group_size": 32, "bits": 4}
    }


def test_stacks_whose_parts_have_other_numbers_of_experts(tmp_path):
    tensors, config = stack()
    assert sorted(read_all(tmp_path, tensors, config)) == [f"m.experts.{e}.up_proj.weight" for e in range(3)]
    for part in tensors:
        wrong(tmp_path, {**tensors, part: tensors[part][:2]}, config, part, "experts")
        wrong(tmp_path, {**tensors, part: tensors[part][:0]}, config, "experts")
        wrong(tmp_path, {**tensors, part: tensors[part][0, 0, 0].clone()}, config, "experts")


def test_experts_in_a_stack_and_alone(tmp_path):
    tensors, config = stack()
    one = {n.replace("switch_mlp", "experts.1"): t[0] for n, t in tensors.items()}
    wrong(tmp_path, tensors | one, config, "m.experts.1.up_proj.weight twice")
    wrong(tmp_path, {"m.experts.gate_up_proj": torch.zeros(2, 4, 4), "m.experts.0.up_proj.weight": W_T}, {}, "twice")


W_T = torch.from_numpy(W)


def test_too_many_experts(tmp_path, monkeypatch):
    wrong(tmp_path, {"m.switch_mlp.up_proj.weight": torch.zeros(5000, 1, 1)}, {}, "5000", "4096")
    monkeypatch.setattr(quantized, "MAX_ENTRIES", 20)
    dense = {f"m.{n}.switch_mlp.up_proj.weight": torch.zeros(9, 1, 1) for n in range(3)}
    wrong(tmp_path, dense, {}, "over 20 tensors")


def test_dense_stacks_of_gate_and_up(tmp_path):
    w = torch.arange(2 * 6 * 4.0).reshape(2, 6, 4)
    found = read_all(tmp_path, {"m.experts.gate_up_proj": w, "m.experts.down_proj": w}, {})
    np.testing.assert_array_equal(found["m.experts.1.gate_proj.weight"][1].float32(), w[1, :3])
    np.testing.assert_array_equal(found["m.experts.0.up_proj.weight"][1].float32(), w[0, 3:])
    np.testing.assert_array_equal(found["m.experts.1.down_proj.weight"][1].float32(), w[1])


# Any change


CHANGES = st.sampled_from(["drop", "copy", "cut", "cut columns", "more", "flat", "type", "scalar", "transposed"])
TYPES = st.sampled_from(
    [torch.uint8, torch.int8, torch.int32, torch.int64, torch.float16, torch.bool, torch.float8_e5m2, torch.bfloat16]
)


def changed_tensor(t, change, dtype):
    if change == "type":
        return t.float().to(dtype)
    if change == "scalar":
        return t.reshape(-1)[0].clone() if t.numel() else t
    if change == "flat":
        return t.reshape(-1)
    if change == "transposed":
        return t.T if t.ndim == 2 else t[None]
    if change == "more":
        return torch.cat([t, t]) if t.ndim else t[None]
    return t[..., : t.shape[-1] // 2] if change == "cut columns" and t.ndim else t[: len(t) // 2] if t.ndim else t[None]


@settings(max_examples=400, deadline=None)
@given(
    name=st.sampled_from([*files.FILES]),
    edits=st.lists(st.tuples(st.integers(0, 9), CHANGES, TYPES), min_size=1, max_size=2),
    path=st.sampled_from(
        ["m.q_proj", "m.experts.gate_up_proj", "m.switch_mlp.up_proj", "m", "m.layers.0.experts.1.up_proj"]
    ),
)
def test_changed_tensors_are_read_or_refused(name, edits, path, tmp_path_factory):
    tensors, config = module(name, path)
    for place, change, dtype in edits:
        key = [*tensors][place % len(tensors)]
        t = tensors.pop(key)
        if change == "copy":
            tensors[f"m.{key}"] = t
        tensors |= {} if change == "drop" else {key: t if change == "copy" else changed_tensor(t, change, dtype)}
        if not tensors:
            return
    read_or_refused(tmp_path_factory.mktemp("changed"), tensors, config)


# Memory


@pytest.mark.parametrize("name", files.FILES)
def test_codes_are_the_files_own(name, tmp_path):
    """Nothing is copied to read a weight but the repacked codes of GPTQ and AWQ, and small parts."""
    tensors, config = module(name)
    source = open_folder(tmp_path, tensors, config)
    tensor = source.tensor("m.q_proj.weight")
    stored = [source.source.raw(n).data for n in tensors]
    repacked = "gptq" in tensor.format or "awq" in tensor.format
    assert any(np.shares_memory(tensor.arrays["codes"], data) for data in stored) != repacked
    small = tensor.format in ("fp8_16x48", "fp8_24x32")  # blocks of few rows, whose scales are repeated
    assert tensor.nbytes <= (1.3 if small else 1.1) * sum(data.nbytes for data in stored)


def test_scales_of_blocks_take_little_memory(tmp_path):
    parts, _ = files.fp8(128, 128)(np.ones((512, 1024), np.float32))
    config = files.fp8_config([128, 128])
    tensor = open_folder(tmp_path, {f"m.{n}": t for n, t in parts.items()}, config).tensor("m.weight")
    assert tensor.nbytes <= 1.04 * 512 * 1024
