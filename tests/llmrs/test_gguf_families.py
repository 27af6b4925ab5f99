"""Models from GGUF files: every family computes what transformers and llama.cpp compute; templates and settings."""

import copy
import shutil

import gguf_families
import llama_cpp
import numpy as np
import pytest
import texts
import tiny
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from llmrs import Engine, EngineConfig, Message, SamplingParams
from llmrs import model as models
from llmrs.core.errors import ModelError, RequestError
from llmrs.model import read_folder, read_gguf
from llmrs.models import demo
from llmrs.models.files.gguf import GGUFSource

PROMPT = tiny.prompts(40)[0]
SEQUENCES = tiny.prompts(1, 5, 23, 64)
TOKENS = 24
# What llama.cpp does otherwise: it has no biases in Qwen 3, ignores Mistral's window, and YaRN's betas and
# temperature in these architectures, as well as the attention scale of Gemma 3.
OTHER_THERE = {"qwen3-untied-bias", "mistral", "llama-yarn", "gemma3"}
SAME_THERE = [(name, None) for name in gguf_families.CONVERTED if name not in OTHER_THERE] + [
    ("mistral-nemo", "mistral3")
]
TYPES = {"llama": "q4_0", "llama-3.1-bias": "q8_0", "mistral-nemo": "q5_0", "qwen2": "q4_1", "qwen3": "q8_0",
         "qwen3-moe": "q4_0", "gemma3-linear": "q5_1"}  # fmt: skip


def backend_of(path):
    model = read_gguf(path)
    backend = tiny.empty_backend("torch")
    backend.load(model.graph, model.open_weights(), lambda _: None)
    backend.allocate(200, 4, 8, 256)
    return backend


def logits(backend):
    """After each of SEQUENCES."""
    return backend.to_host(backend.forward(tiny.prefill_batch(SEQUENCES, 4)))


def greedy(backend):
    request = tiny.request(PROMPT, max_tokens=TOKENS)
    return tiny.run(tiny.core_on(backend, max_num_batched_tokens=16), [request])[0]


def expected_logits(model):
    """Of transformers, in float64."""
    model = copy.deepcopy(model).double()
    model.config._experts_implementation = "eager"  # the others know no float64
    with torch.inference_mode():
        return np.stack([model(torch.tensor([s])).logits[0, -1].numpy() for s in SEQUENCES])


def expected_tokens(model):
    tokens = torch.tensor([PROMPT])
    options = {"do_sample": False, "max_new_tokens": TOKENS, "eos_token_id": None, "pad_token_id": 0}
    with torch.inference_mode():
        out = model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
    return out[0, len(PROMPT) :].tolist()


@pytest.mark.parametrize("name", gguf_families.CONVERTED)
def test_a_converted_checkpoint_computes_what_transformers_computes(name, checkpoints, tmp_path):
    backend = backend_of(gguf_families.write(checkpoints.folder(name), tmp_path / "a.gguf"))
    expected = expected_logits(checkpoints.model(name))
    assert np.abs(expected).max() > 1
    assert np.abs(logits(backend) - expected).max() < 1e-4
    assert greedy(backend) == expected_tokens(checkpoints.model(name))


@pytest.mark.parametrize("name", TYPES)
def test_a_quantized_checkpoint_computes_what_its_values_give(name, checkpoints, tmp_path):
    """The same as transformers on a checkpoint of the rounded values."""
    folder, kind = checkpoints.folder(name), TYPES[name]
    backend = backend_of(gguf_families.write(folder, tmp_path / "a.gguf", kind=kind))
    rounded = gguf_families.rounded(folder, tmp_path / "rounded", kind)
    model = transformers.AutoModelForCausalLM.from_pretrained(rounded).eval()
    assert np.abs(logits(backend) - expected_logits(model)).max() < 2e-4
    assert greedy(backend) == expected_tokens(model)


def test_mistral_under_its_newer_name(checkpoints, tmp_path):
    for name in ("mistral", "mistral-nemo"):
        path = gguf_families.write(checkpoints.folder(name), tmp_path / f"{name}.gguf", arch="mistral3")
        assert np.abs(logits(backend_of(path)) - expected_logits(checkpoints.model(name))).max() < 1e-4


@pytest.mark.parametrize(("name", "arch"), SAME_THERE)
def test_llama_cpp_runs_the_same_file_with_the_same_tokens(name, arch, checkpoints, tmp_path):
    path = gguf_families.write(checkpoints.folder(name), tmp_path / "a.gguf", arch=arch)
    backend = backend_of(path)
    assert llama_cpp.greedy(path, [PROMPT], TOKENS)[0] == greedy(backend)
    close = 0.05 if name.startswith("gemma3") else 1e-3  # its GELU is a table in f16
    theirs = llama_cpp.logits(path, SEQUENCES[-1])[-1]
    assert np.abs(logits(backend)[-1] - np.array(theirs)).max() < close


