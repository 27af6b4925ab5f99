"""A conversation as chat templates know it: plain JSON, with marks that keep control tokens in it text."""

import dataclasses
import re
import reprlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmrs.core.errors import RequestError
from llmrs.models.text.marked import viewed
from llmrs.models.text.message import Message

DEEPEST = 64  # lists and objects within each other; schemas of tools have about ten
LARGEST, ITEM = 16_000_000, 16  # characters of a conversation, and how many each of its values counts for
WIDEST = 1024  # bits of a number
REASONING = ("reasoning_content", "thinking", "reasoning")  # names of the assistant's thoughts
TEXTS = ("role", "tool_call_id", "name", *REASONING)


@dataclass(frozen=True)
class Conversation:
    """What a template is given. All of it is plain JSON that nobody else holds."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    variables: dict[str, Any]
    add_generation_prompt: bool
    continued: str | None  # the field of the last message that the answer goes on with

    def texts(self) -> Iterator[str]:
        """Every text in it, keys included."""
        return _texts([self.messages, self.tools, self.variables])

    def parts(self) -> list[str]:
        """The texts of contents that are lists of parts."""
        lists = [m["content"] for m in self.messages if isinstance(m.get("content"), list)]
        return [part["text"] for content in lists for part in content]

    def called(self) -> list[str]:
        """The names of the functions that messages without a content call."""
        calls = [m.get("tool_calls") for m in self.messages if "content" in m and m["content"] is None]
        functions = [c.get("function") for some in calls if isinstance(some, list) for c in some if isinstance(c, dict)]
        return [f["name"] for f in functions if isinstance(f, dict) and isinstance(f.get("name"), str)]

    def all_text(self) -> bool:
        """Whether every content is a text, or was not given."""
        return all(isinstance(m.get("content", ""), str) for m in self.messages)

    def as_text(self) -> "Conversation":
        """With every content as one text: parts are joined, and None is left out."""
        return dataclasses.replace(self, messages=[_with_text(m) for m in self.messages])


def conversation(
    messages: Sequence[Message | Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool | None = None,
    continue_final_message: bool | str = False,
    **variables: Any,
) -> Conversation:
    """Rebuilds what is given as plain JSON. Raises RequestError for what is not JSON, or too deep or large.

    `continue_final_message` leaves the last message open: its content, or the field that is named. Otherwise the
    beginning of an answer is added, unless `add_generation_prompt` is false.
    """
    rebuilt = _Rebuild()
    turns = [rebuilt(turn(m, n), f"message {n}") for n, m in enumerate(messages)]
    functions = None if tools is None else [rebuilt(_function(t, n), f"tool {n}") for n, t in enumerate(tools)]
    given = {name: rebuilt(value, name) for name, value in variables.items()}
    if continue_final_message and add_generation_prompt:
        raise RequestError("continue_final_message and add_generation_prompt exclude each other", "give one of them")
    continued = "content" if continue_final_message is True else continue_final_message or None
    return Conversation(
        [_with_reasoning(t) for t in turns],
        functions,
        given,
        not continued if add_generation_prompt is None else bool(add_generation_prompt),
        _checked_continued(turns, continued) if continued else None,
    )


def turn(message: Message | Mapping[str, Any], number: int) -> dict[str, Any]:
    """A message's fields by name. Those that are None are left out, as transformers does, except for the content:
    templates ask whether it is None. Raises RequestError.
    """
    if isinstance(message, Message):
        fields = {f.name: getattr(message, f.name) for f in dataclasses.fields(message)}
    elif isinstance(message, Mapping):
        fields = dict(message)
    else:
        raise RequestError(f"message {number} is a {type(message).__name__}", "give Message(role, content)")
    for name in TEXTS:
        if not isinstance(fields.get(name), str | None):
            raise RequestError(f"message {number}: {name} is {reprlib.repr(fields[name])}", f"{name} must be text")
    if fields.get("role") is None:
        raise RequestError(f"message {number} has no role", "roles are system, user, assistant and tool")
    _check_content(fields.get("content"), number)
    return {name: value for name, value in fields.items() if value is not None or name == "content"}


def _check_content(content: Any, number: int) -> None:
    """Raises RequestError for what is neither text nor a list of text parts."""
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
        if not isinstance(part.get("text"), str):
            raise RequestError(
                f"message {number}: content holds a part with text {reprlib.repr(part.get('text'))}", hint
            )


def _with_text(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if isinstance(content, list):
        return {**message, "content": "".join(part["text"] for part in content)}
    return message if content is not None else {k: v for k, v in message.items() if k != "content"}


def _function(tool: Any, number: int) -> Mapping[str, Any]:
    if not isinstance(tool, Mapping):
        raise RequestError(
            f"tool {number} is a {type(tool).__name__}",
            'describe it: {"type": "function", "function": {"name": ..., "description": ..., "parameters": ...}}',
        )
    return tool


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Some templates know the reasoning as `thinking`, and some clients write `reasoning`: as transformers has it."""
    reasoning = next((message[name] for name in REASONING if name in message), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _checked_continued(turns: Sequence[Mapping[str, Any]], field: str) -> str:
    if field not in ("content", "reasoning_content"):
        raise RequestError(f"continue_final_message is {field!r}", "it may be true, content or reasoning_content")
    if not turns or turns[-1].get(field) in (None, []):
        raise RequestError(f"there is no last message whose {field} could be continued", "add the beginning of one")
    return field


class _Rebuild:
    """Copies values that are JSON; all that one of these copies may together be LARGEST."""

    def __init__(self) -> None:
        self.left = LARGEST

    def __call__(self, value: Any, where: str, depth: int = 0) -> Any:
        self.left -= ITEM
        if isinstance(value, str):
            self.left -= len(value)
        if depth > DEEPEST or self.left < 0:
            limit = f"more than {DEEPEST} deep" if depth > DEEPEST else f"larger than {LARGEST} characters"
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
        return checked(str.__str__(key))


def _scalar(value: Any, where: str) -> Any:
    """Subclasses, such as enums, are made what they are based on: their methods are none of a template's business."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return checked(str.__str__(value))
    if isinstance(value, int) and int.bit_length(value) <= WIDEST:
        return int.__int__(value)
    if isinstance(value, float) and float("-inf") < value < float("inf"):
        return float.__float__(value)
    shown = f"a number of {value.bit_length()} bits" if isinstance(value, int) else reprlib.repr(value)
    raise RequestError(f"{where} holds {shown}, which is not JSON", "give text, finite numbers, lists and objects")


def checked(text: str) -> str:
    """The text, if it can be encoded. Raises RequestError."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        shown = ascii(text[error.start])
        raise RequestError(f"the text holds {shown}, a lone surrogate", "text must be valid Unicode") from error
    return text


def _texts(value: Any) -> Iterator[str]:
    left = [value]
    while left:
        v = left.pop()
        if isinstance(v, str):
            yield v
        elif isinstance(v, dict):
            left += [*v.keys(), *v.values()]
        elif isinstance(v, list):
            left += v


# What users write must not become a control token. A mark in each that they write keeps the tokenizer from seeing it.


def unused(c: Conversation, count: int) -> list[str]:
    """So many characters, of the private use area, that the conversation does not hold."""
    used = set().union(*c.texts())
    free = [x for x in map(chr, range(0xE000, 0xF900)) if x not in used][:count]
    if len(free) < count:
        raise RequestError("the conversation holds every private character of Unicode", "leave some out")
    return free


def broken(c: Conversation, control: Collection[str], mark: str) -> Conversation:
    """The conversation with `mark` after the first character of each of these tokens in it.

    A template may change what follows, and so write a token that is not there: by taking something out, or in lower
    case. So the mark also stands where only the first two characters of a token do, if they are not both letters.
    """
    ends = {token: len(token) if token[:2].isalnum() else 2 for token in control}
    begins = {f"{re.escape(token[0])}(?={re.escape(token[1:end])})" for token, end in ends.items()}
    pattern = re.compile("|".join(sorted(begins)) or "(?!)", re.IGNORECASE)

    def texts(text: str) -> str:
        return viewed(pattern.sub(lambda found: found[0] + mark, text), mark)

    return dataclasses.replace(
        c,
        messages=[{name: _mapped(value, texts) for name, value in m.items()} for m in c.messages],
        tools=_mapped(c.tools, texts),
        variables={name: _mapped(value, texts) for name, value in c.variables.items()},
    )


def _mapped(value: Any, texts: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return texts(value)
    if isinstance(value, list):
        return [_mapped(v, texts) for v in value]
    if isinstance(value, dict):
        return {texts(k): _mapped(v, texts) for k, v in value.items()}
    return value
