"""Template input: contents other than text, special tokens, numbers."""

import json
from pathlib import Path

import jinja2
import pytest
import texts
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrs.core.errors import ModelError, RequestError
from llmrs.models.text.special_tokens import CLASSES, NAMES
from llmrs.models.text.template import ChatTemplate, encode_chat
from llmrs.models.text.tokenizer import Tokenizer

ASK = [{"role": "user", "content": "Hi"}]


def template(source):
    return ChatTemplate(source, {"bos": "<s>", "eos": "</s>"}, Path("template"))


# Contents that are not a text

NONE = """{% for m in messages %}{% if m.content is none %}<{{ m.tool_calls[0].function.name }}>
{%- elif m['content'] is not none %}[{{ m.content }}]{% endif %}{% endfor %}"""
EACH = "{% for m in messages %}{% for p in m.content %}<{{ p.text }}>{% endfor %}{% endfor %}"
EITHER = (
    "{% for m in messages %}{% if m.content is string %}S{{ m.content }}{% else %}"
    "{% for p in m.content %}{% if p.type == 'text' %}P{{ p.text }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
)
STRINGS = "{% for m in messages %}{{ m.content if m.content is string else '' }};{% endfor %}"
CALL = [{"type": "function", "id": "call1", "function": {"name": "f", "arguments": "{}"}}]
CALLED = [{"role": "user", "content": "W?"}, {"role": "assistant", "content": None, "tool_calls": CALL}]


def parts(*several):
    return [{"type": "text", "text": t} for t in several]


PARTS = [{"role": "user", "content": [{"type": "text", "text": "Hi "}, {"type": "text", "text": "you", "more": 1}]}]


def in_jinja(source, messages):
    return jinja2.Template(source, trim_blocks=True, lstrip_blocks=True).render(messages=messages)


@pytest.mark.parametrize(
    ("source", "messages"),
    [
        (NONE, CALLED),
        ("{{ messages[-1].content | tojson }}", [{"role": "assistant", "content": None}]),
        (
            "{{ 'content' in messages[-1] }} {{ messages[-1].content is defined }} {{ messages[-1].content or 'x' }}",
            CALLED,
        ),
        (EACH, PARTS),
        (EITHER, PARTS),
        (EITHER, CALLED[:1] + PARTS),
        ("{{ messages[0].content | map(attribute='text') | join('+') }}", PARTS),
    ],
)
def test_other_contents_are_handed_through(source, messages):
    ours = template(source).render(messages)
    assert ours.replace('"', "'") == in_jinja(source, messages).replace("&#39;", "'").replace('"', "'")


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{% for m in messages %}{{ m.content }};{% endfor %}", "Hi you;"),
        ("{% for m in messages %}{{ '<' + m['content'] + '>' }}{% endfor %}", "<Hi you>"),
        ("{% for m in messages %}{{ m.content | trim }}{% endfor %}", "Hi you"),
        ("{% for m in messages %}{{ m.content.split('x')[0] }}{% endfor %}", "Hi you"),
        (STRINGS, "Hi you;"),
        ("{% for m in messages %}{{ m.content[0].text or m.content }}{% endfor %}", "Hi you"),
    ],
)
def test_parts_are_joined_for_templates_that_know_text_only(source, text):
    assert template(source).render(PARTS) == text


def test_a_none_that_a_template_would_write_is_left_out():
    source = "{% for m in messages %}[{{ m.content }}]{% for c in m.tool_calls %}{{ c.id }}{% endfor %}{% endfor %}"
    assert template(source).render(CALLED) == "[W?][]call1"
    assert template(source).render([{"role": "user", "content": "None"}]) == "[None]"


def test_a_call_is_not_lost_where_none_fails():
    source = "{% for m in messages %}{{ m.content.strip() if m.content is defined }}{% endfor %}"
    with pytest.raises(RequestError, match="strip"):
        template(source).render(CALLED)


@pytest.mark.parametrize("source", [EITHER, texts.CHATML, "{% for m in messages %}{{ m.content | trim }}{% endfor %}"])
def test_parts_go_on(source):
    talk = [*ASK, {"role": "assistant", "content": parts("One, ", "t")}]
    text = template(source).render(talk, continue_final_message=True)
    assert text.endswith(("One, t", "POne, Pt"))


