"""Control tokens: those that tokenizer.json calls special, and those that tokenizer_config.json does."""

from collections.abc import Iterator
from typing import Any

import tokenizers

from llmrs.models.text.specials import NAMES, text_of


def add_control(inner: tokenizers.Tokenizer, settings: dict[str, Any]) -> None:
    """Makes control tokens of the tokens that the settings name, as transformers does. Others have no id: it makes
    none.
    """
    added = inner.get_added_tokens_decoder()
    for content in _special(settings):
        token_id = inner.token_to_id(content)
        if token_id is None:
            continue
        token = added.get(token_id, tokenizers.AddedToken(content, normalized=False))
        if not token.special:
            token.special = True
            inner.add_special_tokens([token])


def _special(settings: dict[str, Any]) -> Iterator[str]:
    """The texts of special tokens that are valid Unicode."""
    every = settings.get("added_tokens_decoder")
    listed = [t for t in every.values() if isinstance(t, dict) and t.get("special")] if isinstance(every, dict) else []
    for token in (*(settings.get(f"{name}_token") for name in NAMES), *listed):
        content = text_of(token)
        if isinstance(content, str) and content == content.encode(errors="ignore").decode():  # no lone surrogate
            yield content
