"""The GGUF writer, read back by the gguf package; and what remains of a file that could not be written: nothing."""

import errno
import os
import subprocess
import sys

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrs.core.errors import ConfigError, ModelError
from llmrs.models.files.gguf_writer import GgufTensor, open_gguf
from llmrs.models.files.output import new_folder
from llmrs.quant.ggml import TYPES

ROWS = np.arange(64 * 5, dtype=np.float32).reshape(5, 64) / 7
Q8 = gguf.quants.quantize(ROWS, gguf.GGMLQuantizationType.Q8_0)
TENSORS = [
    GgufTensor("a.weight", TYPES["f32"], (3,)),
    GgufTensor("b.weight", TYPES["q8_0"], (5, 64)),
    GgufTensor("c.weight", TYPES["f16"], (2, 3, 4)),
]
DATA = {
    "a.weight": [np.float32([1, 2, 3])],
    "b.weight": [Q8[:2], Q8[2:]],
    "c.weight": [np.arange(24, dtype=np.float16)],
}
METADATA = {
    "general.architecture": "llama", "u": 7, "i": -7, "large": 2**40, "huge": 2**63, "f": 0.1, "yes": True,
    "tokens": ["a", "ä", ""], "types": [1, -2], "scores": [0.5, 1.5], "flags": [True, False],
    "exact": np.uint64(3), "bytes": np.arange(3, dtype=np.uint8),
}  # fmt: skip


def write(path, data=DATA, metadata=METADATA, tensors=TENSORS, **more):
    with open_gguf(path, metadata, tensors, **more) as file:
        for t in reversed(tensors):
            at = 0
            for piece in data[t.name]:
                at = file.write(t.name, piece, at)
    return file.size


def test_the_gguf_package_reads_it(tmp_path):
    size = write(tmp_path / "x.gguf")
    assert size == (tmp_path / "x.gguf").stat().st_size
    r = gguf.GGUFReader(tmp_path / "x.gguf")
    for key, value in METADATA.items():
        found = r.get_field(key).contents()
        assert found == pytest.approx(value.tolist() if isinstance(value, np.ndarray) else value), key
    kinds = {key: r.get_field(key).types[-1].name for key in METADATA}
    assert kinds == {
        "general.architecture": "STRING", "u": "UINT32", "i": "INT32", "large": "INT64", "huge": "UINT64",
        "f": "FLOAT32", "yes": "BOOL", "tokens": "STRING", "types": "INT32", "scores": "FLOAT32", "flags": "BOOL",
        "exact": "UINT64", "bytes": "UINT8",
    }  # fmt: skip
    a, b, c = r.tensors
    assert a.data.tolist() == [1, 2, 3]
    assert np.array_equal(b.data, Q8)
    assert [int(n) for n in c.shape] == [4, 3, 2]
    assert all(t.data_offset % 32 == 0 for t in r.tensors)


@given(st.dictionaries(st.text(min_size=1).filter(lambda t: t.isprintable()), st.one_of(
    st.text(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1),
    st.floats(width=32, allow_nan=False), st.lists(st.text(), min_size=1)), max_size=5))  # fmt: skip
def test_every_value_comes_back(tmp_path_factory, metadata):
    path = tmp_path_factory.getbasetemp() / "values.gguf"
    metadata = {f"k.{key}": value for key, value in metadata.items()}
    write(path, metadata=metadata, tensors=TENSORS[:1], force=True)
    r = gguf.GGUFReader(path)
    assert {key: r.get_field(key).contents() for key in metadata} == metadata


def test_an_existing_file_stays_without_force(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"mine")
    with pytest.raises(ConfigError, match="exists"):
        write(path)
    assert path.read_bytes() == b"mine"
    write(path, force=True)
    assert path.read_bytes()[:4] == b"GGUF"
    assert [p.name for p in tmp_path.iterdir()] == ["x.gguf"]


@pytest.mark.parametrize(
    "failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), ValueError()]
)
def test_nothing_remains_of_a_failed_file(tmp_path, failure):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"mine")

    def fail():
        yield Q8[:2]
        raise failure

    expected = ModelError if isinstance(failure, OSError) else type(failure)
    with pytest.raises(expected) as caught:
        write(path, {**DATA, "b.weight": fail()}, force=True)
    if isinstance(failure, OSError):
        assert "No space left on device" in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["x.gguf"]
    assert path.read_bytes() == b"mine"


def test_a_size_limit_of_the_system_leaves_nothing(tmp_path):
    """The kernel itself refuses to write on."""
    code = f"""
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))
import numpy as np
from pathlib import Path
from llmrs.core.errors import ModelError
from llmrs.models.files.gguf_writer import GgufTensor, open_gguf
from llmrs.quant.ggml import TYPES
try:
    with open_gguf(Path({str(tmp_path / "x.gguf")!r}), {{}}, [GgufTensor("a", TYPES["f32"], (2**16,))]) as file:
        file.write("a", np.zeros(2**16, np.float32))
except ModelError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert "can't be written: File too large (hint: a size limit" in done.stdout
    assert not list(tmp_path.iterdir())


def test_free_space_is_checked_first(tmp_path, monkeypatch):
    usage = os.statvfs(tmp_path)
    too_large = GgufTensor("a", TYPES["f32"], (usage.f_bavail * usage.f_frsize,))  # four times the free bytes
    with pytest.raises(ModelError, match=r"needs [\d,]+ bytes on the disk, and [\d,]+ are free"):
        write(tmp_path / "x.gguf", {}, tensors=[too_large])
    assert not list(tmp_path.iterdir())


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ConfigError, match=f"there is no folder {tmp_path / 'missing'}"):
        write(tmp_path / "missing" / "x.gguf")


def interrupted(path):
    with new_folder(path, 0, force=True) as folder:
        (folder / "config.json").write_text("2")
        raise KeyboardInterrupt


def test_a_folder_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "model"
    with new_folder(path, 0) as folder:
        (folder / "config.json").write_text("1")
        assert not path.exists()
    assert [p.name for p in path.iterdir()] == ["config.json"]
    with pytest.raises(ConfigError, match="exists"), new_folder(path, 0):
        pass
    with pytest.raises(KeyboardInterrupt):
        interrupted(path)
    assert (path / "config.json").read_text() == "1"
    with new_folder(path, 0, force=True) as folder:
        (folder / "config.json").write_text("3")
    assert (path / "config.json").read_text() == "3"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_folder_that_is_no_model_is_never_replaced(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    with pytest.raises(ConfigError, match="no model folder"), new_folder(tmp_path / "home", 0, force=True):
        pass
    assert (tmp_path / "home" / "letter.txt").exists()
