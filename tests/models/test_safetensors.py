"""Weights from safetensors files, good and bad."""

import json
import struct
import sys

import numpy as np
import pytest
import safetensors.torch
import torch

from llmrs.core.errors import ModelError
from llmrs.models.files.safetensors import SafetensorsSource

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3) / 7,
    "b": torch.arange(5).to(torch.float16) / 3,
    "c": (torch.arange(8) / 11).to(torch.bfloat16).reshape(2, 2, 2),
    "empty": torch.zeros(0, 4),
}

links = pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege on Windows")


def write(folder, tensors=TENSORS, name="model.safetensors"):
    safetensors.torch.save_file(tensors, folder / name)


def raw(folder, header, data=b"", name="model.safetensors"):
    """Writes a file with this header."""
    text = header.encode()
    (folder / name).write_bytes(struct.pack("<Q", len(text)) + text + data)


def sharded(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def read_all(folder):
    source = SafetensorsSource(folder)
    for name in source.names():
        source.tensor(name)


def refused(folder, *words):
    with pytest.raises(ModelError) as caught:
        read_all(folder)
    for word in words:
        assert word in caught.value.message
    assert caught.value.hint


def test_all_types_come_back_exactly(tmp_path):
    write(tmp_path)
    source = SafetensorsSource(tmp_path)
    assert set(source.names()) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert source.shape(name) == tuple(tensor.shape)
        read = source.tensor(name)
        assert read.format == {"a": "f32", "b": "f16", "c": "bf16", "empty": "f32"}[name]
        assert read.nbytes == tensor.nbytes
        np.testing.assert_array_equal(read.float32(), tensor.float().numpy())


def test_data_is_mapped_not_copied(tmp_path):
    write(tmp_path, {"x": torch.ones(1000)})
    source = SafetensorsSource(tmp_path)
    first, second = source.tensor("x"), source.tensor("x")
    assert np.shares_memory(first.data, second.data)
    source.close()
    assert first.data.sum() == 1000  # a view outlives its source


def test_shards_are_one_checkpoint(tmp_path):
    write(tmp_path, {"a": TENSORS["a"]}, "one.safetensors")
    write(tmp_path, {"b": TENSORS["b"], "c": TENSORS["c"]}, "two.safetensors")
    sharded(tmp_path, {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"})
    source = SafetensorsSource(tmp_path)
    assert set(source.names()) == {"a", "b", "c"}
    np.testing.assert_array_equal(source.tensor("c").float32(), TENSORS["c"].float().numpy())


def test_a_single_file_of_any_name(tmp_path):
    write(tmp_path, name="weights.safetensors")
    assert set(SafetensorsSource(tmp_path).names()) == set(TENSORS)
    write(tmp_path, name="other.safetensors")
    refused(tmp_path, "2 safetensors files")


@pytest.mark.parametrize("keep", [0, 4, 8, 60, -1])
def test_a_file_that_is_cut_off(tmp_path, keep):
    write(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(tmp_path, "model.safetensors", "empty" if keep == 0 else "header")


def test_a_header_with_a_name_twice(tmp_path):
    entry = '"x": {"dtype": "F32", "shape": [1], "data_offsets": [%d, %d]}'
    raw(tmp_path, "{" + entry % (0, 4) + "," + entry % (0, 4) + "}", b"\0" * 4)
    refused(tmp_path, "'x' twice")


@pytest.mark.parametrize(
    "entry",
    [
        '"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}',  # too little data
        '"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}',
        '"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}',  # a hole
        '"x": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}',
        '"x": {"dtype": "F32", "shape": [4611686018427387904, 4], "data_offsets": [0, 4]}',
        '"x": 3',
        "not JSON",
    ],
)
def test_headers_that_lie(tmp_path, entry):
    raw(tmp_path, "{" + entry + "}", b"\0" * 4)
    refused(tmp_path, "model.safetensors")


def test_types_that_weights_cannot_have(tmp_path):
    write(tmp_path, {"ids": torch.arange(3)})
    assert SafetensorsSource(tmp_path).shape("ids") == (3,)  # only its use is refused
    refused(tmp_path, "ids", "I64")


def test_float64_is_rounded_to_float32(tmp_path):
    values = torch.tensor([[1 / 3, 1e-300], [1e300, -2.5]], dtype=torch.float64)
    write(tmp_path, {"x": values, "nothing": torch.zeros(0, 2, dtype=torch.float64)})
    source = SafetensorsSource(tmp_path)
    read = source.tensor("x")
    assert (read.format, read.nbytes) == ("f32", 16)
    np.testing.assert_array_equal(read.float32(), values.float().numpy())
    assert source.tensor("nothing").shape == (0, 2)


def test_what_else_can_be_wrong_with_shards(tmp_path):
    sharded(tmp_path, {"a": "one.safetensors"})
    refused(tmp_path, "there is no file", "one.safetensors")
    write(tmp_path, {"a": TENSORS["a"]}, "one.safetensors")
    sharded(tmp_path, {"a": "one.safetensors", "b": "one.safetensors"})
    refused(tmp_path, "lacks b")
    write(tmp_path, {"a": TENSORS["a"]}, "two.safetensors")
    sharded(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    refused(tmp_path, "a is in one.safetensors and in two.safetensors")
    sharded(tmp_path, ["a"])
    refused(tmp_path, "weight_map")


def test_nothing_outside_the_folder_is_read(tmp_path):
    inner = tmp_path / "model"
    inner.mkdir()
    write(tmp_path, {"a": TENSORS["a"]}, "secret.safetensors")
    for name in ("../secret.safetensors", str(tmp_path / "secret.safetensors")):
        sharded(inner, {"a": name})
        refused(inner, "leads out of the folder")


@links
def test_no_link_out_of_the_folder_is_followed(tmp_path):
    inner = tmp_path / "model"
    inner.mkdir()
    write(tmp_path, name="secret.safetensors")
    (inner / "model.safetensors").symlink_to(tmp_path / "secret.safetensors")
    refused(inner, "leads out of the folder")


@links
def test_the_links_of_a_hugging_face_cache(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    write(blobs, name="ab12")
    (snapshot / "model.safetensors").symlink_to("../../blobs/ab12")
    assert set(SafetensorsSource(snapshot).names()) == set(TENSORS)


@links
@pytest.mark.parametrize("name", ["model.safetensors", "blobs/ab12", "sha256-" + "0a" * 32, "0a" * 20])
def test_links_to_another_disk(tmp_path, name):
    """Links to a file of the same name, or to a blob named by hash."""
    inner, disk = tmp_path / "model", tmp_path / "disk"
    inner.mkdir()
    (disk / name).parent.mkdir(parents=True)
    write(disk, name=name)
    (inner / "model.safetensors").symlink_to(disk / name)
    assert set(SafetensorsSource(inner).names()) == set(TENSORS)
    (inner / "model.safetensors").rename(inner / "one.safetensors")
    sharded(inner, dict.fromkeys(TENSORS, "one.safetensors"))
    if name == "model.safetensors":
        refused(inner, "leads out of the folder")
    else:
        assert set(SafetensorsSource(inner).names()) == set(TENSORS)


@links
def test_blobs_of_a_hugging_face_cache_on_another_disk(tmp_path):
    disk, repository = tmp_path / "disk", tmp_path / "models--a--b"
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    disk.mkdir()
    write(disk, name="ab12")
    (repository / "blobs").symlink_to(disk)
    (snapshot / "model.safetensors").symlink_to("../../blobs/ab12")
    assert set(SafetensorsSource(snapshot).names()) == set(TENSORS)


@links
def test_an_index_leads_nowhere_else_whatever_is_there(tmp_path):
    """Names with .. or of other folders are refused, even if blobs or links have such names."""
    inner, blobs = tmp_path / "model", tmp_path / "blobs"
    inner.mkdir()
    blobs.mkdir()
    write(blobs, {"a": TENSORS["a"]}, "0a.safetensors")
    (inner / "link").symlink_to(blobs)
    for name in ("../blobs/0a.safetensors", str(blobs / "0a.safetensors"), "link/../blobs/0a.safetensors"):
        sharded(inner, {"a": name})
        refused(inner, "leads out of the folder")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_not_loaded(tmp_path, name):
    torch.save(TENSORS, tmp_path / name)
    refused(tmp_path, name, "pickle", "not loaded")


def test_an_empty_folder(tmp_path):
    refused(tmp_path, "no weights")
