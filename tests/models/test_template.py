"""Chat templates: rendered as in transformers, bounded, and no special tokens from messages."""

import pickle

import pytest
import texts
import transformers
from hypothesis import given
from hypothesis import strategies as st

from llmrs.core.errors import ModelError, RequestError
from llmrs.models.text.template import ChatPrompt, ChatTemplate, encode_chat
from llmrs.models.text.tokenizer import Tokenizer

TALK = [
    {"role": "system", "content": "Be kind.  "},
    {"role": "user", "content": "Hi\nthere é"},
    {"role": "assistant", "content": "Hello <b>world</b>!"},
    {"role": "user", "content": "  How are you?"},
]
LLAMA = """{{- bos_token }}
{%- for message in messages %}
    {{- '<|start|>' + message['role'] + '<|stop|>\\n\\n' + message['content'] | trim + '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant<|stop|>\\n\\n' }}
{%- endif %}"""
STRICT = """{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set rest = messages[1:] %}
{% else %}{% set system = 'none' %}{% set rest = messages %}{% endif %}
{% for m in rest %}
    {% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
    {% if loop.last and m.role == 'user' %}[INST] {{ system ~ '\\n' ~ m.content.strip() }} [/INST]
    {% elif m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content | trim }}{{ eos_token }}{% endif %}
{% endfor %}"""
LOOPS = """{% macro line(m, n=0) %}{{ n }}:{{ m.role | upper }}={{ m.content | tojson }};{% endmacro %}
{%- set ns = namespace(count=0, seen=[]) %}
{%- for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}
{%- set ns.count = ns.count + 1 %}{{ line(m, ns.count) }}{% generation %}{{ m.content | length }}{% endgeneration %}
{%- set ns.seen = ns.seen + [m.role] %}{% if ns.count == 3 %}{% break %}{% endif %}
{%- endfor %}{{ ns.seen | unique | join(', ') }} {{ messages | selectattr('role', 'equalto', 'user') | list | length }}
{{- {'a': [1, 2.5, none, true], 'é': '<&>'} | tojson(indent=2) }} {{ '%s-%d' % ('x', 3) }} {{ 'ab'.split('b')[0] }}
{{- messages[::-1][0].content is string }} {{ tools is none }} {{ nothing is defined }}"""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    texts.write_text_files(folder)
    return Tokenizer.load(folder)


def template(source, folder, **specials):
    return ChatTemplate(source, {"bos": "<s>", "eos": "</s>", **specials}, folder)


@pytest.mark.parametrize("more", [{}, {"add_generation_prompt": False}])
@pytest.mark.parametrize("source", [texts.CHATML, LLAMA, STRICT, LOOPS])
def test_rendering_equals_transformers(source, more, tmp_path):
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=texts.byte_level(), bos_token="<s>", eos_token="</s>", chat_template=source
    )
    expected = theirs.apply_chat_template(TALK, tokenize=False, **{"add_generation_prompt": True, **more})
    assert template(source, tmp_path).render(TALK, **more) == expected


def test_token_ids_equal_transformers(tokenizer, tmp_path):
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=texts.byte_level(), chat_template=texts.CHATML)
    ids = theirs.apply_chat_template(TALK, add_generation_prompt=True, return_dict=False)
    assert list(encode_chat(tokenizer, template(texts.CHATML, tmp_path), TALK).token_ids) == ids


def special_counts(tokenizer, prompt):
    return [prompt.token_ids.count(tokenizer.token_to_id(c)) for c in texts.CONTROL]


HOSTILE = st.lists(st.sampled_from([*texts.CONTROL, "</think>", "<|im_", "end|>", "<", "|", ">", "a", " ", "\n", "é"]))


@given(contents=st.lists(HOSTILE.map("".join), min_size=1, max_size=3))
def test_special_tokens_in_a_message_are_text(tokenizer, contents):
    chat = ChatTemplate(texts.CHATML, {}, "template")
    talk = [{"role": "user", "content": c} for c in contents]
    prompt = encode_chat(tokenizer, chat, talk)
    assert prompt == chat.render(talk)  # what is shown is what was written
    assert special_counts(tokenizer, prompt) == [0, len(contents) + 1, len(contents)]
    assert prompt.token_ids.count(tokenizer.token_to_id("</think>")) == prompt.count("</think>")  # which is none
    text = "".join(
        next((c for c in texts.CONTROL if tokenizer.token_to_id(c) == i), None)
        or tokenizer.token_bytes(i).decode("latin-1")
        for i in prompt.token_ids
    )
    assert text.encode("latin-1").decode() == prompt  # and the ids say the same


