"""Chat templates: from messages to a prompt in which nothing but the template's own control tokens is one."""

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import meta

from llmrs.core.errors import ModelError, RequestError, did_you_mean
from llmrs.models.text.conversation import REASONING, Conversation, broken, conversation, unused
from llmrs.models.text.marked import MarkedSandbox
from llmrs.models.text.message import Message
from llmrs.models.text.sandbox import Exhausted, Refused
from llmrs.models.text.specials import NAMES
from llmrs.models.text.template_files import DEFAULT, LARGEST, TOOL_USE, sources
from llmrs.models.text.tokenizer import Tokenizer

BASE, PER_CHARACTER = 5_000_000, 200  # what a rendering may spend: for itself, and for what it is given
PROBE = [{"role": "user", "content": "Hi"}]
TOOL = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
HINT = "put a template that works into the model's folder as chat_template.jinja, or use another model"
NONE, PARTS = "None", "'type': 'text'"  # in a prompt: what a template wrote as Python does


class ChatPrompt(str):
    """A rendered conversation. It carries its token ids, which its text alone doesn't determine: control tokens
    inside the messages are plain text.
    """

    token_ids: tuple[int, ...]

    def __new__(cls, text: str, token_ids: Sequence[int]) -> "ChatPrompt":
        prompt = super().__new__(cls, text)
        prompt.token_ids = tuple(token_ids)
        return prompt

    def __reduce__(self) -> Any:
        return type(self), (str(self), self.token_ids)


class UnknownToken(jinja2.Undefined):
    """A special token that no file gives. A template may ask whether it is defined, but not write it."""

    __slots__ = ()
    __str__ = jinja2.Undefined._fail_with_undefined_error

    @property
    def _undefined_message(self) -> str:
        return f"it writes {self._undefined_name}, which tokenizer_config.json does not give"


UNKNOWN = {f"{name}_token": UnknownToken(name=f"{name}_token") for name in NAMES}


class ChatTemplate:
    """A compiled template."""

    def __init__(self, source: str, specials: Mapping[str, str | None], path: Path, **probe: Any) -> None:
        """`specials` are the texts of bos, eos and the like, by name; None where the model has none. One that is
        not there is unknown: the template fails where it writes it. Raises ModelError for a template that can't work.

        It is tried once, with the variables `probe`, so that a template that fails or never ends is found now.
        """
        self.source, self.path = source, path
        known = {f"{name}_token": text for name, text in specials.items()}
        self.specials = {name: text for name, text in {**UNKNOWN, **known}.items() if text is not None}
        self.for_tools: ChatTemplate | ModelError | None = None  # another one, for conversations with tools
        self._sandbox, self._lock = MarkedSandbox(), threading.Lock()
        if len(source) > LARGEST:
            raise ModelError(f"{path}: the chat template has {len(source)} characters, over {LARGEST}", HINT)
        try:
            source.encode()  # no lone surrogate
            self._sandbox.allow(BASE)
            self.variables = meta.find_undeclared_variables(self._sandbox.parse(source)) - UNKNOWN.keys()
            self._template = self._sandbox.compiled(source)
            self._render(PROBE, probe)
        except Refused:
            pass  # it wants something else than one question, which is its right
        except (jinja2.TemplateError, *FAILURES) as error:
            raise ModelError(f"{path}: the chat template fails: {_reason(error)}", HINT) from error

    @classmethod
    def load(cls, folder: Path, specials: Mapping[str, str | None]) -> "ChatTemplate | ModelError | None":
        """From chat_template.jinja and additional_chat_templates, else tokenizer_config.json; None where there is none.

        A template that can't work is returned as its error: it stops conversations, and nothing else. Raises
        ModelError for a file that can't be read.
        """
        found = sources(folder)
        template = cls._made(*found[DEFAULT], specials) if DEFAULT in found else None
        if isinstance(template, ChatTemplate) and TOOL_USE in found:
            template.for_tools = cls._made(*found[TOOL_USE], specials, tools=[TOOL])
        return template

    @classmethod
    def _made(
        cls, source: Any, path: Path, specials: Mapping[str, str | None], **probe: Any
    ) -> "ChatTemplate | ModelError":
        if not isinstance(source, str):
            return ModelError(f"{path}: chat_template is not text", HINT)
        try:
            return cls(source, specials, path, **probe)
        except ModelError as error:
            return error

    def render(self, messages: Sequence[Message | Mapping[str, Any]], **options: Any) -> str:
        """The conversation as text. `options` are those of `conversation`. Raises RequestError."""
        c = conversation(messages, **options)
        return self.rendered(c, *unused(c, 1))

    def rendered(self, c: Conversation, tag: str, marks: str = "") -> str:
        """The conversation as text. `tag` is a character that it doesn't hold; JSON leaves the marks as they are.

        Raises RequestError for what the template refuses or fails on, and for what it would ignore; ModelError where
        the one for tools can't work.
        """
        if c.tools and self.for_tools is not None:
            if isinstance(self.for_tools, ModelError):
                raise ModelError(self.for_tools.message, self.for_tools.hint) from self.for_tools
            return self.for_tools.rendered(c, tag, marks)
        self._require_known(c)
        return self._one(c, tag, marks) if c.all_text() else self._with_contents(c, tag, marks)

    def _with_contents(self, c: Conversation, tag: str, marks: str) -> str:
        """Contents that are None or lists of parts are handed through. Many templates know text only: they fail on
        others, leave them out, or write them as Python does. For those None is left out, and parts are joined.
        """
        try:
            given = self._one(c, tag, marks)
        except RequestError:
            text = self._one(c.as_text(), tag, marks)
            if all(name in text for name in c.called()):  # else it takes a call without a text for an empty answer
                return text
            raise
        try:
            text = self._one(c.as_text(), tag, marks)
        except RequestError:
            return given
        written = any(given.count(python) > text.count(python) for python in (NONE, PARTS))
        lost = any(given.count(part) < text.count(part) for part in map(str.strip, c.parts()))
        return text if written or lost else given

    def _one(self, c: Conversation, tag: str, marks: str) -> str:
        """One rendering."""
        messages = _tagged(c.messages, c.continued, tag) if c.continued else c.messages
        variables = {"add_generation_prompt": c.add_generation_prompt, "tools": c.tools, "documents": None}
        try:
            text = self._render(messages, {**variables, **c.variables}, tag + marks)
        except Refused as error:
            raise RequestError(f"the chat template refuses the messages: {error.message}", "see its rules") from error
        except (jinja2.TemplateError, *FAILURES) as error:
            raise RequestError(f"the chat template fails on the messages: {_reason(error)}", HINT) from error
        return _cut(text, _last_text(c.messages[-1][c.continued]), tag) if c.continued else text

    def _require_known(self, c: Conversation) -> None:
        """Raises RequestError for variables that the template never reads."""
        if c.tools and "tools" not in self.variables:
            raise RequestError("the model's chat template takes no tools", "leave them out, or use another model")
        for name in c.variables:
            if name not in self.variables:
                raise RequestError(f"the chat template knows no {name!r}", did_you_mean(name, self.variables))

    def _render(self, messages: Sequence[Mapping[str, Any]], variables: dict[str, Any], marks: str = "") -> str:
        given = {**self.specials, "messages": messages, **variables}
        with self._lock:
            self._sandbox.allow(BASE + PER_CHARACTER * len(repr(given)), marks)
            return str.__str__(self._template.render(given))  # with its marks


