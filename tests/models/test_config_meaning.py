"""The meaning of config.json against transformers' models: families, rope scaling, windows, real files."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_configs import CLASSES, refused

from llmrs.core.errors import ModelError
from llmrs.models.arch.families import FAMILIES, graph_of, read_config
from llmrs.models.arch.rope import frequencies
from llmrs.models.files.quant_config import read_quantization
from llmrs.models.files.weights import num_parameters

CONFIGS = Path(__file__).resolve().parents[3] / "shared" / "data" / "configs"
SMALL = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "moe_intermediate_size": 24,
    "num_experts": 16,
    "num_experts_per_tok": 2,
}
# of configs that its classes refuse, or fail with
THEIR_ERRORS = (TypeError, ValueError, KeyError, ZeroDivisionError, StrictDataclassError)
ACTIVATIONS = {"silu": "SiLUActivation", "gelu_tanh": "GELUTanh"}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def theirs(folder):
    """The parameters of transformers' model."""
    config = transformers.AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    layers = model.model.layers
    rotary = type(model.model.rotary_emb)(config)
    window = getattr(config, "sliding_window", None) if "llama" not in config.model_type else None
    blocks = [layer.mlp for layer in layers if hasattr(layer.mlp, "gate") and hasattr(layer.mlp, "experts")]
    norm = model.model.norm
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "layers": len(layers),
        "rope": [angles(rotary, getattr(layer.self_attn, "layer_type", None)) for layer in layers],
        "windows": [getattr(layer.self_attn, "sliding_window", window) or 0 for layer in layers],
        "scale": {layer.self_attn.scaling for layer in layers},
        "eps": {getattr(norm, "eps", None) or norm.variance_epsilon},
        "activation": {
            type(getattr(layer.mlp, "act_fn", None) or layer.mlp.experts.act_fn).__name__ for layer in layers
        },
        "experts": {(b.gate.num_experts, b.gate.top_k, b.gate.norm_topk_prob) for b in blocks},
        "sparse": len(blocks),
        "tied": model.config.tie_word_embeddings,
    }


def angles(rotary, kind):
    """RopeFrequencies and scale of a layer, rounded: theirs are float32."""
    prefix = f"{kind}_" if hasattr(rotary, f"{kind}_inv_freq") else ""
    values = getattr(rotary, f"{prefix}inv_freq").tolist()
    return Counter(f"{v:.5e}" for v in values), f"{getattr(rotary, f'{prefix}attention_scaling'):.5f}"


def ours(folder):
    """The same of our config and graph."""
    c = read_config(folder)
    graph = graph_of(c)
    freqs = [frequencies(c.local_rope if kind.window else c.rope, c) for kind in dict.fromkeys(c.layer_kinds)]
    freqs = dict(zip(dict.fromkeys(c.layer_kinds), freqs, strict=True))
    e = c.experts
    sparse = sum(kind.is_moe for kind in c.layer_kinds)
    return {
        "parameters": num_parameters(graph),
        "layers": len(c.layer_kinds),
        "rope": [(Counter(f"{v:.5e}" for v in freqs[k].values), f"{freqs[k].scale:.5f}") for k in c.layer_kinds],
        "windows": [kind.window for kind in c.layer_kinds],
        "scale": {c.attention_scale},
        "eps": {c.norm_eps},
        "activation": {ACTIVATIONS[c.activation]},
        "experts": {(e.num_experts, e.num_experts_per_tok, e.norm_topk_prob)} if e and sparse else set(),
        "sparse": sparse,
        "tied": c.tie_word_embeddings,
    }


def write(folder, architecture, **fields):
    data = {"architectures": [architecture], "model_type": FAMILIES[architecture].model_type, **SMALL, **fields}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in data.items() if v != "left out"}), "utf-8")
    return folder


def same(folder):
    assert not different(theirs(folder), ours(folder))


def different(expected, found):
    return {name: (expected[name], found[name]) for name in expected if not alike(expected[name], found[name])}


def alike(a, b):
    """Equal up to the last digit of frequencies."""
    if isinstance(a, list) and a and isinstance(a[0], tuple):
        return all(x[1] == y[1] and near(x[0], y[0]) for x, y in zip(a, b, strict=True))
    return a == b


def near(a, b):
    return sorted(map(float, a.elements())) == pytest.approx(sorted(map(float, b.elements())), rel=3e-5)


