"""Tokenizers of GGUF files: the ids are llama.cpp's, on many scripts, for every pre-tokenizer that we name."""

import unicodedata

import gguf_vocab
import llama_vocab
import multilingual
import numpy as np
import pytest
from gguf_vocab import CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmrs.core.errors import ModelError
from llmrs.models.files.gguf import GGUFSource
from llmrs.models.text import gguf_tokenizer as under_test
from llmrs.models.text import pre_tokenizers
from llmrs.models.text.detokenize import Detokenizer
from llmrs.models.text.gguf_tokenizer import gguf_tokenizer

SPECIAL_IN_TEXT = [
    "<|im_start|>user\nHi<|im_end|>\n", "a<|im_end|>", "<|im_end|>a", "<|im_end|><|im_end|> <|im_end|>", "<|im_end",
    "<think>x</think>", " <think> ", "a    b", "a     b\n    c", "[PAD4006]",
]  # fmt: skip
TEXTS = [*multilingual.TEXTS[:13], *multilingual.SENTENCES, *SPECIAL_IN_TEXT]
DECOMPOSED = [unicodedata.normalize("NFD", s) for s in multilingual.SENTENCES]
MORE = [*DECOMPOSED, *multilingual.random_texts(120, seed=3)]
BOTH_CASES = {"tekken", "gpt-4o"}  # llama.cpp's expressions are others there: see pre_tokenizers
SPACES_APART = {"deepseek-llm", "deepseek-coder"}
NAMES = list(pre_tokenizers.NAMES)


def load(path):
    return gguf_tokenizer(path, GGUFSource(path).metadata)


def same_in_llama_cpp(name, text):
    """Whether llama.cpp's expressions are the model's on this text."""
    split = pre_tokenizers.NAMES[name]
    if split in BOTH_CASES:
        cased = any(c > "\x7f" and unicodedata.category(c) in ("Lu", "Ll", "Lt") for c in text)
        return not cased and not any(unicodedata.category(c)[0] == "M" for c in text)
    return split not in SPACES_APART or not any(c.isspace() and c > "\x7f" for c in text)


def assert_ids(tokenizer, texts, expected, encode):
    for text, ids in zip(texts, expected, strict=True):
        assert encode(tokenizer, text) == ids, (text, [tokenizer.inner.id_to_token(i) for i in ids])


def parsed(tokenizer, text):
    """Without bos and eos."""
    return tokenizer.inner.encode(text, add_special_tokens=False).ids


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    """A file for each name, all with the same vocabulary."""
    folder = tmp_path_factory.mktemp("byte-level")
    return {name: gguf_vocab.write_byte_level(folder / f"{name}.gguf", name) for name in NAMES}


@pytest.fixture(scope="module")
def expected(byte_level):
    found = llama_vocab.encoded(list(byte_level.values()), TEXTS)
    return {name: found[str(path)] for name, path in byte_level.items()}


@pytest.mark.parametrize("name", NAMES)
def test_byte_level_ids_with_each_pre_tokenizer(name, byte_level, expected):
    tokenizer, _ = load(byte_level[name])
    pairs = [(t, ids) for t, ids in zip(TEXTS, expected[name], strict=True) if same_in_llama_cpp(name, t)]
    assert len(pairs) > len(TEXTS) / 3
    assert_ids(tokenizer, *zip(*pairs, strict=True), parsed)


def test_byte_level_ids_of_more_texts(byte_level):
    """For each expression once. Text is not normalized."""
    names = [name for name in NAMES if pre_tokenizers.NAMES[name] == name] + ["starcoder"]
    found = llama_vocab.encoded([byte_level[n] for n in names], MORE)
    for name in names:
        tokenizer, _ = load(byte_level[name])
        pairs = zip(MORE, found[str(byte_level[name])], strict=True)
        assert_ids(tokenizer, *zip(*(p for p in pairs if same_in_llama_cpp(name, p[0])), strict=True), parsed)


@pytest.mark.parametrize("name", ["tekken", "gpt-4o", "qwen35"])
def test_byte_level_ids_of_transformers(name, byte_level):
    """Letters of all alphabets and marks, which llama.cpp's expressions of tekken and gpt-4o take otherwise."""
    mapping = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")
    tokens, types, merges = gguf_vocab.byte_level()
    given = {"tokenizer_type": "gpt2", "pre_tokenizer_type": name, "tokens": tokens, "token_type": types,
             "merges": merges}  # fmt: skip
    theirs, _ = mapping.convert_gguf_tokenizer("llama", given)
    tokenizer, _ = load(byte_level[name])
    texts = [t for t in (*multilingual.SENTENCES, *MORE) if "    " not in t]  # a token that transformers drops
    assert_ids(tokenizer, texts, [theirs.encode(t, add_special_tokens=False).ids for t in texts], parsed)


