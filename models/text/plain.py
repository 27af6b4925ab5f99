"""A tokenizer to which control tokens are plain text."""

import json
from collections.abc import Collection
from typing import Any

import tokenizers

BOUNDARY, HIDDEN = "\ufdd0", "\ufdd1"  # noncharacters: Unicode keeps them for the inside of programs


def plain(inner: tokenizers.Tokenizer, control: Collection[str]) -> tokenizers.Tokenizer:
    """The same tokenizer, with the same ids, that never makes these tokens out of text.

    Added tokens are looked for in the text, but models may also make a word of their vocabulary that is a control
    token: Unigram the likeliest, WordLevel one that stands alone. So they get names that no text has: HIDDEN is in
    them. BOUNDARY is an added token, to stand before a text that does not begin.
    """
    data = json.loads(inner.to_str())
    for token in data["added_tokens"]:
        if token["content"] in control:
            token |= {"content": HIDDEN + token["content"], "normalized": False}
    _rename(data["model"], {content: HIDDEN + content for content in control})
    made = tokenizers.Tokenizer.from_str(json.dumps(data))
    made.add_special_tokens([BOUNDARY])
    return made


def _rename(model: dict[str, Any], names: dict[str, str]) -> None:
    """Renames words of the vocabulary; those of BPE that are merged from others no longer are."""
    words = model["vocab"]
    if isinstance(words, list):  # Unigram: (word, score)
        model["vocab"] = [[names.get(word, word), score] for word, score in words]
        return
    present = names.keys() & words.keys()
    for name in present:
        words[names[name]] = words.pop(name)
    if present and "merges" in model:
        model["merges"] = [m for m in model["merges"] if not present & {*(pair := _pair(m)), "".join(pair)}]
    if model.get("unk_token") in present:
        model["unk_token"] = names[model["unk_token"]]


def _pair(merge: str | list[str]) -> list[str]:
    return merge.split(" ") if isinstance(merge, str) else merge
