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


def write(path, tensors, metadata=(), arch="qwen3", **options):
    """A file, or a set of split files, by GGUFWriter. `tensors`: name -> array, or (bytes, type)."""
    writer = gguf.GGUFWriter(path, arch, **options)
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


def model_metadata(arch):
    """Keys of a small model, with a SentencePiece tokenizer for `llama` and `gemma3`, else a byte-level one."""
    keys = {
        "block_count": 2, "context_length": 64, "embedding_length": 32, "feed_forward_length": 64,
        "attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 8, "attention.value_length": 8,
    }  # fmt: skip
    floats = {"attention.layer_norm_rms_epsilon": 1e-6, "rope.freq_base": 1e4}
    if arch == "qwen3moe":
        keys |= {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 16}
    elif arch == "llama":
        keys |= {"rope.scaling.original_context_length": 32, "rope.dimension_count": 8}
        floats |= {"rope.scaling.factor": 4.0}
    elif arch == "gemma3":
        keys |= {"attention.sliding_window": 16}
    config = [(f"{arch}.{k}", "uint32", v) for k, v in keys.items()]
    config += [(f"{arch}.{k}", "float32", v) for k, v in floats.items()]
    config += [(f"{arch}.rope.scaling.type", "string", "yarn")] if arch == "llama" else []
    pieces = arch in ("llama", "gemma3")
    return config + (_sentencepiece() if pieces else _byte_level()) + [("tokenizer.chat_template", "string", "{{ 1 }}")]


def _byte_level():
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = [*sorted(ByteLevel.alphabet()), "th", "the", "Ġthe", "<|im_end|>"]
    types = [1] * (len(tokens) - 1) + [3]
    return [
        ("tokenizer.ggml.model", "string", "gpt2"), ("tokenizer.ggml.pre", "string", "qwen2"),
        ("tokenizer.ggml.tokens", "array", tokens), ("tokenizer.ggml.token_type", "array", types),
        ("tokenizer.ggml.merges", "array", ["t h", "th e", "Ġ the"]),
        ("tokenizer.ggml.eos_token_id", "uint32", len(tokens) - 1), ("tokenizer.ggml.add_bos_token", "bool", False),
    ]  # fmt: skip


def _sentencepiece():
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "t", "h", "e", "th", "▁th"]
    types, scores = [2, 3, 3, *([6] * 256), *([1] * 6)], [0.0] * 259 + [-float(n) for n in range(6)]
    return [
        ("tokenizer.ggml.model", "string", "llama"), ("tokenizer.ggml.tokens", "array", tokens),
        ("tokenizer.ggml.scores", "array", scores), ("tokenizer.ggml.token_type", "array", types),
        ("tokenizer.ggml.bos_token_id", "uint32", 1), ("tokenizer.ggml.eos_token_id", "uint32", 2),
        ("tokenizer.ggml.add_bos_token", "bool", True), ("tokenizer.ggml.add_space_prefix", "bool", True),
    ]  # fmt: skip
