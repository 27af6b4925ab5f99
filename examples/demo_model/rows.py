"""From text to what a training step reads: the tokenizer, and documents packed into rows of tokens."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import count, islice
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from demo_model.corpus import END, END_OF_TEXT, START, documents

VOCABULARY = 2048
SPECIALS = [END_OF_TEXT, START, END]
# Qwen's split into words, with digits one by one
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHUNK = 4000  # documents of one seed
OPEN = 16  # rows that still take documents


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """A byte-level BPE tokenizer: any text can be written with it, and no token crosses a word."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, as_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


@dataclass(frozen=True)
class Rows:
    """Packed documents, each array (rows, length)."""

    tokens: NDArray[np.uint16]
    document: NDArray[np.uint16]  # which document of its row a token belongs to, from 1 on; 0 is padding
    trained: NDArray[np.bool_]  # whether the model learns to say this token


def trained_tokens(ids: NDArray[np.uint16], header: list[int], end: int) -> NDArray[np.bool_]:
    """Marks answers with their ends; `header` is what stands before an answer. Plain text is marked as a whole."""
    if ids[0] != header[0]:
        return np.ones(len(ids), bool)
    marks = np.zeros(len(ids), bool)
    ends = np.flatnonzero(ids == end)
    for start in np.flatnonzero(ids == header[0]):
        if ids[start : start + len(header)].tolist() == header:
            stop = ends[np.searchsorted(ends, start)]
            marks[start + len(header) : stop + 1] = True
    return marks


class Row:
    """A row that is being filled."""

    def __init__(self, length: int) -> None:
        self.tokens, self.document = np.zeros(length, np.uint16), np.zeros(length, np.uint16)
        self.trained = np.zeros(length, bool)
        self.free, self.documents = length, 0

    def add(self, ids: NDArray[np.uint16], marks: NDArray[np.bool_]) -> None:
        start = len(self.tokens) - self.free
        here = slice(start, start + len(ids))
        self.documents += 1
        self.tokens[here], self.document[here], self.trained[here] = ids, self.documents, marks
        self.free -= len(ids)


def pack(tokenizer: Tokenizer, texts: list[str], length: int) -> Rows:
    """Each document goes into the first of the last few rows that has room; one that is too long is cut."""
    header = tokenizer.encode(f"{START}assistant\n").ids
    (end,) = tokenizer.encode(END).ids
    rows: list[Row] = []
    for encoding in tokenizer.encode_batch_fast(texts):
        ids = np.array(encoding.ids, np.uint16)
        marks = trained_tokens(ids, header, end)
        ids, marks = ids[:length], marks[:length]
        row = next((r for r in rows[-OPEN:] if r.free >= len(ids)), None)
        if row is None:
            rows.append(row := Row(length))
        row.add(ids, marks)
    return Rows(*(np.stack([getattr(r, name) for r in rows]) for name in ("tokens", "document", "trained")))


def chunk(job: tuple[str, str, int]) -> Rows:
    """The rows of one seed; `job` is the tokenizer's file, the seed and the length. Runs in a worker."""
    path, seed, length = job
    return pack(Tokenizer.from_file(path), list(documents(seed, CHUNK)), length)


def gather(path: Path, seed: int, length: int, workers: int, tokens: int) -> Rows:
    """Rows with at least so many tokens, made by worker processes; their number changes nothing."""
    jobs = ((str(path), f"training {seed} {n}", length) for n in count())
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are enough
    found: list[Rows] = []
    total = 0
    with get_context("spawn").Pool(workers) as pool:
        while total < tokens:
            some = pool.map(chunk, islice(jobs, 2 * workers), chunksize=1)
            for rows in some:
                if total < tokens:
                    found.append(rows)
                    total += int(np.count_nonzero(rows.document))
    return Rows(*(np.concatenate([getattr(r, name) for r in found]) for name in ("tokens", "document", "trained")))
