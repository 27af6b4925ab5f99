"""Chat templates: render messages to a prompt whose special tokens all come from the template."""

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import meta

from llmrs.core.errors import ModelError, RequestError, did_you_mean
from llmrs.models.text.conversation import REASONING, Conversation, conversation
from llmrs.models.text.escaped_str import EscapingSandbox
from llmrs.models.text.escaping import escape_special_tokens, free_private_chars
from llmrs.models.text.message import Message
from llmrs.models.text.sandbox import BudgetExceeded, TemplateRefusal
from llmrs.models.text.special_tokens import NAMES
from llmrs.models.text.template_files import DEFAULT, MAX_TEMPLATE_CHARS, TOOL_USE, sources
from llmrs.models.text.tokenizer import Tokenizer

BASE_BUDGET, BUDGET_PER_CHAR = 5_000_000, 200  # per rendering, and per character of its input
PROBE = [{"role": "user", "content": "Hi"}]
TOOL = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
HINT = "put a template that works into the model's folder as chat_template.jinja, or use another model"
PYTHON_REPRS = ("None", "'type': 'text'")  # in a prompt: the template wrote None or a list of parts


class ChatPrompt(str):
    """A rendered conversation with its token ids. Its text alone is ambiguous: special tokens in messages are text."""

    token_ids: tuple[int, ...]

    def __new__(cls, text: str, token_ids: Sequence[int]) -> "ChatPrompt":
        prompt = super().__new__(cls, text)
        prompt.token_ids = tuple(token_ids)
        return prompt

    def __reduce__(self) -> Any:
        return type(self), (str(self), self.token_ids)


class UnknownToken(jinja2.Undefined):
    """A special token that the files don't define. Templates may test it, but not write it."""

    __slots__ = ()
    __str__ = jinja2.Undefined._fail_with_undefined_error

    @property
    def _undefined_message(self) -> str:
        return f"it writes {self._undefined_name}, which tokenizer_config.json does not give"


UNKNOWN = {f"{name}_token": UnknownToken(name=f"{name}_token") for name in NAMES}


class ChatTemplate:
    """A compiled template."""

    def __init__(self, source: str, special_tokens: Mapping[str, str | None], path: Path, **probe: Any) -> None:
        """`special_tokens`: texts of bos, eos, ... by name, None for tokens that the model does not have. Writing
        a token that is missing here is an error.

        Renders once, with the variables `probe`, to find templates that fail. Raises ModelError for them.
        """
        self.source, self.path = source, path
        known = {f"{name}_token": text for name, text in special_tokens.items()}
        self.special_tokens = {name: text for name, text in {**UNKNOWN, **known}.items() if text is not None}
        self.for_tools: ChatTemplate | ModelError | None = None  # the template for conversations with tools
        self._sandbox, self._lock = EscapingSandbox(), threading.Lock()
        if len(source) > MAX_TEMPLATE_CHARS:
            raise ModelError(f"{path}: the chat template has {len(source)} characters, over {MAX_TEMPLATE_CHARS}", HINT)
        try:
            source.encode()  # no lone surrogate
            self._sandbox.start(BASE_BUDGET)
            self.variables = meta.find_undeclared_variables(self._sandbox.parse(source)) - UNKNOWN.keys()
            self._template = self._sandbox.compiled(source)
            self._render(PROBE, probe)
        except TemplateRefusal:
            pass  # it requires other messages than PROBE
        except (jinja2.TemplateError, *FAILURES) as error:
            raise ModelError(f"{path}: the chat template fails: {_reason(error)}", HINT) from error

    @classmethod
    def load(cls, folder: Path, special_tokens: Mapping[str, str | None]) -> "ChatTemplate | ModelError | None":
        """The model's template, or None without one. Raises ModelError for an unreadable file.

        A template that fails is returned as its error, so that the model can be used without chat.
        """
        return cls.of(sources(folder), special_tokens)

    @classmethod
    def of(
        cls, templates: Mapping[str, tuple[Any, Path]], special_tokens: Mapping[str, str | None]
    ) -> "ChatTemplate | ModelError | None":
        """`load` of templates by name, each with the file that it is from."""
        template = cls._compile(*templates[DEFAULT], special_tokens) if DEFAULT in templates else None
        if isinstance(template, ChatTemplate) and TOOL_USE in templates:
            template.for_tools = cls._compile(*templates[TOOL_USE], special_tokens, tools=[TOOL])
        return template

    @classmethod
    def _compile(
        cls, source: Any, path: Path, special_tokens: Mapping[str, str | None], **probe: Any
    ) -> "ChatTemplate | ModelError":
        if not isinstance(source, str):
            return ModelError(f"{path}: chat_template is not text", HINT)
        try:
            return cls(source, special_tokens, path, **probe)
        except ModelError as error:
            return error

    def render(self, messages: Sequence[Message | Mapping[str, Any]], **options: Any) -> str:
        """The conversation as text. `options`: arguments of `conversation`. Raises RequestError."""
        c = conversation(messages, **options)
        return self.rendered(c, *free_private_chars(c, 1))

    def rendered(self, c: Conversation, tag: str, escape: str = "") -> str:
        """The conversation as text. `tag`: a character that it does not contain, to find the end of the message to
        continue. `escape`: the escape character in its strings.

        Raises RequestError if the template fails on the messages or would ignore arguments; ModelError if the template
        for tools is invalid.
        """
        if c.tools and self.for_tools is not None:
            if isinstance(self.for_tools, ModelError):
                raise ModelError(self.for_tools.message, self.for_tools.hint) from self.for_tools
            return self.for_tools.rendered(c, tag, escape)
        self._check_variables(c)
        return self._render_once(c, tag, escape) if c.is_text_only() else self._render_contents(c, tag, escape)

    def _render_contents(self, c: Conversation, tag: str, escape: str) -> str:
        """Renders contents that are None or lists of parts. Many templates support strings only: they fail, drop the
        content or write its Python repr. Those get the parts joined and None left out.
        """
        try:
            rendered = self._render_once(c, tag, escape)
        except RequestError:
            text = self._render_once(c.as_text_only(), tag, escape)
            if all(name in text for name in c.called_functions()):  # else it dropped a call without content
                return text
            raise
        try:
            text = self._render_once(c.as_text_only(), tag, escape)
        except RequestError:
            return rendered
        has_repr = any(rendered.count(python) > text.count(python) for python in PYTHON_REPRS)
        lost = any(rendered.count(part) < text.count(part) for part in map(str.strip, c.text_parts()))
        return text if has_repr or lost else rendered

    def _render_once(self, c: Conversation, tag: str, escape: str) -> str:
        messages = _append_tag(c.messages, c.continued, tag) if c.continued else c.messages
        variables = {"add_generation_prompt": c.add_generation_prompt, "tools": c.tools, "documents": None}
        try:
            text = self._render(messages, {**variables, **c.variables}, tag + escape)
        except TemplateRefusal as error:
            raise RequestError(f"the chat template refuses the messages: {error.message}", "see its rules") from error
        except (jinja2.TemplateError, *FAILURES) as error:
            raise RequestError(f"the chat template fails on the messages: {_reason(error)}", HINT) from error
        return _cut_at_tag(text, _last_text(c.messages[-1][c.continued]), tag) if c.continued else text

    def _check_variables(self, c: Conversation) -> None:
        """Raises RequestError for variables that the template does not read."""
        if c.tools and "tools" not in self.variables:
            raise RequestError("the model's chat template takes no tools", "leave them out, or use another model")
        for name in c.variables:
            if name not in self.variables:
                raise RequestError(f"the chat template knows no {name!r}", did_you_mean(name, self.variables))

    def _render(self, messages: Sequence[Mapping[str, Any]], variables: dict[str, Any], sentinels: str = "") -> str:
        given = {**self.special_tokens, "messages": messages, **variables}
        with self._lock:
            self._sandbox.start(BASE_BUDGET + BUDGET_PER_CHAR * len(repr(given)), sentinels)
            return str.__str__(self._template.render(given))  # with escapes


