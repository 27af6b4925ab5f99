"""A tokenizer that treats special tokens as ordinary text."""

import json
from collections.abc import Collection
from typing import Any

import tokenizers

BOUNDARY, HIDDEN = "\ufdd0", "\ufdd1"  # noncharacters, which Unicode reserves for internal use


def ordinary_tokenizer(inner: tokenizers.Tokenizer, special: Collection[str]) -> tokenizers.Tokenizer:
    """A copy with the same ids that never encodes text to these tokens.

    Besides matching added tokens, a model may produce a special token from its vocabulary: Unigram as the likeliest
    word, WordLevel as a whole word. Therefore special tokens are renamed to contain HIDDEN, which no text does.
    BOUNDARY is a new added token, to put before text that continues other text.
    """
    data = json.loads(inner.to_str())
    for token in data["added_tokens"]:
        if token["content"] in special:
            token |= {"content": HIDDEN + token["content"], "normalized": False}
    _rename(data["model"], {content: HIDDEN + content for content in special})
    copy = tokenizers.Tokenizer.from_str(json.dumps(data))
    copy.add_special_tokens([BOUNDARY])
    return copy


def _rename(model: dict[str, Any], names: dict[str, str]) -> None:
    """Renames vocabulary entries, and removes the BPE merges that produce or use them."""
    vocab = model["vocab"]
    if isinstance(vocab, list):  # Unigram: (word, score)
        model["vocab"] = [[names.get(word, word), score] for word, score in vocab]
        return
    present = names.keys() & vocab.keys()
    for name in present:
        vocab[names[name]] = vocab.pop(name)
    if present and "merges" in model:
        model["merges"] = [m for m in model["merges"] if not present & {*(pair := _pair(m)), "".join(pair)}]
    if model.get("unk_token") in present:
        model["unk_token"] = names[model["unk_token"]]


def _pair(merge: str | list[str]) -> list[str]:
    return merge.split(" ") if isinstance(merge, str) else merge
