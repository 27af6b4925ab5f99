"""GGUF files, good and bad: what the `gguf` package reads of them is what llmrs reads."""

import os
import struct
import sys

import gguf
import gguf_files
import numpy as np
import pytest
from gguf_files import ARRAY, BOOL, F32, STRING, U8, U32, U64, build, key, place, text

from llmrs.core.errors import ModelError
from llmrs.models.files.gguf import GGUFSource, part_names
from llmrs.models.files.gguf_header import MAX_STRINGS, read_header
from llmrs.quant.ggml import TYPES
from llmrs.quant.tensor import FORMATS, QuantTensor, Stored

METADATA = [
    ("a.u8", "uint8", 250), ("a.i8", "int8", -5), ("a.u16", "uint16", 65535), ("a.i16", "int16", -300),
    ("a.u32", "uint32", 2**32 - 1), ("a.i32", "int32", -(2**31)), ("a.f32", "float32", 1e-6), ("a.f64", "float64", 0.1),
    ("a.u64", "uint64", 2**64 - 1), ("a.i64", "int64", -(2**63)), ("a.yes", "bool", True), ("a.no", "bool", False),
    ("a.text", "string", "ä\n漢字 👍"), ("a.words", "array", ["", "Ġthe", "漢", "x" * 300]),
    ("a.ints", "array", [1, -2]),
    ("a.floats", "array", [0.5, float("inf")]), ("a.flags", "array", [True, False]), ("a.bytes", "array", b"\0\xff"),
]  # fmt: skip
links = pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege on Windows")


def same_metadata(source, path):
    reader = gguf.GGUFReader(path)
    expected = {n: f.contents() for n, f in reader.fields.items() if not n.startswith("GGUF.")}
    assert source.metadata.keys() == expected.keys()
    for name, value in expected.items():
        ours = source.metadata[name]
        ours = ours.tolist() if isinstance(ours, np.ndarray) else ours
        assert ours == value
        assert type(ours) is type(value)


def refused(data, *words, path="x.gguf"):
    with pytest.raises(ModelError) as caught:
        read_header(path, data)
    for word in (path, *words):
        assert word in caught.value.message
    assert caught.value.hint


def test_metadata_of_every_type(tmp_path):
    path = gguf_files.write(tmp_path / "a.gguf", {"x": np.ones((2, 3), np.float32)}, METADATA)
    source = GGUFSource(path)
    same_metadata(source, path)
    assert source.architecture == "qwen3"


@pytest.mark.parametrize("name", TYPES)
def test_tensors_of_every_type(tmp_path, name):
    data, kind = gguf_files.quantized(name, (6, 512))
    path = gguf_files.write(tmp_path / "a.gguf", {"before": np.ones(3, np.float32), "w": (data, kind)})
    source, read = GGUFSource(path), gguf.GGUFReader(path).tensors[1]
    info, ours = source.tensors["w"], source.tensor("w")
    assert (info.type.name, info.type.number, info.nbytes) == (name, kind.value, read.n_bytes)
    assert info.offset == read.data_offset
    assert ours.shape == source.shape("w") == (6, 512)
    size = ours.nbytes
    if isinstance(ours, QuantTensor):
        assert ours.arrays["blocks"].tobytes() == read.data.tobytes()
        size = sum(plane.nbytes for plane in ours.planes().values())
    expanded = name not in FORMATS and not isinstance(ours, QuantTensor)
    assert source.stored("w") == Stored(name, (6, 512), size, expanded)
    np.testing.assert_array_equal(ours.float32(), gguf.quants.dequantize(read.data, kind))


@pytest.mark.parametrize("name", ["f32", "bf16", "q4_k", "q8_0", "iq1_s", "mxfp4"])
def test_experts_are_views_of_a_joined_tensor(tmp_path, name):
    data, kind = gguf_files.quantized(name, (3, 4, 256))
    source = GGUFSource(gguf_files.write(tmp_path / "a.gguf", {"exps": (data, kind), "after": np.ones(3, np.float32)}))
    whole, expected = source.tensor("exps").float32(), gguf.quants.dequantize(data, kind)
    assert source.shape("exps") == (3, 4, 256)
    np.testing.assert_array_equal(whole.reshape(expected.shape), expected)
    for e in range(3):
        np.testing.assert_array_equal(source.expert("exps", e).float32(), expected[e])
    if name == "q4_k":
        joined, expert = (t.arrays["blocks"] for t in (source.tensor("exps"), source.expert("exps", 1)))
        assert joined.shape == (12, 144)
        assert np.shares_memory(joined, expert)


