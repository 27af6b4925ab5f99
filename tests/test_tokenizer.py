"""Text to ids and back, against `tokenizers`, for byte-level and SentencePiece-style vocabularies."""

import json
from itertools import pairwise

import pytest
import texts
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrs.core.errors import ModelError, RequestError
from llmrs.models.detokenize import Detokenizer
from llmrs.models.template import ChatTemplate, encode_chat
from llmrs.models.tokenizer import Tokenizer

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


def text_of(tokenizer, ids, stops=()):
    d = Detokenizer(tokenizer, tuple(stops))
    return "".join([*map(d.push, ids), d.flush()])


def test_the_boundary_of_plain_text_is_refused(tokenizer):
    for first in (True, False):
        with pytest.raises(RequestError, match="FDD0"):
            tokenizer.encode_plain("a\ufdd0b", first=first)


@given(text=st.text(st.characters(exclude_characters="\ufdd0", codec="utf-8"), max_size=40))
def test_bytes_of_tokens_are_the_text(tokenizer, text):
    ids = tokenizer.encode_plain(text)
    joined = b"".join(map(tokenizer.token_bytes, ids)).decode()
    assert joined == text or joined == " " + text  # SentencePiece begins each text with a space


@given(text=st.text(max_size=40))
def test_text_equals_that_of_tokenizers(tokenizer, text):
    ids = tokenizer.encode_rendered(text)
    ours, theirs = text_of(tokenizer, ids), tokenizer.inner.decode(ids)
    assert ours in (theirs, " " + theirs)  # SentencePiece begins each text with a space, which `decode` strips


def test_control_tokens_are_parsed_in_prompts_and_text_elsewhere(tokenizer):
    control = tokenizer.specials["eos"]
    (eos,) = tokenizer.eos_ids
    assert eos in tokenizer.encode(f"a{control}b")
    assert eos in tokenizer.encode_rendered(f"a{control}b")
    plain = tokenizer.encode_plain(f"a{control}b")
    assert eos not in plain
    assert b"".join(map(tokenizer.token_bytes, plain)).decode().strip() == f"a{control}b"
    assert tokenizer.token_bytes(eos) == b""


def test_added_tokens_that_are_no_control_tokens_are_part_of_the_answer(tmp_path):
    texts.write_text_files(tmp_path)
    t = Tokenizer.load(tmp_path)
    think = t.id_of("</think>")
    assert t.token_bytes(think) == b"</think>"
    assert think in t.encode("</think>")
    assert think not in t.encode_plain("</think>")


def test_one_beginning_of_sequence(tmp_path):
    texts.write_text_files(tmp_path, texts.byte_level(bos="<|begin|>"), bos_token="<|begin|>")
    t = Tokenizer.load(tmp_path)
    bos = t.id_of("<|begin|>")
    assert t.encode("Hello")[0] == bos
    assert t.encode("<|begin|>Hello") == t.encode("Hello")
    assert t.encode_rendered("<|begin|>Hello") == t.encode("Hello")
    assert t.encode("").count(bos) == 1


def test_unknown_characters_are_bytes(byte_fallback):
    t = byte_fallback
    ids = t.encode_plain("a😀")
    assert ids[-4:] == [t.id_of(f"<0x{byte:02X}>") for byte in "😀".encode()]
    d = Detokenizer(t)
    assert [d.push(i) for i in ids[-4:]] == ["", "", "", "😀"]


BEGINNINGS = {
    "byte-level": ("<|begin|>", texts.byte_level(bos="<|begin|>")),
    "sentencepiece": ("<s>", texts.sentencepiece()),
}


