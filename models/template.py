"""Chat templates: from messages to a prompt in which nothing but the template's own control tokens is one."""

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import meta

from llmrs.core.errors import ModelError, RequestError, did_you_mean
from llmrs.models.config import read_json
from llmrs.models.conversation import Conversation, broken, conversation, unused
from llmrs.models.files import inside, read_text
from llmrs.models.marked import MarkedSandbox
from llmrs.models.message import Message
from llmrs.models.sandbox import Exhausted, Refused
from llmrs.models.tokenizer import Tokenizer

LARGEST = 200_000  # characters of a template; those of today's models have less than a tenth
BASE, PER_CHARACTER = 5_000_000, 200  # what a rendering may spend: for itself, and for what it is given
PROBE = [{"role": "user", "content": "Hi"}]
HINT = "use the chat template that belongs to the model"


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


class ChatTemplate:
    """A compiled template."""

    def __init__(self, source: str, specials: Mapping[str, str], path: Path) -> None:
        """`specials` are the texts of bos, eos and the like, by name. Raises ModelError for a template that can't work.

        It is tried once, so that a template that fails or never ends is found now.
        """
        self.source, self.path = source, path
        self.specials = {f"{name}_token": text for name, text in specials.items()}
        self.for_tools: ChatTemplate | None = None  # another one, for conversations with tools
        self._sandbox, self._lock = MarkedSandbox(), threading.Lock()
        if len(source) > LARGEST:
            raise ModelError(f"{path}: the chat template has {len(source)} characters, over {LARGEST}", HINT)
        try:
            source.encode()  # no lone surrogate
            self._sandbox.allow(BASE)
            self.variables = meta.find_undeclared_variables(self._sandbox.parse(source)) - self.specials.keys()
            self._template = self._sandbox.compiled(source)
            self._render(PROBE, {})
        except Refused:
            pass  # it wants something else than one question, which is its right
        except (jinja2.TemplateError, *FAILURES) as error:
            raise ModelError(f"{path}: the chat template fails: {_reason(error)}", HINT) from error

    @classmethod
    def load(cls, folder: Path, specials: Mapping[str, str]) -> "ChatTemplate | None":
        """From chat_template.jinja, else tokenizer_config.json; None where there is none. Raises ModelError."""
        path, settings = inside(folder, "chat_template.jinja"), inside(folder, "tokenizer_config.json")
        if path.exists():
            return cls(read_text(path, 4 * LARGEST), specials, path)
        source = read_json(settings).get("chat_template") if settings.exists() else None
        named = source if isinstance(source, list) else [{"name": "default", "template": source}]
        sources: dict[str, Any] = {str(t.get("name")): t.get("template") for t in named if isinstance(t, dict)}
        return cls._of(sources, specials, settings)

    @classmethod
    def _of(cls, sources: Mapping[str, Any], specials: Mapping[str, str], path: Path) -> "ChatTemplate | None":
        """From several by name: "default", and "tool_use" for conversations with tools."""
        made = []
        for source in map(sources.get, ("default", "tool_use")):
            if source is not None and not isinstance(source, str):
                raise ModelError(f"{path}: chat_template is not text", HINT)
            made.append(None if source is None else cls(source, specials, path))
        template, for_tools = made[0], made[1]
        if template is not None:
            template.for_tools = for_tools
        return template

    def render(self, messages: Sequence[Message | Mapping[str, Any]], **options: Any) -> str:
        """The conversation as text. `options` are those of `conversation`. Raises RequestError."""
        c = conversation(messages, **options)
        return self.rendered(c, *unused(c, 1))

    def rendered(self, c: Conversation, tag: str, marks: str = "") -> str:
        """The conversation as text. `tag` is a character that it doesn't hold; JSON leaves the marks as they are.

        Raises RequestError for what the template refuses or fails on, and for what it would ignore.
        """
        if c.tools and self.for_tools is not None:
            return self.for_tools.rendered(c, tag, marks)
        self._require_known(c)
        messages = _tagged(c.messages, c.continued, tag) if c.continued else c.messages
        variables = {"add_generation_prompt": c.add_generation_prompt, "tools": c.tools, "documents": None}
        try:
            text = self._render(messages, {**variables, **c.variables}, tag + marks)
        except Refused as error:
            raise RequestError(f"the chat template refuses the messages: {error.message}", "see its rules") from error
        except (jinja2.TemplateError, *FAILURES) as error:
            raise RequestError(f"the chat template fails on the messages: {_reason(error)}", HINT) from error
        return _cut(text, c.messages[-1][c.continued], tag) if c.continued else text

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
    fields = ("reasoning_content", "thinking") if field == "reasoning_content" else (field,)
    return [*messages[:-1], {**messages[-1], **{f: messages[-1][f] + tag + " " for f in fields}}]


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
