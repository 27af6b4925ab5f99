"""What a conversation is made of."""

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; `role` is what the chat template knows: system, user, assistant, tool.

    `content` is text, a list of text parts as OpenAI's API has them (`{"type": "text", "text": "Hi"}`), or None, which
    the template sees. Other fields that are None are not there for it. `tool_calls` are objects as OpenAI's API has
    them: `type`, `id` and `function` with `name` and `arguments`, which most templates want as an object.
    """

    role: str
    content: str | Sequence[Mapping[str, Any]] | None = None
    _: KW_ONLY
    tool_calls: Sequence[Mapping[str, Any]] | None = None  # of the assistant
    tool_call_id: str | None = None  # of a tool's answer: the call's
    name: str | None = None  # of a tool's answer: the function's
    reasoning_content: str | None = None  # the assistant's thoughts, which templates may leave out