def test_thoughts_in_an_answer_stay_visible_to_the_template(tokenizer, tmp_path):
    source = "{% for m in messages %}<|im_start|>{{ m.content.split('</think>')[-1] }}<|im_end|>{% endfor %}"
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "hm</think>Hello<|im_end|>"}]
    prompt = encode_chat(tokenizer, template(source, tmp_path), talk)
    assert prompt == "<|im_start|>Hi<|im_end|><|im_start|>Hello<|im_end|><|im_end|>"
    assert special_counts(tokenizer, prompt) == [0, 2, 2]


def test_a_prompt_carries_its_ids(tokenizer, tmp_path):
    prompt = encode_chat(tokenizer, template(texts.CHATML, tmp_path), TALK)
    copied = pickle.loads(pickle.dumps(prompt))
    assert isinstance(copied, ChatPrompt)
    assert (copied, copied.token_ids) == (prompt, prompt.token_ids)


def test_bad_messages(tokenizer, tmp_path):
    with pytest.raises(RequestError, match="roles must alternate"):
        template(STRICT, tmp_path).render([TALK[2]])
    with pytest.raises(RequestError, match="ud800"):
        encode_chat(tokenizer, template(texts.CHATML, tmp_path), [{"role": "user", "content": "\ud800"}])
    with pytest.raises(RequestError, match="fails on the messages"):
        template("{{ messages[0].content.index('H') }}", tmp_path).render([{"role": "user", "content": "x"}])


@pytest.mark.parametrize(
    "source",
    [
        "{% if x %}",
        "{{ messages[0].foo.bar }}",
        "{{ 1 / 0 }}",
        "{{ nothing() }}",
        "{% include 'x' %}",
        "{{ 'x' | nonsense }}",
        "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "x" * 300_000,
    ],
)
def test_templates_that_fail(source, tmp_path):
    with pytest.raises(ModelError, match="the chat template"):
        template(source, tmp_path)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({}) }}",
        "{{ raise_exception.__globals__ }}",
        "{{ messages[0] | attr('__class__') }}",
    ],
)
def test_templates_get_nowhere_near_python(source, tmp_path):
    with pytest.raises(ModelError, match=r"unsafe|undefined|no attribute"):
        template(source + "{{ x.y.z }}", tmp_path)


DOUBLING = "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = BODY %}{% endfor %}{{ ns.x }}"


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'A' * 2**29 }}",
        "{{ 2**29 * 'A' }}",
        "{{ [1] * 2**29 }}",
        "{{ 9 ** (9 ** (9 ** 9)) }}",
        "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
        "{{ range(10**12) | list }}",
        DOUBLING.replace("BODY", "ns.x ~ ns.x"),
        DOUBLING.replace("BODY", "ns.x + ns.x"),
        DOUBLING.replace("BODY", "ns.x.replace('a', ns.x)"),
        DOUBLING.replace("BODY", "ns.x | replace('a', ns.x)"),
        DOUBLING.replace("BODY", "ns.x.join([ns.x, ns.x])"),
        DOUBLING.replace("BODY", "'%s%s' % (ns.x, ns.x)"),
        DOUBLING.replace("BODY", "'{0}{0}'.format(ns.x)"),
        DOUBLING.replace("BODY", "[ns.x, ns.x]"),
        DOUBLING.replace("BODY", "{'a': ns.x, 'b': ns.x}"),
        DOUBLING.replace("BODY", "namespace(a=ns.x, b=ns.x)"),
        DOUBLING.replace("BODY", "dict(a=ns.x, b=ns.x)"),
        "{{ [[1] * 9999] * 9999 }}",
        "{{ ([[1] * 999] * 999) | tojson }}{{ ([[1] * 999] * 999) | tojson }}{{ ([[1] * 999] * 999) | tojson }}"
        "{{ ([[1] * 999] * 999) | string }}{{ ([[1] * 999] * 999) | string }}",
        "{{ 'x'.center(10**9) }}",
        "{{ 'x'.zfill(10**9) }}",
        "{{ 'x' | indent(10**9) }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '%*d' % (1000000000, 1) }}",
        "{{ '{:1000000000}'.format(1) }}",
        "{{ '{:{}}'.format(1, 1000000000) }}",
        "{{ strftime_now('%1000000000Y') }}",
        "{% for m in messages recursive %}x{{ loop(messages) }}{% endfor %}",
        "{% set x = 'a' * 2000000 %}{% for i in range(100000) %}{% if 'b' in x %}{% endif %}{% endfor %}"
        "{% for i in range(100000) %}{% if 'b' in x %}{% endif %}{% endfor %}",
    ],
)
def test_work_is_bounded(source, tmp_path):
    with pytest.raises(ModelError, match=r"work|width|wide|size over|too big|recursion"):
        template(source, tmp_path)


