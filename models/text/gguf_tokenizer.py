"""A tokenizer from the metadata of a GGUF file: byte-level BPE ("gpt2"), and SentencePiece ("llama").

Keys and defaults: gguf-py/gguf/constants.py and src/llama-vocab.cpp of github.com/ggml-org/llama.cpp. The ids are
llama.cpp's, but for special tokens that overlap in a text: as in `tokenizers`, the first wins, llama.cpp takes the
longest. Files don't say how text was normalized: as there, it isn't, also for models trained on NFC (Qwen).
"""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llmrs.core.errors import ModelError, did_you_mean
from llmrs.models.files.json_reader import ConfigReader, short_repr
from llmrs.models.text import pre_tokenizers
from llmrs.models.text.special_tokens import NAMES
from llmrs.models.text.tokenizer import SPACE, Tokenizer, parse_tokenizer

PREFIX = "tokenizer.ggml."
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # token types
ADDED = {UNKNOWN: True, CONTROL: True, USER_DEFINED: False}  # type -> whether it is special
MAX_TOKENS = MAX_MERGES = 2**20  # today's largest have 262,144 and some 500,000
MAX_ADDED, MAX_ADDED_CHARS = 2**16, 2**20  # Gemma 3 has some 6,400
MAX_SPLIT = 2**28  # characters to split all SentencePiece tokens in two in every way: 26 million for 2**18 of ten
SPECIAL_KEYS = {name: f"{name}_token_id" for name in NAMES}
SPECIAL_KEYS |= {"unk": "unknown_token_id", "pad": "padding_token_id", "sep": "seperator_token_id"}  # so spelled
SENTENCEPIECE_IDS = {"bos": 1, "eos": 2, "unk": 0}  # where the file does not say
END_KEYS = [f"{name}_token_id" for name in ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")]
END_TEXTS = {  # tokens that end a generation by their text, whatever their type
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>", "<EOT>", "_<EOT>",
    "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>", "<eos>", "<｜end▁of▁sentence｜>", "<|return|>",
    "<|call|>", "<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>",
    "<reponame>", "<|file_sep|>",
}  # fmt: skip
HTML_END = "</s>"  # as END_TEXTS, if it is a control token: Gemma has it as HTML
HINT = "is the file complete? convert the model again"


def gguf_tokenizer(path: Path, metadata: Mapping[str, Any]) -> tuple[Tokenizer, tuple[int, ...]]:
    """The tokenizer, and the ids that end a generation, the model's eos first.

    Raises ModelError for missing, invalid and contradicting values, and for unknown kinds of tokenizers.
    """
    check_tokenizer(path, metadata)
    vocab = _Vocab(path, metadata)
    data = _byte_level(vocab) if vocab.model == "gpt2" else _sentencepiece(vocab)
    data |= {"version": "1.0", "added_tokens": _added_tokens(vocab), "post_processor": _post_processor(vocab)}
    inner = parse_tokenizer(json.dumps(data, ensure_ascii=False), path)
    settings = {f"{name}_token": None if i is None else vocab.tokens[i] for name, i in vocab.special.items()}
    return Tokenizer(inner, settings, path), vocab.end_ids()


def check_tokenizer(path: Path, metadata: Mapping[str, Any]) -> None:
    """Raises ModelError for unknown kinds of tokenizers, and unknown pre-tokenizers."""
    model, pre = metadata.get(f"{PREFIX}model"), metadata.get(f"{PREFIX}pre", "default")
    if not isinstance(model, str) or model not in ("gpt2", "llama"):
        problem = f"{path}: tokenizer.ggml.model is {short_repr(model)}, which is not supported"
        raise ModelError(problem, "gpt2 (byte-level BPE) and llama (SentencePiece) are")
    if model == "gpt2" and (not isinstance(pre, str) or pre not in pre_tokenizers.NAMES):
        problem = f"{path}: tokenizer.ggml.pre is {short_repr(pre)}, which is not supported"
        raise ModelError(problem, did_you_mean(str(pre)[:60], pre_tokenizers.NAMES))


class _Vocab(ConfigReader):
    """The values of `tokenizer.ggml.*`, checked."""

    def __init__(self, path: Path, metadata: Mapping[str, Any]) -> None:
        found = {key.removeprefix(PREFIX): v for key, v in metadata.items() if key.startswith(PREFIX)}
        super().__init__(path, found)
        self.model, self.pre = found.get("model"), found.get("pre", "default")  # checked
        texts = self.texts("tokens")
        if not 0 < len(texts) <= MAX_TOKENS:
            raise self.error("tokens", f"a list of 1 to {MAX_TOKENS:,} texts")
        self.tokens = [text or f"[EMPTY_{i}]" for i, text in enumerate(texts)]
        self.ids = {text: i for i, text in enumerate(self.tokens)}
        if len(self.ids) != len(self.tokens):
            twice = next(text for i, text in enumerate(self.tokens) if self.ids[text] != i)
            raise ModelError(f"{path}: tokenizer.ggml.tokens holds {short_repr(twice)} twice", HINT)
        kinds = self.numbers("token_type", NORMAL, "iu").tolist()
        self.types = [CONTROL if text in END_TEXTS else t for text, t in zip(self.tokens, kinds, strict=True)]
        self.special = {name: self.token_id(key) for name, key in SPECIAL_KEYS.items()}
        if self.model == "llama":
            for name, default in SENTENCEPIECE_IDS.items():
                if self.special[name] is None and default < len(self.tokens):
                    self.special[name] = default

    def error(self, name: str, allowed: str) -> ModelError:
        problem = f"{self.path}: {PREFIX}{name} is {short_repr(self.data.get(name))}; it must be {allowed}"
        return ModelError(problem, HINT)

    def texts(self, name: str) -> list[str]:
        value = self.data.get(name)
        if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
            raise self.error(name, "a list of texts")
        return value

    def numbers(self, name: str, default: int, kinds: str) -> np.ndarray:
        """One number for each token, of a dtype of these kinds; finite."""
        count = len(self.tokens)
        value = np.asarray(self.data.get(name, np.full(count, default)))
        if value.shape != (count,) or value.dtype.kind not in kinds or not np.isfinite(value).all():
            raise self.error(name, f"a list of {count} finite numbers, one for each token")
        return value

    def token_id(self, name: str) -> int | None:
        """None also for an id that is no token: files give -1 or 2**32 - 1 where a model has no such token."""
        value = self.data.get(name, -1)
        if type(value) is not int:
            raise self.error(name, "a token id")
        return value if 0 <= value < len(self.tokens) else None

    def end_ids(self) -> tuple[int, ...]:
        given = [self.special["eos"], *(self.token_id(key) for key in END_KEYS)]
        known = [self.ids[text] for text in sorted((END_TEXTS | {HTML_END}) & self.ids.keys())]
        known = [i for i in known if self.types[i] == CONTROL]
        return tuple(dict.fromkeys(i for i in (*given, *known) if i is not None))

    def adds(self, name: str, default: bool) -> bool:
        """Whether bos or eos is added to a prompt."""
        added = self.boolean(f"add_{name}_token", default)
        if added and self.special[name] is None and f"add_{name}_token" in self.data:
            raise self.error(SPECIAL_KEYS[name], f"a token id, as {PREFIX}add_{name}_token is true")
        return added and self.special[name] is not None


def _bpe(vocab: _Vocab, merges: list[list[str]], **options: Any) -> dict[str, Any]:
    """The `model` of a tokenizer.json."""
    return {"type": "BPE", "vocab": vocab.ids, "merges": merges, **options}


def _byte_level(vocab: _Vocab) -> dict[str, Any]:
    if "pre" not in vocab.data:
        problem = f"{vocab.path} names no pre-tokenizer ({PREFIX}pre)"
        warnings.warn(f"{problem}: the default may make answers worse; convert the model again", stacklevel=2)
    given = vocab.texts("merges")
    _check_count(vocab, "merges", len(given), MAX_MERGES)
    merges = [merge.split(" ") for merge in given]
    for merge in merges:
        if len(merge) != 2 or not {*merge, "".join(merge)} <= vocab.ids.keys():
            problem = f"{vocab.path}: {PREFIX}merges holds {short_repr(' '.join(merge))}"
            raise ModelError(f"{problem}; a merge is two tokens, with a space between them, that make a third", HINT)
    whole = vocab.pre in pre_tokenizers.IGNORE_MERGES
    return {
        "pre_tokenizer": pre_tokenizers.pre_tokenizer(vocab.pre),
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        "model": _bpe(vocab, merges, ignore_merges=whole),
    }


def _sentencepiece(vocab: _Vocab) -> dict[str, Any]:
    """Merges are derived from the scores. A space is put before text after each special token, as in llama.cpp."""
    prefix = vocab.boolean("add_space_prefix", True)
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    decoder = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
    ]  # fmt: skip
    if prefix:
        decoder.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    unknown = vocab.special["unk"]
    options = {} if unknown is None else {"unk_token": vocab.tokens[unknown]}
    steps = [{"type": "Prepend", "prepend": SPACE}, spaces] if prefix else [spaces]
    return {
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "decoder": {"type": "Sequence", "decoders": decoder},
        "model": _bpe(vocab, _merges(vocab), byte_fallback=True, fuse_unk=True, **options),
    }