@pytest.mark.parametrize("kind", BEGINNINGS)
@pytest.mark.parametrize("writes", [True, False])
def test_a_template_decides_about_the_beginning_of_sequence(kind, writes, tmp_path):
    """Its own is the only one, in the conversation and where its text is given as a prompt; nobody adds another."""
    bos, inner = BEGINNINGS[kind]
    eos = "</s>" if kind == "sentencepiece" else "<|im_end|>"
    texts.write_text_files(tmp_path, inner, bos_token=bos, eos_token=eos)
    t = Tokenizer.load(tmp_path)
    source = ("{{ bos_token }}" if writes else "") + "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    chat = ChatTemplate(source, t.specials, tmp_path)
    for content in ("Hello", f"{bos}Hello", f"Hello{bos}{eos}"):
        prompt = encode_chat(t, chat, [{"role": "user", "content": content}])
        assert prompt.token_ids.count(t.id_of(bos)) == int(writes)
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
    for encode in (tokenizer.encode, tokenizer.encode_plain, tokenizer.encode_rendered):
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


def test_a_decoder_that_is_not_supported(tmp_path):
    data = json.loads(texts.byte_level().to_str())
    data["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(ModelError, match="WordPiece"):
        Tokenizer.load(tmp_path)


# streaming


def whole(data: bytes, stops):
    """What an answer of these bytes must be: cut at the stop string that is complete first."""
    text = data.decode("utf-8", "replace")
    ends = [(i + len(s), i) for s in stops for i in range(len(text)) if text.startswith(s, i)]
    return text[: min(ends)[1]] if ends else text


class Bytes:
    """A tokenizer whose tokens are given."""

    def __init__(self, pieces):
        self.pieces = pieces

    def token_bytes(self, token):
        return self.pieces[token]


WORDS = st.sampled_from(["a", "b", "ab", "aab", "é", "日", "😀", "\n"])
STOPS = st.lists(st.text("ab\n日", min_size=1, max_size=4), max_size=3)


@settings(max_examples=400)
@given(words=st.lists(WORDS, max_size=15), junk=st.binary(max_size=3), cuts=st.data(), stops=STOPS)
def test_every_way_of_splitting_gives_the_same_text(words, junk, cuts, stops):
    data = "".join(words).encode() + junk + b"end"
    places = sorted(cuts.draw(st.sets(st.integers(0, len(data)))) | {0, len(data)})
    pieces = [data[a:b] for a, b in pairwise(places)]
    d = Detokenizer(Bytes(pieces), tuple(stops))
    shown = [d.push(i) for i in range(len(pieces))]
    expected = whole(data, stops)
    assert "".join([*shown, d.flush()]) == expected
    assert (d.stopped is None) == (expected == data.decode("utf-8", "replace"))
    for n in range(len(shown)):  # nothing that was shown is ever taken back
        assert expected.startswith("".join(shown[:n]))


@settings(max_examples=300)
@given(ids=st.lists(st.integers(0, 340), max_size=30), stops=STOPS)
def test_any_ids_give_the_text_of_their_bytes(tokenizer, ids, stops):
    """Whatever a model says, also bytes that are no UTF-8, control tokens, and ids that stand for nothing."""
    data = b"".join(map(tokenizer.token_bytes, ids))
    assert text_of(tokenizer, ids, stops) == whole(data, stops)
    if not stops:
        assert text_of(tokenizer, ids) == data.decode("utf-8", "replace")


@settings(max_examples=200)
@given(text=st.text(max_size=8), junk=st.binary(max_size=6), stops=STOPS)
def test_bytes_one_by_one(byte_fallback, text, junk, stops):
    """SentencePiece's bytes: each is a token of its own."""
    data = text.encode() + junk
    ids = [byte_fallback.id_of(f"<0x{byte:02X}>") for byte in data]
    assert text_of(byte_fallback, ids, stops) == whole(data, stops)


def test_only_what_could_begin_a_stop_string_is_held_back():
    d = Detokenizer(Bytes([b"Hello S", b"TO", b"R", b"STOP", b"more"]), ("STOP",))
    assert [d.push(i) for i in range(5)] == ["Hello ", "", "STOR", "", ""]
    assert d.stopped == "STOP"
    assert d.flush() == ""


def test_half_a_character_waits_for_the_rest():
    euro = "€".encode()
    d = Detokenizer(Bytes([euro[:1], euro[1:2], euro[2:], euro[:2]]))
    assert [d.push(i) for i in range(3)] == ["", "", "€"]
    assert d.push(3) == ""
    assert d.flush() == "�"
