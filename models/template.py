"""Chat templates: from messages to a prompt in which nothing but the template's own control tokens is one."""

import re
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from llmrs.core.errors import ModelError, RequestError
from llmrs.models.config import read_json
from llmrs.models.files import inside
from llmrs.models.sandbox import Exhausted, Refused, Sandbox
from llmrs.models.tokenizer import Tokenizer, checked

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
        self._sandbox, self._lock = Sandbox(), threading.Lock()
        if len(source) > LARGEST:
            raise ModelError(f"{path}: the chat template has {len(source)} characters, over {LARGEST}", HINT)
        try:
            self._sandbox.allow(BASE)
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
            try:
                return cls(path.read_text("utf-8"), specials, path)
            except (OSError, UnicodeDecodeError) as error:
                raise ModelError(f"{path} can't be read: {error}", HINT) from error
        source = read_json(settings).get("chat_template") if settings.exists() else None
        if isinstance(source, list):  # several, by name
            named = {t.get("name"): t.get("template") for t in source if isinstance(t, dict)}
            source = named.get("default")
        if source is not None and not isinstance(source, str):
            raise ModelError(f"{settings}: chat_template is not text", HINT)
        return None if source is None else cls(source, specials, settings)

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **more: Any) -> str:
        """The conversation as text. `more` are further variables. Raises RequestError for what the template refuses."""
        variables = {"add_generation_prompt": add_generation_prompt, "tools": None, "documents": None, **more}
        try:
            return self._render(messages, variables)
        except Refused as error:
            raise RequestError(f"the chat template refuses the messages: {error.message}", "see its rules") from error
        except (jinja2.TemplateError, *FAILURES) as error:
            raise RequestError(f"the chat template fails on the messages: {_reason(error)}", HINT) from error

    def _render(self, messages: Sequence[Mapping[str, Any]], variables: dict[str, Any]) -> str:
        given = {**self.specials, "messages": [dict(m) for m in messages], **variables}
        with self._lock:
            self._sandbox.allow(BASE + PER_CHARACTER * len(repr(given)))
            return self._template.render(given)


FAILURES = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError, SyntaxError)


def _reason(error: Exception) -> str:
    """What went wrong, and in which line where that is known."""
    text = getattr(error, "message", None) or str(error) or type(error).__name__
    line = getattr(error, "lineno", None)
    return f"{text} (line {line})" if line and not isinstance(error, Exhausted) else text


def encode_chat(
    tokenizer: Tokenizer, template: ChatTemplate, messages: Sequence[Mapping[str, Any]], **variables: Any
) -> ChatPrompt:
    """Renders and encodes a conversation. Raises RequestError.

    Added tokens in a message stay text: they are broken by a mark before rendering and mended after the template's
    own are found. In the assistant's turns only control tokens are broken: a template may look for others, such as
    the end of the model's thoughts, to leave them out.
    """
    for message in messages:
        checked(message["content"])
    mark = _unused_character(messages)
    broken = [{**m, "content": _broken(tokenizer, m, mark)} for m in messages]
    if broken == list(messages):
        text = template.render(messages, **variables)
        return ChatPrompt(text, tokenizer.encode_rendered(text))
    marked = template.render(broken, **variables)
    ids: list[int] = []
    for part in _added(tokenizer, control_only=False).split(marked):
        if mark in part:
            ids += tokenizer.encode_plain(part.replace(mark, ""))
        elif part:
            ids += tokenizer.encode_rendered(part)
    return ChatPrompt(marked.replace(mark, ""), ids)


def _broken(tokenizer: Tokenizer, message: Mapping[str, Any], mark: str) -> str:
    pattern = _added(tokenizer, control_only=message["role"] == "assistant")
    return pattern.sub(lambda found: found[0][0] + mark + found[0][1:], message["content"])


def _added(tokenizer: Tokenizer, *, control_only: bool) -> re.Pattern[str]:
    """Matches added tokens, the longest first; white space is text. As a group, so that `split` keeps them."""
    found = [t for t in tokenizer.added.values() if t.content.strip() and (t.special or not control_only)]
    contents = sorted({t.content for t in found}, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, contents)) or '(?!)'})")


def _unused_character(messages: Sequence[Mapping[str, Any]]) -> str:
    """A character of the private use area that no message holds."""
    used = set().union(*(m["content"] for m in messages))
    return next(c for c in map(chr, range(0xE000, 0xF900)) if c not in used)