def _tagged(messages: Sequence[dict[str, Any]], field: str, tag: str) -> list[dict[str, Any]]:
    """The messages, with the last one's field ending in a tag and a space, which shows whether spaces are trimmed."""
    last, added = messages[-1], tag + " "
    if isinstance(last[field], list):
        *parts, part = last[field]
        return [*messages[:-1], {**last, field: [*parts, {**part, "text": part["text"] + added}]}]
    fields = [f for f in REASONING if last.get(f) == last[field]] if field in REASONING else [field]
    return [*messages[:-1], {**last, **{f: last[f] + added for f in fields}}]


def _last_text(content: Any) -> str:
    return content[-1]["text"] if isinstance(content, list) else content


def _cut(text: str, continued: str, tag: str) -> str:
    """The text up to the tag. Where the template trims the message, its end is trimmed too, as transformers does."""
    at = text.rfind(tag)
    if at < 0 or continued.strip() not in text:
        raise RequestError(
            "the last message can't be continued: the chat template leaves it out, or changes it",
            "end with a message of the assistant, or don't continue it",
        )
    return text[:at] if text[at + 1 : at + 2] == " " else text[:at].rstrip()


# MemoryError is what the compiler raises for a program that is nested too deep
FAILURES = (
    TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError, SyntaxError, MemoryError,
)  # fmt: skip


def _reason(error: Exception) -> str:
    """What went wrong, and in which line where that is known."""
    text = getattr(error, "message", None) or str(error) or type(error).__name__
    line = getattr(error, "lineno", None)
    return f"{text} (line {line})" if line and not isinstance(error, Exhausted) else text


def encode_chat(
    tokenizer: Tokenizer, template: ChatTemplate, messages: Sequence[Message | Mapping[str, Any]], **options: Any
) -> ChatPrompt:
    """Renders and encodes a conversation; `options` are those of `conversation`. Raises RequestError.

    Control tokens in what is given stay text: they are broken by marks, which the template does not see, and which
    go after the template's own are found. Other added tokens are found wherever they stand.
    """
    c = conversation(messages, **options)
    mark, tag = unused(c, 2)
    marked = template.rendered(broken(c, tokenizer.control_texts, mark), tag, mark)
    return ChatPrompt(marked.replace(mark, ""), tokenizer.encode_marked(marked, mark))
