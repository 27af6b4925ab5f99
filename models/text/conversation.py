"""Validates a conversation and copies it into plain JSON for chat templates."""

import dataclasses
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmrs.core.errors import RequestError
from llmrs.models.text.message import Message

MAX_DEPTH = 64  # nested lists and objects; tool schemas have about ten
MAX_CHARS, CHARS_PER_VALUE = 16_000_000, 16  # size limit of a conversation, in characters plus a charge per value
MAX_INT_BITS = 1024
REASONING = ("reasoning_content", "thinking", "reasoning")  # names of one field
TEXT_FIELDS = ("role", "tool_call_id", "name", *REASONING)
TOOL_FORM = '{"type": "function", "function": {"name": ..., "description": ..., "parameters": ...}}'


@dataclass(frozen=True)
class Conversation:
    """The variables of a chat template: plain JSON, shared with no caller."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    variables: dict[str, Any]
    add_generation_prompt: bool
    continued: str | None  # the field of the last message that the answer continues

    def strings(self) -> Iterator[str]:
        """Every string, keys included."""
        stack: list[Any] = [self.messages, self.tools, self.variables]
        while stack:
            v = stack.pop()
            if isinstance(v, str):
                yield v
            elif isinstance(v, dict):
                stack += [*v.keys(), *v.values()]
            elif isinstance(v, list):
                stack += v

    def text_parts(self) -> list[str]:
        """The texts of contents that are lists of parts."""
        lists = [m["content"] for m in self.messages if isinstance(m.get("content"), list)]
        return [part["text"] for content in lists for part in content]

    def called_functions(self) -> list[str]:
        """Names of the functions that messages with content None call."""
        calls = [m.get("tool_calls") for m in self.messages if "content" in m and m["content"] is None]
        functions = [c.get("function") for cs in calls if isinstance(cs, list) for c in cs if isinstance(c, dict)]
        return [f["name"] for f in functions if isinstance(f, dict) and isinstance(f.get("name"), str)]

    def is_text_only(self) -> bool:
        """Whether every content is a string or missing."""
        return all(isinstance(m.get("content", ""), str) for m in self.messages)

    def as_text_only(self) -> "Conversation":
        """With parts joined, and content None left out."""
        return dataclasses.replace(self, messages=[_with_text(m) for m in self.messages])


def conversation(
    messages: Sequence[Message | Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool | None = None,
    continue_final_message: bool | str = False,
    **variables: Any,
) -> Conversation:
    """Copies its arguments into a Conversation. Raises RequestError for values that are not JSON, too deep or large.

    `continue_final_message` leaves the last message open: its content, or the named field. Otherwise the generation
    prompt is added, unless `add_generation_prompt` is false.
    """
    copy = _JsonCopy()
    copied = [copy(message_fields(m, n), f"message {n}") for n, m in enumerate(messages)]
    tools = None if tools is None else list(tools)
    for n, tool in enumerate(tools or ()):
        if not isinstance(tool, Mapping):
            raise RequestError(f"tool {n} is a {type(tool).__name__}", f"describe it: {TOOL_FORM}")
    functions = None if tools is None else [copy(t, f"tool {n}") for n, t in enumerate(tools)]
    given = {name: copy(value, name) for name, value in variables.items()}
    if continue_final_message and add_generation_prompt:
        raise RequestError("continue_final_message and add_generation_prompt exclude each other", "give one of them")
    continued = "content" if continue_final_message is True else continue_final_message or None
    return Conversation(
        [_with_reasoning(m) for m in copied],
        functions,
        given,
        not continued if add_generation_prompt is None else bool(add_generation_prompt),
        _checked_continued(copied, continued) if continued else None,
    )


def message_fields(message: Message | Mapping[str, Any], number: int) -> dict[str, Any]:
    """A message's fields by name. None is left out, as in transformers, except for content. Raises RequestError."""
    if isinstance(message, Message):
        fields = {f.name: getattr(message, f.name) for f in dataclasses.fields(message)}
    elif isinstance(message, Mapping):
        fields = dict(message)
    else:
        raise RequestError(f"message {number} is a {type(message).__name__}", "give Message(role, content)")
    for name in TEXT_FIELDS:
        if not isinstance(fields.get(name), str | None):
            raise RequestError(f"message {number}: {name} is {reprlib.repr(fields[name])}", f"{name} must be text")
    if fields.get("role") is None:
        raise RequestError(f"message {number} has no role", "roles are system, user, assistant and tool")
    _check_content(fields.get("content"), number)
    return {name: value for name, value in fields.items() if value is not None or name == "content"}


