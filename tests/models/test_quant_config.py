"""What config.json says about quantization: schemes of modules, refusals by name, patterns."""

import copy
import json
from pathlib import Path

import pytest
import quantized_files as files
from hypothesis import given, settings
from hypothesis import strategies as st
from model_configs import QWEN3, parsed, refused
from quantized_folders import ct, hf, module, open_folder, read_or_refused, targets, wrong

from llmrs.core.errors import ModelError
from llmrs.models.files import patterns
from llmrs.models.files.layouts import LAYOUTS
from llmrs.models.files.patterns import Patterns, compile_pattern
from llmrs.models.files.quant_config import METHODS, read_quantization

GPTQ = {"bits": 4, "group_size": 128, "desc_act": False}
AUTO_ROUND = {"bits": 4, "group_size": 32, "packing_format": "auto_round:auto_gptq"}
REFUSED = [
    *((hf(m), m) for m in ("bitsandbytes", "hqq", "quark", "eetq", "exl3", "vptq", "torchao", "fbgemm_fp8", "bitnet")),
    (hf(None), "quant_method None"),
    (hf(["fp8"]), "quant_method ['fp8']"),
    ({"quantization_config": "fp8"}, "'fp8'"),
    ({"quantization_config": {}}, "quant_method None"),
    ({"compression_config": {"format": "dense"}}, "compression_config"),
    *(({"quantization": {"bits": b}}, "bits") for b in (1, 7, 16, 4.0, "4", True, -4, float("nan"), 10**400)),
    *(({"quantization": {"group_size": g}}, "group_size") for g in (16, 0, -64, 256, 64.0, float("nan"), [64])),
    *(({"quantization": {"mode": m}}, "mode") for m in ("mxfp6", "int4", 4, [], {})),
    ({"quantization": {"mode": "mxfp4", "group_size": 64}}, "group_size"),
    ({"quantization": {"mode": "nvfp4", "bits": 8}}, "bits"),
    ({"quantization": {"model.layers.0.mlp.up_proj": {"bits": 9}}}, "model.layers.0.mlp.up_proj"),
    ({"quantization": []}, "quantization"),
    (hf("fp8", fmt="e5m2"), "'e5m2'"),
    *((hf("fp8", weight_block_size=b), "weight_block_size")
      for b in ([128], [0, 128], [-1, 128], [128, 1.5], "128", [2**30, 1], [float("nan")] * 2)),
    (hf("fp8", modules_to_not_convert="lm_head"), "modules_to_not_convert"),
    (hf("gptq", **{**GPTQ, "desc_act": True}), "desc_act"),
    (hf("gptq", **{**GPTQ, "desc_act": "no"}), "desc_act"),
    *((hf("gptq", **{**GPTQ, "bits": b}), "bits") for b in (5, 6, 1, None, 4.0)),
    *((hf("gptq", **{**GPTQ, "group_size": g}), "group_size") for g in (0, -2, None, 128.0, float("nan"), 2**31)),
    (hf("gptq", **GPTQ, checkpoint_format="marlin"), "'marlin'"),
    (hf("gptq", **GPTQ, is_marlin_format=True), "is_marlin_format"),
    (hf("gptq", **GPTQ, dynamic={"-:.*gate.*": {}}), "dynamic"),
    (hf("gptq", **GPTQ, pack_dtype="int16"), "pack_dtype"),
    (hf("awq", bits=8), "bits"),
    (hf("awq", bits=4, version="gemv"), "'gemv'"),
    (hf("awq", bits=4, zero_point=False), "zero_point"),
    (hf("awq", bits=4, backend="llm-awq"), "backend"),
    (hf("auto-round", **{**AUTO_ROUND, "packing_format": "auto_round:exllamav2"}), "packing_format"),
    (hf("auto-round", **AUTO_ROUND, data_type="mx_fp"), "data_type"),
    (hf("auto-round", **AUTO_ROUND, extra_config={"m": {"bits": 5}}), "m: bits"),
    (hf("modelopt", quant_algo="W4A8_AWQ"), "'W4A8_AWQ'"),
    (hf("modelopt"), "quant_algo"),
    (hf("modelopt", quant_algo="MIXED_PRECISION", quantized_layers={"m": {"quant_algo": "INT8"}}), "'INT8'"),
    (hf("modelopt", quant_algo="FP8", ignore=[1]), "ignore"),
    (hf("compressed-tensors", format="pack-quantized"), "config_groups"),
    (hf("compressed-tensors", config_groups={"g": 1}), "g: format"),
    *((ct(num_bits=b), "num_bits") for b in (1, 7, None, 4.0, "4")),
    *((ct(group_size=g), "group_size") for g in (0, -1.0, 1.5, -7, 2**31, "32")),
    (ct(strategy="token"), "strategy"),
    (ct(actorder="group"), "actorder"),
    (ct(symmetric="yes"), "symmetric"),
    (files.ct("int-quantized", num_bits=8, type="int", strategy="channel"), "'int-quantized'"),
    (files.ct("marlin-24", num_bits=4, type="int", strategy="channel"), "'marlin-24'"),
    (files.ct("float-quantized", num_bits=8, type="float", strategy="block", block_structure=[1]), "block_structure"),
    (targets(1), "targets"),
    *((targets("re:" + p), "targets") for p in ("(", "(a*)*x", "(a|aa)+$", "(?x)(a|a) *", "[", "a{99999999999}")),
]  # fmt: skip