@pytest.mark.parametrize("key", ["rope__scaling__attn_factor", "rope__freq_base", "rope__scaling__factor"])
def test_rope_keys_mean_what_they_mean_in_llama_cpp(key, checkpoints, tmp_path):
    path = gguf_families.write(checkpoints.folder("qwen3-yarn"), tmp_path / "a.gguf", **{key: 3.0})
    assert np.abs(logits(backend_of(path))[-1] - np.array(llama_cpp.logits(path, SEQUENCES[-1])[-1])).max() < 1e-3


# text and settings


@pytest.fixture(scope="module")
def bundled(tmp_path_factory):
    """The bundled model as a GGUF file in float32."""
    folder = tmp_path_factory.mktemp("bundled")
    shutil.copytree(demo.FILES, folder / "demo")
    values = load_file(demo.FILES / "model.safetensors")
    save_file({n: v.float() for n, v in values.items()}, folder / "demo" / "model.safetensors", {"format": "pt"})
    return gguf_families.write(folder / "demo", folder / "demo.gguf")


def answers(model):
    with Engine(EngineConfig(model, device="cpu", dtype="f32")) as engine:
        questions = ["What is 7 + 5?", "Who are you?", "Tell me a story about a fox."]
        prompts = [engine.apply_chat_template([Message("user", q)]) for q in questions]
        params = SamplingParams(temperature=0.0, max_tokens=48)
        return [
            (p.token_ids, a.token_ids, a.text)
            for p, a in zip(prompts, engine.generate_sync(params, prompts), strict=True)
        ]


def test_the_bundled_model_answers_from_a_file_as_from_its_folder(bundled):
    """Prompts, answers and where they end."""
    found = answers(bundled)
    assert found == answers(demo.FILES)
    assert all(text for _, _, text in found)


def test_the_bundled_model_in_llama_cpp(bundled):
    for prompt, tokens, _ in answers(bundled):
        assert llama_cpp.greedy(bundled, [prompt], len(tokens))[0] == list(tokens)


def chat(folder, path, **keys):
    """A whole model, small and random, with these keys."""
    return read_gguf(gguf_families.write(folder, path, **keys))


def test_text_of_a_file_is_that_of_the_folder(folder, tmp_path):
    ours, theirs = chat(folder, tmp_path / "a.gguf", tokenizer__ggml__pre="gpt-2"), read_folder(folder)
    for text in (*texts.SAMPLE, "<|im_start|>user\n é 漢字 </think>  \n\nx"):
        assert ours.tokenizer.encode(text) == theirs.tokenizer.encode(text)
        assert ours.tokenizer.encode_ordinary(text) == theirs.tokenizer.encode_ordinary(text)
    assert ours.tokenizer.special_tokens["eos"] == theirs.tokenizer.special_tokens["eos"] == "<|im_end|>"
    assert ours.eos_ids[0] == theirs.eos_ids[0]
    assert {ours.tokenizer.token_to_id(t) for t in ("<|im_end|>", "<|endoftext|>")} == set(ours.eos_ids)
    talk = [Message("system", "Be kind."), Message("user", "Hi <|im_end|>")]
    assert ours.template.render(talk) == theirs.template.render(talk)


def test_chat_templates(folder, tmp_path):
    """The one for tools has a name; without any, chatting is an error, and plain text works."""
    keys = {"tokenizer__chat_template__tool_use": "tools {{ tools | length }}"}
    model = chat(folder, tmp_path / "a.gguf", **keys)
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    assert model.template.render([Message("user", "Hi")], tools=[tool]) == "tools 1"
    assert model.template.render([Message("user", "Hi")]).startswith("<|im_start|>user\nHi")
    path = gguf_families.write(folder, tmp_path / "b.gguf", remove=["tokenizer.chat_template"])
    assert read_gguf(path).template is None
    with Engine(EngineConfig(path, dtype="f32", device="cpu")) as engine:
        with pytest.raises((ModelError, RequestError), match="chat template"):
            engine.apply_chat_template([Message("user", "Hi")])
        assert engine.generate_sync(SamplingParams(temperature=0.0, max_tokens=2), ["Hi"])[0].token_ids


