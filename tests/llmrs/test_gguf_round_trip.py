"""Checkpoints of every family as GGUF: the same tokens as from the folder, also in llama.cpp; the same token ids."""

import llama_cpp
import numpy as np
import pytest
import texts
import tiny

from llmrs import Engine, EngineConfig, SamplingParams
from llmrs.conversion import quantize_model
from llmrs.model import read_gguf, read_model
from llmrs.models.files.gguf import GGUFSource
from llmrs.quant.schemes import find_scheme

WORDS = {"vocab_size": 320, "max_position_embeddings": 128}
CASES = {  # name -> checkpoint, changes to it, tokenizer
    "llama, SentencePiece": ("llama", {}, texts.sentencepiece),
    "llama 3.1": ("llama-3.1-bias", {}, lambda: texts.byte_level(bos="<|begin_of_text|>")),
    "llama 2": ("llama-2", {}, texts.byte_level),
    "mistral": ("mistral-nemo", {}, texts.byte_level),
    "qwen2": ("qwen2", {}, texts.byte_level),
    "qwen3": ("qwen3-yarn", {}, texts.byte_level),
    "qwen3_moe": ("qwen3-moe", {"moe_intermediate_size": 32}, texts.byte_level),
    "gemma3": (
        "gemma3-linear",
        {"num_hidden_layers": 7, "head_dim": 16, "query_pre_attn_scalar": 16},
        texts.sentencepiece,
    ),
}
TEXTS = ["Hello world, how are you?", "  isn't it 12345?\n\n", "Grüße, 你好 👍🏽", "the there <|im_end|> then"]


@pytest.fixture(scope="module", params=CASES)
def source(request, tmp_path_factory):
    checkpoint, changes, tokenizer = CASES[request.param]
    folder = tmp_path_factory.mktemp("family")
    tiny.write_checkpoint(checkpoint, folder, **WORDS, **changes)
    t = tokenizer()
    end = "</s>" if t.token_to_id("</s>") is not None else "<|im_end|>"
    texts.write_text_files(folder, t, eos_token=end)
    texts.change(folder / "config.json", eos_token_id=t.token_to_id(end), bos_token_id=None)
    texts.change(folder / "generation_config.json", eos_token_id=t.token_to_id(end), bos_token_id=None)
    return folder


def written(source, name, path):
    quantize_model(read_model(EngineConfig(str(source))), find_scheme(name), path)
    return path


def greedy(path, prompts, count=24):
    params = SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True)
    with Engine(EngineConfig(str(path), backend="torch", device="cpu", dtype="f32")) as engine:
        return [o.token_ids for o in engine.generate_sync(params, prompts)]


def test_tokens(source, tmp_path):
    prompts = tiny.prompts(5, 20)
    path = written(source, "f32", tmp_path / "x.gguf")
    expected = greedy(source, prompts)
    assert greedy(path, prompts) == expected
    assert llama_cpp.greedy(path, prompts, 24) == expected


@pytest.mark.filterwarnings("ignore:.*no whole blocks")
def test_quantized_from_either(source, tmp_path):
    """From the folder, and from a GGUF file of higher precision."""
    prompts = tiny.prompts(5, 20)
    path = written(source, "q4_0", tmp_path / "x.gguf")
    llama_cpp.quantize(path, {tmp_path / "f32.gguf": "f32"})
    expected = greedy(path, prompts)
    assert llama_cpp.greedy(tmp_path / "f32.gguf", prompts, 24) == expected
    again = written(written(source, "f32", tmp_path / "exact.gguf"), "q4_0", tmp_path / "again.gguf")
    a, b = GGUFSource(path), GGUFSource(again)
    assert a.tensors.keys() == b.tensors.keys()
    assert all(np.allclose(a.tensor(n).float32(), b.tensor(n).float32(), rtol=1e-6) for n in a.names())
    assert set(a.metadata) == set(b.metadata)
    assert greedy(again, prompts) == expected


def test_token_ids(source, tmp_path):
    path = written(source, "f32", tmp_path / "x.gguf")
    ours = read_model(EngineConfig(str(source))).tokenizer
    expected = [ours.encode(text) for text in TEXTS]
    assert [read_gguf(path).tokenizer.encode(text) for text in TEXTS] == expected
    bos = ours.encode("")
    assert [bos + ids for ids in llama_cpp.tokenize(path, TEXTS)] == expected
