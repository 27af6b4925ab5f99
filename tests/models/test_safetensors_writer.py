"""The safetensors writer, read back by the safetensors package."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from llmrs.models.files.safetensors_writer import open_safetensors, size_of

INFOS = {"a": ("F32", (2, 3)), "b.scales": ("F16", (4,)), "c": ("U32", (2, 2, 2))}
DATA = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b.scales": np.arange(4, dtype=np.float16),
    "c": np.arange(8, dtype=np.uint32).reshape(2, 2, 2),
}


def test_the_safetensors_package_reads_it(tmp_path):
    path = tmp_path / "model.safetensors"
    with open_safetensors(path, INFOS) as file:
        file.write("c", DATA["c"][1], 16)
        file.write("b.scales", DATA["b.scales"])
        file.write("c", DATA["c"][0])
        file.write("a", DATA["a"])
    assert path.stat().st_size == size_of(INFOS)
    found = load_file(path)
    assert found.keys() == DATA.keys()
    for name, array in DATA.items():
        assert np.array_equal(found[name], array)
        assert found[name].dtype == array.dtype


def test_an_incomplete_file_does_not_appear(tmp_path):
    def write():
        with open_safetensors(tmp_path / "x.safetensors", INFOS) as file:
            for name in ("a", "c"):
                file.write(name, DATA[name])

    with pytest.raises(AssertionError, match=r"not written in full: .*scales"):
        write()
    assert not list(tmp_path.iterdir())
