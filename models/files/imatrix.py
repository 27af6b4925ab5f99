"""Importance matrices of llama.cpp: mean squares of the inputs of each matrix.

Written as GGUF: `<tensor>.in_sum2` (matrices, K), sums of squares, and `<tensor>.counts` (matrices, 1), tokens; several
matrices for stacked experts. Older files, .dat: count i32, then per tensor its name (length i32, bytes), calls i32,
number of values i32, values f32 (means times calls). Source: tools/imatrix/imatrix.cpp of ggml-org/llama.cpp.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmrs.core.errors import ModelError
from llmrs.models.files.gguf import GGUFSource
from llmrs.models.files.gguf_writer import GgufTensor, open_gguf
from llmrs.models.files.untrusted import MIB, error_text, regular_size
from llmrs.quant.ggml import TYPES

HINT = "is it an imatrix file of llama.cpp, and complete? `llmrs imatrix` makes one"
MAX_BYTES = 2048 * MIB
SUMS, COUNTS = ".in_sum2", ".counts"


@dataclass
class Sums:
    """Of one tensor: squares float64 (matrices, K) and tokens (matrices,)."""

    squares: np.ndarray
    tokens: np.ndarray


Means = dict[str, np.ndarray]  # GGUF name -> mean squares, float32 (matrices, K); NaN for a matrix without tokens


def write_imatrix(
    path: Path, sums: Mapping[str, Sums], text: str, chunks: int, chunk: int, *, force: bool = False
) -> None:  # fmt: skip
    """`sums` by GGUF name; `text`: the name of the file that was read, in `chunks` of `chunk` tokens."""
    metadata = {"general.type": "imatrix", "imatrix.datasets": [text], "imatrix.chunk_count": chunks,
                "imatrix.chunk_size": chunk}  # fmt: skip
    data: dict[str, np.ndarray] = {}
    for name, s in sorted(sums.items()):
        data[name + SUMS] = s.squares.astype(np.float32)
        data[name + COUNTS] = s.tokens.astype(np.float32).reshape(-1, 1)
    tensors = [GgufTensor(name, TYPES["f32"], array.shape) for name, array in data.items()]
    with open_gguf(path, metadata, tensors, force=force) as file:
        for name, array in data.items():
            file.write(name, array)


def read_imatrix(path: Path) -> Means:
    """Raises ModelError for a file that is none."""
    if regular_size(path) > MAX_BYTES:
        raise ModelError(f"{path} has more than {MAX_BYTES:,} bytes", HINT)
    try:
        with path.open("rb") as file:
            is_gguf = file.read(4) == b"GGUF"
        means = _read_gguf(path) if is_gguf else _read_dat(path, path.read_bytes())
    except OSError as error:
        raise ModelError(f"{path} can't be read: {error_text(error)}", HINT) from error
    for name, values in means.items():
        if not (np.isnan(values) | (values >= 0)).all() or np.isinf(values).any():
            raise ModelError(f"{path}: the values of {name[:100]!r} are no means of squares", HINT)
    return means


def _read_gguf(path: Path) -> Means:
    source, means = GGUFSource(path), Means()
    names = set(source.names())
    for name in sorted(n.removesuffix(SUMS) for n in names if n.endswith(SUMS)):
        if name + COUNTS not in names:
            raise ModelError(f"{path} lacks {name[:100]}{COUNTS}", HINT)
        squares, tokens = (source.tensor(name + end).float32() for end in (SUMS, COUNTS))
        squares = squares.reshape(-1, squares.shape[-1])
        if tokens.size != len(squares):
            raise ModelError(f"{path}: {name[:100]} has {len(squares)} sums and {tokens.size} counts", HINT)
        means[name] = squares / np.where(tokens > 0, tokens, np.nan).reshape(-1, 1)
    if not means:
        raise ModelError(f"{path} holds no importance matrix", HINT)
    return means


def _read_dat(path: Path, data: bytes) -> Means:
    means, at = Means(), 0

    def take(size: int) -> bytes:
        nonlocal at
        if not 0 <= size <= len(data) - at:
            raise ModelError(f"{path} is no imatrix file: it ends within its entries", HINT)
        at += size
        return data[at - size : at]

    def number() -> int:
        return int(struct.unpack("<i", take(4))[0])

    for _ in range(number()):
        name = take(number()).decode("utf-8", "replace")
        calls, count = number(), number()
        means[name] = np.frombuffer(take(4 * count), "<f4").reshape(1, -1) / np.float32(max(calls, 1))
    if not means:
        raise ModelError(f"{path} holds no importance matrix", HINT)
    return means
