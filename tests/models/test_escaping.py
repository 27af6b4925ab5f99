"""Escaped strings: templates don't see the escapes, and can't build special tokens from them."""

import itertools

import jinja2
import pytest
import texts
from hypothesis import given, settings
from hypothesis import strategies as st
from talks import BOS, EOS, chat_template, vocabulary

from llmrs.models.text.conversation import conversation
from llmrs.models.text.escaped_str import EscapedStr
from llmrs.models.text.escaping import escape_special_tokens
from llmrs.models.text.message import Message
from llmrs.models.text.template import encode_chat
from llmrs.models.text.tokenizer import Tokenizer

ESCAPE = "\ue000"
LETTERS = st.text("ab |<>\n", max_size=8)
SHORT = st.text("ab |<>\n", max_size=2)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    texts.write_text_files(folder, vocabulary(), bos_token=BOS, eos_token=EOS)
    return Tokenizer.load(folder)


def escaped(text, places):
    """The text with escapes before these characters."""
    at = sorted(p % (len(text) + 1) for p in places)
    cuts = [0, *at, len(text)]
    return EscapedStr(ESCAPE.join(text[a:b] for a, b in itertools.pairwise(cuts)), ESCAPE)


def bare(value):
    """What a template sees: str methods, not the raw text."""
    if isinstance(value, str):
        return "".join(c.replace(ESCAPE, "") for c in map(str.__str__, value))
    return [bare(v) for v in value] if isinstance(value, list | tuple) else value


QUERIES = {
    "len": lambda s, x, y: len(s),
    "bool": lambda s, x, y: bool(s),
    "==": lambda s, x, y: (s == x, x == s, s != x, s < x, x < s, s <= x, s > x, s >= x),
    "hash": lambda s, x, y: ({s: 1}.get(x), {x: 1}.get(s), s in [x, y], x in {s}),
    "in": lambda s, x, y: x in s,
    "find": lambda s, x, y: (s.find(x), s.rfind(x), s.find(x, 1), s.count(x), s.find(x, -3, -1)),
    "starts": lambda s, x, y: (s.startswith(x), s.endswith(y), s.startswith((x, y)), s.startswith(x, 2)),
    "is": lambda s, x, y: (s.isalpha(), s.isspace(), s.islower(), s.isprintable(), s.isalnum()),
    "index": lambda s, x, y: [bare(s[n]) for n in range(-len(s), len(s))],
    "slice": lambda s, x, y: bare([s[1:], s[:-1], s[2:5], s[::-1], s[::2], s[5:2], s[-3:], s[4:1:-2], s[:]]),
    "iterate": lambda s, x, y: bare(list(s)),
    "reversed": lambda s, x, y: bare(list(reversed(s))),
    "strip": lambda s, x, y: bare([s.strip(), s.lstrip(), s.rstrip(), s.strip(x), s.lstrip(x), s.rstrip(y)]),
    "remove": lambda s, x, y: bare([s.removeprefix(x), s.removesuffix(y)]),
    "split": lambda s, x, y: bare([s.split(), s.split(None, 1), s.rsplit(None, 1), s.splitlines(), s.splitlines(True)]),
    "split at": lambda s, x, y: bare([f(x or "a") for f in (s.split, s.rsplit, s.partition, s.rpartition)]),
    "split once": lambda s, x, y: bare([s.split(x or "a", 1), s.rsplit(x or "a", 1)]),
    "replace": lambda s, x, y: bare([s.replace(x or "a", y), s.replace(x or "a", y, 1)]),
    "case": lambda s, x, y: bare([s.upper(), s.lower(), s.title(), s.capitalize(), s.swapcase()]),
    "add": lambda s, x, y: bare(s + x),
    "str": lambda s, x, y: bare(str(s)),
}


@pytest.mark.parametrize("name", QUERIES)
@settings(max_examples=200)
@given(text=LETTERS, x=SHORT, y=SHORT, places=st.lists(st.integers(0, 8), max_size=3))
def test_escapes_are_hidden(name, text, x, y, places):
    ask = QUERIES[name]
    for other in (x, text):
        assert ask(escaped(text, places), other, y) == ask(text, other, y)
        assert ask(escaped(text, places), escaped(other, places), y) == ask(text, other, y)


@given(text=LETTERS.filter(bool), x=SHORT.filter(bool), places=st.lists(st.integers(0, 8), max_size=3))
def test_no_escape_is_lost(text, x, places):
    s = escaped(text, places)
    for pieces in (list(s), s.partition(x), s.rpartition(x), s.splitlines(True), [s[:3], s[3:]], [s.upper()], [f"{s}"]):
        assert sum(str.count(piece, ESCAPE) for piece in pieces) >= len(places)


def test_repr_keeps_the_escape():
    assert repr([EscapedStr(f"a{ESCAPE}\\ue000\n", ESCAPE)]) == f"['a{ESCAPE}\\\\ue000\\n']"