def _check_count(vocab: _Vocab, what: str, count: int, limit: int) -> None:
    if count > limit:
        raise ModelError(f"{vocab.path}: its vocabulary has {count:,} {what}, over {limit:,}", HINT)


def _merges(vocab: _Vocab) -> list[list[str]]:
    """Each way to join two tokens to a third, that of the highest score first.

    SentencePiece joins the pair of the highest score anywhere in the text: BPE with the scores as ranks. Tokens of the
    same score, as in files that were made from a tokenizer.json, are ranked by their ids. Text never becomes a control
    token.
    """
    scores = vocab.numbers("scores", 0, "fiu").tolist()
    ids = {text: i for text, i in vocab.ids.items() if vocab.types[i] not in (UNKNOWN, CONTROL, BYTE)}
    _check_count(vocab, "characters to split", sum(len(text) ** 2 for text in ids), MAX_SPLIT)
    found = []
    for text, i in ids.items():
        for n in range(1, len(text)):
            if (left := ids.get(text[:n])) is not None and (right := ids.get(text[n:])) is not None:
                found.append((-scores[i], i, left, right))
        _check_count(vocab, "merges", len(found), MAX_MERGES)
    return [[vocab.tokens[left], vocab.tokens[right]] for *_, left, right in sorted(found)]


