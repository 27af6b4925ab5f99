"""Tensor names and tied heads of checkpoints, against transformers on the same files."""

import json
import shutil
import warnings

import numpy as np
import pytest
import texts
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file

from llmrs import Engine, EngineConfig, SamplingParams
from llmrs.core.errors import ModelError
from llmrs.loading import plan
from llmrs.model import read_folder
from llmrs.models.arch.families import family, graph_of, read_config
from llmrs.models.files.safetensors import SafetensorsSource
from llmrs.models.files.weights import Weights, num_parameters, untie_stored_head

HEAD, EMBED = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture
def changed(checkpoints, tmp_path):
    """Writes a checkpoint with changed tensors and config."""

    def write(name, change=lambda tensors: tensors, **fields):
        folder = texts.write_model(checkpoints.folder(name), tmp_path / "changed")
        path = folder / "model.safetensors"
        tensors = change(load_file(path))
        path.unlink()  # it is mapped
        save_file({n: t.contiguous().clone() for n, t in tensors.items()}, path, {"format": "pt"})
        texts.change(folder / "config.json", eos_token_id=3, **fields)
        return folder

    yield write
    shutil.rmtree(tmp_path / "changed", ignore_errors=True)


def logits(folder):
    """Logits of the reference backend and of transformers."""
    config = read_config(folder)
    names, source = family(config.architecture).names, SafetensorsSource(folder)
    config = untie_stored_head(config, names, source)
    graph, backend = graph_of(config), tiny.empty_backend("reference")
    backend.load(graph, Weights(graph, names, source, tied=config.tie_word_embeddings), lambda _: None)
    backend.allocate(16, 4, 1, 64)
    sequence = tiny.prompts(9)
    ours = backend.to_host(backend.forward(tiny.prefill_batch(sequence, 4)))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        return ours[0], model(torch.tensor(sequence)).logits[0, -1].numpy()


def same(folder):
    ours, theirs = logits(folder)
    assert np.abs(theirs).max() > 1
    assert np.abs(ours - theirs).max() < 1e-4


def other_head(tensors):
    return {**tensors, HEAD: tensors[EMBED].flip(0)}


def only_head(tensors):
    return {HEAD if name == EMBED else name: t for name, t in tensors.items()}


def without_prefix(tensors):
    return {name.removeprefix("model."): t for name, t in tensors.items()}


def with_prefix(tensors):
    return {name if name.startswith("model.") else f"model.{name}": t for name, t in tensors.items()}


def buffers(tensors):
    every = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}
    return {**tensors, **every, "model.rotary_emb.inv_freq": torch.ones(4), "rotary_emb.inv_freq": torch.ones(4)}


def wider_norms(tensors):
    return {name: t.double() if "norm" in name else t for name, t in tensors.items()}


@pytest.mark.parametrize("name", ["qwen3", "llama", "gemma3", "qwen3-moe-mixed"])
@pytest.mark.parametrize("change", [without_prefix, with_prefix, buffers, wider_norms])
def test_other_names_and_types(name, change, changed):
    same(changed(name, change))


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
@pytest.mark.parametrize("change", [only_head, lambda t: without_prefix(only_head(t))])
def test_a_tied_model_may_store_its_matrix_as_the_head(name, change, changed):
    same(changed(name, change))


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_a_tied_model_with_another_head_uses_it_and_warns(name, changed):
    folder = changed(name, other_head)
    with pytest.warns(UserWarning, match=f"{HEAD} differs from {EMBED}.*tie_word_embeddings"):
        same(folder)
    with pytest.warns(UserWarning, match=HEAD):
        model = read_folder(folder)
    tied = graph_of(read_config(folder))
    more = read_config(folder).vocab_size * read_config(folder).hidden_size
    assert num_parameters(model.graph) == num_parameters(tied) + more  # which the fit of memory counts
    backend, config = tiny.empty_backend("torch"), EngineConfig(str(folder), dtype="f32")
    assert plan(backend, config, model, model.open_weights().stored(), 10**9).weight_bytes == 4 * num_parameters(
        model.graph
    )


def test_an_engine_with_another_head_answers_as_one_whose_config_says_so(changed):
    answers = []
    for tied in (True, False):
        folder = changed("chat", other_head, tie_word_embeddings=tied)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            engine = Engine(EngineConfig(str(folder), dtype="f32", device="cpu", max_num_seqs=1))
        with engine:
            answers += engine.generate_sync(SamplingParams(temperature=0, max_tokens=8, ignore_eos=True), [[1, 2, 3]])
        assert tied == any(HEAD in str(w.message) for w in caught)
        shutil.rmtree(folder)
    assert answers[0].token_ids == answers[1].token_ids


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_copy_of_the_embeddings_is_no_other_head(dtype, changed):
    folder = changed("qwen3", lambda t: {**t, HEAD: t[EMBED].to(dtype)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_folder(folder).config.tie_word_embeddings
    same(folder)


def test_a_difference_anywhere_is_one(changed):
    def last(tensors):
        head = tensors[EMBED].clone()
        head[-1, -1] += 1
        return {**tensors, HEAD: head}

    with pytest.warns(UserWarning, match=HEAD):
        assert not read_folder(changed("qwen3", last)).config.tie_word_embeddings


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: {n: x for n, x in t.items() if n != EMBED}, ("lacks", EMBED)),
        (lambda t: {**t, HEAD: t[EMBED][:-1]}, (HEAD, "shape")),
        (
            lambda t: {**t, "model.layers.0.self_attn.q_proj.bias": t["model.norm.weight"]},
            ("unexpected", "q_proj.bias"),
        ),
        (lambda t: {**t, "lm_head.bias": t["model.norm.weight"]}, ("unexpected", "lm_head.bias")),
        (lambda t: {**t, "norm.weight": t["model.norm.weight"]}, ("model.norm.weight", "also as norm.weight")),
        (lambda t: {**t, "model.norm.weight": t["model.norm.weight"].int()}, ("model.norm.weight", "I32")),
    ],
)
@pytest.mark.filterwarnings("ignore:config.json ties")
def test_what_is_refused(change, words, changed):
    folder = changed("qwen3", change)
    with pytest.raises(ModelError) as caught:
        read_all(folder)
    for word in words:
        assert word in caught.value.message


def read_all(folder):
    model = read_folder(folder)
    names, source = family(model.config.architecture).names, SafetensorsSource(folder)
    for tensor in Weights(model.graph, names, source, tied=model.config.tie_word_embeddings).values():
        tensor.float32()


def test_norms_of_queries_are_not_dropped_from_a_llama(changed):
    folder = changed("llama", lambda t: {**t, "model.layers.0.self_attn.q_norm.weight": torch.ones(16)})
    with pytest.raises(ModelError, match=r"unexpected model\.layers\.0\.self_attn\.q_norm\.weight"):
        read_all(folder)


def test_a_config_of_another_family_does_not_fit(changed):
    folder = changed("qwen3")
    data = json.loads((folder / "config.json").read_text("utf-8"))
    data.update(architectures=["LlamaForCausalLM"], model_type="llama")
    (folder / "config.json").write_text(json.dumps(data), "utf-8")
    with pytest.raises(ModelError, match="k_norm"):
        read_all(folder)
