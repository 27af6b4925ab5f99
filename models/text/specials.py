"""Special tokens by name, bos, eos and the like: from tokenizer_config.json, or the tokenizer class's defaults."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmrs.core.errors import ModelError, RequestError
from llmrs.models.files.json_reader import Fields, read_json
from llmrs.models.files.untrusted import inside
from llmrs.models.text.conversation import checked

NAMES = ("bos", "eos", "unk", "pad", "sep", "cls", "mask")
SENTENCEPIECE = {"bos": "<s>", "eos": "</s>", "unk": "<unk>"}
GPT = dict.fromkeys(("bos", "eos", "unk"), "<|endoftext|>")
# Defaults of the tokenizer classes of transformers 5.23; a name with Fast at its end means the same
CLASSES: dict[str, dict[str, str]] = {
    "CodeLlamaTokenizer": SENTENCEPIECE,
    "CohereTokenizer": {
        "bos": "<BOS_TOKEN>",
        "eos": "<|END_OF_TURN_TOKEN|>",
        "unk": "<UNK>",
        "pad": "<PAD>",
        "cls": "<CLS>",
        "sep": "<SEP>",
        "mask": "<MASK_TOKEN>",
    },
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
    """What tokenizer_config.json holds, and special_tokens_map.json in folders that transformers 4.33 or an earlier one
    wrote: later ones list `added_tokens_decoder`, and the map is ignored, as transformers does. Raises ModelError.
    """
    config, tokens = inside(folder, "tokenizer_config.json"), inside(folder, "special_tokens_map.json")
    settings = read_json(config) if config.exists() else {}
    if "added_tokens_decoder" in settings or not tokens.exists():
        return settings
    return {**settings, **read_json(tokens)}


def special_tokens(settings: dict[str, Any], path: Path, id_of: Callable[[str], int | None]) -> dict[str, str | None]:
    """Texts by name; None where the model has none. Of one that is not there nothing is known. Raises ModelError."""
    given = {name: _content(path, settings, f"{name}_token") for name in NAMES if f"{name}_token" in settings}
    kind = settings.get("tokenizer_class")
    defaults = CLASSES.get(kind.removesuffix("Fast")) if isinstance(kind, str) else None
    if defaults is None:
        return given
    known = {name: defaults.get(name) for name in NAMES}
    return {**{name: text for name, text in known.items() if text is None or id_of(text) is not None}, **given}


def text_of(token: Any) -> Any:
    """A special token's text, which files write as text or as an object."""
    return token.get("content") if isinstance(token, dict) else token


def _content(path: Path, settings: dict[str, Any], name: str) -> str | None:
    value = text_of(settings[name])
    if value is not None and not isinstance(value, str):
        raise Fields(path, settings).error(name, "text, or an object with the text as its content")
    try:
        return checked(value) if value else None
    except RequestError as error:
        raise ModelError(f"{path}: {name}: {error.message}", HINT) from error