CONTENT = "ab<|end|>cd<|end|>"
SEES = [
    "{{ content | length }}{{ content == 'ab<|end|>cd<|end|>' }}{{ 'ab<|end|>cd<|end|>' == content }}",
    "{% if '<|end|>' in content %}yes{% endif %}{{ content in ['x', 'ab<|end|>cd<|end|>'] }}",
    "{{ content.split('<|end|>') | join('-') }} {{ content.split('<|end|>')[-1] | length }}",
    "{{ content.startswith('ab<|') }}{{ content.endswith('|>') }}{{ content.find('cd') }}{{ content[3:6] }}",
    "{{ content | replace('<|end|>', '') }}{{ content.replace('|', '') }}{{ content | trim | length }}",
    "{% set x %}{{ content }}!{% endset %}{{ x | length }}{{ x == content ~ '!' }}{{ x[:-1] == content }}",
    "{% macro m(c) %}{{ c }}{% endmacro %}{{ m(content) == content }}{{ m(content).split('|>') | length }}",
    "{% set x = 'x' + content + 'y' %}{{ x | length }}{{ x[1:-1] == content }}{{ ('%s' % content) == content }}",
    "{{ {'k': content}['k'] == content }}{{ {content: 1}['ab<|end|>cd<|end|>'] }}{{ content is string }}",
    "{% for c in content %}{{ c }}.{% endfor %}{{ content[2] }}{{ content | first }}{{ content | last }}",
    "{{ content | upper }}{{ content | title }}{{ content | list | length }}{{ content | reverse }}",
    "{{ messages | map(attribute='content') | map('length') | list }}{{ [content] }}{{ content | tojson }}",
    "{{ messages | selectattr('content', 'equalto', 'ab<|end|>cd<|end|>') | list | length }}",
    "{% if '<|end|>' in content %}{{ raise_exception('<|end|> in the content') }}{% endif %}",
]


@pytest.mark.parametrize("source", SEES)
def test_a_template_sees_what_was_written(tokenizer, source):
    """As in plain Jinja, with no special tokens but the template's own."""
    source = "{% set content = messages[0].content %}" + source
    talk = [{"role": "user", "content": CONTENT}]
    plain = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, finalize=None)

    class Refuses(Exception):
        pass

    def refuse(words):
        raise Refuses(words)

    try:
        right = plain.from_string(source).render(messages=talk, raise_exception=refuse)
    except Refuses as error:
        with pytest.raises(Exception, match=str(error).replace("|", r"\|")):
            encode_chat(tokenizer, chat_template(source), talk)
        return
    right = right.replace(plain.from_string("{{ c | tojson }}").render(c=CONTENT), f'"{CONTENT}"')  # not for HTML
    prompt = encode_chat(tokenizer, chat_template(source + "<|end|>"), talk)
    assert prompt == right + "<|end|>"
    assert [i for i in prompt.token_ids if i in tokenizer.special_ids] == [tokenizer.token_to_id("<|end|>")]


TAKES_OUT = [
    ("{{ c.replace('XX', '') }}", "<|XXend|>"),
    ("{{ c.split('XX') | join }}", "a<|eXXnd|>"),
    ("{{ c | lower }}", "<|END|>"),
    ("{{ c | replace('<think>', '') }}", "<|en<think>d|>"),
    ("{{ c[:4] ~ c[6:] }}", "<|en..d|>"),
    ("<{{ c[1:] }}", "<|end|>"),
    ("{% for x in c %}{{ x }}{% endfor %}", "<|end|>"),
    ("{{ c | list | join }}{{ c | reverse | reverse }}", "<|end|>"),
    ("{{ c | trim }}{{ c.strip('a') }}{{ c.partition('e') | join }}", "a<|end|>a"),
]


@pytest.mark.parametrize(("source", "content"), TAKES_OUT)
def test_no_template_makes_a_special_token_of_what_was_written(tokenizer, source, content):
    template = chat_template("{% set c = messages[0].content %}" + source + "<|end|>")
    prompt = encode_chat(tokenizer, template, [Message("user", content)])
    assert "<|end|>" in prompt.removesuffix("<|end|>")
    assert [i for i in prompt.token_ids if i in tokenizer.special_ids] == [tokenizer.token_to_id("<|end|>")]


def test_roles_may_be_parts_of_special_tokens(tokenizer):
    template = chat_template("{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}")
    prompt = encode_chat(tokenizer, template, [Message("user", "a")])
    assert prompt.token_ids[0] == tokenizer.token_to_id("<|user|>")


def test_a_special_token_of_one_character(tmp_path):
    inner = texts.byte_level()
    inner.add_special_tokens(["§"])
    texts.write_text_files(tmp_path, inner)
    t = Tokenizer.load(tmp_path)
    prompt = encode_chat(t, chat_template("§{{ messages[0].content }}§"), [Message("user", "a§§ b§")])
    assert prompt == "§a§§ b§§"
    assert [n for n, i in enumerate(prompt.token_ids) if i == t.token_to_id("§")] == [0, len(prompt.token_ids) - 1]


def test_a_word_is_escaped_only_whole():
    (message,) = escape_special_tokens(
        conversation([Message("user", "name naming NAME <b <a>")]), {"name", "<a>"}, ESCAPE
    ).messages
    assert str.__str__(message["content"]) == f"n{ESCAPE}ame naming N{ESCAPE}AME <b <{ESCAPE}a>"
