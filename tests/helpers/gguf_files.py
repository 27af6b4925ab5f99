"""GGUF files: written byte by byte, to be wrong where a test wants it, and by the `gguf` package."""

import struct

import gguf
import numpy as np

U8, U32, I32, F32, BOOL, STRING, ARRAY, U64 = 0, 4, 5, 6, 7, 8, 9, 10
CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}


def text(value):
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data)) + data


def key(name, kind, value):
    """`value` of an array: its element type and its elements."""
    return text(name) + struct.pack("<I", kind) + _value(kind, value)


def _value(kind, value):
    if kind == ARRAY:
        inner, elements = value
        return struct.pack("<IQ", inner, len(elements)) + b"".join(_value(inner, v) for v in elements)
    return text(value) if kind == STRING else struct.pack(f"<{CODES[kind]}", value)


def place(name, dimensions, kind=0, offset=0):
    """`dimensions`: row length first."""
    return text(name) + struct.pack(f"<I{len(dimensions)}QIQ", len(dimensions), *dimensions, kind, offset)


def build(keys=(), places=(), data=b"", *, version=3, alignment=32, counts=None):
    """A file. `counts`: the declared numbers of tensors and keys."""
    head = b"GGUF" + struct.pack("<IQQ", version, *(counts or (len(places), len(keys)))) + b"".join((*keys, *places))
    return head + bytes(-len(head) % alignment) + data


def quantized(name, shape, seed=0):
    """Random weights of a type, and its number.

    Types that the `gguf` package can't quantize get random bytes; small ones, so that no scale is infinite.
    """
    rng = np.random.default_rng(seed)
    kind = gguf.GGMLQuantizationType[name.upper()]
    try:
        return gguf.quants.quantize(rng.normal(size=shape).astype(np.float32), kind), kind
    except NotImplementedError:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        return rng.integers(0, 60, (*shape[:-1], shape[-1] // block * size), np.uint8), kind


def write(path, tensors, metadata=(), **options):
    """A file, or a set of split files, by GGUFWriter. `tensors`: name -> array, or (bytes, type)."""
    writer = gguf.GGUFWriter(path, "qwen3", **options)
    for name, add, value in metadata:
        getattr(writer, f"add_{add}")(name, value)
    for name, tensor in tensors.items():
        data, kind = tensor if isinstance(tensor, tuple) else (tensor, None)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
