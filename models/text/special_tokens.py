"""Special tokens (bos, eos, ...) from tokenizer_config.json, or the defaults of the tokenizer class."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tokenizers

from llmrs.core.errors import ModelError, RequestError
from llmrs.models.files.json_reader import ConfigReader, read_json
from llmrs.models.files.untrusted import inside
from llmrs.models.text.conversation import check_unicode

NAMES = ("bos", "eos", "unk", "pad", "sep", "cls", "mask")
SENTENCEPIECE = {"bos": "<s>", "eos": "</s>", "unk": "<unk>"}
GPT = dict.fromkeys(("bos", "eos", "unk"), "<|endoftext|>")
# Defaults of the tokenizer classes of transformers 5.23, which are also called ...Fast
CLASSES: dict[str, dict[str, str]] = {
    "CodeLlamaTokenizer": SENTENCEPIECE,
    "CohereTokenizer": {"bos": "<BOS_TOKEN>", "eos": "<|END_OF_TURN_TOKEN|>", "mask": "<MASK_TOKEN>"}
    | {name: f"<{name.upper()}>" for name in ("unk", "pad", "cls", "sep")},
    "GPT2Tokenizer": GPT,
    "GPTNeoXTokenizer": {**GPT, "pad": "<|padding|>"},
    "GemmaTokenizer": {"bos": "<bos>", "eos": "<eos>", "unk": "<unk>", "pad": "<pad>", "mask": "<mask>"},
    "LlamaTokenizer": SENTENCEPIECE,
    "PreTrainedTokenizer": {},
    "Qwen2Tokenizer": dict.fromkeys(("eos", "unk", "pad"), "<|endoftext|>"),
    "TokenizersBackend": {},
}
HINT = "is the file complete? It is what `tokenizers` writes"


def read_settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, merged with special_tokens_map.json of transformers 4.33 and older.

    Newer files list `added_tokens_decoder`: then the map is ignored, as in transformers. Raises ModelError.
    """
    config, tokens = inside(folder, "tokenizer_config.json"), inside(folder, "special_tokens_map.json")
    settings = read_json(config) if config.exists() else {}
    if "added_tokens_decoder" in settings or not tokens.exists():
        return settings
    return {**settings, **read_json(tokens)}


def special_tokens(
    settings: dict[str, Any], path: Path, token_to_id: Callable[[str], int | None]
) -> dict[str, str | None]:
    """Text by name, None for a token that the model does not have; unknown ones are missing. Raises ModelError."""
    given = {name: _content(path, settings, f"{name}_token") for name in NAMES if f"{name}_token" in settings}
    kind = settings.get("tokenizer_class")
    defaults = CLASSES.get(kind.removesuffix("Fast")) if isinstance(kind, str) else None
    if defaults is None:
        return given
    known = {name: defaults.get(name) for name in NAMES}
    return {**{name: text for name, text in known.items() if text is None or token_to_id(text) is not None}, **given}


def set_special(inner: tokenizers.Tokenizer, settings: dict[str, Any]) -> None:
    """Sets the `special` flag of the tokens that the settings call special, as transformers does.

    Tokens outside of the vocabulary are ignored: it does not add them either.
    """
    added = inner.get_added_tokens_decoder()
    for content in _special_contents(settings):
        if (token_id := inner.token_to_id(content)) is None:
            continue
        token = added.get(token_id, tokenizers.AddedToken(content, normalized=False))
        if not token.special:
            token.special = True
            inner.add_special_tokens([token])


def _special_contents(settings: dict[str, Any]) -> Iterator[str]:
    every = settings.get("added_tokens_decoder")
    listed = [t for t in every.values() if isinstance(t, dict) and t.get("special")] if isinstance(every, dict) else []
    for token in (*(settings.get(f"{name}_token") for name in NAMES), *listed):
        content = _text(token)
        if isinstance(content, str) and content == content.encode(errors="ignore").decode():  # no lone surrogate
            yield content


def _text(token: Any) -> Any:
    """Files write a special token as a string or as an object."""
    return token.get("content") if isinstance(token, dict) else token


def _content(path: Path, settings: dict[str, Any], name: str) -> str | None:
    value = _text(settings[name])
    if value is not None and not isinstance(value, str):
        raise ConfigReader(path, settings).error(name, "text, or an object with the text as its content")
    try:
        return check_unicode(value) if value else None
    except RequestError as error:
        raise ModelError(f"{path}: {name}: {error.message}", HINT) from error
