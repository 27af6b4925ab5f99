"""Mutated GGUF files: each is read to its last tensor, or refused by a ModelError, in bounded work and memory.

Of models, config, graph, tokenizer, template and sampling defaults are read too.

`make fuzz` makes a million of them; LLMRS_FUZZ is their number, LLMRS_FUZZ_SEED another run.
"""

import math
import os
import random
import struct
import time
import tracemalloc
from dataclasses import dataclass, field
from pathlib import Path

import gguf_files
import numpy as np
import pytest
from gguf_files import ARRAY, STRING, U32, build, key, place

from llmrs.core.errors import ModelError
from llmrs.models.arch.families import graph_of
from llmrs.models.arch.gguf import config_from_metadata
from llmrs.models.files import gguf_header
from llmrs.models.files.generation import gguf_sampling
from llmrs.models.files.gguf import GGUFSource, read_tensor
from llmrs.models.hub.gguf_check import HeaderSource
from llmrs.models.text.gguf_tokenizer import gguf_tokenizer
from llmrs.models.text.template import ChatTemplate
from llmrs.models.text.template_files import gguf_sources
from llmrs.quant.ggml import TYPES

MUTANTS, SEED = int(os.environ.get("LLMRS_FUZZ", "20000")), int(os.environ.get("LLMRS_FUZZ_SEED", "0"))
MAX_MEMORY = 20 * 2**20  # bytes; files have some KB
SIZES = {4: "<I", 8: "<Q"}
PATH = Path("mutant.gguf")
MODELS = ("qwen3", "qwen3moe", "llama", "gemma3")
EDGES = [0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 12, 13, 31, 32, 33, 255, 256, 257, 2**16 - 1, 2**16, 2**20]
EDGES += [2**n + d for n in (31, 32, 40, 61, 62, 63, 64) for d in (-32, -1, 0, 1)]


@dataclass
class File:
    """A valid file, and what it consists of."""

    data: bytes
    fields: list[tuple[int, int]] = field(default_factory=list)  # numbers of the header: place, size
    records: list[tuple[int, int, int]] = field(default_factory=list)  # key or tensor: begin, end, place of its count