def test_special_tokens_in_plain_text(byte_level):
    """Control tokens are text there; user-defined tokens are parsed everywhere."""
    paths = [byte_level[name] for name in ("qwen2", "llama-bpe", "default")]
    found = llama_vocab.encoded(paths, TEXTS, parse=False)
    for path in paths:
        assert_ids(load(path)[0], TEXTS, found[str(path)], lambda t, text: t.encode_ordinary(text))


SPACES = (("<mask>", CONTROL), ("<h1>", USER_DEFINED), ("  ", USER_DEFINED), ("   ", USER_DEFINED),
          ("\n\n", USER_DEFINED), ("▁▁▁▁▁", USER_DEFINED), ("[INST]", USER_DEFINED), ("<unused0>", CONTROL),
          ("[PAD]", UNUSED))  # fmt: skip
SENTENCEPIECE = {  # name -> keys, more tokens
    "llama-2": ({"add_bos_token": True, "add_eos_token": False, "unknown_token_id": 0}, ()),
    "nothing-said": ({}, SPACES),
    "gemma": ({"add_space_prefix": False, "add_bos_token": True}, SPACES),
    "both-ends": ({"add_bos_token": True, "add_eos_token": True}, SPACES),
    "no-bos": ({"add_bos_token": False, "add_eos_token": True, "add_space_prefix": False}, ()),
}
SPM_TEXTS = [*TEXTS, *MORE[-60:], *DECOMPOSED, "<s>a</s>b", "  <s>  a", "[INST] x [/INST]y",
             "a<mask>b <h1>x</h1>", "<0x41>", "<unk>", "▁a ▁", "a\n\n b\n\n\n", "x      y"]  # fmt: skip


@pytest.mark.parametrize("name", SENTENCEPIECE)
def test_sentencepiece_ids(name, tmp_path):
    keys, more = SENTENCEPIECE[name]
    path = gguf_vocab.write_sentencepiece(tmp_path / "a.gguf", more, **keys)
    tokenizer, _ = load(path)
    assert_ids(tokenizer, SPM_TEXTS, llama_vocab.encoded([path], SPM_TEXTS)[str(path)], parsed)
    plain = llama_vocab.encoded([path], SPM_TEXTS, parse=False)[str(path)]
    assert_ids(tokenizer, SPM_TEXTS, plain, lambda t, text: t.encode_ordinary(text))
    whole = llama_vocab.encoded([path], SPM_TEXTS[14:], special=True)[str(path)]
    once = [(t, ids) for t, ids in zip(SPM_TEXTS[14:], whole, strict=True) if not t.startswith("<s>")]
    assert_ids(tokenizer, *zip(*once, strict=True), lambda t, text: t.encode(text))


FLAGS = [{}, {"add_bos_token": True}, {"add_bos_token": True, "add_eos_token": True}, {"add_eos_token": True},
         {"add_bos_token": False}]  # fmt: skip


@pytest.mark.filterwarnings("ignore:.* names no pre-tokenizer")
@pytest.mark.parametrize("pre", ["qwen2", "llama-bpe", "tekken", "minicpm5", None])
def test_bos_and_eos_of_byte_level(pre, tmp_path):
    """Llama 3 and Tekken have a bos where the file says nothing."""
    paths = [gguf_vocab.write_byte_level(tmp_path / f"{n}.gguf", pre, **keys) for n, keys in enumerate(FLAGS)]
    found = llama_vocab.encoded(paths, ["Hello there", ""], special=True)
    for path in paths:
        assert_ids(load(path)[0], ["Hello there", ""], found[str(path)], lambda t, text: t.encode(text))


def test_a_warning_where_no_pre_tokenizer_is_named(tmp_path):
    """Files of before April 2024."""
    paths = [gguf_vocab.write_byte_level(tmp_path / f"{pre}.gguf", pre) for pre in (None, "default")]
    with pytest.warns(UserWarning, match="names no pre-tokenizer"):
        tokenizer, _ = load(paths[0])
    other, _ = load(paths[1])
    assert_ids(tokenizer, TEXTS, [parsed(other, t) for t in TEXTS], parsed)


