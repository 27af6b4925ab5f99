"""Conversations with tools, reasoning and continued messages: transformers' text and token ids."""

import jinja2
import pytest
import texts
import transformers
from talks import ASK, BOS, CLOCK, CONVERSATIONS, EOS, OURS, SOURCES, VARIABLES, vocabulary

from llmrs.core.errors import RequestError
from llmrs.models.text.template import ChatTemplate, encode_chat
from llmrs.models.text.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("frozen_time")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    texts.write_text_files(folder, vocabulary(), bos_token=BOS, eos_token=EOS)
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def theirs():
    return {
        name: transformers.PreTrainedTokenizerFast(
            tokenizer_object=vocabulary(), bos_token=BOS, eos_token=EOS, chat_template=source
        )
        for name, source in SOURCES.items()
    }


def as_dict(message):
    return {k: v for k, v in vars(message).items() if v is not None}


def expected(theirs, messages, options):
    """transformers' text and ids; None if it refuses."""
    given = {"add_generation_prompt": not options.get("continue_final_message"), **options}
    try:
        text = theirs.apply_chat_template([as_dict(m) for m in messages], tokenize=False, **given)
        ids = theirs.apply_chat_template([as_dict(m) for m in messages], return_dict=False, **given)
    except (jinja2.TemplateError, ValueError, TypeError):
        return None
    return text, ids


def compare(theirs, tokenizer, template, messages, options):
    result = expected(theirs, messages, options)
    if result is None:
        with pytest.raises(RequestError) as caught:
            encode_chat(tokenizer, template, messages, **options)
        assert caught.value.hint
    else:
        prompt = encode_chat(tokenizer, template, messages, **options)
        assert prompt == result[0]
        assert list(prompt.token_ids) == result[1]
    return result


@pytest.mark.parametrize("talk", CONVERSATIONS)
@pytest.mark.parametrize("name", SOURCES)
def test_text_and_ids_equal_transformers(name, talk, tokenizer, theirs):
    messages, options = CONVERSATIONS[talk]
    if options.get("tools") and "tools" not in OURS[name].variables:
        with pytest.raises(RequestError, match="takes no tools"):
            encode_chat(tokenizer, OURS[name], messages, **options)
    else:
        compare(theirs[name], tokenizer, OURS[name], messages, options)


@pytest.mark.parametrize(("name", "more"), [(n, v) for n, several in VARIABLES.items() for v in several])
def test_variables_equal_transformers(name, more, tokenizer, theirs):
    for messages, options in CONVERSATIONS.values():
        compare(theirs[name], tokenizer, OURS[name], messages, {**options, **more})


def test_what_the_goldens_cover(theirs):
    """Every template accepts some conversations, and templates with rules refuse some."""
    accepted = {n: sum(expected(theirs[n], *c) is not None for c in CONVERSATIONS.values()) for n in SOURCES}
    assert len(SOURCES) >= 8
    assert all(count >= 8 for count in accepted.values()), accepted
    strict = ("llama2", "mistral", "gemma3")
    assert all(expected(theirs[n], *CONVERSATIONS["not alternating"]) is None for n in strict)
    assert "Today Date: 07 Mar 2026" in expected(theirs["llama31"], [ASK], {})[0]


def test_a_variable_that_the_template_does_not_know(tokenizer):
    with pytest.raises(RequestError, match="knows no 'enable_thinkin'") as caught:
        encode_chat(tokenizer, OURS["qwen3"], [ASK], enable_thinkin=False)
    assert "enable_thinking" in caught.value.hint
    with pytest.raises(RequestError, match="bos_token"):
        encode_chat(tokenizer, OURS["gemma3"], [ASK], bos_token="x")


def test_a_template_for_tools(tmp_path):
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T{{ tools | length }}"}]
    texts.write_text_files(tmp_path, chat_template=named)
    template = ChatTemplate.load(tmp_path, {})
    assert template.render([ASK]) == "D"
    assert template.render([ASK], tools=[]) == "D"
    assert template.render([ASK], tools=[CLOCK]) == "T1"