def walk(data):
    """Finds the fields of a valid file."""
    file, at = File(data), 0

    def number(size):
        nonlocal at
        file.fields.append((at, size))
        at += size
        return struct.unpack_from(SIZES[size], data, at - size)[0]

    def value(kind):
        nonlocal at
        if kind == STRING:
            size = number(8)
            at += size
        elif kind == ARRAY:
            inner, count = number(4), number(8)
            for _ in range(count):
                value(inner)
        else:
            at += struct.calcsize(gguf_files.CODES[kind])

    at = 4
    number(4)
    tensors, keys = number(8), number(8)
    for _ in range(keys):
        begin = at
        value(STRING)
        value(number(4))
        file.records.append((begin, at, 16))
    for _ in range(tensors):
        begin = at
        value(STRING)
        for _ in range(number(4)):
            number(8)
        number(4), number(8)
        file.records.append((begin, at, 8))
    return file


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Small files of every kind."""
    folder = tmp_path_factory.mktemp("fuzz")

    def written(name, tensors, metadata=(), **options):
        return gguf_files.write(folder / f"{name}.gguf", tensors, metadata, **options).read_bytes()

    names = list(TYPES)
    types = [{n: gguf_files.quantized(n, (2, 256)) for n in names[i::5]} for i in range(5)]
    words = [("tokenizer.ggml.tokens", "array", [f"Ġ{n}" for n in range(60)])]
    words += [("tokenizer.ggml.scores", "array", [n / 3 for n in range(60)]), ("tokenizer.ggml.bos", "uint32", 1)]
    experts = {"exps": gguf_files.quantized("q4_k", (2, 3, 256)), "norm": np.ones(8, np.float32)}
    scalars = [("a", "uint8", 1), ("b", "int16", -1), ("c", "float64", 0.5), ("d", "bool", True), ("e", "int64", -9)]
    by_hand = build([key("general.alignment", U32, 64)], [place("x", (4, 2))], bytes(32), version=2, alignment=64)
    whole = [written(f"t{i}", t) for i, t in enumerate(types)]
    whole += [written("words", {}, words), written("experts", experts, scalars), by_hand, build()]
    norm = {"output_norm.weight": np.ones(32, np.float32)}
    models = [written(arch, norm, gguf_files.model_metadata(arch), arch=arch) for arch in MODELS]
    whole = 4 * whole + models  # which take ten times as long
    return [walk(data) for data in whole]


def flip(rng, file, data):
    at = rng.randrange(len(data))
    data[at] ^= 1 << rng.randrange(8)


def set_byte(rng, file, data):
    data[rng.randrange(len(data))] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))


def cut(rng, file, data):
    del data[rng.randrange(len(data)) :]


def extend(rng, file, data):
    data += rng.randbytes(rng.randrange(1, 200))


def edit(rng, file, data):
    """Of a count, a length, a type, a dimension or an offset."""
    at, size = rng.choice(file.fields)
    old = int.from_bytes(data[at : at + size], "little")
    new = rng.choice(
        (rng.choice(EDGES), rng.choice(EDGES), old + rng.choice((-32, -1, 1, 32)), len(data) - at, old * 2)
    )
    data[at : at + size] = (new % 256**size).to_bytes(size, "little")


def splice(rng, file, data):
    """A piece of the file over, or in between, another one."""
    begin, at = rng.randrange(len(data)), rng.randrange(len(data))
    piece = data[begin : begin + rng.randrange(1, 64)]
    data[at : at + rng.choice((0, len(piece)))] = piece


def recount(rng, file, data):
    """A key or a tensor a second time or dropped, and mostly counted so."""
    if file.records:
        begin, end, count = rng.choice(file.records)
        more = rng.choice((1, -1))
        data[begin:end] = data[begin:end] * (1 + more)
        if count < len(data) and rng.random() < 0.8:
            data[count] = (data[count] + more) % 256


MUTATIONS = [flip, set_byte, cut, extend, splice, recount, recount, edit, edit, edit]


def mutant(rng, files):
    file = rng.choice(files)
    data = bytearray(file.data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if data:
            rng.choice(MUTATIONS)(rng, file, data)
    return bytes(data)


@pytest.fixture
def steps(monkeypatch):
    """Counts what the reader takes from a file."""
    count, take = [0], gguf_header._Reader._take

    def counted(self, size, what):
        count[0] += 1
        return take(self, size, what)

    monkeypatch.setattr(gguf_header._Reader, "_take", counted)
    return count


def read(data, seen):
    """Reads everything. `seen`: tensors that were read before."""
    header = gguf_header.read_header(PATH, data)
    for t in header.tensors.values():
        contents = t.type, t.shape, data[t.offset : t.offset + t.nbytes]
        if contents not in seen:
            assert read_tensor(t, data).float32().size == math.prod(t.shape)
            seen.add(contents)
    if "tokenizer.ggml.model" in header.metadata:
        load(header)


def load(header):
    """What is read of a model before its weights."""
    tokenizer, _ = gguf_tokenizer(PATH, header.metadata)
    assert isinstance(tokenizer.encode("the <|im_end|>"), list)
    graph_of(config_from_metadata(PATH, header.metadata, HeaderSource(header)))
    ChatTemplate.of(gguf_sources(PATH, header.metadata), tokenizer.special_tokens)
    gguf_sampling(PATH, header.metadata)


def refusal(function, *args):
    try:
        function(*args)
    except ModelError as error:
        assert error.message.startswith("mutant.gguf")  # noqa: PT017
        assert error.hint  # noqa: PT017
        return error
    return None


def test_every_mutant_is_read_or_refused(files, steps):
    rng, seen, refused, longest, largest = random.Random(SEED), set(), 0, 0.0, 0
    for file in files:
        read(file.data, seen)
    known = frozenset(seen)
    tracemalloc.start(1)
    try:
        for n in range(MUTANTS):
            data, seen = mutant(rng, files), set(known)
            steps[0], before, began = 0, tracemalloc.get_traced_memory()[0], time.process_time()
            tracemalloc.reset_peak()
            refused += refusal(read, data, seen) is not None
            memory = tracemalloc.get_traced_memory()[1] - before
            longest, largest = max(longest, time.process_time() - began), max(largest, memory)
            assert memory < MAX_MEMORY, f"mutant {n} took {memory} bytes"
            assert steps[0] <= len(data), f"mutant {n} of {len(data)} bytes took {steps[0]} steps"
    finally:
        tracemalloc.stop()
    figures = f"the longest took {longest:.3f} s of CPU time, the largest {largest / 2**20:.1f} MiB"
    print(f"\n{refused} of {MUTANTS} refused; {figures}")
    assert MUTANTS // 20 < refused < MUTANTS - MUTANTS // 20  # neither is rare


ODD = [
    True, 0, -1, 1, 7, 2**31, 2**64 - 1, 0.0, -0.5, 1e-30, 1e30, float("inf"), "", "x", "default", "yarn", [], ["a"],
    ["a", "a"], np.zeros(0, np.int32), np.arange(4), np.full(300, 2**40), np.array([True, False]),
    np.array([0.5, -np.inf]), np.full(265, 1, np.uint8),
]  # fmt: skip


@pytest.mark.parametrize("arch", MODELS)
def test_keys_of_other_types_and_values(tmp_path, arch):
    """Each key once with each of them, and left out."""
    norm = {"output_norm.weight": np.ones(32, np.float32)}
    path = gguf_files.write(tmp_path / "a.gguf", norm, gguf_files.model_metadata(arch), arch=arch)
    header, refused = gguf_header.read_header(PATH, path.read_bytes()), 0
    load(header)
    more = [
        f"{arch}.{key}" for key in ("attention.sliding_window_pattern", "attention.scale", "rope.scaling.attn_factor")
    ]
    more += [f"general.sampling.{key}" for key in ("temp", "top_k", "top_p", "min_p")] + ["tokenizer.ggml.scores"]
    for name in [*header.metadata, *more]:
        without = {k: v for k, v in header.metadata.items() if k != name}
        for metadata in [without, *({**without, name: value} for value in ODD)]:
            refused += refusal(load, gguf_header.Header(3, metadata, header.tensors)) is not None
    assert refused > 300


def test_sets_of_split_files(tmp_path):
    """Through files: one part of a set is mutated."""
    tensors = {f"t{n}": np.full((2, 4), n, np.float32) for n in range(3)}
    gguf_files.write(tmp_path / "model.gguf", tensors, split_max_tensors=1)
    parts = sorted(tmp_path.glob("model-*.gguf"))
    whole = [walk(p.read_bytes()) for p in parts]
    rng, results = random.Random(SEED), set()
    for _ in range(300):
        n = rng.randrange(3)
        parts[n].write_bytes(mutant(rng, [whole[n]]))
        try:
            source = GGUFSource(parts[0])
            results.add(len([source.tensor(name).float32() for name in source.names()]))
        except ModelError:
            results.add("refused")
        parts[n].write_bytes(whole[n].data)
    assert results == {3, "refused"}