@pytest.mark.parametrize(("config", "words"), REFUSED, ids=lambda v: json.dumps(v)[:80] if isinstance(v, dict) else "")
def test_what_the_config_alone_refuses(config, words, tmp_path):
    """Before any weights are downloaded."""
    refused(tmp_path, {**QWEN3, **config}, words)


def test_what_is_refused_names_what_works(tmp_path):
    with pytest.raises(ModelError) as caught:
        parsed(tmp_path, {**QWEN3, **hf("bitsandbytes", load_in_4bit=True)})
    assert all(method in caught.value.message for method in METHODS)
    assert "bf16" in caught.value.hint


def test_the_file_of_modelopt_beside_the_config(tmp_path):
    tensors, _ = module("nvfp4-modelopt")
    beside = tmp_path / "hf_quant_config.json"
    beside.write_text(json.dumps({"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4"}}), "utf-8")
    assert open_folder(tmp_path, tensors, {}).tensor("m.q_proj.weight").format == "nvfp4"
    for text, words in (("{", "JSON"), ("{}", "quant_algo"), ('{"quantization": {"quant_algo": "W4"}}', "'W4'")):
        beside.write_text(text, "utf-8")
        wrong(tmp_path, tensors, {}, words, "hf_quant_config.json")


# Which module has which scheme


def scheme(config, name):
    found = read_quantization(Path("config.json"), config)
    assert found is not None
    return found.scheme(name)


def test_modules_by_name_pattern_class_and_container():
    groups = {
        "a": {"targets": ["re:.*self_attn.*", "model.layers.1.mlp.up_proj"], "weights": WEIGHTS | {"num_bits": 8}},
        "b": {"targets": ["Linear"], "weights": WEIGHTS},
        "c": {"targets": ["Embedding"], "weights": WEIGHTS | {"num_bits": 2}},
    }
    config = hf("compressed-tensors", format="pack-quantized", config_groups=groups, ignore=["lm_head", "re:.*gate"])
    found = {
        name: getattr(scheme(config, name), "bits", None)
        for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj", "model.layers.0.mlp.up_proj",
                     "model.embed_tokens", "lm_head")
    }  # fmt: skip
    assert list(found.values()) == [8, 8, 4, 2, None]
    layers = {"model.layers.0.mlp.experts": {"quant_algo": "NVFP4"}, "model.layers.0.mlp": {"quant_algo": "FP8"}}
    config = hf("modelopt", quant_algo="MIXED_PRECISION", quantized_layers=layers, ignore=["model.layers.0.mlp.gate"])
    names = ("experts.7.up_proj", "up_proj", "gate")
    layouts = [getattr(scheme(config, f"model.layers.0.mlp.{n}"), "layout", None) for n in names]
    assert layouts == ["modelopt_nvfp4", "fp8", None]
    assert scheme(config, "model.layers.1.mlp.up_proj") is None


WEIGHTS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}