@pytest.mark.parametrize("architecture", FAMILIES)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"sliding_window": 8},
        {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 2},
        {"sliding_window": None, "sliding_window_pattern": 1},
        {"attention_bias": True, "mlp_bias": True, "attention_output_bias": True},
        {"attention_bias": False},
        {"hidden_activation": "silu", "query_pre_attn_scalar": 20},
        {"head_dim": "left out", "tie_word_embeddings": True},
        {"num_experts": 0, "mlp_only_layers": [1]},
        {"decoder_sparse_step": 2, "norm_topk_prob": True, "num_experts_per_tok": 5},
        {"num_local_experts": 8},
        {"pretraining_tp": 2, "rope_local_base_freq": 500.0, "rope_theta": 1234.0},
        {"rope_scaling": {"type": "linear", "factor": 2}, "rope_theta": 500},
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
        {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 32}, "max_position_embeddings": 256},
        {"rope_scaling": YARN, "max_position_embeddings": 256},
        {"rope_scaling": {**YARN, "factor": None}, "max_position_embeddings": 512},
        {"rope_scaling": {**YARN, "beta_fast": 8, "beta_slow": 2, "truncate": True}},
        {"rope_scaling": {"type": "yarn", "rope_type": "linear", "factor": 3.0}},
        {"rope_scaling": {**YARN, "attention_factor": 0.7, "mscale": 0.5, "mscale_all_dim": 2.0}},
        {"rope_scaling": {**YARN, "mscale": 0.5, "mscale_all_dim": 2.0, "finetuned": True}},
        {"rope_scaling": LLAMA3, "original_max_position_embeddings": 16, "max_position_embeddings": 256},
    ],
    ids=str,
)
def test_a_field_means_what_it_means_in_transformers(architecture, fields, tmp_path):
    write(tmp_path, architecture, **fields)
    same(tmp_path)


FLAT = [
    {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}},
    {"rope_parameters": {**YARN, "rope_theta": 5000.0}, "rope_theta": 300.0},
    {"rope_parameters": {"rope_theta": 5000.0}, "rope_scaling": {"type": "linear", "factor": 3.0}},
    {"rope_scaling": {**YARN, "truncate": False}},
]
NESTED = [
    {"rope_parameters": {"sliding_attention": {"rope_theta": 300.0}, "full_attention": {**YARN, "rope_theta": 7e4}}},
    {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0}}, "rope_theta": 5000.0},
]


@pytest.mark.parametrize("architecture", FAMILIES)
@pytest.mark.parametrize("rope", FLAT + NESTED, ids=str)
def test_only_gemma_has_rope_parameters_of_types_of_layers(architecture, rope, tmp_path):
    """Elsewhere transformers ignores them, or fails."""
    folder = write(tmp_path, architecture, **rope, max_position_embeddings=256)
    if (rope in NESTED) == architecture.startswith("Gemma3"):
        same(folder)
    else:
        words = ("truncate", "rope_theta", "factor", "full_attention")
        with pytest.raises(ModelError, match="|".join(words)):
            read_config(folder)


SCALINGS = st.sampled_from(
    [YARN, LLAMA3, {"type": "linear", "factor": 2.0}, {"rope_type": "dynamic", "factor": 3.0}, {"rope_type": "default"}]
)
KEYS = {
    "rope_theta": [300.0, None],
    "original_max_position_embeddings": [16, 64],
    "factor": [4, 1.0, None],
    "beta_fast": [8, None],
    "beta_slow": [2],
    "mscale": [0.7, 0],
    "mscale_all_dim": [1.3, None],
    "attention_factor": [0.5, None],
    "truncate": [True, False],
    "low_freq_factor": [2],
    "partial_rotary_factor": [1.0, 0.5],
}
VALUES = {
    "attention_bias": [True, False, None],
    "mlp_bias": [True],
    "sliding_window": [8, 3, None],
    "use_sliding_window": [True, False],
    "max_window_layers": [0, 2, 9],
    "layer_types": [None, ["full_attention"] * 4, ["sliding_attention"] * 4],
    "sliding_window_pattern": [1, 3],
    "head_dim": [8, None],
    "num_key_value_heads": [1, 32, None],
    "hidden_act": ["silu", "gelu_pytorch_tanh", None],
    "hidden_activation": ["gelu_pytorch_tanh", "silu"],
    "query_pre_attn_scalar": [20],
    "rms_norm_eps": [1e-5],
    "rope_theta": [500.0, 1e6],
    "rope_local_base_freq": [100.0],
    "tie_word_embeddings": [True, False, None],
    "num_experts": [0, 12],
    "num_local_experts": [12],
    "mlp_only_layers": [None, [], [0, 3]],
    "decoder_sparse_step": [2, 3],
    "norm_topk_prob": [True],
    "num_experts_per_tok": [1],
    "max_position_embeddings": [256, 4096],
    "original_max_position_embeddings": [32],
    "attention_output_bias": [True],
}