def _check_content(content: Any, number: int) -> None:
    """Raises RequestError unless it is text, a list of text parts or None."""
    if isinstance(content, str | None):
        return
    hint = 'content must be text, or a list of parts such as {"type": "text", "text": "Hi"}'
    if not isinstance(content, list | tuple):
        raise RequestError(f"message {number}: content is {reprlib.repr(content)}", hint)
    for part in content:
        if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
            raise RequestError(f"message {number}: content holds {reprlib.repr(part)}, which is no part", hint)
        if part["type"] != "text":
            raise RequestError(f"message {number}: content holds a part of type {part['type'][:50]!r}", hint)
        text = part.get("text")
        if not isinstance(text, str):
            raise RequestError(f"message {number}: content holds a part with text {reprlib.repr(text)}", hint)


def _with_text(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if isinstance(content, list):
        return {**message, "content": "".join(part["text"] for part in content)}
    return message if content is not None else {k: v for k, v in message.items() if k != "content"}


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Some templates read `thinking`, and some clients write `reasoning`: sets both names, as transformers."""
    reasoning = next((message[name] for name in REASONING if name in message), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _checked_continued(messages: Sequence[Mapping[str, Any]], field: str) -> str:
    if field not in ("content", "reasoning_content"):
        raise RequestError(f"continue_final_message is {field!r}", "it may be true, content or reasoning_content")
    if not messages or messages[-1].get(field) in (None, []):
        raise RequestError(f"there is no last message whose {field} could be continued", "add the beginning of one")
    return field


class _JsonCopy:
    """Copies JSON values, at most MAX_CHARS in total."""

    def __init__(self) -> None:
        self.left = MAX_CHARS

    def __call__(self, value: Any, where: str, depth: int = 0) -> Any:
        self.left -= CHARS_PER_VALUE
        if isinstance(value, str):
            self.left -= len(value)
        if depth > MAX_DEPTH or self.left < 0:
            limit = f"more than {MAX_DEPTH} deep" if depth > MAX_DEPTH else f"larger than {MAX_CHARS} characters"
            raise RequestError(f"{where} makes the conversation {limit}", "shorten it")
        if isinstance(value, Mapping):
            return {self._key(k, where): self(v, where, depth + 1) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [self(v, where, depth + 1) for v in value]
        return _scalar(value, where)

    def _key(self, key: Any, where: str) -> str:
        if not isinstance(key, str):
            raise RequestError(f"{where} holds the key {reprlib.repr(key)}", "keys must be text")
        self.left -= len(key)
        return check_unicode(str.__str__(key))


def _scalar(value: Any, where: str) -> Any:
    """Converts subclasses, such as enums, to their base type: templates must not call their methods."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return check_unicode(str.__str__(value))
    if isinstance(value, int) and int.bit_length(value) <= MAX_INT_BITS:
        return int.__int__(value)
    if isinstance(value, float) and float("-inf") < value < float("inf"):
        return float.__float__(value)
    shown = f"a number of {value.bit_length()} bits" if isinstance(value, int) else reprlib.repr(value)
    raise RequestError(f"{where} holds {shown}, which is not JSON", "give text, finite numbers, lists and objects")


def check_unicode(text: str) -> str:
    """The text. Raises RequestError for a lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        shown = ascii(text[error.start])
        raise RequestError(f"the text holds {shown}, a lone surrogate", "text must be valid Unicode") from error
    return text