@pytest.mark.parametrize(
    "text",
    [
        "(a|a)*b", "(a*)*b", "((a?){9}){9}b", "(a|a)(?#c)*b", "(?x)(a|b) *c", "(?i:(a|a)) {9}", ".*.*.*.*.*x",
        "a?" * 40 + "b", "(a|a)" * 30 + "b", "(?=(a|a)+)b", "x" * 20000,
    ],
)  # fmt: skip
def test_patterns_that_could_take_too_long(text):
    with pytest.raises(ValueError, match="too long"):
        compile_pattern(text)


LAYER = "model.layers.20."


@pytest.mark.parametrize(
    ("text", "matched", "other"),
    [
        (r".*self_attn.*", LAYER + "self_attn.q_proj", LAYER + "mlp.up_proj"),
        (r".*mlp\.(gate|up|gate_up|down)_proj.*", LAYER + "mlp.up_proj", LAYER + "mlp.experts.0.up_proj"),
        (r"^model\.layers\.(0|1|2[0-9])\..*", LAYER + "mlp.up_proj", "model.layers.10.mlp.up_proj"),
        (r".*\.experts\.\d+\.(gate|up|down)_proj$", LAYER + "mlp.experts.12.up_proj", LAYER + "mlp.up_proj"),
        (r"model\.layers\.\d+\.(?!mlp).*", LAYER + "self_attn.q_proj", LAYER + "mlp.up_proj"),
        (r".*layers\.([0-9]|1[0-9])\.mlp\.[gu].*", "model.layers.9.mlp.gate_proj", LAYER + "mlp.gate_proj"),
    ],
)
def test_patterns_of_real_files(text, matched, other):
    found = Patterns([(compile_pattern(text), "it")])
    assert found.find(matched) == "it"
    assert found.find(other) is None


@pytest.mark.parametrize("text", [r".*.*.*.*x", "(a|aa)" * 14 + "b", r"[ab]*a[ab]*a[ab]*ac"])
def test_the_slowest_patterns_that_are_allowed_come_to_an_end(text):
    assert compile_pattern(text).match("a" * patterns.MAX_NAME) is None


def test_patterns_take_bounded_time_together(monkeypatch):
    monkeypatch.setattr(patterns, "MAX_SECONDS", 0.2)
    slow = Patterns([(compile_pattern(r".*.*.*x"), 1)])
    assert slow.find("x" * (patterns.MAX_NAME + 1)) is None
    with pytest.raises(ModelError, match="too long"):
        [slow.find("a" * 150 + str(n)) for n in range(10_000)]


def places(value, path=()):
    """Every place in a config."""
    yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*path, key))


def changed(config, path, value):
    config = copy.deepcopy(config)
    at = config
    for key in path[:-1]:
        at = at[key]
    if value == "left out":
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return config


CONFIGS = [config for _, config in files.FILES.values()]
CONFIGS += [
    hf("mxfp4", modules_to_not_convert=["a"]),
    hf("auto-round", **AUTO_ROUND, extra_config={"m.q_proj": {"bits": 8}}),
    hf("modelopt", quant_algo="MIXED_PRECISION", quantized_layers={"m.q_proj": {"quant_algo": "FP8"}}),
    {"quantization": {"bits": 4, "m.q_proj": {"bits": 8, "group_size": 64}, "m.k_proj": False}},
    targets("re:.*q_proj", "Embedding", "m.q_proj", "Linear"),
]
VALUES = st.one_of(
    st.sampled_from(["left out", None, True, False, [], {}, "", "re:(", "Linear", 10**400, [[]], {"a": {}}, "\ud800"]),
    st.sampled_from([*METHODS, *LAYOUTS, "affine", "group", "channel", "tensor", "block", "float", "int"]),
    st.integers(-9, 300),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(-1, 64), max_size=3),
)


@settings(max_examples=400, deadline=None)
@given(
    config=st.sampled_from(CONFIGS),
    edits=st.lists(st.tuples(st.integers(0, 40), VALUES), min_size=1, max_size=3),
    name=st.sampled_from([*files.FILES]),
)
def test_changed_configs_are_read_or_refused(config, edits, name, tmp_path_factory):
    for place, value in edits:
        paths = [p for p in places(config) if p]
        config = changed(config, paths[place % len(paths)], value) if paths else config
    read_or_refused(tmp_path_factory.mktemp("changed"), module(name)[0], config)
