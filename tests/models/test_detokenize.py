"""Streaming detokenization: equal to `tokenizers`, and stopped before stop strings."""

from itertools import groupby, pairwise
from pathlib import Path

import pytest
import texts
import tokenizers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models

from llmrs.models.text.decoder import BYTE, BYTE_OF_LETTER
from llmrs.models.text.detokenize import Detokenizer
from llmrs.models.text.tokenizer import Tokenizer

WORDS = ["a", "▁b", "▁▁", "▁", "é", "日本", ".", "'s", " ", "n't", "##b", "b</w>", "Ġb", "<0x41>", "<0xe9>", "Ċ", "▁."]
LLAMA = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
DECODERS = {
    "byte-level": decoders.ByteLevel(),
    "llama": decoders.Sequence([*LLAMA, decoders.Strip(" ", 1, 0)]),
    "gemma": decoders.Sequence(LLAMA),
    "strip each": decoders.Sequence([LLAMA[0], decoders.Strip(" ", 1), decoders.Fuse(), LLAMA[0]]),
    "metaspace": decoders.Metaspace(),
    "metaspace first": decoders.Metaspace(prepend_scheme="first"),
    "metaspace never": decoders.Metaspace("_", "never"),
    "metaspace bytes": decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()]),
    "wordpiece": decoders.WordPiece(),
    "wordpiece as it is": decoders.WordPiece("##", cleanup=False),
    "suffix": decoders.BPEDecoder(),
}
ADDED = [
    AddedToken("</s>", special=True),
    AddedToken("<|im▁end|>", special=True, lstrip=True, rstrip=True),
    AddedToken("[SEP]", special=True, single_word=True, normalized=True),
    AddedToken("▁▁▁▁", special=False),
    AddedToken("<h1>", special=False, normalized=False),
    AddedToken(" the ", special=False, lstrip=True, rstrip=True),
    AddedToken("<café>", special=False),
    AddedToken("##x", special=False),
    AddedToken("\n\n", special=False, normalized=True),
]


def small(decoder):
    """A vocabulary with words in every spelling, all bytes twice, and added tokens of every kind."""
    letters = [c for c in tokenizers.pre_tokenizers.ByteLevel.alphabet() if c not in WORDS]
    words = [*WORDS, *(f"<0x{b:02X}>" for b in range(256) if b != 0x41), *letters]
    t = tokenizers.Tokenizer(models.WordLevel({w: n for n, w in enumerate(words)}, "a"))
    t.add_tokens(ADDED)
    t.decoder = decoder
    return t