def test_data_is_mapped_not_copied(tmp_path):
    source = GGUFSource(gguf_files.write(tmp_path / "a.gguf", {"x": np.ones(1000, np.float32)}))
    first, second = source.tensor("x"), source.tensor("x")
    assert np.shares_memory(first.data, second.data)
    source.close()
    assert not list(source.names())
    assert first.data.sum() == 1000  # a view outlives its source


def test_version_2_and_an_alignment(tmp_path):
    data, keys = np.arange(4, dtype="<f4").tobytes(), [key("general.alignment", U32, 64)]
    (tmp_path / "a.gguf").write_bytes(build(keys, [place("x", (2, 2))], data, version=2, alignment=64))
    source = GGUFSource(tmp_path / "a.gguf")
    same_metadata(source, tmp_path / "a.gguf")
    np.testing.assert_array_equal(source.tensor("x").float32(), [[0, 1], [2, 3]])
    assert source.tensors["x"].offset % 64 == 0


def test_a_file_without_an_architecture(tmp_path):
    """Such as an importance matrix."""
    for n, keys in enumerate(([], [key("general.architecture", U32, 1)], [key("general.architecture", STRING, "")])):
        (tmp_path / f"{n}.gguf").write_bytes(build(keys))
        with pytest.raises(ModelError, match=r"general\.architecture"):
            _ = GGUFSource(tmp_path / f"{n}.gguf").architecture


def split(folder, parts=3):
    tensors = {f"t{n}": np.full((2, 4), n, np.float32) for n in range(parts)}
    gguf_files.write(folder / "model.gguf", tensors, [("a.b", "uint32", 7)], split_max_tensors=1)
    return [folder / f"model-{n + 1:05d}-of-{parts:05d}.gguf" for n in range(parts)]


def test_split_files_are_one_model(tmp_path):
    files = split(tmp_path)
    for given in files:
        source = GGUFSource(given)
        assert source.files == files
        assert (source.architecture, source.metadata["a.b"]) == ("qwen3", 7)
        assert [(n, source.tensors[n].file, source.tensor(n).float32().max()) for n in source.names()] == [
            (f"t{n}", files[n], n) for n in range(3)
        ]


def test_split_files_that_do_not_belong_together(tmp_path):
    files = split(tmp_path)
    kept = files[1].read_bytes()
    files[1].unlink()
    with pytest.raises(ModelError, match=r"there is no file .*00002-of-00003"):
        GGUFSource(files[0])
    files[1].write_bytes(files[2].read_bytes())
    with pytest.raises(ModelError, match=r"is file 3 of 3, and its name is that of file 2 of 3"):
        GGUFSource(files[2])
    files[1].write_bytes(kept.replace(b"t1", b"t0"))
    with pytest.raises(ModelError, match="'t0' is in another file of the set too"):
        GGUFSource(files[0])
    files[1].write_bytes(kept)
    first = files[0].read_bytes()
    files[0].write_bytes(first.replace(_tensors(3), _tensors(4)))
    with pytest.raises(ModelError, match=r"split.tensors.count is 4; the files hold 3 tensors"):
        GGUFSource(files[0])
    (tmp_path / "whole.gguf").write_bytes(first)
    with pytest.raises(ModelError, match=r"is file 1 of 3, and its name is that of a whole one"):
        GGUFSource(tmp_path / "whole.gguf")
    whole = gguf_files.write(tmp_path / "b-00001-of-00002.gguf", {"x": np.ones(2, np.float32)})
    (tmp_path / "b-00002-of-00002.gguf").write_bytes(whole.read_bytes())
    with pytest.raises(ModelError, match=r"is file 1 of 1, and its name is that of file 1 of 2"):
        GGUFSource(whole)


def _tensors(count):
    return key("split.tensors.count", 5, count)


def test_metadata_of_a_split_of_another_type(tmp_path):
    for name in ("split.no", "split.count"):
        (tmp_path / "a.gguf").write_bytes(build([key(name, ARRAY, (U8, [1, 2]))]))
        with pytest.raises(ModelError, match=f"{name} is .* a whole number"):
            GGUFSource(tmp_path / "a.gguf")


