"""Text to ids and back, against `tokenizers`, for byte-level and SentencePiece-style vocabularies."""

import json
from functools import partial

import pytest
import texts
import tokenizers
import transformers
from hypothesis import given
from hypothesis import strategies as st

from llmrs.core.errors import ModelError, RequestError
from llmrs.models.text.template import ChatTemplate, encode_chat
from llmrs.models.text.tokenizer import Tokenizer

MAKERS = {"byte-level": texts.byte_level, "sentencepiece": texts.sentencepiece}
CONFIGS = {"byte-level": {"eos_token": "<|im_end|>"}, "sentencepiece": {"eos_token": {"content": "</s>"}}}


@pytest.fixture(scope="module", params=MAKERS)
def tokenizer(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    texts.write_text_files(folder, MAKERS[request.param](), **CONFIGS[request.param])
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def byte_fallback(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bytes")
    texts.write_text_files(folder, texts.sentencepiece(), eos_token="</s>")
    return Tokenizer.load(folder)


@pytest.mark.parametrize("character", ["\ufdd0", "\ufdd1"])
def test_internal_noncharacters_are_refused(tokenizer, character):
    for first in (True, False):
        with pytest.raises(RequestError, match="FDD0"):
            tokenizer.encode_ordinary(f"a{character}b", first=first)


@given(text=st.text(st.characters(exclude_characters="\ufdd0\ufdd1", codec="utf-8"), max_size=40))
def test_bytes_of_tokens_are_the_text(tokenizer, text):
    ids = tokenizer.encode_ordinary(text)
    joined = b"".join(map(tokenizer.token_bytes, ids)).decode()
    assert joined == text or joined == " " + text  # SentencePiece begins each text with a space


def test_special_tokens_are_parsed_in_prompts_and_text_elsewhere(tokenizer):
    control = tokenizer.special_tokens["eos"]
    (eos,) = tokenizer.eos_ids
    assert eos in tokenizer.encode(f"a{control}b")
    assert eos in texts.rendered_ids(tokenizer, f"a{control}b")
    plain = tokenizer.encode_ordinary(f"a{control}b")
    assert eos not in plain
    assert b"".join(map(tokenizer.token_bytes, plain)).decode().strip() == f"a{control}b"
    assert tokenizer.token_bytes(eos) == b""


def test_added_tokens_that_are_no_special_tokens_are_part_of_the_answer(tmp_path):
    texts.write_text_files(tmp_path)
    t = Tokenizer.load(tmp_path)
    think = t.token_to_id("</think>")
    assert t.token_bytes(think) == b"</think>"
    for encode in (t.encode, t.encode_ordinary, partial(texts.rendered_ids, t)):
        assert think in encode("a</think>")


SETTINGS = [
    {"eos_token": "</think>"},
    {"pad_token": {"__type": "AddedToken", "content": "</think>", "lstrip": False}},
    {"added_tokens_decoder": {"319": {"content": "</think>", "special": True}}},
    {"eos_token": "the"},  # a word of the vocabulary
]


@pytest.mark.parametrize("given_settings", SETTINGS)
def test_tokens_that_the_settings_call_special_are_special_tokens(given_settings, tmp_path):
    """As in transformers: skipped in text, parsed in prompts, text in messages."""
    texts.write_text_files(tmp_path, tokenizer_class="PreTrainedTokenizerFast", **{"eos_token": None, **given_settings})
    t, theirs = Tokenizer.load(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = [t.token_to_id(word) for word in ("a", "</think>", "b", "the", "<|im_end|>")]
    for skip in (True, False):
        ours = b"".join(t.token_bytes(i, skip_special_tokens=skip) for i in ids).decode()
        assert ours == theirs.decode(ids, skip_special_tokens=skip)
    assert t.encode("a</think>the") == theirs.encode("a</think>the")
    word = "the" if given_settings == SETTINGS[-1] else "</think>"
    assert t.token_to_id(word) in t.special_ids
    assert t.token_to_id(word) not in t.encode_ordinary(f"a{word}b")


def test_one_beginning_of_sequence(tmp_path):
    texts.write_text_files(tmp_path, texts.byte_level(bos="<|begin|>"), bos_token="<|begin|>")
    t = Tokenizer.load(tmp_path)
    bos = t.token_to_id("<|begin|>")
    assert t.encode("Hello")[0] == bos
    assert t.encode("<|begin|>Hello") == t.encode("Hello")
    assert texts.rendered_ids(t, "<|begin|>Hello") == t.encode("Hello")
    assert t.encode("").count(bos) == 1


def test_unknown_characters_are_bytes(byte_fallback):
    t = byte_fallback
    assert t.encode_ordinary("a😀")[-4:] == [t.token_to_id(f"<0x{byte:02X}>") for byte in "😀".encode()]


BEGINNINGS = {
    "byte-level": ("<|begin|>", texts.byte_level(bos="<|begin|>")),
    "sentencepiece": ("<s>", texts.sentencepiece()),
}


@pytest.mark.parametrize("kind", BEGINNINGS)
@pytest.mark.parametrize("writes", [True, False])
def test_a_template_decides_about_the_beginning_of_sequence(kind, writes, tmp_path):
    """Its BOS is the only one, in the conversation and in its text as a prompt."""
    bos, inner = BEGINNINGS[kind]
    eos = "</s>" if kind == "sentencepiece" else "<|im_end|>"
    texts.write_text_files(tmp_path, inner, bos_token=bos, eos_token=eos)
    t = Tokenizer.load(tmp_path)
    source = ("{{ bos_token }}" if writes else "") + "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    chat = ChatTemplate(source, t.special_tokens, tmp_path)
    for content in ("Hello", f"{bos}Hello", f"Hello{bos}{eos}"):
        prompt = encode_chat(t, chat, [{"role": "user", "content": content}])
        assert prompt.token_ids.count(t.token_to_id(bos)) == int(writes)
        assert prompt.token_ids.count(*t.eos_ids) == 1
    prompt = encode_chat(t, chat, [{"role": "user", "content": "Hello"}])
    if writes:
        assert t.encode(str(prompt)) == list(prompt.token_ids)


def test_ids_that_stand_for_nothing(tokenizer):
    assert tokenizer.token_bytes(tokenizer.vocab_size + 5) == b""
    assert not tokenizer.has(tokenizer.vocab_size + 5)


def test_a_file_that_asks_for_truncation_is_not_obeyed(tmp_path):
    inner = texts.byte_level()
    inner.enable_truncation(2)
    inner.enable_padding(length=500)
    texts.write_text_files(tmp_path, inner)
    assert 2 < len(Tokenizer.load(tmp_path).encode("Hello world, how are you?")) < 100


def test_a_lone_surrogate_is_refused(tokenizer):
    for encode in (tokenizer.encode, tokenizer.encode_ordinary):
        with pytest.raises(RequestError, match=r"\\ud800"):
            encode("Hi \ud800")


@pytest.mark.parametrize("keep", [0, 1, 1000, -1])
def test_a_file_that_is_cut_off(tmp_path, keep):
    texts.write_text_files(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("content", ["{}", "[]", "null", '{"model": 3}', "\xff", "[" * 100000])
def test_files_that_are_no_tokenizer(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_no_file(tmp_path):
    with pytest.raises(ModelError, match=r"there is no file .*tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_an_end_of_sequence_that_is_not_in_the_vocabulary(tmp_path):
    texts.write_text_files(tmp_path, eos_token="<|nowhere|>")
    with pytest.raises(ModelError, match=r"<\|nowhere\|>"):
        Tokenizer.load(tmp_path)


FUSE = {"type": "Fuse"}
UNSUPPORTED = {
    "CTC": {"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": True},
    "Fuse": FUSE,
    "ByteFallback, Fuse, Replace": {
        "type": "Sequence",
        "decoders": [{"type": "ByteFallback"}, FUSE, {"type": "Replace", "pattern": {"String": "ab"}, "content": ""}],
    },
    "Strip, ByteFallback": {
        "type": "Sequence",
        "decoders": [{"type": "Strip", "content": " ", "start": 0, "stop": 1}, {"type": "ByteFallback"}],
    },
    "none": None,
}


@pytest.mark.parametrize("shown", UNSUPPORTED)
def test_a_decoder_that_is_not_supported(tmp_path, shown):
    data = json.loads(texts.byte_level().to_str())
    data["decoder"] = UNSUPPORTED[shown]
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(ModelError, match=f"decoder .{shown}. is not supported"):
        Tokenizer.load(tmp_path)


def unigram():
    """In Unigram a whole special token is likelier than its characters."""
    words = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((c, -3.0) for c in "▁</>sabc")]
    return tokenizers.Tokenizer(tokenizers.models.Unigram(words, 0))


def bpe():
    words = {w: n for n, w in enumerate(["<unk>", "<s>", "</s>", *"▁</>sabc", "</", "s>"])}
    merges = [("<", "/"), ("s", ">"), ("<", "s>"), ("</", "s>")]
    return tokenizers.Tokenizer(tokenizers.models.BPE(words, merges, unk_token="<unk>"))


def words():
    t = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: n for n, w in enumerate(["<unk>", "<s>", "</s>", "a", "b"])}, "<unk>")
    )
    t.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return t


@pytest.mark.parametrize("make", [unigram, bpe, words])
def test_no_model_makes_special_tokens_of_plain_text(make, tmp_path):
    inner = make()
    inner.decoder = tokenizers.decoders.Metaspace()
    inner.add_special_tokens(["<s>", "</s>"])
    inner.add_tokens([tokenizers.AddedToken("<b>", special=False, normalized=False)])
    texts.write_text_files(tmp_path, inner, eos_token="</s>")
    t = Tokenizer.load(tmp_path)
    assert t.encode("a </s> <b>").count(t.token_to_id("</s>")) == 1
    plain = t.encode_ordinary("a <s> </s> <b>")
    assert t.special_ids.isdisjoint(plain)
    assert plain[-1] == t.token_to_id("<b>")
    assert max(plain) < t.vocab_size
    assert t.encode_ordinary("a b") == texts.rendered_ids(t, "a b")
