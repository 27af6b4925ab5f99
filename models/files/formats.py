"""The formats of a model's weights, by the headers of its files."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmrs.models.files.gguf import GGUFSource
from llmrs.models.files.layouts import LAYOUTS
from llmrs.models.files.quantized import QuantizedSource, with_quantization
from llmrs.models.files.safetensors import RAW, SafetensorsSource

Sized = tuple[str, int, int]  # format, weights and bytes of a tensor
# general.file_type of GGUF files: the mix of types. Source: enum llama_ftype in include/llama.h of llama.cpp.
FILE_TYPES = {
    0: "f32", 1: "f16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S", 12: "Q3_K_M",
    13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 19: "IQ2_XXS", 20: "IQ2_XS",
    21: "Q2_K_S", 22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S",
    29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "bf16", 36: "TQ1_0", 37: "TQ2_0", 38: "MXFP4_MOE", 39: "NVFP4",
}  # fmt: skip


@dataclass(frozen=True)
class FormatTotal:
    """Tensors of one format."""

    format: str
    tensors: int
    weights: int
    nbytes: int


def stored_formats(path: Path) -> list[FormatTotal]:
    """The formats of a model folder or a GGUF file, that of the most weights first. Raises ModelError."""
    if not path.is_dir():
        with closing(GGUFSource(path)) as file:
            return formats_of(file)
    with closing(with_quantization(SafetensorsSource(path), path)) as source:
        return formats_of(source)


def formats_of(source: GGUFSource | SafetensorsSource | QuantizedSource) -> list[FormatTotal]:
    if isinstance(source, QuantizedSource):
        return _sum(_quantized(source))
    if isinstance(source, GGUFSource):
        return _sum((t.type.name, math.prod(t.shape), t.nbytes) for t in source.tensors.values())
    tensors = source.tensors
    return _sum((source.format(n).lower(), math.prod(t.shape), _nbytes(t.dtype, t.shape)) for n, t in tensors.items())


def gguf_type(metadata: Mapping[str, Any], formats: list[FormatTotal]) -> str:
    """The name of a file's mix of types, such as Q4_K_M; else the type of most weights."""
    number = metadata.get("general.file_type")
    if type(number) is int and number in FILE_TYPES:
        return FILE_TYPES[number]
    name = formats[0].format if formats else ""
    return name if name in ("f32", "f16", "bf16") else name.upper()


def bits_per_weight(formats: list[FormatTotal]) -> float | None:
    weights = sum(f.weights for f in formats)
    return 8 * sum(f.nbytes for f in formats) / weights if weights else None


def _quantized(source: QuantizedSource) -> Iterator[Sized]:
    for name, e in source.entries.items():
        shape, parts, whole = source.shape(name), [e.part], e.parts.shape(e.part)
        if e.scheme is not None:
            layout = LAYOUTS[e.scheme.layout]
            parts = [p for p in (*layout.needs, *layout.may) if p in e.parts.names]
            whole = layout.shape(e.parts, e.scheme)
        nbytes = sum(_nbytes(e.parts.source.tensors[e.parts.names[p]].dtype, e.parts.shape(p)) for p in parts)
        share = nbytes * shape[0] // whole[0] if e.rows is not None else nbytes  # of gate_up, gate or up
        yield source.stored(name).format if e.scheme else e.parts.format(e.part).lower(), math.prod(shape), share


def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Of safetensors' dtypes, also those that are not supported: their names hold their bits."""
    if dtype in RAW:
        return math.prod(shape) * RAW[dtype][1].itemsize
    bits = re.search(r"\d+", dtype)
    return math.prod(shape) * (int(bits[0]) if bits else 8) // 8


def _sum(sizes: Iterable[Sized]) -> list[FormatTotal]:
    found = dict[str, FormatTotal]()
    for name, weights, nbytes in sizes:
        old = found.get(name, FormatTotal(name, 0, 0, 0))
        found[name] = FormatTotal(name, old.tensors + 1, old.weights + weights, old.nbytes + nbytes)
    return sorted(found.values(), key=lambda f: -f.weights)