def _append_tag(messages: Sequence[dict[str, Any]], field: str, tag: str) -> list[dict[str, Any]]:
    """Appends the tag and a space to a field of the last message; the space shows whether the template trims it."""
    last, added = messages[-1], tag + " "
    if isinstance(last[field], list):
        *parts, part = last[field]
        return [*messages[:-1], {**last, field: [*parts, {**part, "text": part["text"] + added}]}]
    fields = [f for f in REASONING if last.get(f) == last[field]] if field in REASONING else [field]
    return [*messages[:-1], {**last, **{f: last[f] + added for f in fields}}]


def _last_text(content: Any) -> str:
    return content[-1]["text"] if isinstance(content, list) else content


def _cut_at_tag(text: str, continued: str, tag: str) -> str:
    """The text before the tag, right-stripped if the template trims the message, as in transformers."""
    at = text.rfind(tag)
    if at < 0 or continued.strip() not in text:
        problem = "the last message can't be continued: the chat template leaves it out, or changes it"
        raise RequestError(problem, "end with a message of the assistant, or don't continue it")
    return text[:at] if text[at + 1 : at + 2] == " " else text[:at].rstrip()


# MemoryError: the compiler's error for deep nesting
FAILURES = (
    TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError, SyntaxError, MemoryError,
)  # fmt: skip


def _reason(error: Exception) -> str:
    """The message, with its line if known."""
    text = getattr(error, "message", None) or str(error) or type(error).__name__
    line = getattr(error, "lineno", None)
    return f"{text} (line {line})" if line and not isinstance(error, BudgetExceeded) else text


def encode_chat(
    tokenizer: Tokenizer, template: ChatTemplate, messages: Sequence[Message | Mapping[str, Any]], **options: Any
) -> ChatPrompt:
    """Renders and encodes a conversation. `options`: arguments of `conversation`. Raises RequestError.

    Special tokens in the arguments stay text: they are escaped, invisibly to the template, and unescaped after
    encoding the template's own. Other added tokens are parsed everywhere.
    """
    c = conversation(messages, **options)
    escape, tag = free_private_chars(c, 2)
    text = template.rendered(escape_special_tokens(c, tokenizer.special_texts, escape), tag, escape)
    return ChatPrompt(text.replace(escape, ""), tokenizer.encode_escaped(text, escape))
