"""GGUF tensor types against the `gguf` package, bit for bit."""

import gguf
import numpy as np
import pytest
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from llmrs.core.errors import ModelError
from llmrs.quant.arrays import NUMPY
from llmrs.quant.form import BITS, pack_codes, unpack_codes
from llmrs.quant.ggml import GGML_TYPES, TYPES, GgmlType, tensor
from llmrs.quant.tensor import QuantTensor

NATIVE = [t for t in GGML_TYPES.values() if t.format]
DENSE = [t for t in GGML_TYPES.values() if t.is_dense]
EXPANDED = [t for t in GGML_TYPES.values() if not (t.is_dense or t.format)]
SCALES = {"q4_k": (0, 2), "q5_k": (0, 2), "q2_k": (80, 82), "q3_k": (108,), "q6_k": (208,), "iq4_xs": (0,)}


def name_of(t: GgmlType) -> str:
    return t.name


def blocks_of(t: GgmlType, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Random blocks (rows, row bytes), a few with scales of zero, or the largest or smallest f16."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (rows * columns // t.block, t.block_bytes), np.uint8)
    at = SCALES.get(t.name, () if t.name == "mxfp4" else (0, 2) if t.name in ("q4_1", "q5_1") else (0,))
    for offset in at:
        scales = rng.normal(0, 0.05, len(blocks)).astype(np.float16)
        scales[: len(EXTREMES)] = EXTREMES
        blocks[:, offset : offset + 2] = scales.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(rows, -1)


EXTREMES = np.array([0, -0.0, 65504, -65504, 6e-8, 6.1e-5], np.float16)


@pytest.mark.parametrize("t", NATIVE, ids=name_of)
def test_unpack_equals_gguf(t: GgmlType) -> None:
    blocks = blocks_of(t, 64, 1024)
    packed = tensor(t, (64, 1024), blocks.reshape(-1))
    assert isinstance(packed, QuantTensor)
    assert packed.shape == (64, 1024)
    with np.errstate(over="ignore"):
        expected = quants.dequantize(blocks, GGMLQuantizationType(t.number)).astype(np.float32)
    assert packed.float32().view(np.uint32).tolist() == expected.view(np.uint32).tolist()


@pytest.mark.parametrize("t", NATIVE, ids=name_of)
def test_planes_of_rows_are_rows_of_planes(t: GgmlType) -> None:
    packed = tensor(t, (24, 512), blocks_of(t, 24, 512).reshape(-1))
    assert isinstance(packed, QuantTensor)
    planes, index = packed.planes(), np.array([3, 3, 0, 23])
    for name, plane in packed.rows(index).planes().items():
        np.testing.assert_array_equal(plane, planes[name][index])
    np.testing.assert_array_equal(packed.rows(slice(1, 20, 2)).float32(), packed.float32()[1:20:2])


@pytest.mark.parametrize("t", NATIVE, ids=name_of)
def test_planes_take_at_most_a_tenth_more_than_the_file(t: GgmlType) -> None:
    packed = tensor(t, (32, 1024), blocks_of(t, 32, 1024).reshape(-1))
    assert isinstance(packed, QuantTensor)
    planes = packed.planes()
    assert sum(p.nbytes for p in planes.values()) <= 1.05 * packed.nbytes
    assert planes["codes"].shape == (32, 1024 * packed.form.bits // 8)
    assert planes["scales"].shape == (32, 1024 // packed.form.group)


@pytest.mark.parametrize("t", EXPANDED, ids=name_of)
def test_codebook_types_expand(t: GgmlType) -> None:
    blocks = blocks_of(t, 8, 512)
    dense = tensor(t, (8, 512), blocks.reshape(-1))
    expected = quants.dequantize(blocks, GGMLQuantizationType(t.number))
    np.testing.assert_array_equal(dense.float32(), expected)


@pytest.mark.parametrize("t", DENSE, ids=name_of)
def test_dense_types(t: GgmlType) -> None:
    values = np.random.default_rng(0).normal(0, 1, (2, 3, 8)).astype(np.float32)
    stored = quants.quantize(values, GGMLQuantizationType(t.number))
    dense = tensor(t, (2, 3, 8), np.frombuffer(stored.tobytes(), np.uint8))
    assert dense.shape == (2, 3, 8)
    np.testing.assert_allclose(dense.float32(), values, rtol=2**-8)


def test_sizes_are_those_of_gguf() -> None:
    for t in GGML_TYPES.values():
        assert GGML_QUANT_SIZES[GGMLQuantizationType(t.number)] == (
            (1, t.block_bytes) if t.name == "bf16" else (t.block, t.block_bytes)
        )
        assert GGMLQuantizationType(t.number).name.lower() == t.name
    assert TYPES["q4_k"].nbytes((2, 512)) == 4 * 144
    assert gguf.GGML_QUANT_VERSION == 2


def test_wrong_sizes_are_refused() -> None:
    for shape, size in (((2, 100), 144), ((2, 256), 144), ((1, 256), 145)):
        with pytest.raises(ModelError, match="type q4_k"):
            tensor(TYPES["q4_k"], shape, np.zeros(size, np.uint8))


@pytest.mark.parametrize("bits", sorted(set(BITS.values())))
def test_codes_are_a_little_endian_bit_stream(bits: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (3, 64), np.uint8)
    packed = pack_codes(NUMPY, codes, bits)
    stream = np.unpackbits(codes[:, :, None], axis=2, bitorder="little")[:, :, :bits].reshape(3, -1)
    np.testing.assert_array_equal(packed, np.packbits(stream, axis=1, bitorder="little"))
    np.testing.assert_array_equal(unpack_codes(NUMPY, packed, bits, 64), codes)
