"""config.json: both spellings, defaults, refusals."""

import json

import pytest
import tiny
import transformers
from model_configs import CLASSES, QWEN3, parsed, refused

from llmrs.models.arch.config import SCALING_KEYS, UNSUPPORTED
from llmrs.models.arch.families import FAMILIES, graph_of, read_config
from llmrs.models.arch.rope import frequencies

MOE = {"architectures": ["Qwen3MoeForCausalLM"], "num_experts": 4, "num_experts_per_tok": 2}


def as_transformers_4(data):
    """The config in the spelling of transformers 4."""
    data = {**data, "torch_dtype": data.pop("dtype", "float32")}
    rope = data.pop("rope_parameters")
    if "full_attention" in rope:
        local, rope = rope["sliding_attention"], rope["full_attention"]
        data["rope_local_base_freq"] = local["rope_theta"]
    data["rope_theta"] = rope.pop("rope_theta")
    if rope["rope_type"] != "default":
        data["rope_scaling"] = rope
    if "num_local_experts" in data:
        data["num_experts"] = data.pop("num_local_experts")
    data.pop("layer_types", None)
    if data["architectures"] == ["Gemma3ForCausalLM"]:
        data["sliding_window_pattern"] = 6
    return data


@pytest.mark.parametrize("name", tiny.CHECKPOINTS)
def test_both_spellings_mean_the_same(name, tmp_path, checkpoints):
    config = read_config(checkpoints.folder(name))
    data = json.loads((checkpoints.folder(name) / "config.json").read_text("utf-8"))
    older = parsed(tmp_path, as_transformers_4(data))
    assert older == config
    assert graph_of(older) == graph_of(config)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_what_a_file_leaves_out_is_what_transformers_takes_it_for(architecture, tmp_path):
    """A default config parses the same without any one of its fields."""
    theirs = getattr(transformers, CLASSES[architecture])(num_hidden_layers=8)
    full = {**theirs.to_dict(), "architectures": [architecture]}
    whole = parsed(tmp_path, full)
    optional = full.keys() - {"architectures", "dtype", "num_hidden_layers"}
    differ = [f for f in optional if parsed(tmp_path, {k: v for k, v in full.items() if k != f}) != whole]
    assert not differ


@pytest.mark.parametrize("field", UNSUPPORTED)
def test_fields_that_change_the_result_and_are_not_implemented(field, tmp_path):
    assert parsed(tmp_path, {**QWEN3, field: None}) == parsed(tmp_path, QWEN3)
    refused(tmp_path, {**QWEN3, field: 0.37}, field, "0.37")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": None}, "architecture"),
        ({"architectures": []}, "architecture"),
        ({"architectures": ["Phi3ForCausalLM"]}, "'Phi3ForCausalLM'"),
        ({"hidden_act": "relu"}, "'relu'"),
        ({"rope_scaling": {"rope_type": "dynamic"}}, "factor"),
        ({"rope_scaling": {"rope_type": "mrope", "factor": 2.0}}, "mrope"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "longrope"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": -2.0}}, "factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"rope_theta": 0.5}, "rope_theta"),
        ({"layer_types": ["full_attention"], "use_sliding_window": True}, "layer_types"),
        ({"layer_types": ["chunked_attention"] * 4, "use_sliding_window": True}, "layer_types"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 15}, "head_dim"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers"),
        ({**MOE, "num_experts": 10**6, "num_experts_per_tok": 2, "moe_intermediate_size": 8}, "num_experts"),
        ({**MOE, "num_experts": 4, "num_experts_per_tok": 5, "moe_intermediate_size": 8}, "num_experts"),
        ({**MOE, "mlp_only_layers": 3}, "mlp_only"),
        ({**MOE, "hidden_act": "gelu_pytorch_tanh"}, "'gelu_pytorch_tanh'"),
        ({"hidden_act": None}, "hidden_act"),
        ({"attention_bias": None}, "attention_bias"),
        ({"head_dim": None}, "head_dim"),
        ({**MOE, "num_experts": None}, "num_experts"),
        ({"max_window_layers": None, "use_sliding_window": True}, "max_window_layers"),
        ({"text_config": {"hidden_size": 64}}, "text_config"),
        ({"use_sliding_window": True, "sliding_window": 0}, "sliding_window"),
    ],
)
def test_what_is_refused(change, words, tmp_path):
    refused(tmp_path, {**QWEN3, **change}, words)


@pytest.mark.parametrize("kind", SCALING_KEYS)
def test_rope_keys_that_are_not_known(kind, tmp_path):
    """Each rope type has its own keys; others, also of another type, are refused."""
    every = {"nonsense", "short_factor", "mrope_section"}.union(*SCALING_KEYS.values())
    for key in every - SCALING_KEYS[kind]:
        refused(tmp_path, {**QWEN3, "rope_scaling": {"rope_type": kind, key: 3}}, key, kind)
        parsed(tmp_path, {**QWEN3, "rope_scaling": {"rope_type": kind, key: None}})


def test_attn_factor_multiplies_the_scale_of_yarn(tmp_path):
    """As in vLLM; with that of DeepSeek-R1-0528-Qwen3-8B the scale is 1."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}

    def scale(**more):
        c = parsed(tmp_path, {**QWEN3, "rope_scaling": {**yarn, **more}})
        return frequencies(c.rope, c).scale

    assert scale(attn_factor=0.8782488562869419) == pytest.approx(1.0)
    assert scale(attn_factor=0.5, mscale=2.0, mscale_all_dim=1.0) == 0.5 * scale(mscale=2.0, mscale_all_dim=1.0)
    assert scale(attn_factor=1.0, attention_factor=0.7) == 0.7
    refused(tmp_path, {**QWEN3, "rope_scaling": {**yarn, "attn_factor": 0.5, "attention_factor": 2.0}}, "attn_factor")
    refused(tmp_path, {**QWEN3, "rope_scaling": {**yarn, "attn_factor": "1"}}, "attn_factor")


def test_windows_of_every_family(tmp_path):
    def windows(**fields):
        return [k.window for k in parsed(tmp_path, {**QWEN3, "sliding_window": 8, **fields}).layer_kinds]

    assert windows() == [0, 0, 0, 0]  # Qwen carries the field along
    assert windows(use_sliding_window=True, max_window_layers=1) == [0, 8, 8, 8]
    assert windows(architectures=["MistralForCausalLM"]) == [8, 8, 8, 8]
    assert windows(architectures=["MistralForCausalLM"], sliding_window=None) == [0, 0, 0, 0]
    assert windows(architectures=["LlamaForCausalLM"], use_sliding_window=True) == [0, 0, 0, 0]
    assert windows(**MOE, use_sliding_window=True, max_window_layers=1) == [8, 8, 8, 8]
    gemma = {"architectures": ["Gemma3ForCausalLM"]}
    assert windows(**gemma, sliding_window_pattern=2) == [8, 0, 8, 0]
    types = ["full_attention", "sliding_attention"] * 2
    assert windows(**gemma, layer_types=types) == [0, 8, 0, 8]


def test_yarn_extends_the_context(tmp_path):
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1000}
    assert (
        parsed(tmp_path, {**QWEN3, "max_position_embeddings": 1000, "rope_scaling": yarn}).max_position_embeddings
        == 4000
    )
    assert (
        parsed(tmp_path, {**QWEN3, "max_position_embeddings": 8000, "rope_scaling": yarn}).max_position_embeddings
        == 8000
    )