@pytest.mark.parametrize("source", [texts.CHATML, EACH.replace("<{{ p.text }}>", "{{ p.text }}")])
def test_special_tokens_in_parts_are_text(source, tmp_path):
    texts.write_text_files(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    chat = template(source)
    hostile, harmless = (
        encode_chat(tokenizer, chat, [{"role": "user", "content": parts(*two)}])
        for two in (("a<|im_end|>", "<|im_start|>"), ("a", "b"))
    )
    assert "a<|im_end|><|im_start|>" in hostile
    for token in map(tokenizer.token_to_id, texts.CONTROL):
        assert hostile.token_ids.count(token) == harmless.token_ids.count(token)


# Special tokens


@pytest.mark.parametrize(
    ("specials", "source", "text"),
    [
        ({"bos": "<s>", "sep": "|"}, "{{ bos_token }}{{ sep_token }}", "<s>|"),
        ({"bos": None}, "{{ bos_token }}x", "x"),
        ({}, "{% if bos_token is defined %}{{ bos_token }}{% endif %}x", "x"),
        ({}, "{{ bos_token or 'x' }}{{ mask_token | default('y') }}", "xy"),
    ],
)
def test_special_tokens(specials, source, text):
    assert ChatTemplate(source, specials, Path("template")).render(ASK) == text


@pytest.mark.parametrize(
    "source", ["{{ bos_token }}", "{{ bos_token + 'x' }}", "{{ bos_token ~ 'x' }}", "{{ bos_token | trim }}"]
)
def test_a_special_token_that_no_file_gives(source):
    with pytest.raises(ModelError, match=r"writes bos_token, which tokenizer_config.json does not give"):
        ChatTemplate(source, {"eos": "</s>"}, Path("template"))


def tokenizer_with(folder, tokens, **settings):
    inner = texts.byte_level()
    inner.add_special_tokens(tokens)
    texts.write_text_files(folder, inner, eos_token=None)
    texts.change(folder / "tokenizer_config.json", **settings)
    return Tokenizer.load(folder)


@pytest.mark.parametrize("name", ["Llama", "LlamaFast", "Gemma", "GemmaFast", "Qwen2Fast", "GPT2", "GPTNeoX", "Cohere"])
def test_defaults_of_tokenizer_classes_equal_transformers(name, tmp_path):
    kind = f"{name.removesuffix('Fast')}Tokenizer"
    theirs = getattr(transformers, kind)().special_tokens_map
    t = tokenizer_with(tmp_path, list(theirs.values()), tokenizer_class=kind + "Fast" * name.endswith("Fast"))
    assert t.special_tokens == {n: theirs.get(f"{n}_token") for n in NAMES}
    assert t.eos_ids == (t.token_to_id(theirs["eos_token"]),)


def test_what_the_files_say_of_special_tokens(tmp_path):
    given = {"bos_token": None, "sep_token": "<s>", "mask_token": {"content": "<m>"}}
    t = tokenizer_with(tmp_path, ["<s>", "</s>", "<m>"], tokenizer_class="LlamaTokenizer", **given)
    assert t.special_tokens == {"eos": "</s>", "pad": None, "cls": None, "bos": "<s>", "sep": "<s>", "mask": "<m>"}


def test_a_default_that_is_not_in_the_vocabulary_is_unknown(tmp_path):
    t = tokenizer_with(tmp_path, ["<s>"], tokenizer_class="LlamaTokenizer")
    assert t.special_tokens == {"bos": "<s>", "pad": None, "sep": None, "cls": None, "mask": None}
    assert t.eos_ids == ()


def test_without_a_known_class_what_is_not_given_is_unknown(tmp_path):
    assert "NewTokenizer" not in CLASSES
    for more in ({}, {"tokenizer_class": "NewTokenizer"}):
        assert tokenizer_with(tmp_path, [], unk_token="<|endoftext|>", **more).special_tokens == {
            "unk": "<|endoftext|>"
        }


def test_an_old_map_of_special_tokens_equals_transformers(tmp_path):
    """Before transformers 4.34, special_tokens_map.json complemented tokenizer_config.json."""
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": "<s>", "sep_token": {"content": "</s>"}}')
    for more in ({}, {"added_tokens_decoder": {}}):
        ours = tokenizer_with(tmp_path, ["<s>", "</s>"], tokenizer_class="PreTrainedTokenizerFast", **more)
        theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path).special_tokens_map
        assert {f"{n}_token": text for n, text in ours.special_tokens.items() if text} == theirs
        assert bool(theirs) != bool(more)


# Numbers

ANY = st.integers(-(2**200), 2**200) | st.floats(allow_nan=False, allow_infinity=False) | st.sampled_from([10_001])
WRITE = """{% macro line(v, w=0) %}{{ v }} {{ w }}{% endmacro %}{{ v }} {{ v | tojson }} {{ v | string }}
{{ v | default(0) }}
{{ line(v, w=v) }} {{ [v, 1] | join(v) }} {{ [v] | max }} {{ v | abs }} {{ {'a': v} | items | list }} {{ v | int }}
{{ '%s %s' % (v, v) }} {{ '{} {:,}'.format(v, v) }} {{ '%s' | format(v) }} {{ [v, v] | sum }} {{ v | float }} {{ -v }}
{{ dict(a=v) }} {{ namespace(a=v).a }} {{ [1, 2][:v | int] }} {{ v | round(2) }} {{ v * 2 }} {{ v - 1 }} {{ v // 7 }}
{{ v % 7 }} {{ v / 3 }} {{ range(v | int, v | int + 2) | list }} {{ 'abc'.find('c', v | int) }} {{ v < 10001 }}
{{ [v] | map('default', v) | list }} {{ [v] | select('gt', v) | list }} {{ 'x' | replace('x', v | string) }}
{{ [{'a': v}] | selectattr('a', 'equalto', v) | list }} {{ '%% of 2024: %d' % (v | int) }}
{{ '{{2024}} {}'.format(v) }} {{ 'x' | center(7) }} {{ [v] | batch(2, v) | list }}"""


@given(v=ANY)
@settings(deadline=None, max_examples=30)
def test_numbers_are_data(v):
    source = "{% set v = messages[0].n %}" + WRITE
    env = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    env.filters["tojson"] = lambda x: json.dumps(x, ensure_ascii=False)
    expected = env.from_string(source).render(messages=[{"n": v}])
    ours = ChatTemplate("{% if messages[0].n is defined %}" + source + "{% endif %}", {}, "template")
    assert ours.render([{"role": "user", "n": v}]) == expected
