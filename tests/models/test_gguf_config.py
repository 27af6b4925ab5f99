"""The config of GGUF files: what conversion wrote is read back, and bad values are refused."""

import dataclasses
import math

import gguf_families
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrs.core.errors import ModelError
from llmrs.models.arch import gguf as under_test
from llmrs.models.arch.families import graph_of, read_config
from llmrs.models.arch.gguf import config_from_metadata
from llmrs.models.arch.rope import frequencies
from llmrs.models.files.gguf import GGUFSource
from llmrs.models.files.json_reader import MAX_INT
from llmrs.quant.tensor import Tensor


class Source:
    """Tensors by their shapes; their values are ones."""

    def __init__(self, *, embed=32, factors=None, more=()):
        self.shapes = {"token_embd.weight": (embed, 16), **dict.fromkeys(more, (16,))}
        if factors is not None:
            self.shapes["rope_freqs.weight"] = np.shape(factors)
        self.factors = factors

    def names(self):
        return self.shapes

    def shape(self, name):
        return self.shapes[name]

    def tensor(self, name):
        return Tensor("f32", self.shapes[name], np.asarray(self.factors, np.float32))


def plain(arch="llama", **changes):
    """Metadata of a small model; `__` stands for a dot, None removes a key."""
    keys = {
        "block_count": 4, "context_length": 64, "embedding_length": 16, "feed_forward_length": 32,
        "attention.head_count": 4, "attention.head_count_kv": 2, "attention.layer_norm_rms_epsilon": 1e-5,
    }  # fmt: skip
    if arch == "qwen3moe":
        keys |= {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 8}
    keys |= {k.replace("__", "."): v for k, v in changes.items()}
    found = {f"{arch}.{k}": v for k, v in keys.items() if v is not None}
    return {"general.architecture": arch, **found, "tokenizer.ggml.tokens": [str(n) for n in range(32)]}


def parsed(metadata, **source):
    return config_from_metadata("x.gguf", metadata, Source(**source))


def refused(metadata, *words, **source):
    with pytest.raises(ModelError) as caught:
        graph_of(parsed(metadata, **source))
    for word in words:
        assert word in caught.value.message + (caught.value.hint or "")
    assert caught.value.hint
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize("name", gguf_families.CONVERTED)
def test_config_of_a_converted_checkpoint_is_that_of_its_folder(name, checkpoints, tmp_path):
    folder = checkpoints.folder(name)
    path = gguf_families.write(folder, tmp_path / "a.gguf")
    source = GGUFSource(path)
    ours, theirs = config_from_metadata(path, source.metadata, source), read_config(folder)
    for rope in ("rope", "local_rope"):
        a, b = (frequencies(getattr(c, rope), c) for c in (ours, theirs))
        np.testing.assert_allclose(a.values, b.values, rtol=2e-6)
        assert math.isclose(a.scale, b.scale, rel_tol=1e-6)
    same = {"rope": theirs.rope, "local_rope": theirs.local_rope, "norm_eps": theirs.norm_eps}
    assert math.isclose(ours.norm_eps, theirs.norm_eps, rel_tol=1e-6)  # a float32 in the file
    assert math.isclose(ours.attention_scale, theirs.attention_scale, rel_tol=1e-6)
    changed = dataclasses.replace(ours, **same, attention_scale=theirs.attention_scale)
    # families read the same layers; llama.cpp calls Mistral llama
    assert dataclasses.replace(changed, architecture=theirs.architecture) == theirs


def test_defaults():
    config = parsed(plain(attention__head_count_kv=None))
    assert (config.num_kv_heads, config.head_dim, config.rope.theta) == (4, 4, 10000.0)
    assert config.tie_word_embeddings
    assert (config.attention_bias, config.output_bias, config.mlp_bias) == (False, False, False)
    assert not parsed(plain(), more=["output.weight"]).tie_word_embeddings
    biased = parsed(plain(), more=["blk.0.attn_q.bias", "blk.0.ffn_gate.bias"])
    assert (biased.attention_bias, biased.output_bias, biased.mlp_bias) == (True, False, True)


