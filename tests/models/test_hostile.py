"""Broken or hostile model folders: a usable, bounded result, or one ModelError with a hint."""

import hashlib
import json
import os
import stat
import sys

import pytest
import texts
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_configs import QWEN3

from llmrs.core.errors import LlmrsError, ModelError
from llmrs.model import read_folder
from llmrs.models.arch.config import MAX_EXPERT_WEIGHTS, MAX_HEAD_DIM, SCALING_KEYS
from llmrs.models.arch.families import FAMILIES, graph_of, read_config
from llmrs.models.files.generation import read_generation
from llmrs.models.files.safetensors import SafetensorsSource
from llmrs.models.files.untrusted import JSON_LIMIT
from llmrs.models.files.weights import num_parameters
from llmrs.models.text.template import ChatTemplate
from llmrs.models.text.tokenizer import MAX_VOCAB_SIZE, Tokenizer

links = pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege on Windows")
pipes = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")

NESTED = json.loads("[" * 400 + "]" * 400)
NUMBERS = [0, -1, 1, 2, 3, 7, 2**30, 2**31 - 1, 2**31, 2**63, 10**400, 0.0, -0.5, 0.5, 1.0, 1e-320, 1e308]
SPECIAL = [float("nan"), float("inf"), float("-inf")]
OTHERS = [
    None,
    True,
    False,
    "",
    "x",
    "default",
    "yarn",
    "\ud800",
    [],
    {},
    [1],
    [0] * 3,
    {"a": 1},
    [None] * 5000,
    NESTED,
]
VALUES = st.sampled_from([*NUMBERS, *SPECIAL, *OTHERS])

ROPE = {
    "rope_type": "yarn",
    "type": "linear",
    "factor": 2.0,
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 64,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "attention_factor": 1.0,
    "attn_factor": 1.0,
    "finetuned": True,
    "truncate": False,
    "partial_rotary_factor": 1.0,
    "full_attention": {"rope_type": "default"},
    "sliding_attention": {"rope_type": "default"},
}
MOE = {"architectures": ["Qwen3MoeForCausalLM"]}
FULL = {
    **QWEN3,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    "max_position_embeddings": 256,
    "sliding_window": 8,
    "use_sliding_window": True,
    "max_window_layers": 1,
    "sliding_window_pattern": 2,
    "layer_types": ["full_attention", "sliding_attention"] * 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [0],
    "tie_word_embeddings": True,
    "attention_bias": False,
    "attention_output_bias": False,
    "mlp_bias": False,
    "query_pre_attn_scalar": 16,
    "torch_dtype": "bfloat16",
    "eos_token_id": 3,
}
CHANGES = st.lists(
    st.tuples(st.sampled_from([*FULL, "hidden_act", "hidden_activation", "rope_parameters", "dtype"]), VALUES),
    max_size=3,
)
# all keys that a way to scale may have, or any
WHOLE = st.sampled_from([*SCALING_KEYS]).map(
    lambda kind: {"rope_type": kind} | {k: ROPE[k] for k in SCALING_KEYS[kind]}
)
ROPES = st.builds(lambda a, b: {**a, **b}, WHOLE, st.dictionaries(st.sampled_from([*ROPE]), VALUES, max_size=2)) | (
    st.dictionaries(st.sampled_from([*ROPE]), VALUES, max_size=5)
)
quick = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def put(folder, name, data):
    (folder / name).write_text(data if isinstance(data, str) else json.dumps(data), "utf-8")


def usable_or_refused(action):
    """The result, or None for a ModelError with a hint."""
    caught = None
    try:
        return action()
    except ModelError as error:
        caught = error
    assert caught.message
    assert caught.hint
    assert len(str(caught)) < 2000
    return None


