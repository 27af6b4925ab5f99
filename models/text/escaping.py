"""Escapes special tokens in untrusted text: a private character inside each keeps the tokenizer from matching it."""

import dataclasses
import re
from collections.abc import Callable, Collection
from typing import Any

from llmrs.core.errors import RequestError
from llmrs.models.text.conversation import Conversation
from llmrs.models.text.escaped_str import hide_escapes


def free_private_chars(c: Conversation, count: int) -> list[str]:
    """`count` private-use characters that the conversation does not contain. Raises RequestError without any."""
    used = set().union(*c.strings())
    free = [x for x in map(chr, range(0xE000, 0xF900)) if x not in used][:count]
    if len(free) < count:
        raise RequestError("the conversation holds every private character of Unicode", "leave some out")
    return free


def escape_special_tokens(c: Conversation, tokens: Collection[str], escape: str) -> Conversation:
    """The conversation with `escape` after the first character of each of these tokens.

    A template may build a token from text around it, by removing characters or changing case. Therefore the first two
    characters of a token are escaped too, unless both are alphanumeric.
    """
    ends = {token: len(token) if token[:2].isalnum() else 2 for token in tokens}
    starts = {f"{re.escape(token[0])}(?={re.escape(token[1:end])})" for token, end in ends.items()}
    pattern = re.compile("|".join(sorted(starts)) or "(?!)", re.IGNORECASE)

    def escaped(text: str) -> str:
        return hide_escapes(pattern.sub(lambda match: match[0] + escape, text), escape)

    return dataclasses.replace(
        c,
        messages=[{name: _map_strings(value, escaped) for name, value in m.items()} for m in c.messages],
        tools=_map_strings(c.tools, escaped),
        variables={name: _map_strings(value, escaped) for name, value in c.variables.items()},
    )


def _map_strings(value: Any, function: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return function(value)
    if isinstance(value, list):
        return [_map_strings(v, function) for v in value]
    if isinstance(value, dict):
        return {function(k): _map_strings(v, function) for k, v in value.items()}
    return value