def test_names_of_split_files():
    assert part_names("a.gguf") == ["a.gguf"]
    assert part_names("a-00002-of-00002.gguf") == ["a-00001-of-00002.gguf", "a-00002-of-00002.gguf"]
    assert part_names("a-1-of-2.gguf") == ["a-1-of-2.gguf"]  # no such set is written
    for name in ("a-00000-of-00002.gguf", "a-00003-of-00002.gguf", "a-00001-of-99999.gguf", "a-00000-of-00000.gguf"):
        with pytest.raises(ModelError, match="sets of 1 to"):
            part_names(name)


def test_a_set_that_was_merged_says_so(tmp_path):
    (tmp_path / "a.gguf").write_bytes(build([key("split.no", 2, 0), key("split.count", 2, 0)]))
    assert not list(GGUFSource(tmp_path / "a.gguf").names())


def array_of(name, kind, count):
    """The head of an array."""
    return text(name) + struct.pack("<IIQ", ARRAY, kind, count)


GOOD = build([key("a", U32, 1)], [place("x", (4,))], bytes(16))
BAD_HEADERS = {
    "empty": (b"", "it is empty"),
    "other magic": (b"GGML" + GOOD[4:], "no GGUF file", "b'GGML'"),
    "no version": (b"GGUF", "the version takes 4 bytes", "0 left"),
    "version 1": (build(version=1), "GGUF version is 1"),
    "version 4": (build(version=4), "GGUF version is 4"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "counts cut": (GOOD[:15], "the number of tensors takes 8 bytes"),
    "keys": (build(counts=(0, 2**63)), "declares 9223372036854775808 keys; at most"),
    "tensors": (build(counts=(2**64 - 1, 0)), "tensors; at most"),
    "fewer keys": (build([key("a", U32, 1)], counts=(0, 2)), "key 1 has 0 bytes"),
    "key length": (build([struct.pack("<Q", 2**60)]), "key 0 takes 1,152,921,504,606,846,976 bytes"),
    "key of 64 KiB": (build([key("k" * 2**16, U32, 1)]), "key 0 has 65536 bytes; 1 to 65535"),
    "string length": (build([text("a") + struct.pack("<IQ", STRING, 2**60)]), "'a' takes 1,152,921,504,606,846,976"),
    "key twice": (build([key("a", U32, 1), key("a", U32, 1)]), "'a' is there twice"),
    "key not UTF-8": (build([key(b"\xff", U32, 1)]), "key 0 is not UTF-8"),
    "surrogate": (build([key("a", STRING, b"\xed\xa0\x80")]), "'a' is not UTF-8"),
    "array not UTF-8": (build([key("a", ARRAY, (STRING, [b"a", b"\xc3("]))]), "string 1 of 'a' is not UTF-8"),
    "value type": (build([text("a") + struct.pack("<II", 13, 0)]), "'a' has the value type 13"),
    "element type": (build([array_of("a", 99, 0)]), "'a' has the value type 99"),
    "nested": (build([key("a", ARRAY, (ARRAY, [(U8, [1])]))]), "'a' is an array of arrays"),
    "boolean": (build([key("a", BOOL, 2)]), "'a' holds the boolean 2"),
    "booleans": (build([key("a", ARRAY, (BOOL, [0, 1, 255]))]), "the boolean 255"),
    "nan": (build([key("a", F32, float("nan"))]), "'a' holds NaN"),
    "nan in an array": (build([key("a", ARRAY, (F32, [0, float("nan")]))]), "'a' holds NaN"),
    "array length": (build([array_of("a", U64, 2**61)]), "'a' takes 18,446,744,073,709,551,616"),
    "strings": (build([array_of("a", STRING, 2**61)]), "'a' has 2,305,843,009,213,693,952 strings"),
    "string in an array": (build([array_of("a", STRING, 1) + struct.pack("<Q", 2**60)]), "string 0 of 'a' ends past"),
    "alignment 0": (build([key("general.alignment", U32, 0)]), "general.alignment is 0", "a power of two from 8"),
    "alignment 48": (build([key("general.alignment", U32, 48)]), "general.alignment is 48"),
    "alignment 2^31": (build([key("general.alignment", U32, 2**31)]), "general.alignment is 2147483648"),
    "alignment text": (build([key("general.alignment", STRING, "32")]), "general.alignment is '32'"),
}  # fmt: skip
MANY = 4 * 2**30
BAD_TENSORS = {
    "name length": ([place("n" * 256, (1,))], "has 256 bytes; 1 to 255"),
    "no name": ([place("", (1,))], "a tensor's name has 0 bytes"),
    "name twice": ([place("x", (1,)), place("x", (1,), offset=32)], "declares 2 tensors, which have 1 names"),
    "no dimensions": ([place("x", ())], "'x' has 0 dimensions"),
    "5 dimensions": ([place("x", (1,) * 5)], "'x' has 5 dimensions"),
    "2^32-1 dimensions": ([text("x") + b"\xff" * 4], "'x' has 4294967295 dimensions"),
    "a dimension of 0": ([place("x", (4, 0))], "'x' has the shape (0, 4), and no elements"),
    "2^256 elements": ([place("x", (2**63,) * 4)], "'x' takes"),
    "wraps to 0": ([place("x", (2**32, 2**32))], "'x' takes 73,786,976,294,838,206,464 bytes"),
    "unknown type": ([place("x", (4,), 1000)], "'x' has the tensor type 1000, which"),
    "integers": ([place("x", (4,), 26)], "'x' has the tensor type 26 (i32), which"),
    "half a block": ([place("x", (48, 2), 8)], "'x' has rows of 48, which blocks of 32 (q8_0) don't fill"),
    "misaligned": ([place("x", (4,), offset=16)], "'x' begins at 16, which is no multiple of 32"),
    "offset past the end": ([place("x", (4,), offset=MANY)], "'x' takes 16 bytes from byte"),
    "offset wraps": ([place("x", (4,), offset=2**64 - 32)], "'x' takes 16 bytes from byte"),
    "last byte missing": ([place("x", (17,))], "'x' takes 68 bytes from byte 64 on, and the file has 128"),
    "overlap": ([place("x", (9,)), place("y", (1,), offset=32)], "'y' overlaps 'x'"),
    "same place": ([place("y", (4,)), place("x", (4,))], "'x' overlaps 'y'"),
}  # fmt: skip


def test_the_good_one_is_good():
    """From which most bad ones are made."""
    header = read_header("x.gguf", GOOD)
    assert (header.version, header.metadata, list(header.tensors)) == (3, {"a": 1}, ["x"])


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_bad_headers(case):
    data, *words = BAD_HEADERS[case]
    refused(data, *words)


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_bad_tensors(case):
    places, *words = BAD_TENSORS[case]
    refused(build((), places, bytes(64)), *words)


def test_a_file_cut_anywhere(tmp_path):
    data, kind = gguf_files.quantized("q4_k", (2, 256))
    whole = gguf_files.write(tmp_path / "a.gguf", {"w": (data, kind)}, METADATA).read_bytes()
    stop = len(whole) - (-288 % 32)  # the rest is padding
    read_header("x.gguf", whole[:stop])
    for size in range(stop):
        refused(whole[:size])


def test_the_number_of_strings_is_bounded():
    half = MAX_STRINGS // 2 + 1
    arrays = [array_of(name, STRING, half) + bytes(8 * half) for name in "ab"]
    refused(build(arrays), "'b' has 1,048,577 strings; all arrays may hold 2,097,152")


def test_a_header_that_is_too_long(monkeypatch):
    from llmrs.models.files import gguf_header

    monkeypatch.setattr(gguf_header, "MAX_HEADER", 100)
    assert read_header("x.gguf", build([key("a", STRING, "x" * 40)])).metadata
    refused(build([key("a", STRING, "x" * 80)]), "'a' takes 80 bytes at byte 45, and a header of 100 has 55 left")


def test_files_that_are_none(tmp_path):
    (tmp_path / "empty.gguf").touch()
    (tmp_path / "folder.gguf").mkdir()
    for name, words in (
        ("empty", "it is empty"),
        ("folder", "is not a file but a folder"),
        ("none", "there is no file"),
    ):
        with pytest.raises(ModelError, match=words):
            GGUFSource(tmp_path / f"{name}.gguf")


@links
def test_pipes_and_links_out_of_the_folder(tmp_path):
    (tmp_path / "secret").write_bytes(GOOD)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "a.gguf").symlink_to("../secret")
    with pytest.raises(ModelError, match="leads out of the folder"):
        GGUFSource(folder / "a.gguf")
    os.mkfifo(folder / "b.gguf")
    with pytest.raises(ModelError, match="is not a file but a pipe"):
        GGUFSource(folder / "b.gguf")