def test_window_of_mistral():
    """Of the llama architecture, with its key; llama.cpp ignores it."""
    assert {kind.window for kind in parsed(plain(attention__sliding_window=7)).layer_kinds} == {7}
    assert {kind.window for kind in parsed(plain()).layer_kinds} == {0}
    assert {kind.window for kind in parsed(plain("mistral3", attention__sliding_window=7)).layer_kinds} == {7}


PATTERNS = {
    "every sixth": ({}, [5] * 5 + [0] + [5] * 2),
    "every third": ({"attention__sliding_window_pattern": 3}, [5, 5, 0, 5, 5, 0, 5, 5]),
    "all global": ({"attention__sliding_window_pattern": 1}, [0] * 8),
    "a list": ({"attention__sliding_window_pattern": np.array([True, False] * 4)}, [5, 0] * 4),
    "a list of one value": ({"attention__sliding_window_pattern": np.ones(8, np.int32)}, [5] * 8),
    "no window": ({"attention__sliding_window": None}, [0] * 8),
}


@pytest.mark.parametrize("name", PATTERNS)
def test_windows_of_gemma(name):
    changes, windows = PATTERNS[name]
    config = parsed(plain("gemma3", **{"block_count": 8, "attention__sliding_window": 5, **changes}))
    assert [kind.window for kind in config.layer_kinds] == windows