@pytest.fixture(scope="module", params=DECODERS)
def tokenizer(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    texts.write_text_files(folder, small(DECODERS[request.param]), eos_token="</s>")
    return Tokenizer.load(folder)


def byte_ids(t, data):
    names = {b: c for c, b in BYTE_OF_LETTER.items()} if isinstance(t.inner.decoder, decoders.ByteLevel) else {}
    return [t.token_to_id(names.get(b, f"<0x{b:02X}>")) for b in data]


def text_of(t, ids, stops=(), minimum=0, **options):
    d = Detokenizer(t, tuple(stops), minimum, **options)
    return "".join([*map(d.add, ids), d.flush()])


def between(t, ids, skip):
    """The ids decoded by `tokenizers`, in the middle of a text."""
    a = t.token_to_id("a")
    before, whole = t.inner.decode([a]), t.inner.decode([a, *ids, a], skip_special_tokens=skip)
    after = t.inner.decode([a, a])[len(before) :]
    assert (whole[: len(before)], whole[len(whole) - len(after) :]) == (before, after)
    return whole[len(before) : len(whole) - len(after)]


def runs(t, ids, skip):
    """The runs of bytes that ByteFallback decodes together."""
    words = [t.inner.id_to_token(i) for i in ids if t.inner.id_to_token(i) and not (skip and i in t.special_ids)]
    for fallback, run in groupby(words, lambda w: bool(BYTE.fullmatch(w))):
        if fallback:
            yield bytes(int(w[3:5], 16) for w in run)


def is_mixed(data):
    text = data.decode(errors="ignore")
    return bool(text) and len(text.encode()) < len(data)


CHUNKS = st.one_of(
    st.tuples(st.just("ids"), st.lists(st.integers(0, 900), max_size=4)),
    st.tuples(st.just("added"), st.sampled_from([t.content for t in ADDED])),
    st.tuples(st.just("bytes"), st.text("a é日😀\x00", max_size=3).map(str.encode) | st.binary(max_size=2)),
)


def ids_of(t, chunks):
    for kind, value in chunks:
        yield from value if kind == "ids" else [t.token_to_id(value)] if kind == "added" else byte_ids(t, value)


@pytest.mark.parametrize("skip", [True, False])
@settings(max_examples=300, deadline=None)
@given(chunks=st.lists(CHUNKS, max_size=8))
def test_pieces_joined_are_what_tokenizers_decodes(tokenizer, skip, chunks):
    ids = list(ids_of(tokenizer, chunks))
    assume(not any(map(is_mixed, runs(tokenizer, ids, skip))))
    assert text_of(tokenizer, ids, skip_special_tokens=skip) == between(tokenizer, ids, skip)


def test_every_single_id(tokenizer):
    for i in range(tokenizer.vocab_size + 2):
        for skip in (True, False):
            assert text_of(tokenizer, [i], skip_special_tokens=skip) == between(tokenizer, [i], skip)


def test_whole_characters_among_wrong_bytes_stay(tmp_path):
    """The one difference to ByteFallback, which gives up all bytes in a row: a stream has shown the character."""
    texts.write_text_files(tmp_path, small(DECODERS["gemma"]), eos_token="</s>")
    t = Tokenizer.load(tmp_path)
    ids = byte_ids(t, "é".encode() + b"\xe2\x82")
    assert text_of(t, ids) == "é\ufffd\ufffd"
    assert between(t, ids, True) == "\ufffd" * 4


@pytest.mark.parametrize("make", [texts.byte_level, texts.sentencepiece])
@given(text=st.text(max_size=40))
def test_encoded_text_comes_back(make, text):
    t = Tokenizer(make(), {}, Path("tokenizer.json"))
    ids = texts.rendered_ids(t, text)
    assert text_of(t, ids) in (t.inner.decode(ids), " " + t.inner.decode(ids))  # which takes the first space off


# stop strings


class Pieces:
    """A tokenizer with given pieces, some of them special tokens."""

    errors = "replace"

    def __init__(self, pieces, control=()):
        self.all_pieces, self.special_ids = pieces, frozenset(control)

    def pieces(self, skip):
        return ["" if skip and n in self.special_ids else p for n, p in enumerate(self.all_pieces)]


def whole(data: bytes, stops):
    """The expected answer: truncated at the stop string that completes first."""
    text = data.decode("utf-8", "replace")
    ends = [(i + len(s), i) for s in stops for i in range(len(text)) if text.startswith(s, i)]
    return text[: min(ends)[1]] if ends else text


WORD = st.sampled_from(["a", "b", "ab", "aab", "é", "日", "😀", "\n"])
STOPS = st.lists(st.text("ab\n日", min_size=1, max_size=4), max_size=3)


@settings(max_examples=400)
@given(words=st.lists(WORD, max_size=15), junk=st.binary(max_size=3), cuts=st.data(), stops=STOPS)
def test_every_way_of_splitting_gives_the_same_text(words, junk, cuts, stops):
    data = "".join(words).encode() + junk + b"end"
    places = sorted(cuts.draw(st.sets(st.integers(0, len(data)))) | {0, len(data)})
    pieces = [data[a:b] for a, b in pairwise(places)]
    d = Detokenizer(Pieces(pieces), tuple(stops))
    shown = [d.add(i) for i in range(len(pieces))]
    expected = whole(data, stops)
    assert "".join([*shown, d.flush()]) == expected
    assert (d.stopped is None) == (expected == data.decode("utf-8", "replace"))
    for n in range(len(shown)):  # nothing that was shown is ever taken back
        assert expected.startswith("".join(shown[:n]))


@settings(max_examples=600)
@given(
    pieces=st.lists(st.text("ab<>", max_size=3), max_size=10),
    control=st.sets(st.integers(0, 9)),
    stops=st.lists(st.text("ab<>", min_size=1, max_size=5), min_size=1, max_size=3),
    minimum=st.integers(0, 6),
    skip=st.booleans(),
)
def test_stop_strings_see_special_tokens_and_wait_for_the_minimum(pieces, control, stops, minimum, skip):
    tokenizer = Pieces(pieces, control)
    text = "".join(pieces)
    early = len("".join(pieces[:minimum]))
    ends = [(i + len(s), i, s) for s in stops for i in range(len(text)) if text.startswith(s, i) and i + len(s) > early]
    cut = min(ends)[1] if ends else len(text)
    places = [(n, c) for n, p in enumerate(pieces) for c in p][:cut]
    expected = "".join(c for n, c in places if not (skip and n in control))
    d = Detokenizer(tokenizer, tuple(stops), minimum, skip_special_tokens=skip)
    shown = [d.add(n) for n in range(len(pieces))]
    assert "".join([*shown, d.flush()]) == expected
    assert d.stopped == (min(ends)[2] if ends else None)


def test_a_special_token_that_is_skipped_is_a_stop_string():
    t = Pieces(["Hello", "<|end|>", " more", "<|", "end|>"], control=[1])
    for stop, ids, expected in [
        ("<|end|>", [0, 2, 1, 2], "Hello more"),
        ("lo<|end|> m", [0, 1, 2], "Hel"),
        ("<|end|>", [0, 3, 4, 2], "Hello"),
        ("|> more", [0, 1, 2, 0], "Hello"),
        ("<|end|><|end|>", [0, 1, 2, 1, 1, 0], "Hello more"),
    ]:
        assert text_of(t, ids, [stop]) == expected
    assert text_of(t, [0, 1, 2], ["more."]) == "Hello more"


def test_a_special_token_does_not_split_a_character():
    t = Pieces(["é".encode()[:1], "<|end|>", "é".encode()[1:], "!"], control=[1])
    assert text_of(t, [0, 1, 2, 3]) == text_of(t, [0, 1, 2, 3], ["?"]) == "é!"
    assert text_of(t, [0, 1, 2, 3], skip_special_tokens=False) == "\ufffd<|end|>\ufffd!"
    assert text_of(t, [0, 1, 2, 3], ["<|end|>"]) == ""


def test_only_what_could_begin_a_stop_string_is_held_back():
    d = Detokenizer(Pieces([b"Hello S", b"TO", b"R", b"STOP", b"more"]), ("STOP",))
    assert [d.add(i) for i in range(5)] == ["Hello ", "", "STOR", "", ""]
    assert d.stopped == "STOP"
    assert d.flush() == ""


def test_half_a_character_waits_for_the_rest():
    euro = "€".encode()
    d = Detokenizer(Pieces([euro[:1], euro[1:2], euro[2:], euro[:2]]))
    assert [d.add(i) for i in range(3)] == ["", "", "€"]
    assert d.add(3) == ""
    assert d.flush() == "�"


def test_half_a_character_at_the_end_may_complete_a_stop_string():
    d = Detokenizer(Pieces(["a", "€".encode()[:2]]), ("a\ufffd",))
    assert [d.add(0), d.add(1), d.flush()] == ["", "", ""]
    assert d.stopped == "a\ufffd"
