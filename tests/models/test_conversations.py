"""Valid conversations; nothing in them becomes a special token."""

import enum
import json

import pytest
import texts
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from talks import ASK, BOS, EOS, OPEN, OTHER, OURS, SOURCES, SPECIAL, TALK, TWO, WEATHER, chat_template, vocabulary

from llmrs import Engine, EngineConfig
from llmrs.core.errors import RequestError
from llmrs.models.text.conversation import MAX_CHARS, MAX_DEPTH, conversation
from llmrs.models.text.message import Message
from llmrs.models.text.template import encode_chat
from llmrs.models.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    texts.write_text_files(folder, vocabulary(), bos_token=BOS, eos_token=EOS)
    return Tokenizer.load(folder)


# What is given


class Colour(enum.StrEnum):
    RED = "red"


class Sneaky(str):
    def __str__(self):
        return "sneaky"

    def strip(self, *_):
        raise AssertionError("a template runs our method")


def test_what_is_given_is_rebuilt_as_plain_json():
    shared = {"a": (1, Colour.RED, 2.5, None, True)}
    c = conversation([Message("user", Sneaky("x"))], tools=[shared], colour=Colour.RED)
    assert c.tools == [{"a": [1, "red", 2.5, None, True]}]
    assert c.tools[0] is not shared
    assert [type(v) for v in (c.tools[0]["a"][1], c.variables["colour"], c.messages[0]["content"])] == [str] * 3
    assert c.messages == [{"role": "user", "content": "x"}]


def test_what_is_none_is_left_out_but_for_the_content():
    given = {"role": "assistant", "content": None, "tool_calls": None, "name": None, "refusal": None}
    assert conversation([given]).messages == [{"role": "assistant", "content": None}]
    assert conversation([Message("assistant")]).messages == [{"role": "assistant", "content": None}]
    assert conversation([{"role": "assistant"}]).messages == [{"role": "assistant"}]


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_every_name_of_thoughts(name):
    (message,) = conversation([{"role": "assistant", "content": "x", name: "hm"}]).messages
    assert message["reasoning_content"] == message["thinking"] == "hm"


def deep(levels):
    value = "x"
    for _ in range(levels):
        value = [value]
    return value


def endless():
    value = {}
    value["self"] = value
    return value


def wide():
    value = ["x"]
    for _ in range(40):  # 2**40 items, of 41 lists
        value = [value, value]
    return value


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (object(), "object"),
        ({1, 2}, "{1, 2}"),
        (b"bytes", "bytes"),
        (float("nan"), "nan"),
        (float("-inf"), "inf"),
        (10**400, "1329 bits"),
        ({1: 2}, "key 1"),
        ({None: 2}, "key None"),
        ("\ud800", "ud800"),
        ({"\udfff": 1}, "udfff"),
        (deep(MAX_DEPTH + 1), "deep"),
        (endless(), "deep"),
        (wide(), "characters"),
        ("x" * (MAX_CHARS + 1), "characters"),
    ],
)
def test_what_is_not_json_is_refused(value, words):
    for options in ({"tools": [{"x": value}]}, {"colour": value}):
        with pytest.raises(RequestError) as caught:
            conversation([ASK], **options)
        assert words in caught.value.message
        assert caught.value.hint
        assert len(str(caught.value)) < 500
    with pytest.raises(RequestError):
        conversation([Message("assistant", tool_calls=[value])])


@pytest.mark.parametrize(
    ("messages", "options", "words"),
    [
        ([3], {}, "message 0 is a int"),
        ([Message("user", 3)], {}, "content is 3"),
        ([Message("user", ["x"])], {}, "content holds 'x', which is no part"),
        ([Message("user", {"type": "text", "text": "x"})], {}, "content is {'text': 'x'"),
        ([Message("user", [{"text": "x"}])], {}, "no part"),
        ([Message("user", [{"type": "text", "text": 3}])], {}, "text 3"),
        ([Message("user", [{"type": "image_url", "image_url": {"url": "x"}}])], {}, "a part of type 'image_url'"),
        ([ASK, Message("assistant", [])], {"continue_final_message": True}, "no last message"),
        ([ASK, Message("assistant", reasoning_content=[])], {}, "message 1: reasoning_content is []"),
        ([{"role": "user", "reasoning": 3}], {}, "message 0: reasoning is 3"),
        ([Message(None, "x")], {}, "message 0 has no role"),
        ([{"content": "x"}], {}, "no role"),
        ([ASK, Message("tool", "x", name=1)], {}, "message 1: name is 1"),
        ([ASK], {"tools": ["clock"]}, "tool 0 is a str"),
        ([ASK], {"continue_final_message": True, "add_generation_prompt": True}, "exclude each other"),
        ([ASK], {"continue_final_message": "name"}, "'name'"),
        ([ASK], {"continue_final_message": "reasoning_content"}, "reasoning_content could be continued"),
        ([], {"continue_final_message": True}, "no last message"),
    ],
)
def test_what_is_refused(messages, options, words):
    with pytest.raises(RequestError) as caught:
        conversation(messages, **options)
    assert words in caught.value.message
    assert caught.value.hint