def test_one_bos_where_the_text_begins_with_it(tmp_path):
    tokenizer, _ = load(gguf_vocab.write_sentencepiece(tmp_path / "a.gguf"))
    assert tokenizer.encode("<s>a")[:1] == [1]
    assert tokenizer.encode("<s>a").count(1) == 1


@pytest.mark.parametrize(
    ("first", "write"),
    [
        ("", lambda p: gguf_vocab.write_byte_level(p, "qwen2")),
        ("", lambda p: gguf_vocab.write_sentencepiece(p, SPACES, add_space_prefix=False)),
        (" ", gguf_vocab.write_sentencepiece),
    ],
    ids=["byte-level", "sentencepiece", "space-prefix"],
)
def test_bytes_of_tokens(first, write, tmp_path):
    """What a token adds to a text, as in llama.cpp; joined over all tokens of a text they are the text."""
    path = write(tmp_path / "a.gguf")
    tokenizer, _ = load(path)
    types = GGUFSource(path).metadata["tokenizer.ggml.token_type"]
    for i, piece in enumerate(llama_vocab.pieces(path)):
        if types[i] != UNUSED and (types[i] != USER_DEFINED or "▁" not in piece.decode()):  # nothing, and ▁, there
            assert tokenizer.token_bytes(i, skip_special_tokens=False) == piece
        assert types[i] not in (CONTROL, UNKNOWN) or tokenizer.token_bytes(i) == b""
    for text in TEXTS[1:]:
        detokenizer = Detokenizer(tokenizer)
        joined = "".join(map(detokenizer.add, tokenizer.encode_ordinary(text))) + detokenizer.flush()
        assert joined == first + text


END = ["<|eot_id|>", "<end_of_turn>", "<|eom_id|>", "<|file_sep|>", "<|fim_pad|>", "[EOS]"]


def test_tokens_that_end_a_generation(tmp_path):
    """Those that llama.cpp knows by their texts, and those that the file names."""
    tokens, types, scores = gguf_vocab.sentencepiece(special=tuple((t, USER_DEFINED) for t in (*END, "<a>", "<b>")))
    keys = {"eos_token_id": tokens.index("<a>"), "eot_token_id": tokens.index("<b>"), "bos_token_id": 1}
    path = gguf_vocab.write(tmp_path / "a.gguf", "llama", tokens, types, scores=scores, **keys)
    tokenizer, ends = load(path)
    assert sorted(ends) == llama_vocab.end_tokens(path)
    assert ends[0] == keys["eos_token_id"]
    assert tokenizer.special_tokens["eos"] == "<a>"
    for text in END:  # control tokens, whatever the file says
        assert tokenizer.token_to_id(text) not in tokenizer.encode_ordinary(f"a{text}b")


def test_html_that_looks_like_an_end(tmp_path):
    """Gemma's `</s>` is HTML and no end; llama.cpp takes it for one."""
    path = gguf_vocab.write(tmp_path / "a.gguf", "gpt2", ["a", "<eos>", "</s>"], [NORMAL, CONTROL, USER_DEFINED],
                            merges=["a a"], eos_token_id=1, pre="qwen2")  # fmt: skip
    metadata = {**GGUFSource(path).metadata, "tokenizer.ggml.merges": []}
    tokenizer, ends = gguf_tokenizer(path, metadata)
    assert ends == (1,)
    assert tokenizer.encode_ordinary("</s>") == [2]


def test_special_ids_that_are_no_tokens(tmp_path):
    """-1, as conversion wrote it for a model without: llama.cpp takes its default."""
    path = gguf_vocab.write_sentencepiece(tmp_path / "a.gguf", padding_token_id=2**32 - 1, bos_token_id=10**6,
                                          eos_token_id=10**6, unknown_token_id=2**31)  # fmt: skip
    tokenizer, ends = load(path)
    assert tokenizer.special_tokens == {"bos": "<s>", "eos": "</s>", "unk": "<unk>"} | dict.fromkeys(
        ("pad", "sep", "cls", "mask")
    )
    assert ends == (2,)
    assert tokenizer.encode("a")[0] == 1


