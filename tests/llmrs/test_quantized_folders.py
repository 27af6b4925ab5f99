"""Folders of `llmrs quantize`: MLX's in mlx-lm, FP8 in transformers; read back here, the same tokens."""

from importlib.util import find_spec

import pytest
import texts
import tiny
import torch
import transformers

from llmrs import Engine, EngineConfig, SamplingParams
from llmrs.conversion import quantize_model
from llmrs.model import read_model
from llmrs.quant.schemes import find_scheme

PROMPT = "<|im_start|>user\nList the days of the week and the months.<|im_end|>\n<|im_start|>assistant\n"
SHAPES = {  # rows of 128 columns or more
    "hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 128, "vocab_size": 320, "head_dim": 32,
    "max_position_embeddings": 128,
}  # fmt: skip
FAMILIES = ["llama", "qwen2", "qwen3", "qwen3-moe", "gemma3-linear"]


@pytest.fixture(scope="module", params=FAMILIES)
def source(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("family")
    tiny.write_checkpoint(request.param, folder, **SHAPES)
    texts.write_text_files(folder)
    for name in ("config.json", "generation_config.json"):
        texts.change(folder / name, eos_token_id=2, bos_token_id=None)
    return folder


def written(source, name, folder):
    quantize_model(read_model(EngineConfig(str(source))), find_scheme(name), folder)
    return folder


def ours(folder, prompts, count):
    params = SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True)
    with Engine(EngineConfig(str(folder), backend="torch", device="cpu", dtype="f32")) as engine:
        prompts = [engine.model.tokenizer.encode(p) if isinstance(p, str) else p for p in prompts]
        return prompts, [o.token_ids for o in engine.generate_sync(params, prompts)]


def mlx_lm_greedy(folder, prompts, count):
    """Of mlx-lm, in float32 on the CPU."""
    if not find_spec("mlx_lm"):
        pytest.skip("mlx-lm is missing: pip install --no-deps mlx-lm")
    import mlx.core as mx
    from mlx_lm.generate import generate_step
    from mlx_lm.utils import load_model

    mx.set_default_device(mx.cpu)
    model, _ = load_model(folder)
    model.set_dtype(mx.float32)
    return [[int(token) for token, _ in generate_step(mx.array(p), model, max_tokens=count)] for p in prompts]


@pytest.mark.parametrize("name", ["mlx2", "mlx3", "mlx4", "mlx5", "mlx6", "mlx8"])
def test_the_bundled_model_in_mlx_lm(name, tmp_path):
    folder = written("demo", name, tmp_path / name)
    prompts, tokens = ours(folder, [PROMPT], 64)
    assert mlx_lm_greedy(folder, prompts, 64) == tokens


def test_families_in_mlx_lm(source, tmp_path):
    folder = written(source, "mlx4", tmp_path / "mlx4")
    prompts, tokens = ours(folder, tiny.prompts(5, 20), 24)
    assert mlx_lm_greedy(folder, prompts, 24) == tokens


def test_fp8_in_transformers(source, tmp_path):
    """Its own expansion of the weights."""
    if not find_spec("accelerate"):
        pytest.skip("accelerate is missing: pip install --no-deps accelerate")
    folder = written(source, "fp8", tmp_path / "fp8")
    prompts, tokens = ours(folder, tiny.prompts(5, 20), 24)
    config = transformers.FineGrainedFP8Config(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
    for prompt, expected in zip(prompts, tokens, strict=True):
        out = model.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=None)
        assert out[0, len(prompt) :].tolist() == expected