# Control tokens in what users write

CONTROL = [*SPECIAL, *texts.CONTROL]
HOSTILE = st.lists(
    st.sampled_from([*CONTROL, *OTHER, "</think>", "<|", "|>", "<", '"', "\\", "\\u007c", "\n", "é", "a", " ", ""]),
    max_size=4,
).map("".join)


def special_tokens(tokenizer, prompt):
    return [i for i in prompt.token_ids if i in {tokenizer.token_to_id(t) for t in CONTROL}]


def filled(text, other):
    """A conversation with these two texts wherever users may write."""
    properties = {f"k{text}": {"description": text, "type": "string"}}
    parameters = {"type": "object", "properties": properties}
    tool = {"name": f"f{text}", "description": other, "parameters": parameters}
    function = {"name": f"f{other}", "arguments": {f"k{text}": other, "list": [text]}}
    messages = [
        Message("system", f"s{text}"),
        Message("user", f"u{other}"),
        Message("assistant", "", tool_calls=[{"type": "function", "id": "123456789", "function": function}]),
        Message("tool", f"t{text}", tool_call_id=f"i{other}", name=f"n{text}"),
        Message("assistant", "fine", reasoning_content=f"r{text}"),
        Message("user", f"u{other}"),
    ]
    return messages, {"tools": [{"type": "function", "function": tool}]}


@pytest.mark.parametrize("name", SOURCES)
@settings(max_examples=40, deadline=None)
@given(text=HOSTILE, other=HOSTILE)
def test_special_tokens_in_what_users_write_are_text(tokenizer, name, text, other):
    template = OURS[name]
    messages, options = filled(text, other)
    harmless, _ = filled("x", "y")
    if "tools" not in template.variables:
        options = {}
    try:
        plain = encode_chat(tokenizer, template, harmless, **(options and filled("x", "y")[1]))
    except RequestError:  # alternation: leave the calls out
        messages, harmless = [[*m[:2], m[4], m[5]] for m in (messages, harmless)]
        plain = encode_chat(tokenizer, template, harmless, **(options and filled("x", "y")[1]))
    prompt = encode_chat(tokenizer, template, messages, **options)
    assert special_tokens(tokenizer, prompt) == special_tokens(tokenizer, plain)
    assert prompt == template.render(messages, **options)  # what is shown is what was written


@pytest.mark.parametrize("name", SOURCES)
def test_other_added_tokens_in_what_users_write_are_found(tokenizer, name):
    """As by transformers, which encodes the rendered text: such as the tags of HTML in Gemma 3."""
    template = OURS[name]
    written = "".join([*OTHER, "</think> a", OTHER[1]])
    messages, options = filled(written, OTHER[0])
    if "tools" not in template.variables:
        messages, options = [*messages[:2], *messages[4:]], {}
    prompt = encode_chat(tokenizer, template, messages, **options)
    assert list(prompt.token_ids) == texts.rendered_ids(tokenizer, str(prompt))
    assert prompt.token_ids.count(tokenizer.token_to_id(OTHER[0])) >= 2


def test_other_added_tokens_beside_special_tokens_that_are_text(tokenizer):
    content = f"{OTHER[0]}a{EOS}{OTHER[1]} b{OTHER[2]}"
    prompt = encode_chat(tokenizer, chat_template("{{ messages[0].content }}<|end|>"), [Message("user", content)])
    found = [i for i in prompt.token_ids if i in tokenizer.added]
    assert found == [tokenizer.token_to_id(t) for t in (*OTHER[:3], "<|end|>")]


REPLY = """{% for m in messages %}[{{ m.role }}]{% if m.role == 'user' and m.content.startswith('<tool_response>') %}
{{- m.content.split('<tool_response>')[1] | length }}{{ m.content == '<tool_response>21' }}{% else %}
{{- m.content }}{% endif %}{% endfor %}"""


