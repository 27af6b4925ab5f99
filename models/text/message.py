"""The chat message."""

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any


@dataclass(frozen=True)
class Message:
    """One message of a conversation. `role`: system, user, assistant, tool, or another that the template knows.

    `content` is text, a list of text parts (`{"type": "text", "text": "Hi"}`), or None. `tool_calls` are objects of
    OpenAI's API: `type`, `id` and `function` with `name` and `arguments`, which most templates expect as an object.
    Fields that are None, except `content`, are hidden from the template.
    """

    role: str
    content: str | Sequence[Mapping[str, Any]] | None = None
    _: KW_ONLY
    tool_calls: Sequence[Mapping[str, Any]] | None = None  # assistant
    tool_call_id: str | None = None  # tool: the call that it answers
    name: str | None = None  # tool: the function
    reasoning_content: str | None = None  # assistant; templates may drop it