def bounded(folder):
    """A checked graph of bounded size, or a refusal."""

    def read():
        config = read_config(folder)
        graph = graph_of(config)
        assert len(graph.main.equations) <= 1010
        assert sum(len(e.inputs) for f in graph.functions.values() for e in f.equations) < 10_000
        freqs = [e.params["frequencies"] for f in graph.functions.values() for e in f.equations if e.op == "rope"]
        assert all(len(t.values) <= MAX_HEAD_DIM // 2 for t in freqs)
        assert sum(len(w.segments) for f in graph.functions.values() for e in f.equations for w in e.inputs
                   if hasattr(w, "segments")) * len(config.layer_kinds) <= 20 * MAX_EXPERT_WEIGHTS  # fmt: skip
        return str(graph)

    return usable_or_refused(read)


@pytest.mark.parametrize("architecture", FAMILIES)
@quick
@given(changes=CHANGES, rope=ROPES, which=st.sampled_from(["rope_scaling", "rope_parameters", None]))
def test_any_config(architecture, changes, rope, which, tmp_path):
    data = {**FULL, "architectures": [architecture], **({which: rope} if which else {}), **dict(changes)}
    put(tmp_path, "config.json", data)
    bounded(tmp_path)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_every_field_of_a_config_with_every_value(architecture, tmp_path):
    for field in FULL:
        rest = {k: v for k, v in FULL.items() if k != field}
        for data in (rest, *({**rest, field: v} for v in (*NUMBERS, *SPECIAL, *OTHERS))):
            put(tmp_path, "config.json", {"architectures": [architecture], **data})
            bounded(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"head_dim": 2**30},
        {"hidden_size": 2**30, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": None},
        {"num_hidden_layers": 2**30},
        {**MOE, "num_experts": 2**30},
        {**MOE, "num_hidden_layers": 1000, "num_experts": 4096},
        {"rope_scaling": {"rope_type": "linear", "factor": 10**400}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "beta_slow": 1e-320}},
        {"rope_scaling": {"rope_type": ["linear"], "factor": 2}},
        {"rope_scaling": {"rope_type": 0, "factor": 2}},
        {"rope_scaling": {"rope_type": NESTED}},
        {**MOE, "mlp_only_layers": 0},
    ],
)
def test_what_no_config_may_ask_for(change, tmp_path):
    put(tmp_path, "config.json", {**FULL, **change})
    assert bounded(tmp_path) is None


def test_the_largest_graph_that_is_allowed_is_small(tmp_path):
    layers = 512
    experts = MAX_EXPERT_WEIGHTS // layers
    more = {**MOE, "num_hidden_layers": layers, "num_experts": experts, "vocab_size": 2**31 - 1}
    put(tmp_path, "config.json", {**FULL, **more})
    assert num_parameters(graph_of(read_config(tmp_path))) > 2**31


@quick
@given(
    data=st.dictionaries(
        st.sampled_from(["eos_token_id", "temperature", "top_p", "top_k", "min_p", "do_sample"]),
        VALUES | st.lists(VALUES, max_size=3),
    )
)
def test_any_generation_config(data, tmp_path):
    put(tmp_path, "config.json", {"eos_token_id": 3})
    put(tmp_path, "generation_config.json", data)
    usable_or_refused(lambda: read_generation(tmp_path, 100, ()))


TEMPLATES = VALUES | st.lists(
    st.fixed_dictionaries({}, optional={"name": VALUES | st.just("default"), "template": VALUES})
)


@quick
@given(
    data=st.dictionaries(
        st.sampled_from(["bos_token", "eos_token", "pad_token", "unk_token", "mask_token", "tokenizer_class"]),
        VALUES | st.fixed_dictionaries({"content": VALUES}) | st.just("<|im_end|>"),
    ),
    source=TEMPLATES,
)
def test_any_tokenizer_config(data, source, tmp_path):
    texts.write_text_files(tmp_path) if not (tmp_path / "tokenizer.json").exists() else None
    put(tmp_path, "tokenizer_config.json", {**data, "chat_template": source})
    usable_or_refused(lambda: Tokenizer.load(tmp_path).encode("Hi"))
    assert isinstance(ChatTemplate.load(tmp_path, {}), ChatTemplate | ModelError | None)


MAKERS = {"byte-level": texts.byte_level, "sentencepiece": texts.sentencepiece}