def some(choices):
    """Up to four fields with one of their values each."""
    return st.lists(st.sampled_from([(n, v) for n in choices for v in choices[n]]), max_size=4).map(dict)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    architecture=st.sampled_from([*FAMILIES]),
    fields=some(VALUES),
    ropes=st.dictionaries(
        st.sampled_from(["rope_scaling", "rope_parameters"]), st.builds(lambda a, b: {**a, **b}, SCALINGS, some(KEYS))
    ),
)
def test_no_config_is_accepted_with_another_meaning(architecture, fields, ropes, tmp_path):
    write(tmp_path, architecture, **fields, **ropes)
    try:
        found = ours(tmp_path)
    except ModelError:
        return
    try:
        expected = theirs(tmp_path)
    except THEIR_ERRORS:
        return
    assert not different(expected, found)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_all_that_a_file_leaves_out_is_as_in_transformers(architecture, tmp_path):
    """Each default alone, and all together."""
    write(tmp_path, architecture, **dict.fromkeys(SMALL, "left out"))
    same(tmp_path)
    for field in SMALL:
        write(tmp_path, architecture, **{field: "left out"})
        same(tmp_path)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_types_of_layers(architecture, tmp_path):
    types = ["full_attention", "sliding_attention"] * 2
    write(tmp_path, architecture, layer_types=types, sliding_window=8, use_sliding_window=True)
    same(tmp_path)


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def test_as_many_heads_of_keys_as_of_queries(architecture, tmp_path):
    write(tmp_path, architecture, num_key_value_heads=None)
    same(tmp_path)


def test_windows_that_are_not_in_use_can_not_be_asked_for(tmp_path):
    types = ["full_attention", "sliding_attention"] * 2
    for architecture, fields in [("Qwen3ForCausalLM", {"sliding_window": 8}), ("Gemma3ForCausalLM", {})]:
        data = {"architectures": [architecture], **SMALL, "layer_types": types, "sliding_window": None, **fields}
        refused(tmp_path, data, "sliding_window")


def test_the_model_type_is_that_of_the_architecture(tmp_path):
    """transformers chooses the class by model_type alone."""
    for architecture, family in FAMILIES.items():
        assert CLASSES[architecture] == type(transformers.AutoConfig.for_model(family.model_type)).__name__
    refused(
        tmp_path, {**SMALL, "architectures": ["LlamaForCausalLM"], "model_type": "mixtral"}, "model_type", "mixtral"
    )


def files():
    return sorted(CONFIGS.glob("*.json")) if CONFIGS.is_dir() else []


@pytest.mark.skipif(not files(), reason=f"the real files are not in {CONFIGS}")
def test_real_files_mean_what_they_mean_in_transformers_or_are_refused(tmp_path):
    """Truncated to 12 layers, for time."""
    accepted, seen = 0, set()
    for path in files():
        data = json.loads(path.read_text("utf-8"))
        data.pop("quantization_config", None) if data.get("model_type") in {
            f.model_type for f in FAMILIES.values()
        } else None
        if data.get("architectures", [""])[0] not in FAMILIES:
            refused(tmp_path, data, "architecture", "is not supported")
            continue
        if isinstance(data.get("num_hidden_layers"), int):
            data["num_hidden_layers"] = min(12, data["num_hidden_layers"])
        key = json.dumps({k: v for k, v in data.items() if k not in ("_name_or_path", "transformers_version")})
        accepted += 1
        if key not in seen:
            seen.add(key)
            (tmp_path / "config.json").write_text(json.dumps(data), "utf-8")
            same(tmp_path)
    assert accepted > 40


@pytest.mark.skipif(not files(), reason=f"the real files are not in {CONFIGS}")
def test_real_files_that_are_quantized_are_read(tmp_path):
    """The unchanged files; of other families and of text_config the quantization alone."""
    layouts = Counter()
    for path in files():
        data = json.loads(path.read_text("utf-8"))
        if not (given := data if data.get("quantization_config") else data.get("text_config", {})).get(
            "quantization_config"
        ):
            continue
        if data["architectures"][0] in FAMILIES:
            (tmp_path / "config.json").write_text(json.dumps(data), "utf-8")
            assert read_config(tmp_path).architecture == data["architectures"][0]
        q = read_quantization(path, given)
        layouts.update({s.layout for s in (q.default, *q.named.values()) if s})
        method = given["quantization_config"].get("quant_method", "modelopt")
        assert q.method == ("modelopt" if "quant_algo" in given["quantization_config"] else method)
    assert layouts == {"fp8": 22, "modelopt_nvfp4": 16, "mxfp4": 2, "ct_packed": 1, "ct_mxfp4": 1}