def test_tokens_of_one_score_are_ranked_by_their_ids():
    """Files that were made from a tokenizer.json have no scores; ids of such vocabularies are in the merges' order."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "a", "b", "c", "bc", "ab", "abc"]
    metadata = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens,
                "tokenizer.ggml.token_type": np.array([2, 3, 3, *[6] * 256, *[1] * 7]),
                "tokenizer.ggml.add_space_prefix": False}  # fmt: skip
    tokenizer, _ = gguf_tokenizer("x.gguf", metadata)
    assert [tokens[i] for i in tokenizer.encode_ordinary("abc")] == ["abc"]
    assert [tokens[i] for i in tokenizer.encode_ordinary("abcb")] == ["abc", "b"]
    assert [tokens[i] for i in tokenizer.encode_ordinary("abb")] == ["ab", "b"]


# bad input


def plain(**changes):
    """A small valid vocabulary, with changes; None removes a key."""
    found = {"model": "gpt2", "pre": "qwen2", "tokens": ["a", "b", "ab", "<|im_end|>"], "merges": ["a b"],
             "token_type": np.array([1, 1, 1, 3], np.int32), "eos_token_id": 3, **changes}  # fmt: skip
    return {f"tokenizer.ggml.{k}": v for k, v in found.items() if v is not None}


def spm(**changes):
    return plain(**{"model": "llama", "pre": None, "merges": None, "scores": np.zeros(4, np.float32), **changes})


def refused(metadata, *words):
    with pytest.raises(ModelError) as caught:
        gguf_tokenizer("x.gguf", metadata)
    assert "x.gguf" in caught.value.message
    for word in words:
        assert word in caught.value.message + (caught.value.hint or "")
    assert caught.value.hint
    assert len(str(caught.value)) < 2000


BAD = {
    "no tokenizer": (dict, ("tokenizer.ggml.model is None", "gpt2")),
    "unknown model": (lambda: plain(model="t5"), ("'t5'", "llama")),
    "model of another type": (lambda: plain(model=np.arange(3)), ("tokenizer.ggml.model", "gpt2")),
    "unknown pre-tokenizer": (lambda: plain(pre="qwen3"), ("'qwen3'", "qwen2")),
    "pre-tokenizer of another type": (lambda: plain(pre=7), ("tokenizer.ggml.pre is 7",)),
    "no tokens": (lambda: plain(tokens=None), ("tokens is None",)),
    "tokens of another type": (lambda: plain(tokens=np.arange(4)), ("a list of texts",)),
    "empty tokens": (lambda: plain(tokens=[], token_type=None), ("1 to",)),
    "a token twice": (lambda: plain(tokens=["a", "b", "a", "<|im_end|>"]), ("'a' twice",)),
    "too few types": (lambda: plain(token_type=np.ones(3, np.int32)), ("token_type", "4")),
    "types as floats": (lambda: plain(token_type=np.ones(4, np.float32)), ("token_type",)),
    "types as texts": (lambda: plain(token_type=["1", "1", "1", "3"]), ("token_type",)),
    "type as one number": (lambda: plain(token_type=1), ("token_type",)),
    "no merges": (lambda: plain(merges=None), ("merges is None",)),
    "merge of three": (lambda: plain(merges=["a b c"]), ("'a b c'", "two tokens")),
    "merge of one": (lambda: plain(merges=["ab"]), ("'ab'",)),
    "merge without a left side": (lambda: plain(merges=[" b"]), ("' b'",)),
    "merge of unknown tokens": (lambda: plain(merges=["a x"]), ("'a x'",)),
    "merge into an unknown token": (lambda: plain(merges=["b a"]), ("'b a'", "a third")),
    "eos as text": (lambda: plain(eos_token_id="3"), ("eos_token_id is '3'",)),
    "eos as a float": (lambda: plain(eos_token_id=3.0), ("eos_token_id",)),
    "eos as a boolean": (lambda: plain(eos_token_id=True), ("eos_token_id",)),
    "bos to add without its id": (lambda: plain(add_bos_token=True), ("bos_token_id", "add_bos_token is true")),
    "eos to add without its id": (lambda: plain(add_eos_token=True, eos_token_id=9), ("eos_token_id",)),
    "flag as a number": (lambda: plain(add_bos_token=1), ("add_bos_token", "true or false")),
    "space prefix as text": (lambda: spm(add_space_prefix="no"), ("add_space_prefix",)),
    "too few scores": (lambda: spm(scores=np.zeros(3, np.float32)), ("scores", "4")),
    "infinite scores": (lambda: spm(scores=np.full(4, np.inf)), ("scores", "finite")),
    "scores as texts": (lambda: spm(scores=["0"] * 4), ("scores",)),
    "too many tokens": (lambda: plain(tokens=["a"] * (2**20 + 1)), ("1,048,576",)),
    "too many merges": (lambda: plain(merges=["a b"] * 5000), ("5,000 merges",)),
    "too many special tokens": (
        lambda: plain(merges=[], tokens=[str(n) for n in range(70_000)], token_type=np.full(70_000, 3)),
        ("70,000 special",),
    ),
    "special tokens that are too long": (
        lambda: plain(merges=[], tokens=[str(n) * 2**18 for n in range(9)], token_type=np.full(9, 4)), ("characters",)
    ),
    "words that can be split in too many ways": (
        lambda: spm(tokens=["a" * n for n in range(1, 1500)], token_type=None, scores=None), ("characters to split",)
    ),
    "too many merges that the words imply": (
        lambda: spm(tokens=["a" * i + "b" * j for i in range(20) for j in range(20) if i + j],
                    token_type=None, scores=None), ("merges, over 4,096",)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_vocabularies(name, monkeypatch):
    monkeypatch.setattr(under_test, "MAX_SPLIT", 2**26)
    monkeypatch.setattr(under_test, "MAX_MERGES", 2**12)
    metadata, words = BAD[name]
    refused(metadata(), *words)


def test_a_token_of_a_megabyte():
    tokenizer, _ = gguf_tokenizer("x.gguf", plain(tokens=["a", "b", "x" * 2**20, "<|im_end|>"], merges=[]))
    assert tokenizer.encode_ordinary("ab") == [0, 1]
    tokenizer, _ = gguf_tokenizer("x.gguf", plain(tokens=["a", "b", "<" + "x" * 2**19, "<|im_end|>"], merges=[],
                                                  token_type=np.array([1, 1, 4, 3])))  # fmt: skip
    assert tokenizer.encode_ordinary("a<" + "x" * 2**19) == [0, 2]
    refused(spm(tokens=["a", "b", "x" * 2**20, "<|im_end|>"]), "characters to split")


def test_empty_tokens_and_a_vocabulary_without_types():
    """An empty token gets a name, as in llama.cpp. The eos is a control token, whatever its type."""
    tokens = ["a", "", "ab", "<|im_end|>", "", "</end>"]
    tokenizer, ends = gguf_tokenizer("x.gguf", plain(tokens=tokens, token_type=None, merges=[], eos_token_id=5))
    assert [tokenizer.has(i) for i in range(7)] == [True] * 6 + [False]
    assert ends == (5, 3)
    assert tokenizer.inner.encode("a</end>a", add_special_tokens=False).ids == [0, 5, 0]
    assert not {3, 5} & {*tokenizer.encode_ordinary("a</end><|im_end|>a")}


LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 2**64), st.floats(), st.text(max_size=4),
    st.lists(st.text(max_size=3), max_size=5),
    st.lists(st.sampled_from(["a", "b", "ab", "▁", "<0x41>", "a b"]), max_size=6),
    st.lists(st.integers(-3, 9), max_size=5).map(lambda x: np.array(x, np.int32)),
    st.lists(st.floats(allow_nan=False, width=32), min_size=4, max_size=4).map(lambda x: np.array(x, np.float32)),
)  # fmt: skip
KEYS = [*plain(), *spm(), *(f"tokenizer.ggml.{k}" for k in ("bos_token_id", "unknown_token_id", "add_bos_token",
        "add_eos_token", "add_space_prefix", "eot_token_id", "padding_token_id", "mask_token_id"))]  # fmt: skip


@pytest.mark.filterwarnings("ignore:.* names no pre-tokenizer")
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(base=st.sampled_from([plain, spm]), changes=st.dictionaries(st.sampled_from(KEYS), LEAVES, max_size=4))
def test_any_vocabulary_loads_or_is_refused(base, changes):
    """By a ModelError alone; what loads encodes and decodes."""
    try:
        tokenizer, ends = gguf_tokenizer("x.gguf", {**base(), **changes})
    except ModelError as error:
        refusal = error
    else:
        refusal = None
    if refusal is not None:
        assert refusal.message
        assert refusal.hint
        return
    ids = tokenizer.encode("ab <|im_end|> ä")
    assert all(0 <= i < tokenizer.vocab_size for i in (*ids, *ends))
    assert isinstance(b"".join(map(tokenizer.token_bytes, ids)), bytes)