@pytest.mark.parametrize(
    ("template", "word"),
    [("{% for %}", "fails"), ("{{ 1 / 0 }}", "fails"), ("{{ 'A' * 2**40 }}", "fails"), (7, "not text"),
     ("{% for a in range(10**9) %}{% for b in range(10**9) %}x{% endfor %}{% endfor %}", "fails"),
     ("{{ ''.__class__.__mro__ }}", "fails"), ("x" * 200_001, "characters")],
)  # fmt: skip
def test_hostile_chat_templates(template, word, folder, tmp_path):
    """The model is read, and its template is the error."""
    found = chat(folder, tmp_path / "a.gguf", tokenizer__chat_template=template).template
    assert isinstance(found, ModelError)
    assert word in found.message
    assert found.hint


def test_recommended_sampling(folder, tmp_path):
    keys = {"temp": 0.5, "top_k": 20, "top_p": 0.75, "min_p": 0.25, "penalty_repeat": 1.5, "mirostat": 0}
    model = chat(folder, tmp_path / "a.gguf", **{f"general__sampling__{k}": v for k, v in keys.items()})
    s = model.sampling
    assert (s.temperature, s.top_k, s.top_p, s.min_p, s.repetition_penalty) == (0.5, 20, 0.75, 0.25, 1.5)
    assert chat(folder, tmp_path / "b.gguf").sampling == SamplingParams()


@pytest.mark.parametrize(
    ("key", "value"),
    [("temp", -1.0), ("temp", "hot"), ("top_k", 0.5), ("top_p", 2.0), ("min_p", [0.5, 0.5]), ("top_k", [1, 2]),
     ("penalty_repeat", float("inf")), ("temp", True)],
)  # fmt: skip
def test_invalid_recommended_sampling(key, value, folder, tmp_path):
    with pytest.raises(ModelError, match=rf"general\.sampling\.{key} is") as caught:
        chat(folder, tmp_path / "a.gguf", **{f"general__sampling__{key}": value})
    assert caught.value.hint


def test_a_file_that_names_no_end(checkpoints, tmp_path):
    path = gguf_families.write(checkpoints.folder("qwen3"), tmp_path / "a.gguf", remove=["tokenizer.ggml.eos_token_id"])
    assert read_gguf(path).eos_ids == (gguf_families.EOS,)  # known by its text
    tokens = [chr(0x100 + n) for n in range(211)]
    keys = {"tokenizer__ggml__tokens": tokens, "tokenizer__ggml__merges": ["Ā ā"]}
    tokens[-1] = "Āā"
    with pytest.raises(ModelError, match="end-of-sequence") as caught:
        read_gguf(
            gguf_families.write(checkpoints.folder("qwen3"), path, remove=["tokenizer.ggml.eos_token_id"], **keys)
        )
    assert caught.value.hint


def test_a_padded_vocabulary(checkpoints, tmp_path):
    """More rows than tokens: the rest have no text."""
    tokens = [chr(0x100 + n) for n in range(190)]
    tokens[2], tokens[-1] = "<|im_end|>", "Āā"
    keys = {"tokenizer__ggml__tokens": tokens, "tokenizer__ggml__token_type": [1] * 190}
    model = read_gguf(gguf_families.write(checkpoints.folder("qwen3"), tmp_path / "a.gguf", **keys))
    assert (model.config.vocab_size, model.tokenizer.vocab_size) == (211, 190)
    assert model.tokenizer.token_bytes(200) == b""
    assert np.isfinite(logits(backend_of(tmp_path / "a.gguf"))).all()


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 400), st.sampled_from([2**31, 2**63, 1e300, 1e-320, "", "yarn", "llama"]),
    st.floats(allow_nan=False), st.text(max_size=5), st.lists(st.text(max_size=3), max_size=4),
    st.lists(st.integers(0, 300), max_size=4).map(np.array), st.lists(st.booleans(), max_size=4).map(np.array),
)  # fmt: skip


@settings(max_examples=100, deadline=None, suppress_health_check=[*HealthCheck])
@given(data=st.data())
def test_any_change_of_the_metadata_loads_or_is_refused(data, folder, tmp_path, monkeypatch):
    """By a ModelError alone."""
    path = tmp_path / "a.gguf"
    if not path.exists():
        gguf_families.write(folder, path, general__sampling__temp=0.5, general__sampling__top_k=3)
    source = GGUFSource(path)
    keys = st.sampled_from([*source.metadata, "tokenizer.chat_template.tool_use", "general.type"])
    changes = data.draw(st.dictionaries(keys, VALUES, min_size=1, max_size=2))
    source.metadata |= changes
    monkeypatch.setattr(models, "GGUFSource", lambda _: source)
    try:
        model = read_gguf(path)
        weights = model.open_weights()
    except ModelError as error:
        refusal = error
    else:
        refusal = None
        assert len(weights) == len(model.graph.weights())
    assert refusal is None or (refusal.message and refusal.hint)