@pytest.mark.parametrize("maker", MAKERS)
def test_a_tokenizer_that_is_cut_off_anywhere(maker, tmp_path):
    text = MAKERS[maker]().to_str()
    for n in range(50):
        put(tmp_path, "tokenizer.json", text[: len(text) * n // 50])
        assert usable_or_refused(lambda: Tokenizer.load(tmp_path)) is None


def places(value, path=()):
    """Paths to all parts of a JSON value, in long lists and tables the first only."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items)[:8]:
        yield (*path, key)
        yield from places(inner, (*path, key))


@pytest.mark.parametrize("maker", MAKERS)
def test_a_tokenizer_with_parts_of_other_types(maker, tmp_path):
    text = MAKERS[maker]().to_str()
    for path in places(json.loads(text)):
        for value in (None, 3, -1, "x", [], {}, 10**30):
            data = json.loads(text)
            inner = data
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = value
            put(tmp_path, "tokenizer.json", data)
            loaded = usable_or_refused(lambda: Tokenizer.load(tmp_path))
            if loaded is not None:
                loaded.encode("Hello wörld")
                loaded.encode_ordinary("Hello")


@pytest.mark.parametrize(
    "change", [("vocab", {"a": MAX_VOCAB_SIZE}), ("vocab", {"a": 2**31}), ("merges", [["x", "<0x00>"]])]
)
def test_a_vocabulary_that_would_make_the_library_panic_or_fill_memory(change, tmp_path):
    data = json.loads(texts.sentencepiece().to_str())
    name, value = change
    data["model"][name] = {**data["model"][name], **value} if name == "vocab" else value
    put(tmp_path, "tokenizer.json", data)
    assert usable_or_refused(lambda: Tokenizer.load(tmp_path)) is None


def test_a_processor_that_adds_a_token_that_is_not_there(tmp_path):
    data = json.loads(texts.sentencepiece().to_str())
    data["post_processor"]["single"][0]["SpecialToken"]["id"] = "<nowhere>"
    put(tmp_path, "tokenizer.json", data)
    assert usable_or_refused(lambda: Tokenizer.load(tmp_path)) is None


# Files that are not what they should be


@pytest.fixture
def model(checkpoints, tmp_path):
    return texts.write_model(checkpoints.folder("chat"), tmp_path / "model")


READ = [
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("chat_template.jinja", "additional_chat_templates/tool_use.jinja"),
]
WEIGHTS = ["model.safetensors", "model.safetensors.index.json"]


def read_all(folder):
    read_folder(folder)
    SafetensorsSource(folder)


def refused(folder, *words):
    with pytest.raises(LlmrsError) as caught:
        read_all(folder)
    assert isinstance(caught.value, ModelError)
    assert caught.value.hint
    for word in words:
        assert word in caught.value.message
    return caught.value


def replaced(folder, name):
    """The path of a removed file. An index is read only without the single file."""
    if name.endswith("index.json"):
        (folder / "model.safetensors").unlink()
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).unlink(missing_ok=True)
    return folder / name


@links
@pytest.mark.parametrize("name", [*READ, *WEIGHTS])
def test_no_link_out_of_the_folder_is_followed(name, model, tmp_path):
    read_all(model)
    path = replaced(model, name)
    (tmp_path / "secret").write_text("{}")
    path.symlink_to(tmp_path / "secret")
    refused(model, name, "leads out of the folder")


@links
@pytest.mark.parametrize("hashed", [False, True])
def test_a_model_whose_files_lie_on_another_disk(hashed, model, tmp_path):
    """Linked under their own names, or as blobs named by hash."""
    before, disk = read_folder(model).config, tmp_path / "disk"
    disk.mkdir()
    for path in list(model.iterdir()):
        moved = disk / (hashlib.sha256(path.read_bytes()).hexdigest() if hashed else path.name)
        path.rename(moved)
        path.symlink_to(moved)
    read_all(model)
    assert read_folder(model).config == before


@links
@pytest.mark.parametrize("name", [*READ, *WEIGHTS])
def test_a_link_to_itself(name, model):
    path = replaced(model, name)
    path.symlink_to(path)
    needed = name in ("config.json", "tokenizer.json", *WEIGHTS)
    assert usable_or_refused(lambda: read_all(model) or "read") is None or not needed


@pipes
@pytest.mark.parametrize("name", [*READ, *WEIGHTS])
def test_a_pipe_in_place_of_a_file(name, model):
    os.mkfifo(replaced(model, name))
    refused(model, name, "not a file but a pipe")


@pytest.mark.parametrize("name", [*READ, *WEIGHTS])
def test_a_folder_in_place_of_a_file(name, model):
    replaced(model, name).mkdir()
    refused(model, name, "not a file but a folder")


@pytest.mark.parametrize("name", [*READ, *WEIGHTS])
def test_a_device_in_place_of_a_file(name, model):
    path = replaced(model, name)
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 5))  # /dev/zero
    except (AttributeError, OSError):
        pytest.skip("devices need a privilege")
    refused(model, name, "not a file but a device")


@pytest.mark.parametrize("name", [*READ, "model.safetensors.index.json"])
def test_a_file_far_too_large(name, model):
    with replaced(model, name).open("wb") as file:
        file.truncate(2**33)  # 8 GiB of nothing, which take no space
    refused(model, name, "bytes, over")


def test_a_header_far_too_large(model):
    path = replaced(model, "model.safetensors")
    with path.open("wb") as file:
        file.write((2 * JSON_LIMIT).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}')
        file.write(b" " * 2 * JSON_LIMIT)
    refused(model, "header")


@pytest.mark.parametrize("name", [*READ, "model.safetensors.index.json"])
def test_text_that_is_not_utf8(name, model):
    replaced(model, name).write_bytes('{"chat_template": "é"}'.encode("utf-16"))
    refused(model, name, "is not text")


@pytest.mark.parametrize("name", READ[:4])
def test_a_byte_order_mark_is_no_harm(name, model):
    path = model / name
    before = read_folder(model).config
    put(model, name, path.read_text("utf-8") if path.exists() else "{}")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_folder(model).config == before


@pytest.mark.parametrize("name", [*READ[:4], "model.safetensors.index.json"])
@pytest.mark.parametrize("text", ["", "[" * 100_000, "null", "3", '{"a": ' + "9" * 5000 + "}", "{" * 1000, "\0"])
def test_text_that_is_no_json_object(name, text, model):
    replaced(model, name).write_text(text)
    refused(model, name)


@pytest.mark.parametrize("shard", ["../secret", "/etc/passwd", "", ".", "a\0b", "x" * 5000, "\ud800", "no/such/file"])
def test_shards_that_are_no_files_of_the_folder(shard, model):
    put(model, replaced(model, "model.safetensors.index.json").name, {"weight_map": {"a": shard}})
    refused(model)


def test_an_index_of_a_hundred_thousand_names(model):
    weight_map = {f"w{n}": f"{n}.safetensors" for n in range(100_000)}
    put(model, replaced(model, "model.safetensors.index.json").name, {"weight_map": weight_map})
    refused(model, "0.safetensors")


def test_programs_in_the_folder_are_not_run(model, tmp_path):
    """`auto_map` names classes in the folder's code, which llmrs never runs."""
    ran = tmp_path / "ran"
    program = f"open({str(ran)!r}, 'w').close()\n"
    for name in ("modeling_x.py", "__init__.py", "tokenization_x.py", "sitecustomize.py", "setup.py", "conftest.py"):
        (model / name).write_text(program)
    auto = {"AutoModelForCausalLM": "modeling_x.X", "AutoTokenizer": ["tokenization_x.T", None]}
    texts.change(model / "config.json", auto_map=auto)
    texts.change(model / "tokenizer_config.json", auto_map=auto)
    read_all(model)
    texts.change(model / "config.json", architectures=["XForCausalLM"])
    refused(model, "'XForCausalLM'", "not supported")
    assert not ran.exists()


def test_only_pickles(model):
    replaced(model, "model.safetensors")
    torch.save({}, model / "pytorch_model.bin")
    error = refused(model, "pytorch_model.bin", "pickle", "not loaded", "can run any program")
    assert "safetensors" in error.hint