def _added_tokens(vocab: _Vocab) -> list[dict[str, Any]]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    ids = [i for i, kind in enumerate(vocab.types) if kind in ADDED]
    _check_count(vocab, "special and user-defined tokens", len(ids), MAX_ADDED)
    _check_count(vocab, "characters in those", sum(len(vocab.tokens[i]) for i in ids), MAX_ADDED_CHARS)
    return [{"id": i, "content": vocab.tokens[i], "special": ADDED[vocab.types[i]], **flags} for i in ids]


def _post_processor(vocab: _Vocab) -> dict[str, Any] | None:
    """Adds bos and eos."""
    first = vocab.adds("bos", vocab.model == "llama" or vocab.pre in pre_tokenizers.ADD_BOS)
    names = ["bos"] * first + ["A"] + ["eos"] * vocab.adds("eos", default=False)
    if names == ["A"]:
        return None
    ids = {name: i for name in names if (i := vocab.special.get(name)) is not None}
    tokens = {vocab.tokens[i]: {"id": vocab.tokens[i], "ids": [i], "tokens": [vocab.tokens[i]]} for i in ids.values()}
    single = [
        {"SpecialToken": {"id": vocab.tokens[ids[n]], "type_id": 0}}
        if n in ids
        else {"Sequence": {"id": n, "type_id": 0}}
        for n in names
    ]
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]  # not used
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": tokens}
