"""The tokenizer of a model folder, as the metadata of a GGUF file.

Keys and token types: gguf-py/gguf/constants.py of github.com/ggml-org/llama.cpp. Byte-level BPE becomes "gpt2", with a
name for the pre-tokenizer; BPE with byte fallback becomes "llama", SentencePiece, whose merges are ordered by scores.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmrs.core.errors import ModelError
from llmrs.models.files.json_reader import parse_json, short_repr
from llmrs.models.files.untrusted import read_text
from llmrs.models.text.gguf_tokenizer import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, gguf_tokenizer
from llmrs.models.text.pre_tokenizers import GPT2, IGNORE_MERGES, NAMES, SPLITS
from llmrs.models.text.template_files import DEFAULT, GGUF_KEY, sources
from llmrs.models.text.tokenizer import MAX_FILE_BYTES, SPACE, Tokenizer

BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
HINT = "quantize to mlx4 or fp8, which keep tokenizer.json"
# Texts whose ids must not change: scripts, digits, spaces, punctuation, code, emoji, an apostrophe.
PROBES = (
    "Hello, World! It's 3.14159 or 2026, isn't it? I'LL SEE.", "  two  spaces\n\n\tand\r\ntabs \u00a0 ",
    "x = {'a': [1, 22, 333]}; // ok",
    "Grüße aus Zürich, ça va? İstanbul ğüşiöç", "Привет, мир. Ελληνικά",
    "你好，世界！今天是2026年。", "こんにちは、カタカナ 漢字",
    "안녕하세요 세계", "مرحبا بالعالم", "שלום עולם", "नमस्ते दुनिया", "สวัสดีชาวโลก", "👩‍👩‍👧 🇨🇭 ∑√∞ ½ ①", "\u200b\ufeff",
)  # fmt: skip


def vocabulary(folder: Path, tokenizer: Tokenizer, vocab_size: int, eos_ids: Sequence[int]) -> dict[str, Any]:
    """The keys tokenizer.*, checked by encoding texts. Raises ModelError for a tokenizer that they can't express."""
    path = folder / "tokenizer.json"
    data = parse_json(read_text(path, MAX_FILE_BYTES), path)
    model = data["model"]
    if model.get("type") != "BPE":
        raise ModelError(f"{folder}: GGUF files can't express its tokenizer, {model.get('type')}", HINT)
    tokens, types = _tokens(data, tokenizer, vocab_size)
    values: dict[str, Any] = {"tokens": tokens, "token_type": np.array(types, np.int32)}
    if model.get("byte_fallback"):
        scores = _scores(tokens, [_pair(m) for m in model["merges"]])
        spaced = tokenizer.inner.encode("x", add_special_tokens=False).tokens[0].startswith(SPACE)
        values |= {"model": "llama", "scores": scores, "add_space_prefix": spaced}
    else:
        merges = [" ".join(_pair(m)) for m in model["merges"]]
        values |= {"model": "gpt2", "pre": pre_name(path, data), "merges": merges}
    values |= _special(tokenizer, eos_ids)
    found = {f"tokenizer.ggml.{key}": value for key, value in values.items()}
    verify(path, found, tokenizer)
    templates = {name: text for name, (text, _) in sources(folder).items() if isinstance(text, str)}
    return {
        **found,
        **{GGUF_KEY if name == DEFAULT else f"{GGUF_KEY}.{name}": text for name, text in templates.items()},
    }


def _pair(merge: Any) -> tuple[str, str]:
    """Files write a merge as "a b" or as ["a", "b"]."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _tokens(data: Mapping[str, Any], tokenizer: Tokenizer, vocab_size: int) -> tuple[list[str], list[int]]:
    """Texts and types by id; ids without a token are padding."""
    tokens, types = [f"[PAD{n}]" for n in range(vocab_size)], [UNUSED] * vocab_size
    unknown = data["model"].get("unk_token")
    for text, n in data["model"]["vocab"].items():
        if n >= vocab_size:
            raise ModelError(f"the tokenizer has the id {n}, and the model a vocabulary of {vocab_size}", HINT)
        kind = BYTE if data["model"].get("byte_fallback") and BYTE_TOKEN.fullmatch(text) else NORMAL
        tokens[n], types[n] = text, UNKNOWN if text == unknown else kind
    for n, added in tokenizer.added.items():
        if n < vocab_size and types[n] != UNKNOWN:
            tokens[n], types[n] = added.content, CONTROL if added.special else USER_DEFINED
    return tokens, types


def _scores(tokens: Sequence[str], merges: Sequence[tuple[str, str]]) -> np.ndarray:
    """float32: minus the place of the first merge that makes a token."""
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    return np.array([-float(ranks.get(text, 0)) for text in tokens], np.float32)


def _special(tokenizer: Tokenizer, eos_ids: Sequence[int]) -> dict[str, Any]:
    """Ids of special tokens, and which of them a prompt gets."""
    names = {"bos": "bos", "unk": "unknown", "pad": "padding"}
    ids = {
        f"{key}_token_id": tokenizer.token_to_id(tokenizer.special_tokens.get(name) or "")
        for name, key in names.items()
    }
    ids |= dict(zip(("eos_token_id", "eot_token_id", "eom_token_id"), eos_ids, strict=False))
    plain, added = (tokenizer.inner.encode("x", add_special_tokens=flag).ids for flag in (False, True))
    bos, eos = added[:1] != plain[:1], added[-1:] != plain[-1:]
    if bos and added[0] != ids["bos_token_id"]:
        ids["bos_token_id"] = added[0]
    return {**{key: n for key, n in ids.items() if n is not None}, "add_bos_token": bos, "add_eos_token": eos}


def pre_name(path: Path, data: Mapping[str, Any]) -> str:
    """llama.cpp's name of the pre-tokenizer. Raises ModelError for one without a name."""
    patterns, whole_words = _patterns(data.get("pre_tokenizer") or {}), bool(data["model"].get("ignore_merges"))
    for name, splits in sorted(NAMES.items(), key=lambda item: item[0] != item[1]):  # the main name first
        if SPLITS[splits] == patterns and (name in IGNORE_MERGES) == whole_words:
            return name
    shown = short_repr(" | ".join(p or "?" for p in patterns))
    raise ModelError(f"{path}: its pre-tokenizer has no name in GGUF files: {shown}", HINT)


def _patterns(step: Mapping[str, Any]) -> list[str | None]:
    """The regular expressions that split text, one after the other; None for another kind of step."""
    kind = step.get("type")
    if kind == "Sequence":
        return [p for inner in step["pretokenizers"] for p in _patterns(inner)]
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return [GPT2] if step.get("use_regex", True) else []
    if kind == "Digits" and step.get("individual_digits"):
        return [r"\p{N}"]
    isolated = kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert")
    return [step["pattern"].get("Regex") if isolated else None]


def verify(path: Path, metadata: Mapping[str, Any], tokenizer: Tokenizer) -> None:
    """Raises ModelError where the tokenizer that GGUF readers make of the metadata gives other ids."""
    made, _ = gguf_tokenizer(path, metadata)
    for text in PROBES:
        if made.encode(text) != tokenizer.encode(text):
            raise ModelError(f"{path}: GGUF files can't express its tokenizer: {text!r} would get other ids", HINT)
