"""Tokenizer training, and documents packed into training sequences."""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import count, islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from demo_model.corpus import END, END_OF_TEXT, START, documents

VOCAB_SIZE = 2048
SPECIAL_TOKENS = [END_OF_TEXT, START, END]
# Qwen's pre-tokenization, with single digits
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DOCUMENTS_PER_SEED = 4000
OPEN_SEQUENCES = 16  # candidates for the next document


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """A byte-level BPE tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, as_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


@dataclass(frozen=True)
class Packed:
    """Packed documents, each array (sequences, length)."""

    tokens: NDArray[np.uint16]
    document: NDArray[np.uint16]  # index of the token's document in its sequence, from 1; 0 is padding
    loss_mask: NDArray[np.bool_]

    @classmethod
    def join(cls, function: Callable[..., NDArray[Any]], parts: Sequence[Any]) -> "Packed":
        return cls(*(function([getattr(p, f.name) for p in parts]) for f in fields(cls)))


def answer_mask(ids: NDArray[np.uint16], header: list[int], end: int) -> NDArray[np.bool_]:
    """The loss mask of a document: answers with their end tokens, or all of plain text. `header` starts an answer."""
    if ids[0] != header[0]:
        return np.ones(len(ids), bool)
    mask = np.zeros(len(ids), bool)
    ends = np.flatnonzero(ids == end)
    for start in np.flatnonzero(ids == header[0]):
        if ids[start : start + len(header)].tolist() == header:
            stop = ends[np.searchsorted(ends, start)]
            mask[start + len(header) : stop + 1] = True
    return mask


class OpenSequence:
    """A sequence with free space."""

    def __init__(self, length: int) -> None:
        self.tokens, self.document = np.zeros(length, np.uint16), np.zeros(length, np.uint16)
        self.loss_mask = np.zeros(length, bool)
        self.free, self.documents = length, 0

    def add(self, ids: NDArray[np.uint16], mask: NDArray[np.bool_]) -> None:
        start = len(self.tokens) - self.free
        span = slice(start, start + len(ids))
        self.documents += 1
        self.tokens[span], self.document[span], self.loss_mask[span] = ids, self.documents, mask
        self.free -= len(ids)


def pack(tokenizer: Tokenizer, texts: list[str], length: int) -> Packed:
    """First fit into the last OPEN_SEQUENCES sequences; documents are truncated to `length`."""
    header = tokenizer.encode(f"{START}assistant\n").ids
    (end,) = tokenizer.encode(END).ids
    sequences: list[OpenSequence] = []
    for encoding in tokenizer.encode_batch_fast(texts):
        ids = np.array(encoding.ids, np.uint16)
        mask = answer_mask(ids, header, end)[:length]
        ids = ids[:length]
        target = next((s for s in sequences[-OPEN_SEQUENCES:] if s.free >= len(ids)), None)
        if target is None:
            sequences.append(target := OpenSequence(length))
        target.add(ids, mask)
    return Packed.join(np.stack, sequences)


def pack_seed(job: tuple[str, str, int]) -> Packed:
    """Runs in a worker. `job`: tokenizer file, seed, sequence length."""
    path, seed, length = job
    return pack(Tokenizer.from_file(path), list(documents(seed, DOCUMENTS_PER_SEED)), length)


def make_dataset(path: Path, seed: int, length: int, workers: int, tokens: int) -> Packed:
    """At least `tokens` tokens, made by worker processes. The result does not depend on `workers`."""
    jobs = ((str(path), f"training {seed} {n}", length) for n in count())
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process per core already
    parts: list[Packed] = []
    total = 0
    with get_context("spawn").Pool(workers) as pool:
        while total < tokens:
            for packed in pool.map(pack_seed, islice(jobs, 2 * workers), chunksize=1):
                if total < tokens:
                    parts.append(packed)
                    total += int(np.count_nonzero(packed.document))
    return Packed.join(np.concatenate, parts)