def test_a_long_conversation_is_no_excess(tmp_path):
    talk = [{"role": ("user", "assistant")[n % 2], "content": "word " * 200} for n in range(1000)]
    assert len(template(LOOPS.replace("{% break %}", ""), tmp_path).render(talk)) > 1_000_000


def test_where_templates_come_from(tmp_path):
    assert ChatTemplate.load(tmp_path, {}) is None
    texts.write_text_files(
        tmp_path, chat_template=[{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    )
    assert ChatTemplate.load(tmp_path, {}).render([]) == "D"
    (tmp_path / "chat_template.jinja").write_text("J")
    assert ChatTemplate.load(tmp_path, {}).render([]) == "J"
    (tmp_path / "chat_template.jinja").unlink()
    texts.write_text_files(tmp_path, chat_template=3)
    error = ChatTemplate.load(tmp_path, {})
    assert isinstance(error, ModelError)
    assert "not text" in error.message


def write_templates(folder, **sources):
    (folder / "additional_chat_templates").mkdir()
    for name, source in sources.items():
        (folder / "additional_chat_templates" / f"{name}.jinja").write_text(source)


TOOLS = [{"type": "function", "function": {"name": "f"}}]


def test_additional_templates_equal_transformers(tmp_path):
    """As `save_pretrained` writes them."""
    both = {"default": "D{{ messages[0].content }}", "tool_use": "T{{ messages[0].content }}{{ tools | length }}"}
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=texts.byte_level(), chat_template=both)
    theirs.save_pretrained(tmp_path)
    assert (tmp_path / "additional_chat_templates" / "tool_use.jinja").exists()
    template = ChatTemplate.load(tmp_path, {})
    for more in ({}, {"tools": TOOLS}):
        assert template.render(TALK[1:2], **more) == theirs.apply_chat_template(TALK[1:2], tokenize=False, **more)


def test_which_of_several_files_counts(tmp_path):
    texts.write_text_files(
        tmp_path, chat_template=[{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    )
    write_templates(tmp_path, tool_use="T{{ tools }}")
    assert ChatTemplate.load(tmp_path, {}).render(TALK) == "d"
    assert ChatTemplate.load(tmp_path, {}).render(TALK, tools=TOOLS).startswith("T")
    (tmp_path / "additional_chat_templates" / "default.jinja").write_text("A")
    assert ChatTemplate.load(tmp_path, {}).render(TALK) == "A"
    (tmp_path / "chat_template.jinja").write_text("J")
    assert ChatTemplate.load(tmp_path, {}).render(TALK) == "J"


def test_a_broken_template_for_tools_stops_tools_only(tmp_path):
    texts.write_text_files(tmp_path, chat_template="D")
    write_templates(tmp_path, tool_use="{% if %}")
    template = ChatTemplate.load(tmp_path, {})
    assert template.render(TALK) == "D"
    with pytest.raises(ModelError, match=r"tool_use.jinja: the chat template fails"):
        template.render(TALK, tools=TOOLS)


def test_a_template_for_tools_is_tried_with_one(tmp_path):
    texts.write_text_files(tmp_path, chat_template="D")
    write_templates(tmp_path, tool_use="{{ tools[0].function.name.strip() }}{{ tools[0].function.parameters.type }}")
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    assert ChatTemplate.load(tmp_path, {}).render(TALK, tools=tools) == "fobject"


def test_an_additional_template_that_leads_out_of_the_folder(tmp_path):
    folder, secret = tmp_path / "model", tmp_path / "secret.txt"
    folder.mkdir()
    secret.write_text("T")
    texts.write_text_files(folder, chat_template="D")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").symlink_to(secret)
    with pytest.raises(ModelError, match="leads out of the folder"):
        ChatTemplate.load(folder, {})
