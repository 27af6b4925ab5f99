"""Files of `llmrs quantize` in llama.cpp, and llama.cpp's files here: the same greedy tokens.

llama.cpp rounds what it multiplies quantized weights with to 8 bits. So answers that are a choice between equals (which
dog is in the story) may differ there; they are compared after llama.cpp expanded the file to float32.
"""

from dataclasses import replace

import llama_cpp
import pytest

from llmrs import Engine, EngineConfig, Message, SamplingParams
from llmrs.conversion import quantize_model
from llmrs.model import read_model
from llmrs.quant.schemes import SCHEMES, find_scheme

COUNT = 64
DEFINITE = ("List the days of the week and the months.", "Show me a config file.")
STORY = "Write a long story about a dog."
FILES = [
    "q4_0",
    "q4_1",
    "q5_0",
    "q5_1",
    "q8_0",
    "q2_k",
    "q3_k_m",
    "q4_k_s",
    "q4_k_m",
    "q5_k_m",
    "q6_k",
    "iq4_nl",
    "iq4_xs",
]


@pytest.fixture(scope="module")
def model():
    return read_model(EngineConfig())


@pytest.fixture(scope="module")
def theirs(model, tmp_path_factory):
    """Files that llama.cpp quantized, and its expansions of them to float32, by type."""
    llama_cpp.require_llama_cpp()
    folder = tmp_path_factory.mktemp("theirs")
    quantize_model(model, find_scheme("f32"), folder / "f32.gguf")
    llama_cpp.quantize(folder / "f32.gguf", {folder / f"{kind}.gguf": kind for kind in FILES})
    return folder


def check(path, expanded):
    """The same answers; and of the story 64 tokens, past its end, where llama.cpp computes as exactly."""
    greedy = SamplingParams(max_tokens=COUNT, temperature=0.0)
    params = [greedy] * len(DEFINITE) + [replace(greedy, ignore_eos=True)]
    with Engine(EngineConfig(str(path), backend="torch", device="cpu", dtype="f32")) as engine:
        prompts = [engine.apply_chat_template([Message("user", q)]) for q in (*DEFINITE, STORY)]
        *ours, story = [o.token_ids for o in engine.generate_sync(params, prompts)]
    *prompts, story_prompt = [p.token_ids for p in prompts]
    assert sum(map(len, ours)) >= COUNT
    found = llama_cpp.greedy(path, prompts, max(map(len, ours)))
    assert [f[: len(o)] for f, o in zip(found, ours, strict=True)] == ours
    llama_cpp.quantize(path, {expanded: "f32"})
    assert llama_cpp.greedy(expanded, [story_prompt], COUNT) == [story]


@pytest.mark.parametrize("kind", FILES)
def test_a_file_of_llama_cpp(kind, theirs, tmp_path):
    check(theirs / f"{kind}.gguf", tmp_path / "expanded.gguf")


@pytest.mark.parametrize("name", [s.name for s in SCHEMES.values() if s.kind in ("recipe", "dense")] + ["q4_k_m"])
def test_a_file_of_ours(name, model, tmp_path):
    llama_cpp.require_llama_cpp()
    quantize_model(model, find_scheme(name), tmp_path / "x.gguf")
    check(tmp_path / "x.gguf", tmp_path / "expanded.gguf")
