"""Vocabularies of GGUF files, trained on many languages."""

import json
from functools import cache
from pathlib import Path

import gguf
import multilingual
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # types
SPECIAL = [("<|endoftext|>", CONTROL), ("<|im_start|>", CONTROL), ("<|im_end|>", CONTROL), ("<think>", USER_DEFINED),
           ("</think>", USER_DEFINED), ("    ", USER_DEFINED)]  # fmt: skip
SPACE = "▁"


@cache
def byte_level(size: int = 4000) -> tuple[list[str], list[int], list[str]]:
    """Tokens, types and merges, as of GPT-2, Qwen and Llama 3; at the end SPECIAL and some that are not used."""
    t = tokenizers.Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]{1,7}"), "isolated"),  # merges across the words of all of them
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                  show_progress=False)  # fmt: skip
    t.train_from_iterator(multilingual.random_texts(1500, seed=1) + multilingual.TEXTS, trainer)
    vocab = sorted(t.get_vocab().items(), key=lambda item: item[1])
    merges = [" ".join(m) if isinstance(m, list) else m for m in json.loads(t.to_str())["model"]["merges"]]
    tokens, types = [text for text, _ in vocab], [NORMAL] * len(vocab)
    tokens += [text for text, _ in SPECIAL] + [f"[PAD{len(vocab) + len(SPECIAL) + n}]" for n in range(3)]
    return tokens, types + [kind for _, kind in SPECIAL] + [UNUSED] * 3, merges


def sentencepiece(special: tuple[tuple[str, int], ...] = ()) -> tuple[list[str], list[int], list[float]]:
    """Tokens, types and scores, as of Llama 2 and Gemma: each score is the negative rank of the token's merge."""
    learned = [text for text in _learned_pieces() if text not in dict(special)]
    words, letters = [w for w in learned if len(w) > 1], [w for w in learned if len(w) == 1]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *words, *letters]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(learned)]
    scores = [0.0] * 259 + [-float(n) for n in range(len(learned))]
    tokens += [text for text, _ in special]
    return tokens, types + [kind for _, kind in special], scores + [-1000.0] * len(special)


@cache
def _learned_pieces(size: int = 3000) -> list[str]:
    t = tokenizers.Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always")
    texts = multilingual.random_texts(1500, seed=2) + multilingual.TEXTS
    t.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, limit_alphabet=400, show_progress=False))
    return [text for text, _ in sorted(t.get_vocab().items(), key=lambda item: item[1])]


def write(path: Path, model: str, tokens: list[str], types: list[int] | None = None, **keys: object) -> Path:
    """A file with this vocabulary and without weights. `keys`: more of `tokenizer.ggml`."""
    writer = gguf.GGUFWriter(path, "llama")
    for key in ("context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count"):
        writer.add_uint32(f"llama.{key}", 32)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-6)
    writer.add_tokenizer_model(model)
    writer.add_token_list(tokens)
    if types is not None:
        writer.add_token_types(types)
    for key, value in keys.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string, list: writer.add_array}
        add[type(value)](f"tokenizer.ggml.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def write_byte_level(path: Path, pre: str | None, **keys: object) -> Path:
    """Of `byte_level`."""
    tokens, types, merges = byte_level()
    end = {"eos_token_id": tokens.index("<|im_end|>"), "bos_token_id": tokens.index("<|endoftext|>")}
    given = {} if pre is None else {"pre": pre}
    return write(path, "gpt2", tokens, types, merges=merges, **{**given, **end, **keys})


def write_sentencepiece(path: Path, special: tuple[tuple[str, int], ...] = (), **keys: object) -> Path:
    """Of `sentencepiece`."""
    tokens, types, scores = sentencepiece(special=special)
    return write(path, "llama", tokens, types, scores=scores, **{"bos_token_id": 1, "eos_token_id": 2, **keys})