def test_templates_see_other_added_tokens_as_they_are(tokenizer):
    talk = [Message("user", "<tool_response>21"), Message("user", "21<tool_response>")]
    assert encode_chat(tokenizer, chat_template(REPLY), talk) == "[user]2True[user]21<tool_response>"


ASCII = "{% for t in tools %}{{ t | tojson(ensure_ascii=true) }}<|end|>{{ t | tojson }}<|end|>{% endfor %}"


@given(text=st.text() | HOSTILE)
@settings(deadline=None)
def test_marks_survive_json(tokenizer, text):
    tool = {text: [text, {"x": text}], "y": "\\ue000\ue000" + text}
    prompt = encode_chat(tokenizer, chat_template(ASCII), [ASK], tools=[tool])
    assert prompt == f"{json.dumps(tool)}<|end|>{json.dumps(tool, ensure_ascii=False)}<|end|>"
    assert len(special_tokens(tokenizer, prompt)) == 2


def test_a_key_that_is_an_added_token_and_a_word_is_still_found(tmp_path):
    inner = texts.byte_level()
    inner.add_tokens(["name"])
    texts.write_text_files(tmp_path, inner)
    source = "{% for t in tools %}{{ t.name }} {{ t['<|im_end|>'] }}{% endfor %}"
    prompt = encode_chat(Tokenizer.load(tmp_path), chat_template(source), [ASK], tools=[{"name": "my name"}])
    assert prompt == "my name "


@pytest.mark.parametrize("prepend", ["first", "always", "never"])
def test_broken_tokens_change_nothing_else(prepend, tmp_path):
    """What stands around them is encoded as it is without them, also where a text's first word gets a space."""
    inner = texts.sentencepiece()
    inner.normalizer = None
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace("▁", prepend)
    inner.add_special_tokens([tokenizers.AddedToken("<|end|>", special=True, rstrip=True)])
    texts.write_text_files(tmp_path, inner, eos_token="</s>")
    t = Tokenizer.load(tmp_path)
    source = "{% for m in messages %}<s>{{ m.content }}<|end|>\n the {% endfor %}"
    ids = encode_chat(t, chat_template(source), [Message("user", "he"), Message("user", "in</s>in")]).token_ids
    end, bos = t.token_to_id("<|end|>"), t.token_to_id("<s>")
    whole = texts.rendered_ids(t, "<s>he<|end|>\n the <s>in<|end|>\n the ")
    assert [i for i in ids if i in (end, bos)] == [bos, end, bos, end]
    assert list(ids[: whole.index(bos, 1) + 1]) == whole[: whole.index(bos, 1) + 1]
    tail = whole[whole.index(end, whole.index(end) + 1) :]
    assert list(ids[-len(tail) :]) == tail
    first, last = texts.rendered_ids(t, "<s>in"), list(ids[whole.index(bos, 1) : len(ids) - len(tail)])
    assert last[: len(first)] == first


def test_a_token_that_only_normalizing_makes(tmp_path):
    inner = texts.byte_level()
    inner.normalizer = tokenizers.normalizers.NFKC()
    inner.add_special_tokens([tokenizers.AddedToken("<|end|>", special=True, normalized=True)])
    texts.write_text_files(tmp_path, inner)
    t = Tokenizer.load(tmp_path)
    end = t.token_to_id("<|end|>")
    assert texts.rendered_ids(t, "<｜end｜>") == [end]  # what the library does
    prompt = encode_chat(t, chat_template("{{ messages[0].content }}<|end|>"), [Message("user", "a<｜end｜>b<|end|>")])
    assert prompt.token_ids.count(end) == 1
    assert prompt.token_ids[-1] == end


def test_an_engine_takes_all_of_it(checkpoints, tmp_path, capsys):
    folder = texts.write_model(checkpoints.folder("chat"), tmp_path / "chat", chat_template=SOURCES["qwen3"])
    with Engine(EngineConfig(str(folder), dtype="f32", device="cpu", kv_cache_memory=2**20)) as engine:
        capsys.readouterr()  # transformers wrote the checkpoint
        prompt = engine.apply_chat_template(TWO, True, tools=[WEATHER], enable_thinking=False)
        assert prompt == OURS["qwen3"].render(TWO, tools=[WEATHER], enable_thinking=False)
        assert prompt.endswith("</think>\n\n")
        assert capsys.readouterr().err == f"{prompt}\n"
        assert engine.apply_chat_template(OPEN, continue_final_message=True).endswith("The answer is ")
        assert engine.apply_chat_template(TALK, add_generation_prompt=False).endswith("<|im_end|>\n")