def test_attention_scale_of_gemma():
    """By the size of a head; of the 27B model, by that of the hidden state and the heads."""
    small = plain("gemma3", attention__key_length=8)
    assert parsed(small).attention_scale == 8**-0.5
    large = plain("gemma3", attention__key_length=8, block_count=62)
    assert parsed(large).attention_scale == 4**-0.5
    assert math.isclose(parsed({**small, "gemma3.attention.scale": 0.25}).attention_scale, 0.25)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"rope_type": "default"}),
        ({"factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),  # without a type
        ({"type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"type": "none", "factor": 4.0}, {"rope_type": "default"}),
        ({"type": "yarn", "factor": 0.0}, {"rope_type": "default"}),
        ({"type": "yarn", "factor": 4.0, "yarn_attn_factor": 1.0}, {"rope_type": "yarn", "factor": 4.0}),
        ({"type": "yarn", "factor": 4.0, "yarn_attn_factor": 1.5}, {"rope_type": "yarn", "attention_factor": 1.5}),
        ({"type": "yarn", "factor": 4.0, "attn_factor": 0.5}, {"rope_type": "yarn", "attn_factor": 0.5}),
        ({"finetuned": True, "attn_factor": 1.0}, {"rope_type": "default"}),
    ],
)
def test_rope_scaling(changes, expected):
    config = parsed(plain(**{f"rope__scaling__{k}": v for k, v in changes.items()}))
    assert expected.items() <= config.rope.scaling.items()
    graph_of(config)


def test_old_name_of_linear_scaling():
    assert parsed(plain(rope__scale_linear=2.0)).rope.scaling["factor"] == 2


def test_divisors_of_frequencies():
    config = parsed(plain(), factors=[1.0, 8.0])
    values = frequencies(config.rope, config).values
    assert values == (1.0, 10000.0**-0.5 / 8)
    for factors, word in (
        ([1.0], "(1,)"),
        ([0.0, 1.0], "positive"),
        ([1.0, math.inf], "positive"),
        ([[1.0], [1.0]], "(2, 1)"),
    ):
        refused(plain(), "rope_freqs.weight", word, factors=factors)


def test_values_of_each_layer():
    """An array of one number is that number."""
    assert parsed(plain(attention__head_count=np.full(4, 4))).num_heads == 4
    refused(plain(attention__head_count_kv=np.array([2, 1, 2, 2])), "head_count_kv is [2, 1, 2, 2]")


def test_padded_vocabulary():
    """Rows of the embeddings without a token are padding; tokens without a row are an error."""
    assert parsed(plain(), embed=40).vocab_size == 40
    assert parsed(plain(vocab_size=40), embed=40).vocab_size == 40
    refused(plain(), "31 rows", "32 tokenizer.ggml.tokens", embed=31)
    refused(plain(vocab_size=32), "vocab_size is 32", "40", embed=40)


BAD = {
    "no architecture": ({}, ("general.architecture is None", "llama")),
    "unknown architecture": ({"general.architecture": "mamba"}, ("'mamba'", "qwen3")),
    "architecture of another type": ({"general.architecture": 3}, ("general.architecture is 3",)),
    "architecture as a list": ({"general.architecture": ["llama"]}, ("general.architecture",)),
    "an adapter": ({**plain(), "general.type": "adapter"}, ("'adapter'", "holds no model")),
    "an image encoder": ({**plain(), "general.type": "mmproj"}, ("'mmproj'",)),
    **{f"no {key}": (plain(**{key: None}), (f"llama.{key.replace('__', '.')} is None",))
       for key in ("block_count", "context_length", "embedding_length", "feed_forward_length", "attention__head_count",
                   "attention__layer_norm_rms_epsilon")},
    **{f"{value!r} layers": (plain(block_count=value), ("llama.block_count",))
       for value in (0, -1, 10**9, 2**63, 1.0, True, "4", np.array([4, 5]))},
    "a million heads": (plain(attention__head_count=10**6, attention__head_count_kv=3), ("num_key_value_heads",)),
    "kv heads that don't divide": (plain(attention__head_count_kv=3), ("divisor",)),
    "odd heads": (plain(attention__key_length=5), ("head_dim",)),
    "huge heads": (plain(attention__key_length=2**20), ("head_dim",)),
    "values of another size": (plain(attention__value_length=2), ("value_length is 2", "4")),
    "part of the rope": (plain(rope__dimension_count=2), ("dimension_count is 2",)),
    "infinite epsilon": (plain(attention__layer_norm_rms_epsilon=math.inf), ("rms_epsilon",)),
    "negative epsilon": (plain(attention__layer_norm_rms_epsilon=-1e-6), ("rms_epsilon",)),
    "epsilon as text": (plain(attention__layer_norm_rms_epsilon="1e-6"), ("rms_epsilon",)),
    "base of 1": (plain(rope__freq_base=1.0), ("rope_theta",)),
    "base as text": (plain(rope__freq_base="1e4"), ("rope.freq_base",)),
    "unknown scaling": (plain(rope__scaling__type="longrope"), ("'longrope'", "yarn")),
    "scaling as a number": (plain(rope__scaling__type=1), ("rope.scaling.type is 1",)),
    "scaling as a list": (plain(rope__scaling__type=["yarn"]), ("rope.scaling.type",)),
    "negative factor": (plain(rope__scaling__factor=-2.0), ("rope.scaling.factor",)),
    "factor as text": (plain(rope__scaling__factor="2"), ("rope.scaling.factor",)),
    "factor as a list": (plain(rope__scaling__factor=np.array([2.0, 3.0])), ("rope.scaling.factor",)),
    "temperature without yarn": (plain(rope__scaling__attn_factor=2.0), ("attn_factor is 2.0",)),
    "two temperatures": (plain(rope__scaling__type="yarn", rope__scaling__factor=2.0, rope__scaling__attn_factor=2.0,
                               rope__scaling__yarn_attn_factor=2.0), ("both",)),
    "attention scale": (plain(attention__scale=0.1), ("attention.scale is 0.1",)),
    "attention scale as text": (plain(attention__scale="0.5"), ("attention.scale is '0.5'",)),
    "tiny attention scale": (plain("gemma3", attention__scale=1e-300), ("attention.scale",)),
    "pattern of another length": (plain("gemma3", attention__sliding_window=4,
                                        attention__sliding_window_pattern=np.array([True])), ("pattern",)),
    "pattern of other numbers": (plain("gemma3", attention__sliding_window=4,
                                       attention__sliding_window_pattern=np.arange(4)), ("pattern",)),
    "pattern as texts": (plain("gemma3", attention__sliding_window=4,
                               attention__sliding_window_pattern=["a"] * 4), ("pattern",)),
    "window of 0": (plain("gemma3", attention__sliding_window=0), ("sliding_window is 0",)),
    "softcapping": (plain("gemma3", final_logit_softcapping=30.0), ("final_logit_softcapping is 30.0", "implemented")),
    "experts of another architecture": (plain(expert_count=8), ("expert_count is 8",)),
    "no experts": (plain("qwen3moe", expert_count=None), ("qwen3moe.expert_count is None",)),
    "more experts used": (plain("qwen3moe", expert_used_count=5), ("num_experts",)),
    "too many experts": (plain("qwen3moe", expert_count=10**6), ("num_experts",)),
    "sigmoid gate": (plain("qwen3moe", expert_gating_func=2), ("expert_gating_func is 2",)),
    "unknown key": (plain(something__new=1), ("llama.something.new is 1", "not implemented")),
    "no causal mask": (plain(attention__causal=False), ("attention.causal is False",)),
    "window that qwen3 has not": (plain("qwen3", attention__sliding_window=4), ("sliding_window is 4",)),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_configs(name):
    metadata, words = BAD[name]
    refused(metadata, *words)


@pytest.mark.parametrize("key", [*under_test.NEUTRAL, *sorted(under_test.IGNORED), *under_test.EXPERTS.values()])
def test_keys_without_effect(key):
    """Files give them at the values that change nothing."""
    value = under_test.NEUTRAL.get(key, (0,))[0]
    assert graph_of(parsed({**plain(), f"llama.{key}": value})).main


def test_files_without_a_vocabulary():
    """The size is then that of the embeddings, or the one given."""
    metadata = {k: v for k, v in plain().items() if "tokens" not in k}
    assert parsed(metadata, embed=77).vocab_size == 77


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 70), st.sampled_from([2**31 - 1, MAX_INT, 2**63, 10**30]),
    st.floats(allow_nan=False), st.sampled_from([1e-320, 1e300, 0.0, 0.5, 4.0]), st.text(max_size=3),
    st.lists(st.text(max_size=2), max_size=2), st.sampled_from(["yarn", "linear", "none"]),
    st.lists(st.integers(0, 9), max_size=5).map(lambda x: np.array(x, np.int32)),
    st.lists(st.booleans(), max_size=5).map(np.array),
    st.lists(st.floats(allow_nan=False, width=32), max_size=5).map(lambda x: np.array(x, np.float32)),
)  # fmt: skip
TOP = ["general.architecture", "general.type", "tokenizer.ggml.tokens"]
KEYS = [
    *under_test.INTEGERS.values(), *under_test.EXPERTS.values(), *under_test.NEUTRAL, "block_count", "vocab_size",
    "attention.head_count_kv", "attention.key_length", "attention.value_length", "rope.dimension_count",
    "attention.scale", "attention.sliding_window", "attention.sliding_window_pattern", "rope.freq_base",
    "rope.freq_base_swa", "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear", "rope.scaling.attn_factor",
    "rope.scaling.yarn_attn_factor", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow",
    "rope.scaling.original_context_length", "expert_weights_norm", "attention.layer_norm_rms_epsilon", "x",
]  # fmt: skip


@settings(max_examples=500, deadline=None)
@given(
    arch=st.sampled_from([*under_test.GGUF_FAMILIES]),
    changes=st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4),
    top=st.dictionaries(st.sampled_from(TOP), VALUES, max_size=1),
    factors=st.none() | st.lists(st.floats(width=32), max_size=3),
)
def test_any_metadata_gives_a_config_or_is_refused(arch, changes, top, factors):
    """By a ModelError alone, and graphs are of bounded size."""
    changes = {f"{arch}.{k}": v for k, v in changes.items()}
    rope = {f"{arch}.rope.scaling.type": "yarn", f"{arch}.rope.scaling.factor": 2.0} if len(changes) % 2 else {}
    try:
        config = parsed({**plain(arch), **rope, **changes, **top}, factors=factors)
        graph = graph_of(config)
    except ModelError as error:
        refusal = error
    else:
        refusal = None
        assert len(graph.main.equations) < 1010
    assert refusal is None or (refusal.message and refusal.hint and len(str(refusal)) < 2000)
