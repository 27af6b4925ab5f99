"""Quantized safetensors folders, end to end: the tokens of the dense model of the same values, on every backend."""

import json
import shutil

import numpy as np
import pytest
import quantized_files as files
import texts
import tiny
import torch
from safetensors.torch import load_file

from llmrs import Engine, EngineConfig, ModelError, SamplingParams
from llmrs.models.text.tokenizer import Tokenizer

SIZES = {"vocab_size": 320, "hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "num_hidden_layers": 2}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "norm_topk_prob": True}
MODELS = {
    "qwen3": ("Qwen3", {**SIZES, "tie_word_embeddings": False}),
    "qwen3-tied": ("Qwen3", {**SIZES, "tie_word_embeddings": True}),
    "llama": ("Llama", {**SIZES, "tie_word_embeddings": False}),
    "mistral": ("Mistral", {**SIZES, "sliding_window": None, "tie_word_embeddings": False}),
    "qwen2": ("Qwen2", {**SIZES, "tie_word_embeddings": True}),
    "qwen3-moe": ("Qwen3Moe", {**SIZES, **MOE, "tie_word_embeddings": False}),
    "gemma3": ("Gemma3Text", {**SIZES, "sliding_window": 6, "num_hidden_layers": 7, "initializer_range": 0.05}),
}
# one of each layout, for families other than the first
LAYOUTS = [
    n for n in ("int4", "int4-asymmetric", "gptq4", "awq", "fp8", "fp8-ct-channel", "fp8-modelopt", "nvfp4-ct",
                "nvfp4-modelopt", "mxfp4-ct", "mlx4-g64-float16", "mlx5-g64-float16", "mlx-mxfp4", "mlx-mxfp8",
                "mlx-nvfp4")
    if n in files.FILES
]  # fmt: skip
PROMPTS = ["the cat", "What is 7 + 5?"]
GREEDY = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A whole folder of one of MODELS, written once."""
    made = {}

    def folder(name):
        if name not in made:
            at = tmp_path_factory.mktemp(name)
            tiny.write_model(*MODELS[name], at / "checkpoint")
            made[name] = texts.write_model(at / "checkpoint", at / "model")
        return made[name]

    return folder


def tokens(folder, backend):
    kind, _, device = backend.partition(":")
    config = EngineConfig(str(folder), backend=kind, device=device or "cpu", dtype="f32", max_model_len=128)
    with Engine(config) as engine:
        return [output.token_ids for output in engine.generate_sync(GREEDY, PROMPTS)]


def check(packed, dense):
    expected = tokens(dense, "reference")
    assert len(set(expected[0])) > 4
    for backend in tiny.BACKENDS:
        assert tokens(packed, backend) == expected, backend


@pytest.mark.parametrize("name", files.FILES)
def test_every_format(name, folders, tmp_path):
    check(*files.quantize_folder(folders("qwen3"), tmp_path, name))


@pytest.mark.parametrize("model", ["llama", "qwen3-moe"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_in_other_families(model, name, folders, tmp_path):
    check(*files.quantize_folder(folders(model), tmp_path, name))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", [n for n in ("mlx4-g64-float16", "mlx-nvfp4") if n in LAYOUTS])
def test_all_matrices_quantized_as_mlx_does(model, name, folders, tmp_path):
    """Embeddings, heads and routers too. The tied head is the table of embeddings."""
    check(*files.quantize_folder(folders(model), tmp_path, name, chosen=is_matrix))


def is_matrix(name):
    return name.endswith(("_proj.weight", "lm_head.weight", "embed_tokens.weight", "mlp.gate.weight"))


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("mlx4-g64-float16", {"quantization": None, "quantization_config": None}, "unexpected|lacks"),
        ("awq", {"quantization_config": None}, "unexpected|lacks"),
        ("fp8", {"quantization_config": None}, "unexpected|lacks"),
        ("mlx4-g64-float16", {"quantization": {"group_size": 32, "bits": 8}}, "the config asks for"),
        ("mlx4-g64-float16", {"quantization": {"group_size": 128, "bits": 2}}, "the config asks for"),
        ("nvfp4-ct", {"hidden_size": 256}, "the config asks for"),
        ("awq", {"quantization_config": {**files.AWQ, "group_size": 32}}, "qzeros|scales"),
    ],
)
def test_folders_that_contradict_themselves(name, change, words, folders, tmp_path):
    """Also where the tensors of a module agree with each other."""
    packed, dense = files.quantize_folder(folders("qwen3"), tmp_path, name)
    texts.change(packed / "config.json", **change)
    with pytest.raises(ModelError, match=words) as caught:
        tokens(packed, "torch")
    assert caught.value.hint
    texts.change(dense / "config.json", **files.FILES[name][1])
    with pytest.raises(ModelError, match="no tensor is quantized"):
        tokens(dense, "torch")


def test_stacked_experts_with_bits_of_each_module(folders, tmp_path):
    """What mlx-lm's conversion makes of a Qwen3-MoE model, with a global scale of nvfp4 per expert."""
    mx = pytest.importorskip("mlx.core")
    tensors = load_file(folders("qwen3-moe") / "model.safetensors")
    packed, dense = dict(tensors), dict(tensors)
    settings = {"group_size": 64, "bits": 4, "mode": "affine"}
    for layer in range(2):
        for part, entry, quantize in (
            ("gate", {"group_size": 32, "bits": 6}, files.mlx("affine", 6, 32)),
            ("up", {"group_size": 16, "bits": 4, "mode": "nvfp4", "global_scale": True}, None),
            ("down", None, files.mlx("affine", 4, 64)),
        ):
            names = [f"model.layers.{layer}.mlp.experts.{e}.{part}_proj.weight" for e in range(4)]
            made = [(quantize or nvfp4(mx))(packed.pop(n).numpy()) for n in names]
            dense |= {n: torch.from_numpy(values) for n, (_, values) in zip(names, made, strict=True)}
            module = f"model.layers.{layer}.mlp.switch_mlp.{part}_proj"
            packed |= {f"{module}.{p}": torch.stack([t[p] for t, _ in made]) for p in made[0][0]}
            settings |= {module: entry} if entry else {}
    folder = files.write(folders("qwen3-moe"), tmp_path / "packed", packed, {"quantization": settings})
    check(folder, files.write(folders("qwen3-moe"), tmp_path / "dense", dense, {}))


def nvfp4(mx):
    def quantize(w):
        largest = np.float32(np.abs(w).max())
        weight, scales = mx.quantize(mx.array(w), mode="nvfp4", global_scale=mx.array(largest))
        values = mx.dequantize(weight, scales, mode="nvfp4", global_scale=mx.array(largest), dtype=mx.float32)
        parts = {"weight": torch.from_numpy(np.array(weight)), "scales": torch.from_numpy(np.array(scales))}
        return {**parts, "global_scale": torch.tensor(largest)}, np.array(values)

    return quantize


# of transformers 4, which mlx-lm reads
SPELLINGS = {
    "gemma3": {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 6, "layer_types": None},
    "qwen3-moe": {"num_experts": 4, "decoder_sparse_step": 1, "mlp_only_layers": []},
}
CONVERSIONS = {
    "4 bits": {"q_bits": 4, "q_group_size": 64},
    "3 bits": {"q_bits": 3, "q_group_size": 32},
    "8 bits": {"q_bits": 8, "q_group_size": 128},
    "mixed": {"quant_predicate": "mixed_3_6", "q_group_size": 64},
    "mxfp4": {"q_mode": "mxfp4"},
    "nvfp4": {"q_mode": "nvfp4"},
    "mxfp8": {"q_mode": "mxfp8"},
}


@pytest.mark.parametrize(
    ("model", "conversion"), [*((m, "mixed") for m in MODELS), *(("qwen3-moe", c) for c in CONVERSIONS if c != "mixed")]
)
def test_folders_that_mlx_lm_converted(model, conversion, folders, tmp_path, capsys):
    """The tokens of mlx-lm in float32."""
    mlx_lm = pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: pip install mlx-lm")
    import mlx.core as mx

    source = files.write(folders(model), tmp_path / "source", load_file(folders(model) / "model.safetensors"), {})
    texts.change(source / "config.json", **{"rope_theta": 1e4, **SPELLINGS.get(model, {})})
    converted = tmp_path / "converted"
    mlx_lm.convert(str(source), str(converted), quantize=True, dtype="bfloat16", **CONVERSIONS[conversion])
    theirs, _ = mlx_lm.load(str(converted))
    shutil.copy(source / "tokenizer.json", converted)  # it writes another, by the class of the family
    theirs.set_dtype(mx.float32)
    names = load_file(converted / "model.safetensors")
    assert any("switch_mlp" in n for n in names) == (model == "qwen3-moe")
    assert json.loads((converted / "config.json").read_text())["quantization"]
    expected = tokens(converted, "reference")
    assert all(tokens(converted, backend) == expected for backend in tiny.BACKENDS)
    tokenizer = Tokenizer.load(converted)
    for prompt, answer in zip(PROMPTS, expected, strict=True):
        ids = tokenizer.encode(prompt)
        logits = theirs(mx.array([ids + answer[:-1]]))[0, len(ids) - 1 :]
        assert mx.argmax(logits, -1).tolist() == answer
