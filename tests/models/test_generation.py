"""generation_config.json: sampling defaults and EOS ids, in every spelling."""

import json

import pytest
import texts
import tiny
import transformers

from llmrs import Engine, EngineConfig, SamplingParams
from llmrs.core.errors import ModelError
from llmrs.models.files.generation import read_generation


def read(folder, generation, config=None, tokenizer=()):
    """With a vocabulary of 100 tokens."""
    (folder / "config.json").write_text(json.dumps(config or {}), "utf-8")
    (folder / "generation_config.json").write_text(json.dumps(generation), "utf-8")
    return read_generation(folder, 100, tokenizer)


def refused(folder, *words, **fields):
    with pytest.raises(ModelError) as caught:
        read(folder, **fields)
    for word in words:
        assert word in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"top_k": -1.0}, {"top_k": 0}),
        ({"top_k": 0}, {"top_k": 0}),
        ({"top_k": None, "temperature": None, "top_p": None, "min_p": None, "repetition_penalty": None}, {}),
        ({"top_k": 20.0, "top_p": 1, "temperature": 1}, {"top_k": 20, "top_p": 1.0, "temperature": 1.0}),
        ({"do_sample": False}, {"temperature": 0.0}),
        ({"do_sample": False, "temperature": 0, "top_p": 0.9}, {"temperature": 0.0, "top_p": 0.9}),
        ({"do_sample": False, "temperature": None}, {"temperature": 0.0}),
        ({"do_sample": True, "temperature": 0.6}, {"temperature": 0.6}),
        ({"do_sample": None, "temperature": 0.6}, {"temperature": 0.6}),
    ],
    ids=str,
)
def test_recommended_values(fields, expected, tmp_path):
    found = read(tmp_path, {"eos_token_id": 3, **fields}).sampling
    assert found == expected
    assert {n: type(v) for n, v in found.items()} == {n: type(v) for n, v in expected.items()}
    SamplingParams(**found)  # they are allowed
    transformers.GenerationConfig.from_pretrained(tmp_path)  # the file is one that it reads


@pytest.mark.parametrize(
    "field",
    [
        {"top_k": -2},
        {"top_k": 20.5},
        {"top_k": True},
        {"top_p": 1.1},
        {"top_p": "0.9"},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"do_sample": "false"},
        {"do_sample": 0},
    ],
    ids=str,
)
def test_values_that_are_refused(field, tmp_path):
    ((name, value),) = field.items()
    refused(tmp_path, name, str(value), generation={"eos_token_id": 3, **field})


@pytest.mark.parametrize("value", [3, [3], 3.0, [3, 100], [100, 3], [-1, 3], [3, 3], [2**40, 3.0]], ids=str)
@pytest.mark.parametrize("place", ["generation", "config"])
def test_ids_that_end_an_answer(place, value, tmp_path):
    """Ids outside of the vocabulary are ignored next to a valid one."""
    assert read(tmp_path, **{"generation": {}, place: {"eos_token_id": value}}).eos_ids == (3,)


def test_where_the_ids_are_from(tmp_path):
    both = {"generation": {"eos_token_id": 3}, "config": {"eos_token_id": 4}}
    assert read(tmp_path, **both).eos_ids == (3,)
    assert read(tmp_path, **both, tokenizer=(5,)).eos_ids == (3, 5)
    assert read(tmp_path, {"eos_token_id": 100}, tokenizer=(5, 100)).eos_ids == (5,)
    assert read(tmp_path, {"eos_token_id": []}, {"eos_token_id": 4}).eos_ids == (4,)


@pytest.mark.parametrize("value", ["3", True, 3.5, [[3]], {"a": 3}, 100, [100, -1], float("nan")], ids=str)
def test_ids_that_are_refused(value, tmp_path):
    refused(tmp_path, "generation_config.json", "eos_token_id", generation={"eos_token_id": value})


def test_no_end_at_all(tmp_path):
    """Also for config classes with a default EOS, which transformers does not use in generation."""
    refused(tmp_path, "names no end-of-sequence", generation={}, config={"architectures": ["LlamaForCausalLM"]})


def test_an_answer_ends_at_the_id_that_is_there(checkpoints, tmp_path):
    folder = texts.write_model(checkpoints.folder("chat"), tmp_path / "model")
    prompt = tiny.prompts(5)
    settings = {"dtype": "f32", "device": "cpu", "max_num_seqs": 1}
    with Engine(EngineConfig(str(folder), **settings)) as engine:
        tokens = engine.generate_sync(SamplingParams(temperature=0, max_tokens=4, ignore_eos=True), prompt)[0].token_ids
    texts.change(folder / "generation_config.json", eos_token_id=[999, tokens[1]], top_k=-1)
    with Engine(EngineConfig(str(folder), **settings)) as engine:
        answer = engine.generate_sync(SamplingParams(temperature=0, max_tokens=4), prompt)[0]
    assert (answer.token_ids[0], answer.finish_reason) == (tokens[0], "stop")
