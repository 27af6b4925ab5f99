"""Refuses a GGUF model by the beginning of its file, before the rest is downloaded."""

from collections.abc import Callable
from pathlib import Path

from llmrs.core.errors import ModelError
from llmrs.models.arch.gguf import ROPE_FACTORS, config_from_metadata, gguf_family
from llmrs.models.files.gguf import TensorTable
from llmrs.models.files.gguf_header import MAGIC, MAX_HEADER, Header, read_header
from llmrs.models.files.untrusted import MIB
from llmrs.models.hub.download import PART_SUFFIX
from llmrs.models.text.gguf_tokenizer import check_tokenizer
from llmrs.quant.tensor import AnyTensor

FIRST_BYTES = MIB  # then four times as many, until the header is there


class HeaderSource(TensorTable):
    """The tensors of a header."""

    def __init__(self, header: Header) -> None:
        super().__init__({n: t for n, t in header.tensors.items() if n != ROPE_FACTORS})  # whose data the config needs

    def tensor(self, name: str) -> AnyTensor:
        raise AssertionError(name)


def check_beginning(path: Path, size: int, fetch: Callable[[int], Path], *, whole: bool) -> None:
    """Raises ModelError for a file that llmrs can't load.

    `path`: in errors; `size`: of the file; `fetch(n)` gives a file with its first n bytes; `whole`: not one of a set.
    """
    header = _header(path, size, fetch)
    if whole:
        config_from_metadata(path, header.metadata, HeaderSource(header))
    else:  # the tensors of the other files decide as well
        gguf_family(path, header.metadata)
    check_tokenizer(path, header.metadata)


def _header(path: Path, size: int, fetch: Callable[[int], Path]) -> Header:
    limit = min(size, MAX_HEADER)
    count = min(FIRST_BYTES, limit)
    while True:
        file = fetch(count)
        with file.open("rb") as opened:
            data = opened.read(limit)
        try:
            return read_header(path, data, size)
        except ModelError:
            if len(data) >= limit or data[:4] != MAGIC:
                if file.suffix == PART_SUFFIX:
                    file.unlink()  # it may be what a proxy sent
                raise
        count = min(4 * len(data), limit)
